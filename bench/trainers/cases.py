"""The cases of the trainer benchmark: a model, rows, and what a step of them holds."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdpo.data.groups import make_groups
from fastdpo.data.tokenize import tokenize_dataset

from ..jsonl import write_rows
from ..workloads import Pair, lengths_named, model_path, pairs_of
from .clock import device

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
    rows = pairs_of(options.data, options.steps * options.pairs_per_step)
    if len(rows) < options.steps * options.pairs_per_step:
        raise SystemExit(f"{options.data}: {len(rows)} rows are too few for {options.steps} steps")
    file = folder / "rows.jsonl"
    write_rows(file, rows)
    length = options.max_length or (None if lengths_named(options.data) else 1024)
    useful, response = _tokens(rows, path, length, options.pairs_per_step)
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
        if options.keys:  # and no such field otherwise: rows of a case are compared with older ones
            case["keys"] = options.keys
        if options.limit_gib:
            case["limit_gib"] = options.limit_gib
        yield Workload(case, path, file, useful, response, *_weights(path))


def _tokens(
    rows: list[Pair], path: Path, max_length: int | None, per_step: int
) -> tuple[list[int], list[int]]:
    """Tokens of each step: of two whole sequences a comparison, and of the responses alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=max_length)
    groups = make_groups(tokens, group_prompts=False)
    responses = [sum(map(len, group.responses)) for group in groups]
    useful = [2 * len(g.prompt) + length for g, length in zip(groups, responses, strict=True)]

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
