"""Conditions between several keys, and settings that have no effect in this combination."""

import re
from typing import Any

from ..errors import ConfigError
from .declare import Rule
from .keys import ONE_FILE, Keys
from .optimizer import OFFLOADED, TORCHAO
from .schedule import SCHEDULE_OPTIONS, SCHEDULERS
from .values import show_short


def check_together(keys: Keys) -> None:
    """Raise `ConfigError` for values that are right one by one and wrong together."""
    if not keys.loss_type:
        raise keys.error("loss_type", "expected at least one loss")
    if keys.loss_weights is not None and len(keys.loss_weights) != len(keys.loss_type):
        raise keys.error(
            "loss_weights",
            f"expected one weight for each entry of loss_type, {len(keys.loss_type)}, "
            f"got {len(keys.loss_weights)}",
        )
    if keys.loss_weights is not None and not any(keys.loss_weights):
        raise keys.error("loss_weights", "expected at least one weight above 0")
    if "exo_pair" in keys.loss_type and keys.label_smoothing == 0:
        raise keys.error(
            "loss_type", "exo_pair needs a label_smoothing above 0; its paper recommends 1e-3"
        )
    _check_schedule(keys)
    _check_optimizer(keys)
    _check_targets(keys)
    if keys.load_in_4bit and not keys.use_peft:
        raise keys.error("load_in_4bit", "needs use_peft: 4-bit weights cannot be trained")
    if keys.activation_offloading and not keys.gradient_checkpointing:
        raise keys.error(
            "activation_offloading",
            "needs gradient_checkpointing: the inputs of recomputed layers are what is offloaded",
        )
    if keys.torch_compile and keys.layer_tile_tokens is not None:
        raise keys.error(
            "torch_compile", "cannot go with layer_tile_tokens, whose tiles run outside of graphs"
        )
    if keys.resume_from_checkpoint and keys.overwrite_output_dir:
        raise keys.error(
            "overwrite_output_dir",
            "cannot go with resume_from_checkpoint: one starts anew, the other goes on",
        )
    if keys.eval_source is not None and keys.eval_dataset_name is None:
        name, split = keys.eval_source
        if name.endswith(ONE_FILE) and not split.startswith("train"):
            raise keys.error(
                "eval_dataset_name",
                f"expected the data to evaluate on, since {name} is one file without a {split} "
                "split; or a part of it, such as dataset_test_split: train[90%:]",
            )


def _check_optimizer(keys: Keys) -> None:
    """Raise `ConfigError` for optimizer keys that cannot go together."""
    if keys.optimizer_in_backward and not keys.optimizer_offload and keys.max_grad_norm > 0:
        raise keys.error(
            "optimizer_in_backward",
            f"needs max_grad_norm 0, got {keys.max_grad_norm}: weights are stepped before the "
            "norm of all gradients is known",
        )
    if keys.optimizer_offload and keys.optim not in OFFLOADED:
        raise keys.error(
            "optimizer_offload", f"expected optim {' or '.join(OFFLOADED)}, got {keys.optim}"
        )
    if keys.optimizer_in_backward and keys.use_peft:
        raise keys.error(
            "optimizer_in_backward",
            "is for training all weights: an adapter's gradients are too small to matter",
        )
    if keys.stochastic_rounding and keys.optim not in TORCHAO:
        raise keys.error(
            "stochastic_rounding", f"expected optim {' or '.join(TORCHAO)}, got {keys.optim}"
        )
    if keys.stochastic_rounding and keys.dtype != "bfloat16":
        raise keys.error(
            "stochastic_rounding",
            f"expected dtype bfloat16, got {keys.dtype}: other weights are not rounded",
        )


def _check_targets(keys: Keys) -> None:
    pattern = keys.lora_targets
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise keys.error(
                "lora_target_modules", f"expected a regular expression, got {pattern} ({error})"
            ) from error


def _check_schedule(keys: Keys) -> None:
    name = keys.lr_scheduler_type
    options = {k: v for k, v in (keys.lr_scheduler_kwargs or {}).items() if v is not None}

    def error(problem: str) -> ConfigError:
        key = "lr_scheduler_kwargs" if keys.lr_scheduler_kwargs else "lr_scheduler_type"
        return keys.error(key, problem)

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
    if least is not None and keys.learning_rate <= least:
        raise keys.error(
            "learning_rate",
            f"the {name} schedule needs one above {least}, got {keys.learning_rate}",
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


def idle_settings(keys: Keys) -> list[str]:
    """One line for each key that was set and does nothing because of another key's value."""
    conditions = {
        "use_peft is false": (
            not keys.use_peft,
            [
                *(name for name in vars(keys) if name.startswith("lora_")),
                "use_rslora",
                "use_dora",
            ],
        ),
        "load_in_4bit is false": (
            not keys.load_in_4bit,
            ["bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"],
        ),
        "gradient_checkpointing is false": (
            not keys.gradient_checkpointing,
            ["gradient_checkpointing_every"],
        ),
        f"attn_implementation is {keys.attn_implementation}": (
            keys.attn_implementation is not None,
            ["attention_backend"],
        ),
        "nothing is evaluated (eval_strategy is no)": (
            not keys.evaluates,
            ["eval_dataset_name"],
        ),
        "evaluation is packed by max_tokens_per_batch, with the same result": (
            True,
            ["per_device_eval_batch_size"],
        ),
        f"eval_strategy is {keys.eval_strategy}": (
            keys.eval_strategy != "steps",
            ["eval_steps"],
        ),
        f"save_strategy is {keys.save_strategy}": (
            keys.save_strategy != "steps",
            ["save_steps"],
        ),
        "max_steps sets the length of the run": (keys.max_steps > 0, ["num_train_epochs"]),
        "precompute_ref_log_probs is false": (
            not keys.precompute_ref_log_probs,
            ["reference_cache_dir"],
        ),
        "the constant schedule has no warm-up; constant_with_warmup has": (
            keys.lr_scheduler_type == "constant",
            ["warmup_steps"],
        ),
        "sgd has no moments": (
            keys.optim == "sgd",
            ["adam_beta1", "adam_beta2", "adam_epsilon"],
        ),
    }
    changed = set(keys.changed())
    return [
        f"{name} has no effect: {reason}"
        for reason, (holds, names) in conditions.items()
        if holds
        for name in names
        if name in changed
    ]
