"""LoRA adapters: a new one, or one that lies on disk, to be trained on or merged into its base."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import TrainConfig
from ..errors import ModelError, one_line
from ..quiet import without_warnings
from .frozen import compare, frozen_state, probe_tokens
from .place import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Place, find_model
from .weights import check_adapter, read_header


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> Any:
    """The model with a new LoRA or DoRA adapter to train.

    Raises:
        ModelError: target modules that the model does not have.
        ConfigError: modules to save that it does not have.
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
    names = [name for name, _ in model.named_modules()]
    for wanted in config.lora_modules_to_save or ():
        if not any(name.endswith(wanted) for name in names):  # peft's own rule
            raise config.error("lora_modules_to_save", f"the model has no module {wanted}")
    try:
        # peft calls what transformers is to drop.
        with without_warnings(FutureWarning):
            return get_peft_model(model, adapter)
    except ValueError as error:
        raise ModelError(f"lora_target_modules: {one_line(error)}") from error


def adopt_adapter(config: TrainConfig) -> TrainConfig:
    """The configuration with the settings of the adapter that `model_name_or_path` leads to, where
    that is what is trained; `lora_dropout` is the configuration's own if it was given.

    Raises:
        ConfigError: a setting that was given and contradicts the adapter's.
    """
    if not config.use_peft or find_model(config).adapter is None:
        return config
    place = find_model(config)
    adapter, file = lora_settings(place), f"{place.adapter}/{ADAPTER_CONFIG}"
    settings = {
        "lora_r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_modules_to_save": sorted(adapter.modules_to_save or ()) or None,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
    }
    for name, value in settings.items():
        given = getattr(config, name)
        given = sorted(given) if isinstance(given, list) else given
        if name in config.origins and given != value:
            raise config.error(name, f"expected {value}, as in {file}, got {given}; leave it out")
    targets = adapter.target_modules
    targets = [targets] if isinstance(targets, str) else sorted(targets or ()) or None
    free = {"lora_dropout": adapter.lora_dropout, "lora_target_modules": targets}
    settings |= {name: value for name, value in free.items() if name not in config.origins}
    return config.choose(file, **settings)


def lora_settings(place: Place) -> Any:
    """peft's `LoraConfig` of the adapter at `place`.

    Raises:
        ModelError: values that peft does not take.
    """
    from peft import LoraConfig

    file = f"{place.adapter}/{ADAPTER_CONFIG}"
    try:
        with without_warnings():
            settings = LoraConfig.from_pretrained(str(place.adapter))
    except Exception as error:  # the file is anybody's, and its values fail in any way
        raise ModelError(f"{file}: {one_line(error)}") from error
    for name in ("r", "lora_alpha"):  # peft takes anything, and fails far from here
        value = getattr(settings, name)
        if not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{file}: {name}: expected a number above 0, found {value!r}")
    settings.task_type = "CAUSAL_LM"
    return settings


def check_adapter_file(place: Place) -> Path:
    """The file of the weights of the adapter at `place`.

    Raises:
        ModelError: it is missing, cut off, damaged, or a pointer of Git LFS.
    """
    assert place.adapter is not None
    file = place.adapter / ADAPTER_WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        raise ModelError(f"{file}: is missing; only safetensors are loaded, not {file.stem}.bin")
    read_header(file)
    return file


def load_adapter(model: PreTrainedModel, place: Place, dropout: float = 0.0) -> Any:
    """The model with the adapter at `place` on it, as it lies there, to be trained.

    Raises:
        ModelError: its weights are missing or damaged, or made for another model.
    """
    from peft import PeftModelForCausalLM, load_peft_weights, set_peft_model_state_dict

    file, settings = check_adapter_file(place), lora_settings(place)
    settings.lora_dropout, settings.inference_mode = dropout, False
    names = getattr(model, "_checkpoint_conversion_mapping", None)
    try:
        with without_warnings():  # each of them is an error or a line of ours here
            adapted = PeftModelForCausalLM(model, settings)
            tensors = load_peft_weights(str(file.parent), device="cpu", key_mapping=names)
            result = set_peft_model_state_dict(adapted, tensors)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # as above
        raise ModelError(f"{file}: does not fit {place.name} ({one_line(error)})") from error
    check_adapter(adapted, result, file, place.name)
    return adapted


def merge_adapter(model: PreTrainedModel, place: Place) -> PreTrainedModel:
    """The model with the adapter at `place` added to its weights, all of them to be trained.

    Raises:
        ModelError: as `load_adapter`, or the merged weights do not give what the adapter gave.
    """
    tied = _is_tied(model)
    adapted = load_adapter(model, place)
    before = _logits(adapted)
    with without_warnings():
        merged: PreTrainedModel = adapted.merge_and_unload()
    after = _logits(merged)
    difference, tolerance = compare(after, before, after.dtype)
    if not difference <= tolerance or _is_tied(merged) != tied:
        why = "its head is the embedding too, and the adapter changes one of them" if tied else ""
        raise ModelError(
            f"{place.adapter}: cannot be merged into {place.name} ({why or 'the numbers differ'}); "
            "set use_peft to train the adapter itself"
        )
    return merged.requires_grad_(True)


def check_targets(model: PreTrainedModel, place: Place, config: TrainConfig) -> None:
    """Raise ConfigError if `lora_target_modules` means other modules than the adapter has."""
    given = config.lora_targets
    if given is not None and "lora_target_modules" in config.origins:
        own, meant = _targets(model, lora_settings(place).target_modules), _targets(model, given)
        if own != meant:
            names = sorted({name.rpartition(".")[2] for name in own})
            raise config.error(
                "lora_target_modules",
                f"expected {' '.join(names)}, as the adapter {place.adapter} has, got "
                f"{given if isinstance(given, str) else ' '.join(given)}; leave it out",
            )


def _targets(model: PreTrainedModel, targets: Any) -> set[str]:
    """The names of the modules that peft's `target_modules` means."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(model.named_modules())
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = model.get_output_embeddings()
        linear = nn.Linear | Conv1D
        return {n for n, m in modules.items() if isinstance(m, linear) and m is not head}
    settings = LoraConfig(target_modules=targets or [])
    return {name for name in modules if name and check_target_module_exists(settings, name)}


def _is_tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _logits(model: Any) -> torch.Tensor:
    with frozen_state(model):
        logits: torch.Tensor = model(input_ids=probe_tokens(model, 8)[None], use_cache=False).logits
    return logits.clone()
