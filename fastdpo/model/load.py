"""Loading a tokenizer and a causal language model, with messages for what can be wrong there."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from ..config import TrainConfig
from ..errors import CheckpointError, ConfigError, ModelError, one_line
from .adapter import check_adapter_file, merge_adapter
from .dropout import switch_off
from .place import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Place, find_model, tokenizer_place
from .quantised import check_packed, compute_in, is_quantised, quantisation
from .weights import (
    TOKENIZER_FILES,
    check_file,
    check_files,
    check_loaded,
    lies_there,
    no_report,
    read_json,
)

logger = logging.getLogger(__name__)


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of the model.

    Raises:
        ModelError: there is none at that place, or its files are damaged.
    """
    place = find_model(config)
    path, revision = tokenizer_place(place, config)
    files = [Path(path) / name for name in TOKENIZER_FILES]
    files = [file for file in files if lies_there(file)]
    for file in files:
        check_file(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # a damaged file fails in any way
        for file in files:
            if file.suffix == ".json":
                read_json(file)
        reason = one_line(error)
        if Path(path).is_dir() and not files:
            reason = f"it holds none of {', '.join(TOKENIZER_FILES[:2])}"
        raise ModelError(f"{_where(path)}: no tokenizer could be loaded ({reason})") from error
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer itself; its pad token defaults to its EOS token, as in TRL."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: TrainConfig, path: str | None = None) -> Any:
    """The model's configuration; an adapter's is that of its base.

    Raises:
        ModelError: there is none at that place, or none that transformers knows.
    """
    place = find_model(config, path)
    if place.directory is not None:
        file = place.directory / "config.json"
        if not lies_there(file):
            raise ModelError(
                f"{place.directory}: no model could be loaded (it has neither {file.name} nor "
                f"{ADAPTER_CONFIG})"
            )
        read_json(file)
    try:
        return AutoConfig.from_pretrained(
            place.name, revision=place.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # what config.json says reaches the classes of any architecture
        raise ModelError(
            f"{_where(place.name)}: no model could be loaded ({one_line(error)})"
        ) from error


def check_model_files(config: TrainConfig) -> None:
    """Look at the files of policy and reference before anything heavy is done.

    Raises:
        ModelError: one that is missing, cut off, damaged, or a pointer of Git LFS.
    """
    for path in (None, config.ref_model_name_or_path):
        place = find_model(config, path)
        load_model_config(config, path)
        if place.directory is not None:
            check_files(place.directory)
        if place.adapter is not None:
            check_adapter_file(place)


def load_model(
    config: TrainConfig,
    device: torch.device,
    path: str | None = None,
    autocast: torch.dtype | None = None,
) -> PreTrainedModel:
    """The causal language model at `path` (default: the policy's), without dropout, from
    safetensors alone; its 4-bit weights, where it has any, multiply in the type of `autocast`.

    An adapter at `path` is merged into its base, or left out with `use_peft`.

    Raises:
        ModelError: no such model, no safetensors, damaged files, weights that are not there, no
            causal language model, or a quantised one without adapters to train.
        ConfigError: `load_in_4bit` or `use_liger_kernel` without what they need.
    """
    place, model_config = find_model(config, path), load_model_config(config, path)
    dropouts = switch_off(model_config)
    model = _from_files(config, device, place, model_config)
    model.fastdpo_dropouts = dropouts
    if config.use_liger_kernel:
        _use_liger_layers(model, device)
    if not is_quantised(model):
        model = model.to(device)
        if place.adapter is None or config.use_peft:
            return model
        logger.info(f"adapter: {place.adapter}, merged into {place.name}")
        return merge_adapter(model, place)
    _require_adapter(config, place.name)
    compute_in(model, autocast)
    if config.load_in_4bit:
        check_packed(model)
    return model


def check_given(model: Any, config: TrainConfig) -> None:
    """Raise ModelError for what cannot be trained in place of a model that is loaded: no model of
    transformers, one with adapters or without a weight to train, or a quantised one without
    adapters to train.
    """
    if hasattr(model, "peft_config"):  # peft leaves it on the base too
        raise ModelError(
            "model: has adapters already; pass what peft_model.unload() or merge_and_unload() "
            "returns, or name the adapter's directory in model_name_or_path"
        )
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise ModelError(f"model: expected a transformers PreTrainedModel, got {kind}")
    if not config.use_peft and not any(p.requires_grad for p in model.parameters()):
        raise ModelError("model: no weight of it requires a gradient; requires_grad_() makes all")
    if is_quantised(model):
        _require_adapter(config, "model")


def _require_adapter(config: TrainConfig, where: str) -> None:
    if not config.use_peft:
        raise ModelError(
            f"{where}: its weights are quantised: set use_peft to train adapters on it"
        )


def adopt_model(
    model: Any, config: TrainConfig, device: torch.device, autocast: torch.dtype | None
) -> PreTrainedModel:
    """A model that the caller has `lent`, as `load_model` would have returned it: on the device, in
    place, with the attention that the configuration names.
    """
    if config.attn_implementation:
        model.set_attn_implementation(config.attn_implementation)
    if config.use_liger_kernel:
        _use_liger_layers(model, device)
    if not is_quantised(model):
        return model.to(device)
    compute_in(model, autocast)
    return model


def load_weights(model: Any, config: TrainConfig, path: Path) -> None:
    """Put the weights (or the adapter) of a checkpoint into the model that is being trained.

    Raises:
        CheckpointError: it holds another model or none.
    """
    if config.use_peft:
        _load_adapter_weights(model, path)
        return
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: holds no full model, but use_peft is not set")
    if model.dtype == torch.float64:  # which no key asks for, but a model in memory may have
        config = config.choose("checkpoint", dtype="auto")
    saved = load_model(config, torch.device("cpu"), str(path))
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"{path}: holds another model ({error})") from error


def _load_adapter_weights(model: Any, path: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    adapter = path / ADAPTER_WEIGHTS
    if not adapter.exists():
        raise CheckpointError(f"{path}: holds no adapter, but use_peft is set")
    try:
        loaded = set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its adapter has other shapes ({error})") from error
    missing = [name for name in loaded.missing_keys if "lora_" in name]
    if missing or loaded.unexpected_keys:
        names = ", ".join([*missing, *loaded.unexpected_keys][:3])
        raise CheckpointError(f"{path}: its adapter is on other modules ({names})")


def _from_files(
    config: TrainConfig, device: torch.device, place: Place, model_config: Any
) -> PreTrainedModel:
    """The model that transformers makes, all of whose weights came from its files."""
    types = check_files(place.directory) if place.directory is not None else {}
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        with no_report():
            model, info = AutoModelForCausalLM.from_pretrained(
                place.name,
                config=model_config,
                revision=place.revision,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                attn_implementation=config.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told by check_loaded, with their names
                **quantisation(config, device),
            )
    except (torch.OutOfMemoryError, MemoryError, ConfigError):
        raise
    except Exception as error:  # any architecture's own code, given anybody's files
        raise ModelError(
            f"{_where(place.name)}: no causal language model in safetensors could be loaded "
            f"({one_line(error)})"
        ) from error
    check_loaded(model, info, types, place.name)
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
        raise ConfigError(f"use_liger_kernel: {one_line(error)}") from error


def _where(name: str) -> str:
    return name if Path(name).is_dir() else f"{name} (no directory here, so a model of the hub)"
