"""The cases of the trainer benchmark: a model, rows, and what a step of them holds."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastdpo.data.needs import COMPARISONS, Needs
from fastdpo.data.tokenize import tokenize_dataset

from ..jsonl import write_rows
from ..workloads import labelled_of, lengths_named, model_path, pairs_of, written_out
from .clock import device
from .with_trl import LABELLED, REFERENCE_FREE, Rows, trl_keys

SWITCH = {"off": False, "on": True}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """A case with everything that its runs need."""

    case: dict[str, Any]
    model: Path
    rows: Path
    useful_tokens: list[int]
    """Of each step."""
    response_tokens: list[int]
    layer_weights: int
    head_weights: int


def workloads(options: argparse.Namespace, folder: Path) -> Iterator[Workload]:
    """The cases of a command line, on the same rows."""
    name = options.model_name_or_path or options.model_config
    path = model_path(name, options.data, TORCH_DTYPES[options.dtype], device())
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = rows_for(options.loss, options.data, options.steps * options.pairs_per_step, tokenizer)
    if len(rows) < options.steps * options.pairs_per_step:
        raise SystemExit(f"{options.data}: {len(rows)} rows are too few for {options.steps} steps")
    file = folder / "rows.jsonl"
    write_rows(file, rows)
    length = options.max_length or (None if lengths_named(options.data) else 1024)
    useful, response = tokens_of_steps(rows, tokenizer, length, options.pairs_per_step)
    for checkpointing, reference in itertools.product(
        options.gradient_checkpointing, options.reference
    ):
        case = {
            "model": name,
            "data": options.data,
            "pairs_per_step": options.pairs_per_step,
            "steps": options.steps,
            "warm_up": options.warm_up,
            "dtype": options.dtype,
            "lora": options.lora,
            "gradient_checkpointing": SWITCH[checkpointing],
            "reference": reference,
            "learning_rate": options.learning_rate,
            "max_length": length,
        }
        # No such fields otherwise: rows of a case are compared with older ones.
        if options.loss != "sigmoid":
            case["loss"] = options.loss
            case["unit"] = "rows" if options.loss in LABELLED else "pairs"
        if options.keys:
            case["keys"] = options.keys
        if options.limit_gib:
            case["limit_gib"] = options.limit_gib
        yield Workload(case, path, file, useful, response, *_weights(path))


def rows_for(loss: str, data: str, count: int, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """So many rows of the layout that a loss has, of which TRL and fastdpo make the same tokens."""
    if loss in LABELLED:
        return labelled_of(data, count)
    rows = pairs_of(data, count)
    return written_out(rows, tokenizer) if trl_keys(loss)["trainer"] in REFERENCE_FREE else rows


def tokens_of_steps(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int | None, per_step: int
) -> tuple[list[int], list[int]]:
    """Tokens of each step: of a whole sequence a response, and of the responses alone."""
    needs = Needs(("label",)) if "label" in rows[0] else COMPARISONS
    dataset = Dataset.from_list(list(rows))
    tokens, _ = tokenize_dataset(dataset, tokenizer, max_length=max_length, needs=needs)
    responses = [sum(map(len, row["response_ids"])) for row in tokens]
    prompts = [len(row["prompt_ids"]) * len(row["response_ids"]) for row in tokens]
    useful = [prompt + length for prompt, length in zip(prompts, responses, strict=True)]

    def of_steps(counts: list[int]) -> list[int]:
        return [sum(counts[i : i + per_step]) for i in range(0, len(counts), per_step)]

    return of_steps(useful), of_steps(responses)


def _weights(path: Path) -> tuple[int, int]:
    """Weights of the layers and of the head."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    return sum(p.numel() for p in model.parameters()) - outside, head.numel()
