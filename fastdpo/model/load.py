"""Loading a tokenizer and a causal language model, with messages for what can be wrong there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from ..config import TrainConfig
from ..errors import ConfigError, ModelError
from .quantised import check_packed, compute_in, is_quantised, quantisation


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of the model; its pad token defaults to its EOS token, as in TRL.

    Raises:
        ModelError: there is none at that place.
    """
    path = _path(config.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no tokenizer could be loaded ({_first_line(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: TrainConfig, path: str | None = None) -> Any:
    """The model's configuration.

    Raises:
        ModelError: there is none at that place.
    """
    path = _path(path or config.model_name_or_path)
    try:
        model_config = AutoConfig.from_pretrained(
            path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no model could be loaded ({_first_line(error)})") from error
    return model_config


def load_model(
    config: TrainConfig,
    device: torch.device,
    path: str | None = None,
    autocast: torch.dtype | None = None,
) -> PreTrainedModel:
    """The causal language model at `path` (default: the policy's), without dropout, from
    safetensors alone; its 4-bit weights, where it has any, multiply in the type of `autocast`.

    Raises:
        ModelError: no such model, no safetensors, no causal language model, or a quantised one
            without adapters to train.
        ConfigError: `load_in_4bit` or `use_liger_kernel` without what they need.
    """
    model_config = load_model_config(config, path)
    dropouts = _dropouts(model_config)
    _set(model_config, dict.fromkeys(dropouts, 0.0))
    path = _path(path or config.model_name_or_path)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            revision=config.model_revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            attn_implementation=config.attn_implementation,
            **quantisation(config, device),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: no causal language model in safetensors could be loaded "
            f"({_first_line(error)})"
        ) from error
    model.fastdpo_dropouts = dropouts
    if config.use_liger_kernel:
        _use_liger_layers(model, device)
    if not is_quantised(model):
        return model.to(device)
    if not config.use_peft:
        raise ModelError(f"{path}: its weights are quantised: set use_peft to train adapters on it")
    compute_in(model, autocast)
    if config.load_in_4bit:
        check_packed(model)
    return model


def _use_liger_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Liger's kernels in place of the layers' norms, rotary embeddings and MLPs.

    Raises:
        ConfigError: no GPU, or Liger is not installed.
    """
    if device.type != "cuda":
        raise ConfigError("use_liger_kernel: Liger's kernels need a GPU")
    try:
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    except ImportError as error:
        raise ConfigError(f"use_liger_kernel: {_first_line(error)}") from error


@contextmanager
def original_dropout(model: Any) -> Iterator[None]:
    """The configuration with the dropouts it was loaded with, while the model is being saved."""
    dropouts = getattr(model, "fastdpo_dropouts", {})
    _set(model.config, dropouts)
    try:
        yield
    finally:
        _set(model.config, dict.fromkeys(dropouts, 0.0))


def _parts(model_config: Any) -> list[Any]:
    text = model_config.get_text_config()
    return [model_config] if text is model_config else [model_config, text]


def _dropouts(model_config: Any) -> dict[tuple[int, str], float]:
    """Every dropout of a configuration, by the part that holds it and its name."""
    return {
        (number, name): value
        for number, part in enumerate(_parts(model_config))
        for name, value in part.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float)
    }


def _set(model_config: Any, dropouts: dict[tuple[int, str], float]) -> None:
    parts = _parts(model_config)
    for (number, name), value in dropouts.items():
        setattr(parts[number], name, value)


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> Any:
    """The model with a new LoRA or DoRA adapter to train.

    Raises:
        ModelError: target modules that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter)
    except ValueError as error:
        raise ModelError(f"lora_target_modules: {_first_line(error)}") from error


def _path(name: str | None) -> str:
    if not name:
        raise ModelError("model_name_or_path: expected a local directory or a hub name")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.exists():
        raise ModelError(f"model_name_or_path: {name} does not exist")
    return str(path) if path.exists() else name


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
