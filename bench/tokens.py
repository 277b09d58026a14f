"""How many tokens a pass over a data set computes: shared rows against padded batches.

    python -m bench.tokens

Counts, for every row of both data sets at `max_length` 1024 with SmolLM2's tokenizer: two padded
sequences a comparison in batches of 8 in the order of the data, packed rows that repeat the prompt,
and shared rows, once with whole groups and once as an epoch of steps of 8 comparisons in rows of
1024 tokens. Writes bench/results/tokens.jsonl.
"""

import argparse

from datasets import Dataset
from transformers import AutoTokenizer

from fastdpo.data.groups import count_comparisons, make_groups
from fastdpo.data.packing import part_tokens
from fastdpo.data.plan import make_plan
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.demo.model import demo_model_path

from . import data
from .report import record

BATCH = 8


def main() -> None:
    """Count, write one row a data set, print it."""
    results = record.Results("tokens", argparse.Namespace(batch=BATCH, max_length=1024))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    for name, rows in (("dpo_en_demo", data.dpo_en_demo()), ("gsm8k", data.gsm8k_pairs())):
        if rows is None:
            continue
        pairs = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
        tokens, _ = tokenize_dataset(Dataset.from_list(pairs), tokenizer, max_length=1024)
        apart, groups = make_groups(tokens, group_prompts=False), make_groups(tokens)
        lengths = [len(g.prompt) + max(len(r) for r in g.responses) for g in apart]
        padded = sum(
            2 * len(batch) * max(batch)
            for batch in (lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH))
        )
        whole = {
            layout: sum(part_tokens(g, range(len(g.responses)), layout) for g in groups)
            for layout in ("shared", "packed")
        }
        plan = make_plan(groups, units_per_step=BATCH, max_tokens=1024)
        epoch = sum(
            part_tokens(groups[p.group], p.responses, "shared")
            for step in plan
            for row in step.ranks[0]
            for p in row
        )
        row = {
            "data": name,
            "comparisons": count_comparisons(groups),
            "groups": len(groups),
            "padded": padded,
            **whole,
            "shared_epoch": epoch,
            "shared_over_padded": whole["shared"] / padded,
            "epoch_over_padded": epoch / padded,
        }
        results.add(**row)
        print(row)


if __name__ == "__main__":
    main()
