"""Who computes a head: ours, and the bare matrix products as the floor (peers: `peers`).

A provider is one function from a `Problem` to its `Passes`, registered by name. It may raise
whatever it has to (a missing package, `Unsupported`): the benchmark writes that down as its row.
All get leaves of the same values.
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Inputs, Problem


class Output(NamedTuple):
    """What a forward gives."""

    value: Tensor
    """What is differentiated: the loss, or the log-probability of each token."""
    logps: Tensor | None
    """Of tokens or of responses."""


class Passes(NamedTuple):
    """What is timed of a provider: its forward and its backward."""

    forward: Callable[[], Output]
    backward: Callable[[Output], tuple[Tensor, ...]]
    in_order: Callable[[Tensor], Tensor] = lambda gradient: gradient
    """The gradient of the hidden states in the order of the inputs."""


class Unsupported(Exception):
    """This provider has no such regime, or does not run on this device or with this version."""


def needs_triton(problem: Problem) -> None:
    """Raise where Triton's kernels cannot run: on a CPU, but for Triton's interpreter."""
    if not problem.inputs.weight.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("Triton needs a GPU")


Function = Callable[[Tensor, Tensor], Output]
Provider = Callable[[Problem], Passes]
PROVIDERS: dict[str, Provider] = {}
BACKENDS = {"fastdpo": "auto", "fastdpo-torch": "torch", "fastdpo-triton": "triton"}
"""Of our providers."""
PRODUCT_TOKENS = 16384


def provider(name: str) -> Callable[[Provider], Provider]:
    """Make a function from a problem to passes available as `--providers NAME`."""

    def add(function: Provider) -> Provider:
        PROVIDERS[name] = function
        return function

    return add


def differentiable(problem: Problem, function: Function, hidden: Tensor | None = None) -> Passes:
    """The passes of a function of (hidden, weight) that autograd can go through."""
    inputs, regime = problem.inputs, problem.regime
    hidden = inputs.hidden if hidden is None else hidden
    hidden = hidden.detach().requires_grad_(regime.hidden)
    weight = inputs.weight.detach().requires_grad_(regime.weight)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def forward() -> Output:
        with torch.set_grad_enabled(bool(leaves)):
            return function(hidden, weight)

    def backward(output: Output) -> tuple[Tensor, ...]:
        upstream = None if output.value.ndim == 0 else inputs.token_grads.to(output.value)
        return torch.autograd.grad(output.value, leaves, upstream) if leaves else ()

    return Passes(forward, backward)


def from_logprob(
    problem: Problem,
    logprob: Callable[[Tensor, Tensor], Tensor],
    wrap: Callable[[Function], Function] = lambda function: function,
) -> Passes:
    """The passes of a function that gives the log-probability of each token; sums and loss are
    PyTorch's, in fp32. `wrap` gets all of that together.
    """

    def function(hidden: Tensor, weight: Tensor) -> Output:
        logps = logprob(hidden, weight)
        if not problem.regime.dpo:
            return Output(logps, logps)
        sums = logps.view(problem.responses, -1).sum(1)
        return Output(problem.loss(sums), sums)

    return differentiable(problem, wrap(function))


def _fastdpo(problem: Problem, backend: str) -> Passes:
    from fastdpo_kernels import linear_dpo_loss, linear_logprob

    targets = problem.inputs.targets
    options: dict[str, Any] = {"backend": backend, "workspace_mib": problem.workspace_mib}
    if not problem.regime.dpo:
        return from_logprob(problem, lambda x, w: linear_logprob(x, w, targets, **options))
    # On the CPU, as a loader has them: cutting into tiles then needs no synchronisation.
    responses = torch.arange(problem.responses)
    response_ids = responses.repeat_interleave(problem.response_tokens)
    ref_logps = torch.zeros(problem.responses, device=targets.device)

    def function(hidden: Tensor, weight: Tensor) -> Output:
        loss, logps = linear_dpo_loss(
            hidden,
            weight,
            targets,
            response_ids,
            responses.view(-1, 2),
            ref_logps,
            beta=problem.beta,
            **options,
        )
        return Output(loss, logps)

    return differentiable(problem, function)


def planned_passes(problem: Problem, name: str) -> float | None:
    """`fastdpo_kernels.head_passes` of a provider; None of one that is not ours, and in a regime
    without gradients.
    """
    regime, weight = problem.regime, problem.inputs.weight
    if name not in BACKENDS or not regime.hidden:
        return None
    from fastdpo_kernels import head_passes

    tokens = problem.inputs.targets.numel()
    unit = 2 * problem.response_tokens if regime.dpo else tokens
    return head_passes(
        range(0, tokens + 1, unit),
        *weight.shape,
        weight.dtype,
        weight.device,
        trained=regime.weight,
        separable=regime.dpo,
        workspace_mib=problem.workspace_mib,
        backend=BACKENDS[name],
    )


@provider("fastdpo")
def fastdpo(problem: Problem) -> Passes:
    """`linear_logprob` and `linear_dpo_loss` with the backend that they choose."""
    return _fastdpo(problem, BACKENDS["fastdpo"])


@provider("fastdpo-torch")
def fastdpo_torch(problem: Problem) -> Passes:
    """The portable path."""
    return _fastdpo(problem, BACKENDS["fastdpo-torch"])


@provider("fastdpo-triton")
def fastdpo_triton(problem: Problem) -> Passes:
    """The fused kernels."""
    needs_triton(problem)
    return _fastdpo(problem, BACKENDS["fastdpo-triton"])


@provider("products")
def products(problem: Problem) -> Passes:
    """The regime's 1, 2 or 3 bare matrix products into buffers made before: the floor.

    All tokens at once up to 16384; of more, so many at a time, which share the buffer of logits.
    """
    x, weight = problem.inputs.hidden, problem.inputs.weight
    tiles = x.split(PRODUCT_TOKENS)
    logits = x.new_empty(tiles[0].shape[0], weight.shape[0])
    dx = torch.empty_like(x) if problem.regime.hidden else None
    dw = torch.empty_like(weight) if problem.regime.weight else None

    def forward() -> Output:
        for tile in tiles:
            torch.mm(tile, weight.T, out=logits[: len(tile)])
        return Output(logits, None)

    def backward(output: Output) -> tuple[Tensor, ...]:
        for number, tile in enumerate(tiles):
            part = logits[: len(tile)]
            if dx is not None:
                torch.mm(part, weight, out=dx.split(PRODUCT_TOKENS)[number])
            if dw is not None:
                torch.addmm(dw, part.T, tile, beta=int(number > 0), out=dw)
        return ()

    return Passes(forward, backward)


def configured(inputs: Inputs) -> dict[str, Provider]:
    """The fused kernels with each candidate of their table of configurations in turn."""
    from fastdpo_kernels.head import Head
    from fastdpo_kernels.triton import configs

    device = inputs.weight.device
    entry = configs.TABLE[configs.card(device)]
    kind = configs.family(Head(inputs.weight), inputs.hidden)
    candidates = entry[kind]

    def make(config: Any) -> Provider:
        def with_it(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                entry[kind] = (config,)
                try:
                    return function(*arguments)
                finally:
                    entry[kind] = candidates

            return wrapped

        def build(problem: Problem) -> Passes:
            forward, backward, _ = fastdpo_triton(problem)
            return Passes(with_it(forward), with_it(backward))

        return build

    return {str(config): make(config) for config in configs.candidates(device, kind)}


def release() -> None:
    """Free what providers keep between calls."""
    # Looked up, so that peers alone can be measured where ours cannot be imported.
    tiles = sys.modules.get("fastdpo_kernels.tiles")
    getattr(tiles, "release_workspace", lambda: None)()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
