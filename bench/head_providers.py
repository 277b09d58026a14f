"""Who computes a head: ours, its peers, and the bare matrix products as the floor.

A provider is one function from a `Problem` to a `Step`, registered by name. It may raise whatever
it has to (a missing package, `Unsupported`): the benchmark writes that down as its row. Peers run
with their own defaults, on leaves of the same values.
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .head_cases import Inputs, Problem


class Output(NamedTuple):
    """What a forward gives."""

    value: Tensor
    """What is differentiated: the loss, or the log-probability of each token."""
    logps: Tensor | None
    """Of tokens or of responses."""


class Step(NamedTuple):
    """What is timed."""

    forward: Callable[[], Output]
    backward: Callable[[Output], tuple[Tensor, ...]]
    in_order: Callable[[Tensor], Tensor] = lambda gradient: gradient
    """The gradient of the hidden states in the order of the inputs."""


class Unsupported(Exception):
    """This provider has no such regime."""


Provider = Callable[[Problem], Step]
PROVIDERS: dict[str, Provider] = {}


def provider(name: str) -> Callable[[Provider], Provider]:
    """Make a function from a problem to a step available as `--providers NAME`."""

    def add(function: Provider) -> Provider:
        PROVIDERS[name] = function
        return function

    return add


def differentiable(
    problem: Problem, function: Callable[[Tensor, Tensor], Output], hidden: Tensor | None = None
) -> Step:
    """The step of a function of (hidden, weight) that autograd can go through."""
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

    return Step(forward, backward)


def from_logprob(problem: Problem, logprob: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The step of a function that gives the log-probability of each token; sums and loss are
    PyTorch's, in fp32.
    """

    def function(hidden: Tensor, weight: Tensor) -> Output:
        logps = logprob(hidden, weight)
        if not problem.regime.dpo:
            return Output(logps, logps)
        sums = logps.view(problem.responses, -1).sum(1)
        return Output(problem.loss(sums), sums)

    return differentiable(problem, function)


def _fastdpo(problem: Problem, backend: str) -> Step:
    from fastdpo_kernels import linear_dpo_loss, linear_logprob

    targets = problem.inputs.targets
    options: dict[str, Any] = {"backend": backend, "workspace_mib": problem.workspace_mib}
    if not problem.regime.dpo:
        return from_logprob(problem, lambda x, w: linear_logprob(x, w, targets, **options))
    # On the CPU, as a loader has them: cutting into tiles then needs no synchronisation.
    responses = torch.arange(problem.responses)
    response_ids = responses.repeat_interleave(problem.response_tokens)
    references = torch.zeros(problem.responses, device=targets.device)

    def function(hidden: Tensor, weight: Tensor) -> Output:
        loss, logps = linear_dpo_loss(
            hidden,
            weight,
            targets,
            response_ids,
            responses.view(-1, 2),
            references,
            beta=problem.beta,
            **options,
        )
        return Output(loss, logps)

    return differentiable(problem, function)


@provider("fastdpo")
def fastdpo(problem: Problem) -> Step:
    """`linear_logprob` and `linear_dpo_loss` with the backend that they choose."""
    return _fastdpo(problem, "auto")


@provider("fastdpo-torch")
def fastdpo_torch(problem: Problem) -> Step:
    """The portable path."""
    return _fastdpo(problem, "torch")


@provider("fastdpo-triton")
def fastdpo_triton(problem: Problem) -> Step:
    """The fused kernels."""
    return _fastdpo(problem, "triton")


@provider("products")
def products(problem: Problem) -> Step:
    """The regime's 1, 2 or 3 bare matrix products into buffers made before: the floor."""
    x, weight = problem.inputs.hidden, problem.inputs.weight
    logits = x.new_empty(x.shape[0], weight.shape[0])
    dx = torch.empty_like(x) if problem.regime.hidden else None
    dw = torch.empty_like(weight) if problem.regime.weight else None

    def forward() -> Output:
        return Output(torch.mm(x, weight.T, out=logits), None)

    def backward(output: Output) -> tuple[Tensor, ...]:
        if dx is not None:
            torch.mm(logits, weight, out=dx)
        if dw is not None:
            torch.mm(logits.T, x, out=dw)
        return ()

    return Step(forward, backward)


@provider("trl")
def trl(problem: Problem) -> Step:
    """TRL's chunked head, as its `DPOTrainer` calls it but for the optional outputs: none is asked
    for.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    targets, width = problem.inputs.targets, _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, width, None, 1.0, ()
        )[0]

    return from_logprob(problem, logprob)


@provider("naive")
def naive(problem: Problem) -> Step:
    """The full logits, `log_softmax` in fp32, and autograd."""
    targets = problem.inputs.targets.unsqueeze(1)
    cells = targets.numel() * problem.inputs.weight.shape[0]
    if not targets.is_cuda:
        # Where the CPU's memory runs out, the kernel ends the process instead of raising.
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if free < 20 * cells:
            raise MemoryError(f"needs some {20 * cells >> 20} MiB, {free >> 20} are free")

    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return logits.float().log_softmax(-1).gather(1, targets).squeeze(1)

    return from_logprob(problem, logprob)


def _liger(problem: Problem, pairs: int) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if not problem.regime.dpo:
        raise Unsupported("Liger's fused DPO gives no log-probabilities of tokens")
    head = LigerFusedLinearDPOLoss(
        beta=problem.beta, use_ref_model=False, average_log_prob=False, chunk_size=pairs
    )
    count, length = problem.responses, problem.response_tokens
    order = torch.arange(count).view(-1, 2).T.flatten()
    targets = problem.inputs.targets.view(count, length)[order]
    hidden = problem.inputs.hidden.view(count, length, -1)[order]

    def function(hidden: Tensor, weight: Tensor) -> Output:
        loss, (chosen, rejected, *_) = head(weight, hidden, targets)
        return Output(loss, torch.stack([chosen, rejected], 1).flatten())

    step = differentiable(problem, function, hidden)
    return step._replace(in_order=lambda gradient: gradient[order.argsort()].flatten(0, 1))


@provider("liger")
def liger(problem: Problem) -> Step:
    """Liger's fused DPO, chosen responses first as it wants them, no second head for the reference;
    one pair at a time, its default.
    """
    return _liger(problem, 1)


@provider("liger-8")
def liger_8(problem: Problem) -> Step:
    """The same, eight pairs at a time."""
    return _liger(problem, 8)


@provider("cce")
def cce(problem: Problem) -> Step:
    """Apple's Cut Cross-Entropy without a reduction, its gradient filter on as by default."""
    from cut_cross_entropy import linear_cross_entropy

    targets = problem.inputs.targets
    return from_logprob(
        problem, lambda x, w: -linear_cross_entropy(x, w, targets, reduction="none")
    )


def configured(inputs: Inputs) -> dict[str, Provider]:
    """The fused kernels with each candidate of their table of configurations in turn."""
    from fastdpo_kernels.head import Head
    from fastdpo_kernels.triton import configs

    entry = configs.TABLE[configs.architecture(inputs.weight.device)]
    kind = configs.family(Head(inputs.weight), inputs.hidden)
    candidates = entry[kind]

    def make(config: Any) -> Provider:
        def chosen(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                entry[kind] = (config,)
                try:
                    return function(*arguments)
                finally:
                    entry[kind] = candidates

            return wrapped

        def build(problem: Problem) -> Step:
            step = fastdpo_triton(problem)
            return step._replace(forward=chosen(step.forward), backward=chosen(step.backward))

        return build

    return {str(config): make(config) for config in candidates}


def release() -> None:
    """Free what providers keep between calls."""
    # Looked up, so that peers alone can be measured where ours cannot be imported.
    tiles = sys.modules.get("fastdpo_kernels.tiles")
    getattr(tiles, "release_workspace", lambda: None)()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
