"""What a resumed run may change: nothing that decides what is trained, unless it is told to."""

from collections.abc import Callable, Mapping
from typing import Any

from ..config import TrainConfig
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

FIXED = (
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
    "label_smoothing",
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
    "dataset_train_split",
    "skip_bad_rows",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
)
"""Keys that may change as long as what they lead to does not: the weights of the models, the
tokens, the comparisons of each step, the precision.
"""

ALLOW = "set resume_with_changes: true to go on all the same"


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The value of every key that decides the trained weights."""
    return {name: getattr(config, name) for name in (*FIXED, *FOLLOWED, *COMPARED)}


def check_changes(
    path: object,
    saved: Mapping[str, Any],
    config: TrainConfig,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Compare a checkpoint's state with the run that is to go on from it; says what changes.

    `identity` names what keys led to: `{"precision": ..., "reference": ..., "data": ...}`, the same
    names as in the checkpoint.

    Raises:
        CheckpointError: a key of `FIXED` or an identity differs and `resume_with_changes` is false.
    """
    before, step = saved.get("config", {}), saved["step"]
    now = deciding(config)
    differs = {
        name: f"{name} was {before[name]}, is {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    }
    fixed = FIXED if config.use_peft or before.get("use_peft") else FIXED[: -len(ADAPTERS)]
    changed = [differs[name] for name in fixed if name in differs]
    hints = ", ".join(differs[name] for name in COMPARED if name in differs)
    known = saved.get("identity", {})
    other = [name for name, value in identity.items() if name in known and known[name] != value]
    if not changed and other:
        changed = [f"other {' and '.join(other)} ({hints or 'under the same name'})"]
    if changed and not config.resume_with_changes:
        raise CheckpointError(f"{path}: made with {'; '.join(changed)}; {ALLOW}")
    changed += [differs[name] for name in FOLLOWED if name in differs]
    if changed:
        say(f"resumed with changes from step {step + 1} on: {'; '.join(changed)}")
