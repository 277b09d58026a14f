"""Time, memory and error of a head in every regime: ours, its peers, and the bare products.

    python -m bench.heads --device cuda --heads llama-3.1-8b --tokens 16384 --regimes dpo

All providers of a case get the same inputs (`cases`) and take turns, A B A B, in one process.
Every one has been called three times before the first repetition counts. CUDA is timed by events, a
CPU by the clock. Whatever compiles has graphs of exactly the case's shapes. Gradients are fresh
tensors in each call, as in training, and so, on a CPU, are their page faults; only the bare
products write to buffers made before.

Memory is what one call adds to what was there: on CUDA the allocator's peak, on a CPU the peak of
the allocations that PyTorch's profiler sees, temporaries inside an operation included (the
process's own peak would be that of the largest provider before). `workspace_mib` is that peak
without the returned gradients. `head_passes` is what is planned of ours: operations over T·V·H.

Errors are against fp64, see `Problem.errors`, over all tokens but for dX, of which the first 16384
tokens are compared. Where they are larger than rounding explains (`Problem.refusal`), the rows have
a field `refused` with the reason: such a time counts for nothing.

Rows go to bench/results/heads-<device>.jsonl, one a repetition; a provider that cannot be
imported, lacks the regime or runs out of memory is a row that says so (`measure.failure`).
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fastdpo_kernels.head import workspace_of

from ..cli import Parser, split_lists
from ..report import record
from ..report.heads import head_tables
from .cases import HEADS, REGIMES, Inputs, Problem
from .measure import call, clock, examine, failure, memory_as_errors, own_graphs
from .peers import PROVIDERS
from .providers import Passes, Provider, configured, planned_passes, release

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULTS = {
    "heads": "cpu",
    "regimes": "no_grad,frozen,trainable,dpo",
    "providers": "fastdpo,products,trl,liger,liger-8,liger-flce,cce,torch-lce,naive,naive-compiled",
}
QUICK = {
    "heads": "smollm2",
    "regimes": "dpo",
    "providers": ",".join(name for name in PROVIDERS if name != "fastdpo-torch"),
    "tokens": "512",
    "repeats": 2,
}
"""On a CPU, `fastdpo` is `fastdpo-torch`."""
Case = dict[str, Any]


def run_case(
    problem: Problem, providers: dict[str, Provider], repeats: int, write: Callable[..., None]
) -> None:
    """Examine every provider, then let them take turns; `write` gets each row as it comes."""
    device = problem.inputs.weight.device

    def attempt(name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            write(provider=name, error=failure(error))
        # Not before the error is gone: its frames hold the tensors.
        release()
        return None

    def warm(name: str) -> Passes:
        passes = providers[name](problem)
        call(passes)
        return passes

    facts, ready = {}, {}
    for name, build in providers.items():
        facts[name] = attempt(name, partial(examine, problem, build))
        planned = planned_passes(problem, name)
        if facts[name] and planned is not None:
            facts[name]["head_passes"] = planned
        release()
    for name in (name for name, known in facts.items() if known):
        ready[name] = attempt(name, partial(warm, name))
    for repetition in range(repeats):
        for name in [name for name, passes in ready.items() if passes]:
            times = attempt(name, partial(clock, ready[name], device))
            if times is None:
                ready[name] = None
            else:
                write(provider=name, repetition=repetition, **times, **facts[name])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("fastdpo bench heads", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    known = {"heads": list(HEADS), "regimes": list(REGIMES), "providers": list(PROVIDERS)}
    for name, default in DEFAULTS.items():
        listed = f"of {','.join(known[name])}; default {default}"
        parser.add_argument(f"--{name}", default=default, metavar="A,B", help=listed)
    parser.add_argument("--tokens", default="2048", metavar="A,B")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--workspace-mib", type=int, help="default: what suits the device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--configs", action="store_true", help="every configuration of the fused kernels besides"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="other defaults: every provider at one small head, in a minute on a CPU",
    )
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    split_lists(parser, options, known)
    options.tokens = [int(tokens) for tokens in options.tokens.split(",")]
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    options.workspace_mib = workspace_of(options.workspace_mib, torch.device(options.device))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases, write rows, print the table."""
    options = parse(arguments)
    device, dtype, rows = torch.device(options.device), DTYPES[options.dtype], []
    results = record.Results("heads", options, device)
    for head, tokens in itertools.product(options.heads, options.tokens):
        providers = {name: PROVIDERS[name] for name in options.providers}
        inputs = Inputs.make(head, tokens, dtype, device)
        if options.configs:
            providers |= configured(inputs)
        for regime in options.regimes:
            problem = Problem.make(inputs, REGIMES[regime], options.workspace_mib)
            case = {
                "head": head,
                "vocab": HEADS[head][0],
                "hidden": HEADS[head][1],
                "tokens": tokens,
                "regime": regime,
                "dtype": options.dtype,
                "response_tokens": problem.response_tokens,
                "workspace_limit_mib": problem.workspace_mib,
            }

            def write(case: Case = case, **row: Any) -> None:
                rows.append(results.add(case=case, **row))

            with memory_as_errors(device), own_graphs():
                run_case(problem, providers, options.repeats, write)
            print(f"done: {regime}, {head}, T={tokens}", flush=True)
        del inputs, problem
        release()
    print("\n" + head_tables(rows))
