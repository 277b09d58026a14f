"""Scoring N-best groups: ours beside padded batches through the model's own logits, in turns.

    python -m bench.score --groups 12 --repetitions 3 --shots 4

GSM8K questions with five solutions each, on SmolLM2-135M-Instruct, after as many solved questions
as `shots` says, as base models are given them.
`padded` is what a script on transformers does: batches of 8 whole sequences in the order of the
rows, all logits, log-softmax, gather; `sorted` the same with sequences of like length together.
A figure is the median over the turns of response tokens a processor second, ours over theirs, on
one thread: what runs beside it does not count. Rows go to
bench/results/score-cpu.jsonl, one a turn.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM

from fastdpo import TrainConfig
from fastdpo.data.groups import Group
from fastdpo.demo.model import demo_model_path
from fastdpo.scoring.responses import ResponseScorer, load_response_scorer
from fastdpo.scoring.rows import make_encoder, windows

from . import data
from .cli import Parser
from .report import record

BATCH = 8
Scores = list[list[float]]


@torch.no_grad()
def padded(model: torch.nn.Module, groups: Sequence[Group], by_length: bool) -> Scores:
    """Log-probabilities of every response, from padded batches of whole sequences."""
    places = [(i, r) for i, group in enumerate(groups) for r in range(len(group.responses))]
    if by_length:
        places.sort(key=lambda p: len(groups[p[0]].prompt) + len(groups[p[0]].responses[p[1]]))
    found = [[0.0] * len(group.responses) for group in groups]
    for start in range(0, len(places), BATCH):
        some = places[start : start + BATCH]
        prompts = [torch.from_numpy(groups[i].prompt).long() for i, _ in some]
        answers = [torch.from_numpy(groups[i].responses[r]).long() for i, r in some]
        sequences = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        tokens = logps.gather(-1, ids[:, 1:, None])[..., 0]
        for line, (i, r) in enumerate(some):
            first = len(prompts[line]) - 1
            found[i][r] = float(tokens[line, first : first + len(answers[line])].double().sum())
    return found


def after_shots(rows: Sequence[dict[str, Any]], count: int, shots: int) -> list[dict[str, Any]]:
    """The first `count` groups, their prompts after `shots` questions, each with its first right
    solution, from the end of the rows.
    """
    solved = [row for row in reversed(rows[count:]) if max(row["scores"]) == 1][:shots]
    told = "".join(
        f"{row['prompt']}\n{row['responses'][row['scores'].index(1)]}\n\n" for row in solved
    )
    return [{**row, "prompt": f"{told}{row['prompt']}\n"} for row in rows[:count]]


def cases(scorer: ResponseScorer, groups: Sequence[Group]) -> dict[str, Callable[[], Scores]]:
    """Each way to score the same groups."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    return {
        "fastdpo": lambda: [one.logps.tolist() for one in scorer(groups)],
        "padded": lambda: padded(model, groups, by_length=False),
        "sorted": lambda: padded(model, groups, by_length=True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Score in turns, write a row a turn, print the medians."""
    parser = Parser("fastdpo bench score", __doc__)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--shots", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = data.gsm8k_groups()
    if rows is None:
        parser.error("the GSM8K rows are not beside the repository")
    config = TrainConfig(
        model_name_or_path=str(demo_model_path()), use_cpu=True, bf16=False, max_length=2048
    )
    scorer = load_response_scorer(config)
    dataset = datasets.Dataset.from_list(after_shots(rows, options.groups, options.shots))
    encoder = make_encoder(dataset, scorer.tokenizer, "gsm8k", config.max_length, scorer.vocab_size)
    groups = [group for some, _ in windows(dataset, encoder) for group in some]
    tokens = sum(len(response) for group in groups for response in group.responses)
    prompt_tokens = sum(len(group.prompt) for group in groups)
    torch.set_num_threads(1)
    results = record.Results("score", options, torch.device("cpu"))
    ways, turns = cases(scorer, groups), []
    for turn in range(options.repetitions):
        seconds, scores = {}, {}
        for name in sorted(ways, key=lambda name: (list(ways).index(name) + turn) % len(ways)):
            start = time.process_time()
            scores[name] = ways[name]()
            seconds[name] = time.process_time() - start
        flat = {name: torch.tensor([s for g in found for s in g]) for name, found in scores.items()}
        apart = ((flat["fastdpo"] - flat["padded"]).abs() / flat["padded"].abs()).max()
        row = results.add(
            turn=turn,
            groups=len(groups),
            response_tokens=tokens,
            prompt_tokens=prompt_tokens,
            processor_seconds=seconds,
            largest_relative_difference=float(apart),
        )
        turns.append(row["processor_seconds"])
        print(f"turn {turn}: {seconds}, log-probabilities within {float(apart):.1e}", flush=True)
    for name in ways:
        ratios = [seconds[name] / seconds["fastdpo"] for seconds in turns]
        print(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
