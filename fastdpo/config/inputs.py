"""What is trained on what: the keys of model, data, reference and loss, and our own."""

from dataclasses import dataclass, field

from .declare import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    BELOW_HALF,
    NOT_BLANK,
    NOT_NEGATIVE,
    POSITIVE,
    key,
)

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """The policy and how it runs."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=key(
            "model",
            "The model to train, or a LoRA adapter on one: a directory or a hub name. "
            "Needed by train and precompute.",
            rule=NOT_BLANK,
            path=True,
        ),
    )
    model_revision: str = field(
        default="main",
        metadata=key("model", "Branch, tag or commit of the model on the hub.", rule=NOT_BLANK),
    )
    dtype: str = field(
        default="float32",
        metadata=key(
            "model",
            "Type the weights are held in; auto keeps the checkpoint's own. bf16 sets the "
            "type of the computation.",
            choices=DTYPES,
        ),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=key("model", "Run Python code that the model's or tokenizer's repository ships."),
    )
    attn_implementation: str | None = field(
        default=None,
        metadata=key(
            "model",
            "Unset: the fastest attention that is exact for this model. eager or sdpa force "
            "transformers' own, on padded rows.",
            choices=("eager", "sdpa"),
        ),
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata=key(
            "model",
            "Liger's kernels for norms, rotary embeddings and MLPs of policy and reference, on a "
            "GPU; the head stays ours.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """The rows and how they become tokens."""

    dataset_name: str | None = field(
        default=None,
        metadata=key(
            "data",
            "A hub dataset, a directory, or a .jsonl, .json, .parquet or .csv file. Needed "
            "by train and precompute.",
            rule=NOT_BLANK,
            path=True,
        ),
    )
    dataset_config: str | None = field(
        default=None,
        metadata=key("data", "Configuration of the hub dataset, where it has several."),
    )
    dataset_train_split: str = field(
        default="train", metadata=key("data", "Split to train on.", rule=NOT_BLANK)
    )
    dataset_test_split: str = field(
        default="test",
        metadata=key("data", "Split to evaluate on, when evaluation is asked for.", rule=NOT_BLANK),
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata=key("data", "Processes that tokenise the data; unset is one.", rule=AT_LEAST_ONE),
    )
    max_length: int | None = field(
        default=1024,
        metadata=key(
            "data",
            "Longest prompt plus response, in tokens; longer ones are cut by "
            "truncation_mode. none cuts nothing.",
            rule=AT_LEAST_TWO,
        ),
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=key(
            "data",
            "Which end of a sequence longer than max_length stays; TRL drops keep_end too.",
            choices=("keep_start",),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceKeys:
    """The policy's starting point, which the loss compares it with."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata=key(
            "reference",
            "A reference other than the model's own starting weights: a directory or a hub name.",
            rule=NOT_BLANK,
            path=True,
        ),
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata=key(
            "reference",
            "Compute the reference's log-probabilities once, before training, and cache "
            "them on disk, so that no reference is in memory while training. TRL's default "
            "is false.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LossKeys:
    """The preference loss."""

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata=key(
            "loss", "The loss, or several that are added up with loss_weights.", rule=NOT_BLANK
        ),
    )
    loss_weights: list[float] | None = field(
        default=None,
        metadata=key(
            "loss",
            "One weight for each entry of loss_type; unset weighs each with 1.",
            rule=NOT_NEGATIVE,
        ),
    )
    beta: float = field(
        default=0.1,
        metadata=key(
            "loss",
            "Strength of the pull towards the reference; for ipo it is the paper's tau.",
            rule=POSITIVE,
        ),
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=key(
            "loss",
            "Probability that a label is the wrong way round. Unlike TRL, sigmoid honours it.",
            rule=BELOW_HALF,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class OwnKeys:
    """What TRL has no key for."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata=key(
            "own",
            "Evaluate on this file, directory or hub dataset instead of a split of dataset_name.",
            rule=NOT_BLANK,
            path=True,
        ),
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata=key(
            "own", "Drop and count rows that cannot be used, instead of stopping at the first."
        ),
    )
    max_comparisons_per_group: int | None = field(
        default=None,
        metadata=key(
            "own",
            "Sample at most this many comparisons for a prompt with scored responses; unset "
            "takes all.",
            rule=AT_LEAST_ONE,
        ),
    )
    shuffle: bool = field(
        default=True,
        metadata=key("own", "Shuffle the groups at each epoch; false keeps the file's order."),
    )
    group_prompts: bool = field(
        default=True,
        metadata=key(
            "own", "Put rows with the same prompt into one group, so that it is computed once."
        ),
    )
    share_prefix: bool = field(
        default=True,
        metadata=key(
            "own", "Compute a prompt once for all its responses, where the model allows it exactly."
        ),
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=key(
            "own",
            "Token budget of a packed row, the size of one forward pass. Unset: chosen at "
            "start-up from the device. It changes memory and speed, not the gradient.",
            rule=AT_LEAST_ONE,
        ),
    )
    attention_backend: str | None = field(
        default=None,
        metadata=key(
            "own",
            "Kernel for the attention of packed rows; unset: the fastest that is exact for the "
            "model and the device.",
            choices=("varlen", "flash_attn", "flash_attn_3", "flash_attn_4", "flex", "sdpa"),
        ),
    )
    head_workspace_mib: int = field(
        default=512,
        metadata=key(
            "own",
            "Memory in MiB that the output head may use for pieces of the logits.",
            rule=AT_LEAST_ONE,
        ),
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata=key(
            "own",
            "Where reference log-probabilities are cached; unset is the user's cache directory.",
            rule=NOT_BLANK,
            path=True,
        ),
    )
    profile_steps: int = field(
        default=0,
        metadata=key(
            "own",
            "Steps to trace with PyTorch's profiler, after two that warm up, into trace.json in "
            "output_dir; ui.perfetto.dev opens it.",
            rule=NOT_NEGATIVE,
        ),
    )
