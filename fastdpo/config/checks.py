"""Conditions between several keys, and settings that have no effect in this combination."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .adapters import AdapterKeys
from .best_checks import idle_best, of_best
from .datasets import FIELDS, entry_problem, known_fields
from .declare import Rule
from .hub import HubKeys
from .keys import ONE_FILE, Keys
from .loss_checks import idle_options, of_loss, of_options, of_order, of_reference
from .losses import WITH_BATCH_TERMS
from .optimizer import OFFLOADED, TORCHAO
from .schedule import SCHEDULE_OPTIONS, SCHEDULERS
from .values import show, show_short

_LORA = tuple(item.name for item in fields(AdapterKeys) if item.name.startswith("lora_"))
_QUANTISED = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_HUB = tuple(item.name for item in fields(HubKeys) if item.name.startswith("hub_"))
_ONLY_WHERE: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("use_peft", True, (*_LORA, "use_rslora", "use_dora")),
    ("load_in_4bit", True, _QUANTISED),
    ("gradient_checkpointing", True, ("gradient_checkpointing_every",)),
    ("attn_implementation", None, ("attention_backend",)),
    ("eval_strategy", "steps", ("eval_steps",)),
    ("save_strategy", "steps", ("save_steps",)),
    ("push_to_hub", True, _HUB),
    ("sync_ref_model", True, ("ref_model_mixup_alpha", "ref_model_sync_steps")),
    ("data_parallel", "hsdp", ("dp_replicate_size",)),
    ("global_batch_size", None, ("gradient_accumulation_steps",)),
)
"""Keys, the value that each must have, and the keys that do nothing where it has another."""


def check_together(keys: Keys) -> None:
    """Raise `ConfigError` for values that are right one by one and wrong together."""
    of_losses = (of_loss, of_options, of_reference, of_order)
    for conflicts in (*of_losses, _schedule, _optimizer, _layers, _parallel, _files, of_best):
        for name, problem in conflicts(keys):
            raise keys.error(name, problem)


def _schedule(keys: Keys) -> Iterator[tuple[str, str]]:
    name = keys.lr_scheduler_type
    options = {k: v for k, v in (keys.lr_scheduler_kwargs or {}).items() if v is not None}
    key = "lr_scheduler_kwargs" if keys.lr_scheduler_kwargs else "lr_scheduler_type"
    for option, value in options.items():
        if option not in SCHEDULERS[name]:
            known = ", ".join(SCHEDULERS[name]) or "no options"
            yield key, f"the {name} schedule takes {known}, not {option}"
        elif not _fits(value, SCHEDULE_OPTIONS[option]):
            expected = SCHEDULE_OPTIONS[option].expected
            yield key, f"{option}: expected {expected}, got {show_short(value)}"
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        yield key, f"the {name} schedule needs num_decay_steps"
    if "min_lr" in SCHEDULERS[name] and ("min_lr" in options) == ("min_lr_rate" in options):
        yield key, f"the {name} schedule needs either min_lr or min_lr_rate"
    # transformers' default, and what it divides by.
    least = options.get("lr_end", 1e-7) if name == "polynomial" else None
    if "min_lr" in options:
        least = 0
    if least is not None and keys.learning_rate <= least:
        problem = f"the {name} schedule needs one above {least}, got {keys.learning_rate}"
        yield "learning_rate", problem


def _fits(value: Any, rule: Rule) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (rule.choices is not None or is_number) and rule.holds(value)


def _optimizer(keys: Keys) -> Iterator[tuple[str, str]]:
    if keys.optimizer_in_backward and not keys.optimizer_offload and keys.max_grad_norm > 0:
        yield (
            "optimizer_in_backward",
            f"needs max_grad_norm 0, got {keys.max_grad_norm}: weights are stepped before the "
            "norm of all gradients is known",
        )
    if keys.optimizer_offload and keys.optim not in OFFLOADED:
        yield "optimizer_offload", f"expected optim {' or '.join(OFFLOADED)}, got {keys.optim}"
    if keys.optimizer_in_backward and keys.use_peft:
        yield (
            "optimizer_in_backward",
            "is for training all weights: an adapter's gradients are too small to matter",
        )
    if keys.stochastic_rounding and keys.optim not in TORCHAO:
        yield "stochastic_rounding", f"expected optim {' or '.join(TORCHAO)}, got {keys.optim}"
    if keys.stochastic_rounding and keys.dtype != "bfloat16":
        yield (
            "stochastic_rounding",
            f"expected dtype bfloat16, got {keys.dtype}: other weights are not rounded",
        )


def _layers(keys: Keys) -> Iterator[tuple[str, str]]:
    if isinstance(pattern := keys.lora_targets, str):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield "lora_target_modules", f"expected a regular expression, got {pattern} ({error})"
    if keys.load_in_4bit and not keys.use_peft:
        yield "load_in_4bit", "needs use_peft: 4-bit weights cannot be trained"
    if keys.activation_offloading and not keys.gradient_checkpointing:
        yield (
            "activation_offloading",
            "needs gradient_checkpointing: the inputs of recomputed layers are what is offloaded",
        )
    if keys.torch_compile and keys.layer_tile_tokens is not None:
        yield (
            "torch_compile",
            "cannot go with layer_tile_tokens, whose tiles run outside of graphs",
        )


def _parallel(keys: Keys) -> Iterator[tuple[str, str]]:
    size, batch = keys.global_batch_size, keys.per_device_train_batch_size
    if size is not None and size % batch and set(keys.loss_type) & set(WITH_BATCH_TERMS):
        yield (
            "global_batch_size",
            f"expected a multiple of per_device_train_batch_size {batch}, over which the loss "
            f"takes means, got {size}",
        )
    if keys.head_parallel == "vocabulary" and keys.data_parallel == "replicate":
        yield "head_parallel", "vocabulary needs data_parallel fsdp or hsdp: replicate has it whole"


def _files(keys: Keys) -> Iterator[tuple[str, str]]:
    if keys.resume_from_checkpoint and keys.overwrite_output_dir:
        yield (
            "overwrite_output_dir",
            "cannot go with resume_from_checkpoint: one starts anew, the other goes on",
        )
    yield from _data(keys)
    if keys.eval_source is not None and keys.eval_dataset_name is None:
        name, split = keys.eval_source
        if name.endswith(ONE_FILE) and not split.startswith("train"):
            yield (
                "eval_dataset_name",
                f"expected the data to evaluate on, since {name} is one file without a {split} "
                "split; or a part of it, such as dataset_test_split: train[90%:]",
            )


def _data(keys: Keys) -> Iterator[tuple[str, str]]:
    if problem := entry_problem(keys.datasets):
        yield "datasets", problem
    if keys.datasets and keys.dataset_name is not None:
        yield "datasets", "cannot go with dataset_name: put its data into an entry"
    if keys.columns is not None and not known_fields(keys.columns):
        yield "columns", f"expected the columns of some of {', '.join(FIELDS)}"
    if keys.layout is not None and keys.columns is not None:
        yield "columns", "cannot go with layout: either says how the rows are laid out"


def idle_settings(keys: Keys) -> list[str]:
    """One line for each key that was set and does nothing because of another key's value."""
    idle = {
        name: f"{other} is {show(getattr(keys, other))}"
        for other, needed, names in _ONLY_WHERE
        if getattr(keys, other) != needed
        for name in names
    }
    idle |= idle_options(keys) | idle_best(keys)
    if not keys.evaluates:
        idle["eval_dataset_name"] = "nothing is evaluated (eval_strategy is no)"
    packed = "evaluation is packed by max_tokens_per_batch, with the same result"
    if not set(keys.loss_type) & set(WITH_BATCH_TERMS):
        idle["per_device_eval_batch_size"] = packed
    if keys.max_steps > 0:
        idle["num_train_epochs"] = "max_steps sets the length of the run"
    if keys.lr_scheduler_type == "constant":
        idle["warmup_steps"] = "the constant schedule has no warm-up; constant_with_warmup has"
    if keys.optim == "sgd":
        moments = ("adam_beta1", "adam_beta2", "adam_epsilon")
        idle |= dict.fromkeys(moments, "sgd has no moments")
    changed = keys.changed()
    return [f"{name} has no effect: {why}" for name, why in idle.items() if name in changed]
