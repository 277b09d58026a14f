"""What the public functions and the operators accept, checked before anything is computed.

Kernels read memory as they are told to, so a wrong shape, dtype or device has to end here, in one
line that names the argument. Looking at values would make the host wait for a GPU: an index out of
range is a `ValueError` where it lies on the host, and elsewhere becomes one that kernels answer
with NaN and PyTorch with an assertion on the device, so that no number comes out wrong in silence.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    temperature: float,
) -> None:
    """`ValueError` unless these are hidden (..., H), weight (V, H), bias (V,) and targets (...)."""
    if hidden.ndim == 0 or 0 in (hidden.shape[-1], *weight.shape):
        raise ValueError(
            "hidden, weight: expected (..., H) and (V, H) with H and V above 0, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    _check_shape("targets", targets, tuple(hidden.shape[:-1]))
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (V, {hidden.shape[-1]}), got {tuple(weight.shape)} for hidden "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None:
        _check_shape("bias", bias, (weight.shape[0],))
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype not in _FLOATS or tensor.layout != torch.strided):
            raise ValueError(
                f"{name}: expected a dense tensor in fp64, fp32, bf16 or fp16, got {tensor.dtype}"
                f" ({tensor.layout})"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("targets", targets)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} as hidden, got {tensor.device}")
    _check_integers("targets", targets)
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")


def check_packed(hidden: Tensor) -> None:
    """`ValueError` unless hidden is (T, H)."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected (T, H), got {tuple(hidden.shape)}")


def check_problem(
    hidden: Tensor,
    response_ids: Tensor,
    units: Tensor,
    ref_logps: Tensor,
    weights: Tensor | None,
    response_lengths: Tensor | None,
) -> None:
    """`ValueError` unless these are hidden (T, H), response_ids (T,), units (U, k), ref_logps (R,),
    weights (U,) and response_lengths (R,).
    """
    check_packed(hidden)
    _check_shape("response_ids", response_ids, (hidden.shape[0],))
    if ref_logps.ndim != 1:
        raise ValueError(f"ref_logps: expected (R,), got {tuple(ref_logps.shape)}")
    _check_integers("response_ids", response_ids)
    _check_integers("units", units)
    count, responses = units.shape[0], ref_logps.shape[0]
    if weights is not None:
        _check_shape("comparison_weights", weights, (count,))
    if response_lengths is not None:
        _check_shape("response_lengths", response_lengths, (responses,))


def check_comparisons(comparisons: Tensor) -> None:
    """`ValueError` unless comparisons are (C, 2)."""
    if comparisons.ndim != 2 or comparisons.shape[1] != 2:
        raise ValueError(f"comparisons: expected (C, 2), got {tuple(comparisons.shape)}")
    _check_integers("comparisons", comparisons)


def check_units(
    hidden: Tensor, response_ids: Tensor, units: Tensor, kind: str, prompt: bool
) -> None:
    """`ValueError` unless units are of the shape that a kind of loss has, with a column for the
    `prompt` where the loss reads one.
    """
    check_packed(hidden)
    _check_integers("units", units)
    _check_shape("response_ids", response_ids, (hidden.shape[0],))
    pairs = "(U, 3), winner, loser and prompt" if prompt else "(U, 2)"
    expected = {"response": "(U,)", "tokens": "(U,)", "group": "(U, G)"}.get(kind, pairs)
    fits = units.ndim == (1 if expected == "(U,)" else 2)
    if fits and expected == pairs:
        fits = units.shape[1] == 3 or (units.shape[1] == 2 and not prompt)
    if not fits:
        raise ValueError(f"units: expected {expected}, got {tuple(units.shape)}")


def check_constants(
    hidden: Tensor,
    units: Tensor,
    kind: str,
    given: Mapping[str, Tensor],
    weights: Tensor | None,
    ref_token_logps: Tensor | None,
) -> None:
    """`ValueError` unless these are weights (U,), ref_token_logps (T,) and constants (U,), or of
    the shape of `units` where those are groups.
    """
    count = units.shape[0]
    if weights is not None:
        _check_shape("unit_weights", weights, (count,))
    if ref_token_logps is not None:
        _check_shape("ref_token_logps", ref_token_logps, (hidden.shape[0],))
    for name, value in given.items():
        subject = f"given[{name!r}]"
        if not isinstance(value, Tensor):
            raise ValueError(f"{subject}: expected a tensor, got {type(value).__name__}")
        if kind != "group" or value.shape != units.shape:
            _check_shape(subject, value, (count,))


def scored_targets(targets: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Targets in int64, -1 where ignored."""
    targets = targets.long()
    ignored = targets == ignore_index
    of = f"the vocabulary of {vocab}"
    return indices("targets", targets.masked_fill(ignored, 0), vocab, of).masked_fill(ignored, -1)


def indices(name: str, values: Tensor, count: int, of: str) -> Tensor:
    """Indices of `count` things in int64: on the host checked, and elsewhere with `count` for
    negative ones, which PyTorch would take from the end.
    """
    values = values.long()
    if not on_the_host(values):
        return values.masked_fill(values < 0, count)
    outside = (values < 0) | (values >= count)
    if bool(outside.any()):
        raise ValueError(f"{name}: {values[outside][0].item()} is outside {of}")
    return values


def on_the_host(values: Tensor) -> bool:
    return values.device.type == "cpu"


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {tensor.dtype}")
