"""What a call of the head costs, before it runs, from where its tokens may be cut."""

from collections.abc import Sequence

import torch

from .backends import layout_of
from .cuts import pieces


def head_passes(
    cuts: Sequence[int],
    vocab: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trained: bool = True,
    separable: bool = True,
    workspace_mib: int | None = None,
    outputs: tuple[str, ...] = (),
    backend: str = "auto",
) -> float:
    """Operations of a loss and its gradient over T·V·H: every product of states or logits with the
    head is 2.

    6 is the least for a trained head: its logits, and two gradients. A unit longer than a tile is
    projected twice but for one tile of it, as are all tokens of any other gradient that do not fit
    one tile: 8 at most. A head that is not trained costs 4. In fp16 the fused kernels project twice
    wherever they make a tile.

    Args:
        cuts: ascending, from 0 to T, where no unit of the loss is cut (`cuts.unit_cuts`); of a loss
            of a whole step 0 and T.
        vocab, width: V and H of the head.
        dtype: what the head computes in.
        device, workspace_mib, backend: as in `workspace_bytes`.
        trained: whether weight or bias have a gradient.
        separable: whether the loss is that of `linear_loss`; False for a gradient of
            `linear_logprob`.
        outputs: what is measured of every token, which takes room from tiles.

    Raises:
        ValueError: as `workspace_bytes`.
    """
    layout = layout_of(
        vocab, width, dtype, device, workspace_mib=workspace_mib, outputs=outputs, backend=backend
    )
    tokens, rows = cuts[-1], layout.rows
    tile = 2 if layout.projects_once else 4
    if not tokens:
        return 0.0
    if not trained:
        return tile + 2.0
    once = tokens if tokens <= rows else 0
    if separable and tokens > rows:
        once = sum(min(rows, piece.stop - piece.start) for piece in pieces(cuts, rows))
    return 4 + (tile * once + 4 * (tokens - once)) / tokens
