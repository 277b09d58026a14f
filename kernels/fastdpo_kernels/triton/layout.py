"""How tiles are laid out for the fused kernels; like `configs`, it can do without Triton."""

from ..head import OUTPUTS, Layout, WorkspaceBytes
from .configs import TABLE

_PITCH = 64
"""Rows of a tile begin at multiples of so many elements, as the copy engine needs it."""
_ROWS = 128


class TritonLayout(Layout):
    """`Layout` for the fused kernels, in whole blocks of tokens where there are several.

    The interpreter's own copies are not counted.
    """

    @property
    def pitch(self) -> int:
        """Elements from one row of a tile to the next."""
        return -(-self.vocab // _PITCH) * _PITCH

    @property
    def rows(self) -> int:
        """A tile and everything beside it stay within `workspace_mib` MiB."""
        row_bytes = self.pitch * self.dtype.itemsize + self._beside(OUTPUTS)
        rows = (self.workspace_mib << 20) // row_bytes
        return max(1, rows if rows < 2 * _ROWS else rows // _ROWS * _ROWS)

    def bytes(self, tokens: int, outputs: tuple[str, ...], softcap: bool) -> WorkspaceBytes:
        rows = min(tokens, self.rows)
        return WorkspaceBytes(rows * self.pitch * self.dtype.itemsize, rows * self._beside(outputs))

    def _beside(self, outputs: tuple[str, ...]) -> int:
        """Bytes for each row of a tile: the partial sums of its blocks, a product (t, H) and states
        (t, H) that carry their coefficients.
        """
        sums = 1 + len({*outputs} - {"lse"})
        blocks = self.vocab // _narrowest_block(self.device) + 1
        return 4 * sums * blocks + self.width * (4 + self.dtype.itemsize)


class TritonShardLayout(TritonLayout):
    """`TritonLayout` for the columns of the widest rank, the same on all of them."""

    def _beside(self, outputs: tuple[str, ...]) -> int:
        """With the states of all ranks, and what is sent and received of their gradients."""
        return super()._beside(outputs) + 3 * self.width * self.dtype.itemsize


def _narrowest_block(device: str) -> int:
    """The fewest columns of a block of logits in any configuration of a kind of device."""
    entries = [entry for arch, entry in TABLE.items() if (arch > 0) == (device == "cuda")]
    return min(c.block_v for entry in entries for family in entry.values() for c in family)
