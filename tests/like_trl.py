"""What TRL makes of rows, run beside ours."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_samples import tokenize_rows
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.data_utils import maybe_apply_chat_template
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bench.trainers.providers import run_trl
from bench.trainers.with_trl import Rows, trl_keys


def trl_metrics(
    loss: str, rows: Rows, model: Path, steps: int, per_step: int, batch: int, **keys: Any
) -> list[dict[str, Any]]:
    """What the trainer of TRL that has this loss of ours logs of every step, batches of `batch`
    rows accumulated to `per_step`. For those without a reference, rows are to be `written_out`.
    """
    clock = run_trl(rows, model, steps, per_step, batch, **trl_keys(loss), **keys)
    return [dict(metrics) for metrics in clock.metrics]


def trl_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, trainer: Any
) -> list[dict[str, Any]]:
    """What TRL's trainer makes of the rows before it batches them."""
    bare = trainer.__new__(trainer)
    bare._tokenizer = tokenizer
    bare.calculate_KL = False
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    return bare._prepare_dataset(rows, tokenizer, args, "eval").to_list()


def trl_pairs(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[dict[str, Any]]:
    """TRL's batches of one pair each, as our rows: what its model sees, cut and masked."""
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    pairs = []
    for row in trl_rows(rows, tokenizer, max_length, DPOTrainer):
        batch = collate.torch_call([row])
        sequences = []
        for i in range(2):
            real = batch["attention_mask"][i].bool()
            answer = batch["completion_mask"][i].bool()
            sequences.append(batch["input_ids"][i][real & answer].tolist())
            prompt = batch["input_ids"][i][real & ~answer].tolist()
        pairs.append({"prompt_ids": prompt, "response_ids": sequences})
    return pairs


def reference_free_pairs(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, trainer: Any
) -> list[dict[str, Any]]:
    """What TRL's ORPO or CPO trainer makes of rows; the prompt of each response, which may differ,
    in place of `prompt_ids`.
    """
    bare = trainer.__new__(trainer)
    bare.processing_class, bare.is_encoder_decoder, bare.max_length = tokenizer, False, 1 << 30
    pairs = []
    for row in rows:
        made = bare.tokenize_row(maybe_apply_chat_template(dict(row), tokenizer))
        prompts, responses = [], []
        for name in ("chosen", "rejected"):
            cut = made[f"{name}_labels"].count(-100)
            prompts.append(made[f"{name}_input_ids"][:cut])
            responses.append(made[f"{name}_input_ids"][cut:])
        pairs.append({"prompts": prompts, "response_ids": responses})
    return pairs


def assert_like_trl(
    rows: Dataset | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    clean: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Our rows have the tokens that TRL gives them, or gives `clean` rows that mean the same."""
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    theirs = dataset if clean is None else Dataset.from_list(clean)
    made = tokenize_rows(dataset, tokenizer, max_length)
    expected = trl_pairs(theirs, tokenizer, max_length)
    assert len(made) == len(expected)
    for row, pair in zip(made, expected, strict=True):
        assert {name: row[name] for name in pair} == pair
        assert (row["winners"], row["losers"], row["weights"], row["labels"]) == (
            [0],
            [1],
            [1.0],
            [],
        )
    return made
