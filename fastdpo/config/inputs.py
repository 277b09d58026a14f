"""What is trained on what: the keys of model and data, and our own."""

from .datasets import LAYOUTS
from .declare import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    NOT_BLANK,
    NOT_NEGATIVE,
    key,
    one_of,
    section,
)

DTYPES = ("auto", "bfloat16", "float16", "float32")


@section("model")
class ModelKeys:
    """The policy and how it runs."""

    model_name_or_path: str | None = key(
        None,
        "The model to train, or a LoRA adapter on one: a directory or a hub name. "
        "Needed by train and precompute.",
        NOT_BLANK,
        path=True,
    )
    model_revision: str = key("main", "Branch, tag or commit of the model on the hub.", NOT_BLANK)
    dtype: str = key(
        "float32",
        "Type the weights are held in; auto keeps the checkpoint's own. bf16 sets the "
        "type of the computation.",
        one_of(*DTYPES),
    )
    trust_remote_code: bool = key(
        False, "Run Python code that the model's or tokenizer's repository ships."
    )
    attn_implementation: str | None = key(
        None,
        "Unset: the fastest attention that is exact for this model. eager or sdpa force "
        "transformers' own, on padded rows.",
        one_of("eager", "sdpa", unset="for the fastest attention that is exact"),
    )
    use_liger_kernel: bool = key(
        False,
        "Liger's kernels for norms, rotary embeddings and MLPs of policy and reference, on a "
        "GPU; the head stays ours.",
    )


@section("data")
class DataKeys:
    """The rows and how they become tokens."""

    dataset_name: str | None = key(
        None,
        "A hub dataset, a directory, a .jsonl, .json, .parquet or .csv file, or a URL such as "
        "hf://datasets/OWNER/NAME/FILE. Needed by train and precompute, or datasets in its place.",
        NOT_BLANK,
        path=True,
    )
    dataset_config: str | None = key(
        None, "Configuration of the hub dataset, where it has several."
    )
    datasets: list[dict[str, object]] = key(
        [],
        "Several data sets in one, each with a path and, as in TRL, name, data_dir, data_files, "
        "split, columns and fraction, its share; or with weight, how often each of its rows is "
        "taken: 0.5 is a half of them. layout and columns (a mapping) may be given to each.",
    )
    dataset_streaming: bool = key(
        False, "Accepted: a data set is read to the cache once, before the run."
    )
    dataset_train_split: str = key("train", "Split to train on.", NOT_BLANK)
    dataset_test_split: str = key(
        "test", "Split to evaluate on, when evaluation is asked for.", NOT_BLANK
    )
    dataset_num_proc: int | None = key(
        None,
        "Processes that tokenise the data; unset is one for each core where rows are many.",
        AT_LEAST_ONE,
    )
    max_length: int | None = key(
        1024,
        "Tokens that a prompt and a response may have together. Longer responses are cut, as "
        "truncation_mode says; a row whose prompt alone is that long is dropped. none is no limit.",
        AT_LEAST_TWO,
    )
    truncation_mode: str = key(
        "keep_start",
        "Which end of a sequence longer than max_length stays. Cut at its start, a prompt would "
        "differ from response to response and could not be shared; TRL drops keep_end too.",
        one_of("keep_start"),
    )


@section("own")
class OwnKeys:
    """What TRL has no key for."""

    eval_dataset_name: str | None = key(
        None,
        "Evaluate on this file, directory or hub dataset instead of a split of dataset_name.",
        NOT_BLANK,
        path=True,
    )
    layout: str | None = key(
        None,
        "The layout of the rows, where it is not to be told from their columns.",
        one_of(*LAYOUTS, unset="to tell it from the columns"),
    )
    columns: dict[str, str | list[str]] | None = key(
        None,
        "Which column holds what, in place of a layout, such as {prompt: question, chosen: good, "
        "rejected: answers.1.text}.",
    )
    skip_bad_rows: bool = key(
        False, "Drop and count rows that cannot be used, instead of stopping at the first."
    )
    check_data: bool = key(
        True,
        "Look at the rows before the first step, as fastdpo check does but shortly: a few lines, "
        "and data_checks.json in output_dir.",
    )
    max_comparisons_per_group: int | None = key(
        None,
        "Sample at most this many comparisons for a prompt with scored responses; unset takes all.",
        AT_LEAST_ONE,
    )
    convert: str | None = key(
        None,
        "Turn rows into those that the loss needs: unpair makes labelled responses of comparisons, "
        "pair makes comparisons of the labelled responses of a prompt.",
        one_of("unpair", "pair", unset="to take the rows as they are"),
    )
    shuffle: bool | None = key(
        None,
        "Shuffle the groups at each epoch; false keeps the file's order. Unset is true, but false "
        "for kto, which pairs each prompt with the completion of the row before in the file, and "
        "as in TRL for apo_zero_unpaired.",
    )
    group_prompts: bool = key(
        True, "Put rows with the same prompt into one group, so that it is computed once."
    )
    share_prefix: bool = key(
        True, "Compute a prompt once for all its responses, where the model allows it exactly."
    )
    max_tokens_per_batch: int | None = key(
        None,
        "Token budget of a packed row, the size of one forward pass. Unset: set at "
        "start-up to suit the device. It changes memory and speed, not the gradient.",
        AT_LEAST_ONE,
    )
    attention_backend: str | None = key(
        None,
        "Kernel for the attention of packed rows; unset: the fastest that is exact for the "
        "model and the device.",
        one_of("varlen", "flash_attn", "flash_attn_3", "flash_attn_4", "flex", "sdpa"),
    )
    head_workspace_mib: int | None = key(
        None,
        "Memory in MiB that the output head may use for pieces of the logits. Unset: 512, on a GPU "
        "with more than 18 GiB a 36th of its memory, at most 2048.",
        AT_LEAST_ONE,
    )
    reference_cache_dir: str | None = key(
        None,
        "Where reference log-probabilities are cached; unset is the user's cache directory.",
        NOT_BLANK,
        path=True,
    )
    profile_steps: int = key(
        0,
        "Steps to trace with PyTorch's profiler, after two that warm up, into trace.json in "
        "output_dir; ui.perfetto.dev opens it.",
        NOT_NEGATIVE,
    )
