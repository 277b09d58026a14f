"""How tiles are laid out for the fused kernels; like `configs`, it can do without Triton."""

from dataclasses import dataclass

import torch

from ..head import Head, Layout, WorkspaceBytes
from .configs import TABLE, choose

_PITCH = 64
"""Rows of a tile begin at multiples of so many elements, as the copy engine needs it."""
_ROWS = 128
_VECTORS = 208
"""Bytes of all numbers of a token beside its row: target, anchor, scale, flag, statistics."""


@dataclass(frozen=True)
class TritonLayout(Layout):
    """`Layout` for the fused kernels, in whole blocks of tokens where there are several.

    The interpreter's own copies are not counted.
    """

    block_v: int | None = None
    """Columns of a block of logits; None: the fewest of any configuration for that kind of device,
    for what is planned without it and for ranks that have to cut alike.
    """

    @property
    def pitch(self) -> int:
        """Elements from one row of a tile to the next."""
        return -(-self.vocab // _PITCH) * _PITCH

    @property
    def rows(self) -> int:
        """A tile and everything beside it stay within `workspace_mib` MiB."""
        rows = (self.workspace_mib << 20) // (self.pitch * self.dtype.itemsize + self._beside)
        return max(1, rows if rows < 2 * _ROWS else rows // _ROWS * _ROWS)

    @property
    def projects_once(self) -> bool:
        return self.dtype != torch.float16

    def bytes(self, tokens: int, softcap: bool) -> WorkspaceBytes:
        rows = min(tokens, self.rows)
        return WorkspaceBytes(rows * self.pitch * self.dtype.itemsize, rows * self._beside)

    @property
    def _beside(self) -> int:
        """Bytes for each row of a tile: first the partial sums of its blocks; when those are gone,
        a product (t, H) or states (t, H) that carry their coefficients.
        """
        blocks = -(-self.vocab // (self.block_v or _narrowest_block(self.device)))
        sums = 1 + len({*self.outputs} - {"lse"})
        return max(4 * sums * blocks, self.width * (4 + self.dtype.itemsize)) + _VECTORS


class TritonShardLayout(TritonLayout):
    """`TritonLayout` for the columns of the widest rank, the same on all of them."""

    @property
    def _beside(self) -> int:
        """With the states of all ranks, and what is sent and received of their gradients."""
        return super()._beside + 3 * self.width * self.dtype.itemsize


def block_columns(head: Head, outputs: tuple[str, ...]) -> int:
    """Columns of a block of logits, with partial sums of its own, in a call that asks for
    `outputs`; hidden states may be aligned as the weight is, or not.
    """
    ways = (choose(head, head.weight, outputs, descriptors=way) for way in (True, False))
    return min(config.block_v for config in ways)


def _narrowest_block(device: str) -> int:
    """The fewest columns of a block of logits in any configuration of a kind of device."""
    entries = [
        entry for name, entry in TABLE.items() if (name == "interpreter") == (device != "cuda")
    ]
    return min(c.block_v for entry in entries for family in entry.values() for c in family)
