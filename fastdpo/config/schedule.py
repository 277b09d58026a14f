"""How the run proceeds: the keys of training, evaluation, logging and saving."""

from dataclasses import dataclass, field
from typing import Any

from .declare import (
    AT_LEAST_ONE,
    EPOCHS,
    INTERVAL,
    NOT_BLANK,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    STEPS_OR_UNSET,
    WARMUP,
    Rule,
    key,
    trackers,
    yaml_no,
)

SCHEDULERS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""transformers' learning-rate schedules that follow the step alone, with the options of each."""

_SHARE_OR_ALL = Rule("a number from 0 to 1", lambda v: 0 <= v <= 1)
_SHAPE = ("linear", "cosine", "1-sqrt")
SCHEDULE_OPTIONS: dict[str, Rule | tuple[str, ...]] = {
    "num_cycles": POSITIVE,
    "lr_end": NOT_NEGATIVE,
    "power": POSITIVE,
    "timescale": AT_LEAST_ONE,
    "min_lr": NOT_NEGATIVE,
    "min_lr_rate": _SHARE_OR_ALL,
    "warmup_lr_rate": _SHARE_OR_ALL,
    "num_decay_steps": AT_LEAST_ONE,
    "num_stable_steps": Rule("a whole number of at least 0", lambda v: v >= 0),
    "warmup_type": _SHAPE,
    "decay_type": _SHAPE,
    "min_lr_ratio": _SHARE_OR_ALL,
}
"""What each option takes: a number within a rule, or one of some words."""


@dataclass(frozen=True, kw_only=True)
class TrainingKeys:
    """Steps, schedule, precision and seeds."""

    num_train_epochs: float = field(
        default=3.0,
        metadata=key(
            "training", "Passes over the data, where max_steps sets no limit.", rule=EPOCHS
        ),
    )
    max_steps: int = field(
        default=-1,
        metadata=key(
            "training",
            "Optimizer steps to take, over as many epochs as that needs; -1 leaves it to "
            "num_train_epochs.",
            rule=STEPS_OR_UNSET,
        ),
    )
    per_device_train_batch_size: int = field(
        default=8,
        metadata=key(
            "training",
            "Preference pairs a device takes for one step, before accumulation.",
            rule=AT_LEAST_ONE,
        ),
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata=key(
            "training",
            "Multiplies the pairs of a step; the gradient is that of one large batch.",
            rule=AT_LEAST_ONE,
        ),
    )
    learning_rate: float = field(
        default=1e-6, metadata=key("training", "Highest learning rate.", rule=NOT_NEGATIVE)
    )
    lr_scheduler_type: str = field(
        default="linear",
        metadata=key(
            "training",
            "How the learning rate changes after the warm-up.",
            choices=tuple(SCHEDULERS),
        ),
    )
    lr_scheduler_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata=key("training", "Options of the schedule, as JSON on the command line."),
    )
    warmup_steps: int | float = field(
        default=0,
        metadata=key(
            "training",
            "Steps over which the learning rate rises from 0; below 1 it is a share of the run.",
            rule=WARMUP,
        ),
    )
    bf16: bool | None = field(
        default=None,
        metadata=key(
            "training",
            "Compute in bfloat16. Unset: on where the device is faster that way, decided "
            "and said at start-up.",
        ),
    )
    tf32: bool | None = field(
        default=None,
        metadata=key(
            "training",
            "TensorFloat-32 for float32 products on a GPU; unset leaves torch's setting.",
        ),
    )
    torch_compile: bool = field(
        default=False,
        metadata=key(
            "training",
            "Compile the layers with torch.compile, once for rows of all lengths: about half a "
            "minute at the start. The attention and the head stay as they are.",
        ),
    )
    use_cpu: bool = field(
        default=False, metadata=key("training", "Train on the CPU even where there is a GPU.")
    )
    seed: int = field(
        default=42,
        metadata=key(
            "training", "Seed of everything random, the order of the data too.", rule=SEED
        ),
    )
    data_seed: int | None = field(
        default=None,
        metadata=key(
            "training", "Another seed for the order of the data; unset is seed.", rule=SEED
        ),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationKeys:
    """When the policy is evaluated, and how."""

    do_eval: bool = field(
        default=False,
        metadata=key(
            "evaluation", "Evaluate once after the last step, also with eval_strategy no."
        ),
    )
    eval_strategy: str = field(
        default="no",
        metadata=key(
            "evaluation",
            "When to evaluate while training.",
            choices=("no", "steps", "epoch"),
            prepare=yaml_no,
        ),
    )
    eval_steps: int | float | None = field(
        default=None,
        metadata=key(
            "evaluation",
            "Steps between evaluations; below 1 it is a share of the run. Unset is logging_steps.",
            rule=INTERVAL,
        ),
    )
    eval_on_start: bool = field(
        default=False, metadata=key("evaluation", "Evaluate before the first step too.")
    )
    per_device_eval_batch_size: int = field(
        default=8,
        metadata=key(
            "evaluation",
            "Changes nothing: evaluation is packed by max_tokens_per_batch instead.",
            rule=AT_LEAST_ONE,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LoggingKeys:
    """What is reported, when and where."""

    logging_steps: int | float = field(
        default=10,
        metadata=key(
            "logging",
            "Steps between two lines of metrics; below 1 it is a share of the run.",
            rule=INTERVAL,
        ),
    )
    logging_first_step: bool = field(
        default=False, metadata=key("logging", "Report the first step too.")
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata=key(
            "logging",
            "Trackers that get the metrics besides metrics.jsonl and the terminal.",
            choices=("tensorboard", "wandb", "trackio"),
            prepare=trackers,
        ),
    )
    run_name: str | None = field(
        default=None, metadata=key("logging", "Name of the run for the trackers.")
    )
    disable_tqdm: bool | None = field(
        default=None,
        metadata=key("logging", "No progress bar; unset shows one on a terminal only."),
    )


@dataclass(frozen=True, kw_only=True)
class SavingKeys:
    """What is written, when and where."""

    output_dir: str = field(
        default="trainer_output",
        metadata=key(
            "saving",
            "Directory for the trained model, its checkpoints, metrics.jsonl and this "
            "configuration.",
            rule=NOT_BLANK,
            path=True,
        ),
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=key(
            "saving",
            "Start anew in an output_dir that holds another run; without it, or "
            "resume_from_checkpoint, that is an error.",
        ),
    )
    save_strategy: str = field(
        default="steps",
        metadata=key(
            "saving",
            "When to write a checkpoint while training.",
            choices=("no", "steps", "epoch"),
            prepare=yaml_no,
        ),
    )
    save_steps: int | float = field(
        default=500,
        metadata=key(
            "saving", "Steps between checkpoints; below 1 it is a share of the run.", rule=INTERVAL
        ),
    )
    save_total_limit: int | None = field(
        default=None,
        metadata=key("saving", "Keep only this many newest checkpoints.", rule=AT_LEAST_ONE),
    )
    save_only_model: bool = field(
        default=False,
        metadata=key(
            "saving",
            "Leave the optimizer's state out of checkpoints, which then cannot be resumed.",
        ),
    )
    resume_from_checkpoint: bool | str | None = field(
        default=None,
        metadata=key(
            "saving",
            "Go on from this checkpoint directory; true takes the newest one in output_dir.",
            path=True,
        ),
    )
    resume_with_changes: bool = field(
        default=False,
        metadata=key(
            "saving",
            "Let a resumed run differ from its checkpoint in what is trained (beta, loss_type, "
            "max_length, the data, the reference, ...); without it that is an error.",
        ),
    )
