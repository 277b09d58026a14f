"""What the operators of `library.py` return, in dtype, shape and layout: for compilers, and where
there is nothing to return.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import empty, names, wide
from .gradients import Dtypes
from .head import OUTPUTS, transposed


def dtypes_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Dtypes:
    """In which the gradients of a call are returned."""
    return Dtypes(hidden.dtype, weight.dtype, (weight if bias is None else bias).dtype)


def kept_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Dtypes:
    """In which those are kept that the forward forms."""
    kept = (torch.float32 if d == torch.float16 else d for d in dtypes_of(hidden, weight, bias))
    return Dtypes(*kept)


def or_empty(
    gradients: Sequence[Tensor | None], like: Tensor, dtypes: Dtypes
) -> tuple[Tensor, ...]:
    """Gradients as an operator returns them."""
    pairs = zip(gradients, dtypes, strict=True)
    return tuple(like.new_empty(0, dtype=dtype) if g is None else g for g, dtype in pairs)


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtypes: Dtypes
) -> tuple[Tensor, ...]:
    """What `Gradients` returns, in shape and layout; empty where it is not needed."""
    tensors = (hidden, weight, weight if bias is None else bias)
    fakes = [
        t.new_empty(t.shape if need else 0, dtype=dtype)
        for t, need, dtype in zip(tensors, needs, dtypes, strict=True)
    ]
    if needs[1] and transposed(weight):
        fakes[1] = weight.new_empty(weight.shape[::-1], dtype=dtypes.weight).T
    return tuple(fakes)


def fake_outputs(hidden: Tensor, dtype: torch.dtype, outputs: str) -> tuple[Tensor, ...]:
    """What `Call.outputs` returns."""
    wanted, count = names(outputs), hidden.shape[0]
    return tuple(
        empty(hidden, name, wide(dtype), count if name in wanted else 0) for name in OUTPUTS
    )
