"""How the run proceeds: the keys of training, evaluation, logging and saving."""

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
    one_of,
    section,
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
_SHAPE = one_of("linear", "cosine", "1-sqrt")
SCHEDULE_OPTIONS = {
    "num_cycles": POSITIVE,
    "lr_end": NOT_NEGATIVE,
    "power": POSITIVE,
    "timescale": AT_LEAST_ONE,
    "min_lr": NOT_NEGATIVE,
    "min_lr_rate": _SHARE_OR_ALL,
    "warmup_lr_rate": _SHARE_OR_ALL,
    "num_decay_steps": AT_LEAST_ONE,
    "num_stable_steps": Rule("a whole number of at least 0", lambda v: v >= 0 and v == int(v)),
    "warmup_type": _SHAPE,
    "decay_type": _SHAPE,
    "min_lr_ratio": _SHARE_OR_ALL,
}
"""What each option takes."""


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""The services that metrics can be sent to, by the names of their packages."""


def _yaml_no(value: Any) -> Any:
    """Give a strategy its word back: a bare `no` in YAML 1.1 arrives as False."""
    return "no" if value is False else value


def _trackers(value: Any) -> Any:
    """The spellings of "report nowhere" (null, `none`, an empty list) as an empty list."""
    return [] if value in (None, "none", "None", ["none"]) else value


@section("training")
class TrainingKeys:
    """Steps, schedule, precision and seeds."""

    num_train_epochs: float = key(
        3.0, "Passes over the data, where max_steps sets no limit.", EPOCHS
    )
    max_steps: int = key(
        -1,
        "Optimizer steps to take, over as many epochs as that needs; -1 leaves it to "
        "num_train_epochs.",
        STEPS_OR_UNSET,
    )
    per_device_train_batch_size: int = key(
        8,
        "What each device takes for one step, before accumulation: comparisons, responses or "
        "groups, as the loss counts.",
        AT_LEAST_ONE,
    )
    gradient_accumulation_steps: int = key(
        1, "Multiplies what a step takes; the gradient is that of one large batch.", AT_LEAST_ONE
    )
    learning_rate: float = key(1e-6, "Highest learning rate.", NOT_NEGATIVE)
    lr_scheduler_type: str = key(
        "linear", "How the learning rate changes after the warm-up.", one_of(*SCHEDULERS)
    )
    lr_scheduler_kwargs: dict[str, Any] | None = key(
        None, "Options of the schedule, as JSON on the command line."
    )
    warmup_steps: int | float = key(
        0,
        "Steps over which the learning rate rises from 0; below 1 it is a share of the run.",
        WARMUP,
    )
    bf16: bool | None = key(
        None,
        "Compute in bfloat16. Unset: on where the device is faster that way, decided "
        "and said at start-up.",
    )
    tf32: bool | None = key(
        None, "TensorFloat-32 for float32 products on a GPU; unset leaves torch's setting."
    )
    torch_compile: bool = key(
        False,
        "Compile the layers with torch.compile, once for rows of all lengths: about half a "
        "minute at the start. The attention and the head stay as they are.",
    )
    use_cpu: bool = key(False, "Train on the CPU even where there is a GPU.")
    seed: int = key(42, "Seed of everything random, the order of the data too.", SEED)
    data_seed: int | None = key(
        None, "Another seed for the order of the data; unset is seed.", SEED
    )


@section("evaluation")
class EvaluationKeys:
    """When the policy is evaluated, and how."""

    do_eval: bool = key(False, "Evaluate once after the last step, also with eval_strategy no.")
    eval_strategy: str = key(
        "no", "When to evaluate while training.", one_of("no", "steps", "epoch"), prepare=_yaml_no
    )
    eval_steps: int | float | None = key(
        None,
        "Steps between evaluations; below 1 it is a share of the run. Unset is logging_steps.",
        INTERVAL,
    )
    eval_on_start: bool | None = key(
        None,
        "Evaluate before the first step too, so that there is a figure to compare with. Unset: "
        "where the run evaluates, and its data for that is at most a tenth of what it trains on.",
    )
    per_device_eval_batch_size: int = key(
        8, "Changes nothing: evaluation is packed by max_tokens_per_batch instead.", AT_LEAST_ONE
    )
    load_best_model_at_end: bool = key(
        False,
        "End with the weights of the checkpoint that was evaluated best. save_strategy has to be "
        "best or that of evaluation, and save_steps a multiple of eval_steps.",
    )
    metric_for_best_model: str | None = key(
        None,
        "The metric of evaluation that says which model is best, with or without its eval_; unset "
        "is loss.",
        NOT_BLANK,
    )
    greater_is_better: bool | None = key(
        None,
        "Whether a higher value of metric_for_best_model is better; unset is true unless its name "
        "ends with loss.",
    )
    early_stopping_patience: int | None = key(
        None,
        "Stop after so many evaluations in a row without a better metric_for_best_model; unset "
        "never does. transformers has it as EarlyStoppingCallback.",
        AT_LEAST_ONE,
    )
    early_stopping_threshold: float = key(
        0.0, "By how much an evaluation has to be better to count as that.", NOT_NEGATIVE
    )


@section("logging")
class LoggingKeys:
    """What is reported, when and where."""

    logging_steps: int | float = key(
        10, "Steps between two lines of metrics; below 1 it is a share of the run.", INTERVAL
    )
    logging_first_step: bool = key(False, "Report the first step too.")
    report_to: list[str] = key(
        [],
        "Trackers that get the metrics besides metrics.jsonl and the terminal; all is every one "
        "that is installed.",
        one_of(*TRACKERS, "all"),
        prepare=_trackers,
    )
    run_name: str | None = key(None, "Name of the run for the trackers.")
    project: str = key(
        "huggingface",
        "Project of the run, for wandb and trackio; WANDB_PROJECT goes before it, and an mlflow "
        "experiment has this name where MLFLOW_EXPERIMENT_NAME is not set.",
        NOT_BLANK,
    )
    logging_dir: str | None = key(
        None,
        "Directory of tensorboard's files; unset is TENSORBOARD_LOGGING_DIR, else runs in "
        "output_dir.",
        NOT_BLANK,
        path=True,
    )
    trackio_space_id: str | None = key(
        None, "Space on the hub that trackio sends the run to; unset keeps it on this machine."
    )
    trackio_bucket_id: str | None = key(
        None, "Bucket on the hub for the data of trackio_space_id; unset is named after the Space."
    )
    report: bool = key(
        True, "Keep report.html in output_dir up to date while training, for a browser to follow."
    )
    report_samples: int = key(
        4,
        "Held-out prompts that the policy answers for the report before the first step and after "
        "the last, where the run evaluates; 0 for none.",
        Rule("a whole number of at least 0", lambda v: v >= 0),
    )
    disable_tqdm: bool | None = key(None, "No progress bar; unset shows one on a terminal only.")


@section("saving")
class SavingKeys:
    """What is written, when and where."""

    output_dir: str = key(
        "trainer_output",
        "Directory for the trained model, its checkpoints, metrics.jsonl and this configuration.",
        NOT_BLANK,
        path=True,
    )
    overwrite_output_dir: bool = key(
        False,
        "Start anew in an output_dir that holds another run; without it, or "
        "resume_from_checkpoint, that is an error.",
    )
    save_strategy: str = key(
        "steps",
        "When to write a checkpoint while training; best is after each evaluation that is better "
        "than all before it.",
        one_of("no", "steps", "epoch", "best"),
        prepare=_yaml_no,
    )
    save_steps: int | float = key(
        500, "Steps between checkpoints; below 1 it is a share of the run.", INTERVAL
    )
    save_total_limit: int | None = key(
        None, "Keep only this many newest checkpoints.", AT_LEAST_ONE
    )
    save_only_model: bool = key(
        False, "Leave the optimizer's state out of checkpoints, which then cannot be resumed."
    )
    resume_from_checkpoint: bool | str | None = key(
        None,
        "Go on from this checkpoint directory; true takes the newest one in output_dir.",
        path=True,
    )
    resume_with_changes: bool = key(
        False,
        "Let a resumed run differ from its checkpoint in what is trained (beta, loss_type, "
        "max_length, the data, the reference, ...); without it that is an error.",
    )
