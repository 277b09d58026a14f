"""Conditions between several keys, and settings that have no effect in this combination."""

import re
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .declare import Rule
from .optimizer import check_optimizer
from .schedule import SCHEDULE_OPTIONS, SCHEDULERS
from .values import show_short

if TYPE_CHECKING:
    from . import TrainConfig

ONE_FILE = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz")
"""How the name of a data set ends that is one file; all its rows are the split "train"."""


def check_together(config: "TrainConfig") -> None:
    """Raise `ConfigError` for values that are right one by one and wrong together."""
    if not config.loss_type:
        raise config.error("loss_type", "expected at least one loss")
    if config.loss_weights is not None and len(config.loss_weights) != len(config.loss_type):
        raise config.error(
            "loss_weights",
            f"expected one weight for each entry of loss_type, {len(config.loss_type)}, "
            f"got {len(config.loss_weights)}",
        )
    if config.loss_weights is not None and not any(config.loss_weights):
        raise config.error("loss_weights", "expected at least one weight above 0")
    if "exo_pair" in config.loss_type and config.label_smoothing == 0:
        raise config.error(
            "loss_type", "exo_pair needs a label_smoothing above 0; its paper recommends 1e-3"
        )
    _check_schedule(config)
    check_optimizer(config)
    _check_targets(config)
    if config.load_in_4bit and not config.use_peft:
        raise config.error("load_in_4bit", "needs use_peft: 4-bit weights cannot be trained")
    if config.activation_offloading and not config.gradient_checkpointing:
        raise config.error(
            "activation_offloading",
            "needs gradient_checkpointing: the inputs of recomputed layers are what is offloaded",
        )
    if config.torch_compile and config.layer_tile_tokens is not None:
        raise config.error(
            "torch_compile", "cannot go with layer_tile_tokens, whose tiles run outside of graphs"
        )
    if config.resume_from_checkpoint and config.overwrite_output_dir:
        raise config.error(
            "overwrite_output_dir",
            "cannot go with resume_from_checkpoint: one starts anew, the other goes on",
        )
    if config.eval_source is not None and config.eval_dataset_name is None:
        name, split = config.eval_source
        if name.endswith(ONE_FILE) and not split.startswith("train"):
            raise config.error(
                "eval_dataset_name",
                f"expected the data to evaluate on, since {name} is one file without a {split} "
                "split; or a part of it, such as dataset_test_split: train[90%:]",
            )


def _check_targets(config: "TrainConfig") -> None:
    pattern = config.lora_targets
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise config.error(
                "lora_target_modules", f"expected a regular expression, got {pattern} ({error})"
            ) from error


def _check_schedule(config: "TrainConfig") -> None:
    name = config.lr_scheduler_type
    options = {k: v for k, v in (config.lr_scheduler_kwargs or {}).items() if v is not None}

    def error(problem: str) -> ConfigError:
        key = "lr_scheduler_kwargs" if config.lr_scheduler_kwargs else "lr_scheduler_type"
        return config.error(key, problem)

    for option, value in options.items():
        if option not in SCHEDULERS[name]:
            known = ", ".join(SCHEDULERS[name]) or "no options"
            raise error(f"the {name} schedule takes {known}, not {option}")
        if expected := _unfit(SCHEDULE_OPTIONS[option], value):
            raise error(f"{option}: expected {expected}, got {show_short(value)}")
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        raise error(f"the {name} schedule needs num_decay_steps")
    if "min_lr" in SCHEDULERS[name] and ("min_lr" in options) == ("min_lr_rate" in options):
        raise error(f"the {name} schedule needs either min_lr or min_lr_rate")
    # transformers' default, and what it divides by.
    least = options.get("lr_end", 1e-7) if name == "polynomial" else None
    if "min_lr" in options:
        least = 0
    if least is not None and config.learning_rate <= least:
        raise config.error(
            "learning_rate",
            f"the {name} schedule needs one above {least}, got {config.learning_rate}",
        )


def _unfit(wanted: Rule | tuple[str, ...], value: Any) -> str | None:
    """What was expected of an option of a schedule; None if `value` is it."""
    if isinstance(wanted, tuple):
        return None if value in wanted else f"one of {', '.join(wanted)}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        is_number
        and wanted.holds(value)
        and ("whole" not in wanted.expected or value == int(value))
    ):
        return None
    return wanted.expected


def idle_settings(config: "TrainConfig") -> list[str]:
    """One line for each key that was set and does nothing because of another key's value."""
    conditions = {
        "use_peft is false": (
            not config.use_peft,
            [
                *(name for name in vars(config) if name.startswith("lora_")),
                "use_rslora",
                "use_dora",
            ],
        ),
        "load_in_4bit is false": (
            not config.load_in_4bit,
            ["bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"],
        ),
        "gradient_checkpointing is false": (
            not config.gradient_checkpointing,
            ["gradient_checkpointing_every"],
        ),
        f"attn_implementation is {config.attn_implementation}": (
            config.attn_implementation is not None,
            ["attention_backend"],
        ),
        "nothing is evaluated (eval_strategy is no)": (
            not config.evaluates,
            ["eval_dataset_name"],
        ),
        "evaluation is packed by max_tokens_per_batch, with the same result": (
            True,
            ["per_device_eval_batch_size"],
        ),
        f"eval_strategy is {config.eval_strategy}": (
            config.eval_strategy != "steps",
            ["eval_steps"],
        ),
        f"save_strategy is {config.save_strategy}": (
            config.save_strategy != "steps",
            ["save_steps"],
        ),
        "max_steps sets the length of the run": (config.max_steps > 0, ["num_train_epochs"]),
        "precompute_ref_log_probs is false": (
            not config.precompute_ref_log_probs,
            ["reference_cache_dir"],
        ),
        "the constant schedule has no warm-up; constant_with_warmup has": (
            config.lr_scheduler_type == "constant",
            ["warmup_steps"],
        ),
        "sgd has no moments": (
            config.optim == "sgd",
            ["adam_beta1", "adam_beta2", "adam_epsilon"],
        ),
    }
    changed = set(config.changed())
    return [
        f"{name} has no effect: {reason}"
        for reason, (holds, names) in conditions.items()
        if holds
        for name in names
        if name in changed
    ]
