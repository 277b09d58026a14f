"""Compiling the kernels of a head before they are needed."""

import torch
from torch import Tensor

from .backends import choose_backend, make_tiles
from .call import inside_operator
from .head import Head, Tiles, workspace_of
from .losses import Loss

_TOKENS = 2


@torch.no_grad()
def compile_ahead(
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    outputs: tuple[str, ...] = (),
    loss: Loss | None = None,
    backend: str = "auto",
) -> None:
    """Compile every kernel that calls for one head will launch, by launching each with two tokens.

    Triton compiles a kernel when it is first launched, some tenths of a second each, and keeps it
    on disk: after this no step, long or short, evaluated or trained on, waits for that. Nothing is
    compiled where no fused kernel runs. A few MB are allocated and freed; nothing is returned.

    Args:
        weight: (V, H), as it will be given to `linear_logprob` or `linear_loss`; its values are
            read, and no gradient is formed. Of a head that is spread over ranks, this rank's rows.
        bias, softcap, logit_scale, temperature, backend: as in `linear_logprob`.
        dtype: of the hidden states, in which the head computes; the weight's unless given.
        outputs: what is asked for beside the log-probabilities where anything is; calls without
            outputs are always among those compiled for.
        loss: what is trained with, which may have kernels of its own.

    Raises:
        ValueError: an unknown backend, or one that does not run on the weight's device.
    """
    vocab, width = weight.shape
    dtype = dtype or weight.dtype
    if not vocab or choose_backend(backend, weight.device, dtype, width) != "triton":
        return
    with inside_operator(weight):
        head = Head(weight, bias, softcap, logit_scale, temperature).cast(dtype)
        tiles = make_tiles("triton", head, workspace_of(None, weight.device))
        weighting = ("log_sum_sq_prob",) if loss is not None and loss.use_weighting else ()
        for names in dict.fromkeys(((), outputs, (*outputs, *weighting))):
            _launch(tiles, names)
        if loss is not None:
            _launch_loss(loss, weight.device)


def _launch(tiles: Tiles, outputs: tuple[str, ...]) -> None:
    """One pass that scores, one that forms a tile, and one that forms it once more."""
    weight = tiles.head.weight
    hidden = weight.new_zeros((_TOKENS, weight.shape[1]))
    targets = torch.zeros(_TOKENS, dtype=torch.int64, device=weight.device)
    stats = tiles.score(hidden, targets, outputs)
    tiles.exponentials(hidden, targets, outputs)
    tiles.probabilities(hidden, targets, stats)


def _launch_loss(loss: Loss, device: torch.device) -> None:
    """The loss of one comparison, where a kernel knows it."""
    from .triton.tiles import add_response_sums, knows, loss_and_coefficients

    if not knows(loss):
        return
    numbers = torch.ones(_TOKENS, dtype=torch.float64, device=device)
    ids = torch.arange(_TOKENS, device=device)
    logps = torch.zeros_like(numbers)
    add_response_sums(logps, numbers.float(), ids)
    loss_and_coefficients(
        logps,
        torch.zeros_like(numbers),
        numbers,
        ids[None],
        numbers[:1],
        loss_type=str(loss.name),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
    )
