"""What the general form of a loss costs beside the one of comparisons alone.

    python -m bench.forms --tokens 1024 --repetitions 15

DPO's sigmoid, forward and backward through a trainable head, as `linear_dpo_loss`, as `linear_loss`
by its name, as `linear_loss` of a function, and as a loss of tokens. In turns, in one process, each
beginning every fourth time. A figure is the median over the turns of the time divided by that of
`linear_dpo_loss` in the same turn. Rows go to bench/results/forms-cpu.jsonl, one a turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from fastdpo_kernels import Comparisons, Responses, linear_dpo_loss, linear_loss
from torch import Tensor
from torch.nn.functional import logsigmoid

from .cli import Parser
from .report import record

HEADS = {"smollm2": (49152, 576), "small": (4096, 64)}


def margins(pairs: Comparisons) -> Tensor:
    """`sigmoid` as a function of a user's own."""
    return -logsigmoid(0.1 * pairs.margins)


def by_tokens(responses: Responses) -> Tensor:
    """As costly as any loss of tokens: a sum over the tokens of each response."""
    assert responses.tokens is not None
    gains = responses.tokens.logps - responses.tokens.ref_logps
    return -logsigmoid(0.1 * responses.tokens.sums(gains, len(responses.logps)))


def forms(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A forward and backward of each form on the same inputs."""
    vocab, width = HEADS[options.head]
    g = torch.Generator().manual_seed(0)
    responses = options.tokens // 64
    hidden = torch.randn(options.tokens, width, generator=g, requires_grad=True)
    weight = (torch.randn(vocab, width, generator=g) * 0.05).requires_grad_()
    targets = torch.randint(0, vocab, (options.tokens,), generator=g)
    ids = torch.arange(responses).repeat_interleave(64)
    pairs = torch.arange(responses).view(-1, 2)
    ref = -torch.rand(responses, generator=g, dtype=torch.float64) * 300
    tokens = -torch.rand(options.tokens, generator=g, dtype=torch.float64) * 10
    head = (hidden, weight, targets, ids)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    return {
        "linear_dpo_loss": step(lambda: linear_dpo_loss(*head, pairs, ref)[0]),
        "linear_loss": step(lambda: linear_loss(*head, pairs, ref, loss="sigmoid").loss),
        "function": step(lambda: linear_loss(*head, pairs, ref, loss=margins).loss),
        "tokens": step(
            lambda: (
                linear_loss(
                    *head,
                    torch.arange(responses),
                    loss=by_tokens,
                    kind="tokens",
                    ref_token_logps=tokens,
                ).loss
            )
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the forms in turns, write a row a turn, print the medians."""
    parser = Parser("fastdpo bench forms", __doc__)
    parser.add_argument("--head", choices=HEADS, default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="in responses of 64")
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args(arguments)
    results = record.Results("forms", options, torch.device("cpu"))
    steps = forms(options)
    for run in steps.values():
        run()
    turns = []
    for turn in range(options.repetitions):
        names = list(steps)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        seconds = {}
        for name in names:
            start = time.perf_counter()
            steps[name]()
            seconds[name] = time.perf_counter() - start
        turns.append(results.add(turn=turn, seconds=seconds)["seconds"])
    for name in steps:
        ratios = [seconds[name] / seconds["linear_dpo_loss"] for seconds in turns]
        print(f"{name}: {statistics.median(ratios):.4f} ({min(ratios):.4f}-{max(ratios):.4f})")


if __name__ == "__main__":
    main()
