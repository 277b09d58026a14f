"""What `fastdpo check` finds of faults that are planted, and how long it takes.

    python -m bench.check faults --repetitions 5     # duplicates, contradictions, leaks, lengths
    python -m bench.check speed                      # seconds for 100,000 pairs
    python -m bench.check labels --data demo         # swapped labels, found with a model

`faults` plants them in GSM8K pairs, one for each question, which have none of their own. `speed`
runs the command in a process of its own, on two sets: sentences of GSM8K mixed at random, where
no two rows are alike, and its pairs over and over, where every row is nearly the same as others.
`labels` swaps a tenth of the pairs and measures the area under the ROC curve by which SmolLM2-135M
tells those from the others: by log-probability, by log-probability a token, and by the implicit
reward of policies that were trained on the other half of the same rows, swapped ones among them.
Rows go to bench/results/check.jsonl.
"""

import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fastdpo import TrainConfig, score, train
from fastdpo.checks.check import check
from fastdpo.checks.near import SAME, similarity
from fastdpo.demo.model import demo_model_path
from fastdpo.scoring.measures import area

from . import data
from .cli import Parser
from .jsonl import read_rows, write_rows
from .report import record

Row = dict[str, Any]
KEYS = ("prompt", "chosen", "rejected")
_SHARE = 0.05
_DEMO = Path(__file__).parents[1] / "fastdpo" / "demo"


def single_pairs() -> list[Row]:
    """The first GSM8K pair of each question.

    Raises:
        FileNotFoundError: the rows do not lie beside the repository.
    """
    rows = data.gsm8k_pairs()
    if rows is None:
        raise FileNotFoundError("the GSM8K rows are not beside the repository")
    return list({row["prompt"]: {key: row[key] for key in KEYS} for row in reversed(rows)}.values())


def faults(rng: random.Random) -> Iterator[dict[str, Any]]:
    """What is found of each kind of fault that is planted."""
    rows = single_pairs()
    rng.shuffle(rows)
    held, rows = rows[:100], rows[100:]
    number = round(_SHARE * len(rows))
    repeated_rows = rng.sample(rows, number)
    exact = [_respaced(row, rng) for row in repeated_rows]
    turned_rows = rng.sample(rows, number)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in turned_rows]
    test = [*held, *(_respaced(row, rng) for row in rng.sample(rows, 50))]
    leaked = range(len(held) + 1, len(test) + 1)
    found = _found([*rows, *exact, *turned], test)
    added = range(len(rows) + 1, len(rows) + 2 * number + 1)
    yield _judged("exact_duplicate", found, added[:number])
    found["contradiction"] &= {*added}  # what they contradict is named too
    both = [at for at, row in zip(added, repeated_rows, strict=False) if row in turned_rows]
    yield _judged("contradiction", found, [*both, *added[number:]])
    yield _judged("shared_prompt", found, leaked)
    drawn = rng.sample(rows, 4 * number)
    near = [_reworded(row, rng, 1 + place % 8) for place, row in enumerate(drawn)]
    same = [
        len(rows) + 1 + place
        for place, (a, b) in enumerate(zip(drawn, near, strict=True))
        if similarity(_whole(a), _whole(b)) >= SAME
    ]
    test = [*held, *({**row, "prompt": _words(row["prompt"], rng, 1)} for row in drawn[:50])]
    found = _found([*rows, *near], test)
    yield {**_judged("near_duplicate", found, same), "reworded": len(near)}
    yield _judged("near_shared_prompt", found, leaked)
    for share in (0.5, 0.6, 0.75):
        biased = [_longer_first(row, rng.random() < share) for row in rows]
        checked = check(datasets.Dataset.from_list(biased), "pairs")
        [bias] = [one for one in checked.findings if one.name == "length_bias"]
        said = bias.level == "warning"
        yield {"fault": "length_bias", "longer_wins": share, "pairs": len(rows), "warned": said}


def _found(rows: Sequence[Row], test: Sequence[Row]) -> dict[str, set[int]]:
    both = (datasets.Dataset.from_list(list(test)), "test")
    checked = check(datasets.Dataset.from_list(list(rows)), "pairs", both)
    return {finding.name: set(finding.rows) for finding in checked.findings}


def _judged(name: str, found: dict[str, set[int]], planted: Iterable[int]) -> dict[str, Any]:
    """How many were planted, found, and both."""
    wanted, got = set(planted), found.get(name, set())
    right = len(wanted & got)
    return {"fault": name, "planted": len(wanted), "found": len(got), "right": right}


def _respaced(row: Row, rng: random.Random) -> Row:
    """The same with other white space and case."""
    return {key: f" {text.replace(' ', '  ', 2).swapcase()}\n" for key, text in row.items()}


def _reworded(row: Row, rng: random.Random, count: int) -> Row:
    return {key: _words(text, rng, count) for key, text in row.items()}


def _words(text: str, rng: random.Random, count: int) -> str:
    """The text with so many of its words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), min(count, len(words))):
        words[place] = "other"
    return " ".join(words)


def _whole(row: Row) -> str:
    return "\n".join(row[key] for key in KEYS)


def _longer_first(row: Row, longer: bool) -> Row:
    short, long = sorted((row["chosen"], row["rejected"]), key=len)
    chosen, rejected = (long, short) if longer else (short, long)
    return {**row, "chosen": chosen, "rejected": rejected}


def mixed(count: int, rng: random.Random) -> Iterator[Row]:
    """Pairs whose prompts and responses are GSM8K sentences at random, as many as they had."""
    rows = single_pairs()
    pools = {key: [s for row in rows for s in row[key].split("\n" if key != "prompt" else ". ")]
             for key in KEYS}  # fmt: skip
    for _ in range(count):
        yield {key: " ".join(rng.choices(pool, k=4)) for key, pool in pools.items()}


def repeated(count: int, rng: random.Random) -> Iterator[Row]:
    """GSM8K pairs again and again, the question's number before it."""
    for number, row in enumerate(itertools.islice(itertools.cycle(single_pairs()), count)):
        yield {**row, "prompt": f"{number}. {row['prompt']}"}


def seconds(rows: Iterable[Row]) -> dict[str, Any]:
    """The time of the command in a process of its own: of the clock and of the processors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_rows(file, rows)
        command = [sys.executable, "-m", "fastdpo", "check", str(file), "-o", f"{folder}/out.json"]
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}
        before, start = os.times(), time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, os.times()
        cpu = after.children_user - before.children_user
        cpu += after.children_system - before.children_system
    return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def labels(rows: list[Row], rng: random.Random, scratch: Path, **keys: Any) -> dict[str, Any]:
    """The area under the ROC curve by which each measure tells swapped pairs from the others."""
    rng.shuffle(rows)
    swapped = np.zeros(len(rows), bool)
    swapped[rng.sample(range(len(rows)), len(rows) // 10)] = True
    given = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if swap else row
        for row, swap in zip(rows, swapped, strict=True)
    ]
    base = TrainConfig(
        model_name_or_path=str(demo_model_path()), use_cpu=True, bf16=False, max_length=512
    )
    columns = score(base, given).columns
    sides = [(np.array(columns[f"{side}_logp"]), np.array(columns[f"{side}_tokens"]))
             for side in ("chosen", "rejected")]  # fmt: skip
    margins = {
        "logp": sides[0][0] - sides[1][0],
        "logp_per_token": sides[0][0] / sides[0][1] - sides[1][0] / sides[1][1],
    }
    halves = (0, 1) if keys["num_train_epochs"] else ()
    if halves:
        margins["reward"] = np.zeros(len(rows))
    for half in halves:
        path = scratch / f"half{half}"
        part = TrainConfig(
            **{**vars_of(base), **keys, "output_dir": str(path), "overwrite_output_dir": True}
        )
        train(part, given[half::2])
        policy = TrainConfig(**{**vars_of(base), "model_name_or_path": str(path),
                                "ref_model_name_or_path": str(demo_model_path())})  # fmt: skip
        other = score(policy, given[1 - half :: 2])
        margins["reward"][1 - half :: 2] = other.columns["margin"]
    return {
        "pairs": len(rows),
        "swapped": int(swapped.sum()),
        "auc": {name: round(area(margin, ~swapped), 4) for name, margin in margins.items()},
    }


def vars_of(config: TrainConfig) -> dict[str, Any]:
    """The keys that a configuration sets beside the defaults."""
    return {name: getattr(config, name) for name in
            ("model_name_or_path", "use_cpu", "bf16", "max_length")}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, write a row for each result, print it."""
    parser = Parser("fastdpo bench check", __doc__)
    parser.add_argument("part", choices=("faults", "speed", "labels"))
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=100_000, help="of speed, and most of labels")
    parser.add_argument("--epochs", type=float, default=2.0, help="of labels; 0 trains nothing")
    parser.add_argument("--data", choices=("demo", "gsm8k"), default="demo", help="of labels")
    options = parser.parse_args(arguments)
    results = record.Results("check", options)
    for turn in range(options.repetitions):
        for row in _part(options, random.Random(turn)):
            print(results.add(part=options.part, turn=turn, **row), flush=True)


def _part(options: Namespace, rng: random.Random) -> Iterator[dict[str, Any]]:
    if options.part == "faults":
        yield from faults(rng)
    elif options.part == "speed":
        for make in (mixed, repeated):
            found = seconds(make(options.pairs, rng))
            yield {"rows": make.__name__, "pairs": options.pairs, **found}
    else:
        rows, keys = single_pairs(), {"learning_rate": 1e-5, "num_train_epochs": options.epochs}
        if options.data == "demo":
            rows = [r for name in ("train", "test") for r in read_rows(_DEMO / f"{name}.jsonl")]
        keys |= {"gradient_checkpointing": False, "save_strategy": "no", "report": False}
        with tempfile.TemporaryDirectory() as folder:
            found = labels(rows[: options.pairs], rng, Path(folder), **keys)
        yield {"data": options.data, **found}


if __name__ == "__main__":
    main()
