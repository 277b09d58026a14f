"""The peers of our head: naive PyTorch, compiled and not, TRL, Liger, Apple and PyTorch's own.

Each runs at its best. Where a peer lets its caller choose how many logits it holds at a time, it
gets the most that the case's workspace limit holds: the defaults (some T·H logits) make chunks of
64 to 128 tokens at the heads of small models, which costs both time and the accuracy of a bf16 dW.
"""

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .cases import Problem
from .providers import (
    PROVIDERS,
    Output,
    Passes,
    Unsupported,
    differentiable,
    from_logprob,
    needs_triton,
    provider,
)

__all__ = ["PROVIDERS"]


@provider("trl")
def trl(problem: Problem) -> Passes:
    """TRL's chunked head, as its `DPOTrainer` calls it but for the optional outputs: none is asked
    for. 32768 columns of the vocabulary at a time, the trainer's constant.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    targets, width = problem.inputs.targets, _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, width, None, 1.0, ()
        )[0]

    return from_logprob(problem, logprob)


def _naive(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    targets = targets.unsqueeze(1)

    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return logits.float().log_softmax(-1).gather(1, targets).squeeze(1)

    return logprob


@provider("naive")
def naive(problem: Problem) -> Passes:
    """The full logits, `log_softmax` in fp32, and autograd."""
    return from_logprob(problem, _naive(problem.inputs.targets))


@provider("naive-compiled")
def naive_compiled(problem: Problem) -> Passes:
    """The naive head and its loss through `torch.compile`, as one graph for exactly these shapes.

    In the default mode: the others search for a product faster than the library's, or replay CUDA
    graphs, which hides launches that take no share of the time at these sizes.
    """

    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    return from_logprob(problem, _naive(problem.inputs.targets), compiled)


def _liger(problem: Problem, pairs: int) -> Passes:
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

    passes = differentiable(problem, function, hidden)
    return passes._replace(in_order=lambda gradient: gradient[order.argsort()].flatten(0, 1))


@provider("liger")
def liger(problem: Problem) -> Passes:
    """Liger's fused DPO, chosen responses first as it wants them, no second head for the reference;
    one pair at a time, its default.
    """
    return _liger(problem, 1)


@provider("liger-8")
def liger_8(problem: Problem) -> Passes:
    """The same, eight pairs at a time."""
    return _liger(problem, 8)


@provider("liger-flce")
def liger_flce(problem: Problem) -> Passes:
    """Liger's fused linear cross entropy without a reduction, the only one that gives the
    log-probabilities that a loss needs; its backward then projects a second time.

    Versions that ignore the gradient of each token there give a wrong dW and are refused. dW is
    accumulated in the weight's own dtype, as by default.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as function
    from liger_kernel.ops import fused_linear_cross_entropy as module

    known = inspect.signature(module.fused_linear_cross_entropy_forward).parameters
    if not {"token_grad_output", "chunk_mem_const"} <= set(known):
        version = importlib.metadata.version("liger-kernel")
        raise Unsupported(f"Liger {version} ignores the gradient of each token in dW")
    needs_triton(problem)
    targets, (vocab, width) = problem.inputs.targets, problem.inputs.weight.shape
    # It rounds T / ⌈V / (budget·H)⌉ up to a power of 2.
    rows, tokens = _rows(problem, problem.inputs.weight.element_size()), targets.numel()
    budget = 1
    while _liger_rows(tokens, vocab, 2 * budget * width) <= rows and budget * width < vocab:
        budget *= 2
    options = inspect.signature(function.forward).parameters
    names = [name for name in options if name not in ("ctx", "_input", "weight", "target")]
    ours = {"reduction": "none", "chunk_mem_const": budget}
    rest = [ours.get(name, options[name].default) for name in names]

    return from_logprob(problem, lambda x, w: -function.apply(x, w, targets, *rest)[0])


def _liger_rows(tokens: int, vocab: int, budget: int) -> int:
    """Tokens of a chunk of Liger's for `budget` logits a token of the batch."""
    rows = -(-tokens // -(-vocab // budget))
    return min(tokens, 1 << (rows - 1).bit_length())


def _rows(problem: Problem, cell_bytes: int) -> int:
    """Tokens whose logits fit the workspace limit."""
    row = problem.inputs.weight.shape[0] * cell_bytes
    return max(1, min(problem.inputs.targets.numel(), (problem.workspace_mib << 20) // row))


@provider("cce")
def cce(problem: Problem) -> Passes:
    """Apple's Cut Cross-Entropy without a reduction, its gradient filter on as by default: it never
    holds logits, so there is nothing to choose.
    """
    from cut_cross_entropy import linear_cross_entropy

    needs_triton(problem)
    targets = problem.inputs.targets
    return from_logprob(
        problem, lambda x, w: -linear_cross_entropy(x, w, targets, reduction="none")
    )


@provider("torch-lce")
def torch_lce(problem: Problem) -> Passes:
    """`torch.nn.functional.linear_cross_entropy` of torch 2.13, chunked and without a reduction:
    its backward projects a second time, and what it gives for bf16 is rounded to bf16.

    Its logits are fp32 where the inputs are not; all other options are its own choice.
    """
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    make_options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or make_options is None:
        raise Unsupported(f"no chunked linear_cross_entropy in torch {torch.__version__}")
    targets = problem.inputs.targets
    options = make_options(batch_chunk_size=_rows(problem, 4))
    probe = problem.inputs.hidden.new_ones(2, 2)
    with warnings.catch_warnings():
        # It warns when it does not take the chunked path and builds the full logits instead.
        warnings.simplefilter("error", UserWarning)
        try:
            function(probe, probe, targets[:2] * 0, reduction="none", options=options)
        except UserWarning as error:
            raise Unsupported(f"torch {torch.__version__}: {error}") from None

    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        return -function(hidden, weight, targets, reduction="none", options=options).float()

    return from_logprob(problem, logprob)
