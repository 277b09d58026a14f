"""What the pages show of the losses: the demo's model under several, what their form costs, and
what scoring costs without any.
"""

import statistics
from pathlib import Path

from .rows import origins, read
from .tables import NOTHING, markdown, number


def demo_block(folder: Path) -> str:
    """Held-out pairs before training and after training with each loss."""
    rows = {row["loss"]: row for row in read(folder, "demo.jsonl")}  # the newest of each
    if not rows:
        return NOTHING
    lines = [
        [
            name,
            ", ".join(f"{key} {value}" for key, value in row["keys"].items()),
            number(row["accuracy"]),
            number(row["likelier"]),
            number(row["chosen"]),
            number(row["rejected"]),
        ]
        for name, row in rows.items()
    ]
    columns = (
        "loss",
        "keys beside the demo's",
        "gained on the other",
        "likelier a token",
        "preferred, nats",
        "other, nats",
    )
    pairs = next(iter(rows.values()))["pairs"]
    said = (
        f"Of {pairs} held-out pairs: the share in which the preferred response has gained on the "
        "other since before training (a tie is one half), the share in which it is the likelier "
        "one a token, and by how much the log-probabilities of both have changed."
    )
    return "\n\n".join([markdown(columns, lines, 2), said, *origins(list(rows.values()))])


def forms_block(folder: Path) -> str:
    """The time of each form of a loss beside that of comparisons alone."""
    rows = read(folder, "forms-*.jsonl")
    rows = [row for row in rows if row["command"] == rows[-1]["command"]]
    if not rows:
        return NOTHING
    lines = []
    for name in rows[0]["seconds"]:
        ratios = [row["seconds"][name] / row["seconds"]["linear_dpo_loss"] for row in rows]
        spread = f"{number(min(ratios))}–{number(max(ratios))}"
        lines.append([name, f"{statistics.median(ratios):.3f}×", spread, str(len(ratios))])
    columns = ("form", "time", "least–most", "turns")
    return "\n\n".join([markdown(columns, lines), *origins(rows)])


def kto_tokens_block(folder: Path) -> str:
    """What KTO's KL estimate computes, beside whole pairs and beside what TRL pads."""
    rows = read(folder, "kto-tokens.jsonl")
    if not rows:
        return NOTHING
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    lines = [
        [
            f"{row['data']}, {row['rows']} rows, {row['batches_per_step']} batches of "
            f"{row['options']['batch']} a step",
            str(row["shared"]),
            f"{number(row['shared_over_apart'], 2)}×",
            f"{number(row['shared_over_padded'], 2)}×",
        ]
        for row in rows
    ]
    columns = ("rows", "tokens, prompts shared", "of unpadded pairs apart", "of TRL's padded pairs")
    return "\n\n".join([markdown(columns, lines), *origins(rows)])


def score_block(folder: Path) -> str:
    """Scoring N-best groups, beside padded batches."""
    rows = read(folder, "score-*.jsonl")
    if not rows:
        return NOTHING
    lines = []
    for shots in sorted({row["options"]["shots"] for row in rows}):
        turns = [row for row in rows if row["options"]["shots"] == shots]
        groups, responses = turns[-1]["groups"], 5 * turns[-1]["groups"]
        lengths = (
            f"{turns[-1]['prompt_tokens'] / groups:.0f}",
            f"{turns[-1]['response_tokens'] / responses:.0f}",
        )
        for name in ("padded", "sorted"):
            ratios = [
                row["processor_seconds"][name] / row["processor_seconds"]["fastdpo"]
                for row in turns
            ]
            spread = f"{number(min(ratios))}–{number(max(ratios))}"
            speed = f"{statistics.median(ratios):.2f}×"
            lines.append([str(shots), *lengths, str(groups), name, speed, spread, str(len(ratios))])
    said = (
        "GSM8K questions with five solutions each after some solved ones, SmolLM2-135M, fp32: "
        "response tokens a processor second of `fastdpo score` over those of padded batches of 8 "
        "through transformers, in the order of the rows and sorted by length."
    )
    columns = (
        *("solved before", "prompt tokens", "response tokens", "questions"),
        *("batches", "speed", "least–most", "turns"),
    )
    return "\n\n".join([said, markdown(columns, lines), *origins(rows)])
