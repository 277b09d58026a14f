"""What a resumed run may change: nothing that decides what is trained, unless it is told to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..config.losses import OPTIONS, unread
from ..errors import CheckpointError

ADAPTERS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)
"""Keys that decide nothing where there are no adapters."""

SYNCHRONISATION = ("ref_model_mixup_alpha", "ref_model_sync_steps")
"""Keys that decide nothing where the reference stays as it is."""

FIXED = (
    "convert",
    "max_length",
    "truncation_mode",
    "max_comparisons_per_group",
    "group_prompts",
    "shuffle",
    "seed",
    "data_seed",
    "dtype",
    "loss_type",
    "loss_weights",
    "beta",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    *OPTIONS,
    "sync_ref_model",
    *SYNCHRONISATION,
    "optim",
    "stochastic_rounding",
    "use_peft",
    *ADAPTERS,
)
"""Keys that must be those of the checkpoint."""

FOLLOWED = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
"""Keys whose new value holds from the first new step on."""

COMPARED = (
    "model_name_or_path",
    "model_revision",
    "ref_model_name_or_path",
    "dataset_name",
    "dataset_config",
    "datasets",
    "dataset_train_split",
    "layout",
    "columns",
    "skip_bad_rows",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "bf16",
)
"""Keys that may change as long as what they lead to does not: the weights of the models, the
tokens, the units of each step, the precision.
"""


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The value of every key that decides the trained weights."""
    values = {name: getattr(config, name) for name in (*FIXED, *FOLLOWED, *COMPARED)}
    return {**values, "shuffle": config.shuffles}


def stopping(config: TrainConfig) -> dict[str, Any]:
    """The value of every key that decides when a run stops for want of a better evaluation."""
    return {
        "metric": list(config.best_metric),
        "patience": config.early_stopping_patience,
        "threshold": config.early_stopping_threshold,
    }


def check_keys(path: Path, saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Compare the keys of a checkpoint's state with those of the run that is to go on from it.

    Raises:
        CheckpointError: a key of `FIXED` differs and `resume_with_changes` is false.
    """
    _refuse(path, _changed(saved, config, FIXED), config)


def check_identity(
    path: Path, saved: Mapping[str, Any], config: TrainConfig, identity: Mapping[str, str]
) -> None:
    """Compare what the keys of `COMPARED` led to, under the names that `identity` gives it.

    Raises:
        CheckpointError: something differs and `resume_with_changes` is false.
    """
    known = saved.get("identity", {})
    other = [name for name, value in identity.items() if known.get(name, value) != value]
    if other:
        names = _changed(saved, config, COMPARED) or ["although the keys are the same"]
        _refuse(path, [f"other {' and '.join(other)}: {', '.join(names)}"], config)


def describe_changes(saved: Mapping[str, Any], config: TrainConfig) -> str | None:
    """The keys whose new values hold from the checkpoint on, in one line; None where none do."""
    changed = _changed(saved, config, (*FIXED, *FOLLOWED, *COMPARED))
    if not changed:
        return None
    return f"changed from step {saved['step'] + 1} on: {', '.join(changed)}"


def _changed(saved: Mapping[str, Any], config: TrainConfig, names: Sequence[str]) -> list[str]:
    before, now = saved.get("config", {}), deciding(config)
    idle = tuple(unread([*config.loss_type, *before.get("loss_type", ())]))
    if not (config.use_peft or before.get("use_peft")):
        idle += ADAPTERS
    if not (config.sync_ref_model or before.get("sync_ref_model")):
        idle += SYNCHRONISATION
    if "alpha_divergence" not in (config.f_divergence_type, before.get("f_divergence_type")):
        idle += ("f_alpha_divergence_coef",)
    if config.memory == "auto":  # it chooses the optimizer, for the device at hand
        idle = (*idle, "optim")
    same, other = _plain(now), _plain({**now, **before})
    return [
        f"{name} {before[name]} (now {now[name]})"
        for name in names
        if name not in idle and name in before and other[name] != same[name]
    ]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of keys with one notation for what means the same."""
    plain = dict(values)
    for name in ("lora_target_modules", "lora_modules_to_save"):
        if isinstance(plain[name], list):
            plain[name] = sorted(plain[name], key=str)
    if plain["data_seed"] == plain["seed"]:
        plain["data_seed"] = None
    if isinstance(weights := plain["loss_weights"], list) and all(w == 1 for w in weights):
        plain["loss_weights"] = None
    unset = {
        "cpo_alpha": 1.0,
        "epsilon_high": plain["epsilon"],
        "max_completion_length": plain["max_length"],
    }
    for name, meaning in unset.items():
        if plain[name] is None:
            plain[name] = meaning
    return plain


def _refuse(path: Path, changed: Sequence[str], config: TrainConfig) -> None:
    if changed and not config.resume_with_changes:
        raise CheckpointError(
            f"resume_from_checkpoint: {path} was made with {', '.join(changed)}; set "
            "resume_with_changes: true to go on all the same"
        )
