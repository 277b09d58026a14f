"""The gradients of a head, added up from its tiles."""

from typing import NamedTuple

import torch
from torch import Tensor

from .head import Tiles, transposed
from .products import addmm_, mm


class Needs(NamedTuple):
    """Of which tensors a gradient is wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        """Whether the head is trained."""
        return self.weight or self.bias


class Dtypes(NamedTuple):
    """In which dtypes gradients are wanted."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype


_LEAST = {
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-16,
    torch.float32: 2.0**-25,
    torch.float64: 2.0**-54,
}
"""How far below the coefficient of lse one may be, by the dtype of a tile that it divides."""


def with_lse(
    tiles: Tiles,
    tile: Tensor,
    row_scale: Tensor,
    targets: Tensor,
    logprob: Tensor,
    logit: Tensor,
    coefficients: Tensor,
    of_lse: Tensor,
) -> Tensor:
    """Make of a tile (t, V) for Σ c_t·logp_t one for Σ c_t·logp_t + d_t·lse_t, in place; returns
    what takes the place of c. All others are (t,): what is known of the tokens, c, and d `of_lse`.

    As lse = z_y − logp, the logits of a token get (c − d)·(onehot − softmax) + d·onehot: c − d for
    c, and −d/(c − d) added to the target's entry, which is rounded as a whole. Where c − d is next
    to 0, the other entries are as well: a little above 0 keeps that entry finite.
    """
    c = coefficients - of_lse
    least = of_lse.abs() * _LEAST[tile.dtype]
    c = torch.where(c.abs() < least, least.copysign(c), c)
    ratio = torch.where(of_lse == 0, 0, of_lse / c)
    entry = tiles.head.slope(logit) * (logprob.expm1() - ratio) / row_scale
    tiles.put_targets(tile, targets, torch.where(row_scale == 0, 0, entry))
    return c


class Gradients:
    """Accumulates the gradients of `Σ c_t·logp_t` from tiles, the coefficients kept off the tile.

    The weight's is fp32 (fp64 for fp64) while tiles are added up; a single tile's is rounded once.
    `total` says how many tokens there are in all where `hidden` is not all of them.
    """

    def __init__(
        self,
        tiles: Tiles,
        hidden: Tensor,
        needs: Needs,
        dtypes: Dtypes,
        total: int | None = None,
    ) -> None:
        self._tiles, self._needs, self._dtypes = tiles, needs, dtypes
        self._total = hidden.shape[0] if total is None else total
        self._wide = torch.promote_types(hidden.dtype, torch.float32)
        self.turn_to(hidden)
        self._weight: Tensor | None = None  # (V, H), but (H, V) of a transposed weight
        self._bias: Tensor | None = None
        # fp16 rounds a small coefficient to 0: the sums are kept in units of the largest so far.
        self._unit: Tensor | None = None

    def turn_to(self, hidden: Tensor) -> None:
        """Go on with other tokens (t, H): `hidden` becomes the gradient of theirs, the head's is
        that of all.
        """
        self._x = hidden
        self.hidden: Tensor | None = None
        if self._needs.hidden:
            self.hidden = hidden.new_empty(hidden.shape, dtype=self._dtypes.hidden)

    def add(self, rows: slice, tile: Tensor, scale: Tensor) -> None:
        """Add the contribution of `rows`: tile (t, V), and row_scale times c_t, (t,)."""
        scale = scale * -self._tiles.head.gradient_scale
        if self.hidden is not None:
            self._put_hidden(rows, tile, scale)
        if not self._needs.head:
            return
        if tile.dtype == torch.float16:
            scale = self._in_units(scale)
        if self._needs.weight:
            self._add_weight(rows, tile, scale)
        if self._needs.bias:
            row = scale.unsqueeze(0).to(tile.dtype)
            part = mm(row, tile, self._wide, operands=tile.dtype).squeeze(0)
            self._bias = part if self._bias is None else self._bias.add_(part)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients that were wanted, in `dtypes`."""
        head, weight, bias = self._tiles.head, None, None
        if self._needs.weight:
            columns = transposed(head.weight)
            like = head.weight.T if columns else head.weight
            weight = self._finished(self._weight, like, self._dtypes.weight)
            weight = weight.T if columns else weight
        if self._needs.bias and head.bias is not None:
            bias = self._finished(self._bias, head.bias, self._dtypes.bias)
        return self.hidden, weight, bias

    def _put_hidden(self, rows: slice, tile: Tensor, scale: Tensor) -> None:
        assert self.hidden is not None
        out = self.hidden[rows]
        weight, operands = self._tiles.head.weight, self._x.dtype
        in_place = out if out.dtype == self._wide else None
        product = mm(tile, weight, self._wide, operands=operands, out=in_place)
        torch.mul(product, scale.unsqueeze(1), out=out)

    def _add_weight(self, rows: slice, tile: Tensor, scale: Tensor) -> None:
        x = (self._x[rows] * scale.unsqueeze(1)).to(tile.dtype)
        operands = self._x.dtype
        a, b = (x.T, tile) if transposed(self._tiles.head.weight) else (tile.T, x)
        if self._weight is not None:
            addmm_(self._weight, a, b, operands=operands)
            return
        single = x.shape[0] == self._total and self._unit is None
        dtype = self._dtypes.weight if single else self._wide
        self._weight = mm(a, b, dtype, operands=operands)

    def _in_units(self, scale: Tensor) -> Tensor:
        """Coefficients in units of the largest so far, which the sums are brought to as well."""
        smallest = torch.finfo(scale.dtype).tiny
        unit = scale.abs().amax().clamp(min=smallest)
        if self._unit is not None:
            unit = torch.maximum(unit, self._unit)
            for total in (self._weight, self._bias):
                if total is not None:
                    total.mul_(self._unit / unit)
        self._unit = unit
        return scale / unit

    def _finished(self, total: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
        if total is None:
            return like.new_zeros(like.shape, dtype=dtype)
        if self._unit is not None:
            total.mul_(self._unit)
        return total.to(dtype)
