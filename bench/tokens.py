"""How many tokens a pass over a data set computes: shared rows against padded batches.

    python -m bench.tokens
    python -m bench.tokens kto

Counts, for every row of both data sets at `max_length` 1024 with SmolLM2's tokenizer: two padded
sequences a comparison in batches of 8 in the order of the data, packed rows that repeat the prompt,
and shared rows, once with whole groups and once as an epoch of steps of 8 comparisons in rows of
1024 tokens. Writes bench/results/tokens.jsonl.

With `kto`, what the KL estimate of KTO takes on the labelled GSM8K groups in the order of the data,
with batches of 8 and steps of 1, 2 and 4 of them. Writes bench/results/kto-tokens.jsonl.
"""

import argparse
import sys
from collections.abc import Sequence

from datasets import Dataset
from transformers import AutoTokenizer

from fastdpo.data.grouping import make_groups
from fastdpo.data.groups import count_units
from fastdpo.data.needs import Needs
from fastdpo.data.packing import part_tokens
from fastdpo.data.plan import make_plan
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.demo.model import demo_model_path

from . import data
from .report import record

BATCH = 8

Tokens = tuple[int, ...]


def mismatched_tokens(
    rows: Sequence[tuple[Tokens, Tokens]], batch: int, per_step: int
) -> dict[str, int]:
    """Tokens of the pairs that estimate KTO's KL term: each prompt of a batch with the completion
    of the row before it, the first with the last one's.

    Args:
        rows: prompt and completion of each, in the order in which they are trained.
        batch: rows of a batch, the last of which may be smaller.
        per_step: rows of an optimizer step, whole batches of them.

    Returns:
        `apart` whole pairs as they come; `padded` these as long as the longest of their batch;
        `shared` each prompt of a step once, and each completion
        of a prompt once; `added` of those only the completions that do not belong to their prompt
        anyway, which is what the estimate adds to a step that trains its rows in the same pass.
    """
    apart = padded = shared = added = 0
    for start in range(0, len(rows), per_step):
        step = rows[start : start + per_step]
        pairs = []
        for first in range(0, len(step), batch):
            prompts, completions = zip(*step[first : first + batch], strict=True)
            rotated = list(zip(prompts, completions[-1:] + completions[:-1], strict=True))
            lengths = [len(prompt) + len(completion) for prompt, completion in rotated]
            apart += sum(lengths)
            padded += len(lengths) * max(lengths)
            pairs += rotated
        distinct = set(pairs)
        shared += sum(map(len, {prompt for prompt, _ in distinct}))
        shared += sum(len(completion) for _, completion in distinct)
        added += sum(len(completion) for _, completion in distinct - set(step))
    return {"apart": apart, "padded": padded, "shared": shared, "added": added}


def kto() -> None:
    """Count the tokens of the KL estimate, write one row a size of the steps, print it."""
    results = record.Results("kto-tokens", argparse.Namespace(batch=BATCH, max_length=1024))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    labelled = data.gsm8k_labels()
    if labelled is None:
        return
    needs, dataset = Needs(("label",)), Dataset.from_list(labelled)
    tokens, _ = tokenize_dataset(dataset, tokenizer, max_length=1024, needs=needs)
    rows = [(tuple(row["prompt_ids"]), tuple(row["response_ids"][0])) for row in tokens]
    for batches in (1, 2, 4):
        counts = mismatched_tokens(rows, BATCH, BATCH * batches)
        row = {
            "data": "gsm8k-groups",
            "rows": len(rows),
            "batches_per_step": batches,
            **counts,
            "shared_over_apart": counts["shared"] / counts["apart"],
            "shared_over_padded": counts["shared"] / counts["padded"],
            "added_over_apart": counts["added"] / counts["apart"],
        }
        results.add(**row)
        print(row)


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
            "comparisons": count_units(groups),
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
    kto() if "kto" in sys.argv[1:] else main()
