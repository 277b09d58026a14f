"""The projection to the vocabulary, and what a device must offer to score through it.

`Head` says what the logits are; `Tiles` is the interface between the regimes (`regimes.py`), which
know what has to be computed when, and a device's way of computing it: `tiles.py` in plain PyTorch,
`triton/` in fused kernels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem, Selection

OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob", "lse")
_LEAST_MIB, _MOST_MIB = 512, 2048
_SHARE = 36
"""Of a device's memory a workspace is one in so many: 2 GiB of 72 and more, which large heads need
for a tile of 4096 tokens and more, and less than 3 % of any device that has 18 GiB.
"""

Stats = dict[str, Tensor]
"""Per-token results by name: "logprob", "lse" and any other of `OUTPUTS`, each (t,)."""


def transposed(weight: Tensor) -> bool:
    """Whether (V, H) is the view of a matrix (H, V) whose rows are contiguous; its gradient is laid
    out like it.
    """
    vocab, width = weight.shape
    return width > 1 and weight.stride(0) == 1 and weight.stride(1) >= vocab > 1


def default_workspace_mib(memory: int) -> int:
    """MiB of a workspace on a GPU with so many bytes of memory."""
    return max(_LEAST_MIB, min(_MOST_MIB, (memory >> 20) // _SHARE))


def workspace_of(workspace_mib: int | None, device: torch.device) -> int:
    """MiB of a workspace; None is what suits the device: 512 but for a GPU that is there."""
    if workspace_mib is not None:
        return workspace_mib
    if device.type != "cuda" or not torch.cuda.is_available():
        return _LEAST_MIB
    return default_workspace_mib(torch.cuda.get_device_properties(device).total_memory)


class WorkspaceBytes(NamedTuple):
    """The memory that a call needs for its tiles; plain PyTorch on a CPU keeps `tile` until the
    next call, and `linear_logprob` with a trained head until the next call or the end of its graph;
    all else is freed with the call.
    """

    tile: int
    beside: int
    """What is made from a tile or for it: partial sums, blocks of it, products (t, H)."""


@dataclass(frozen=True)
class Head:
    """A projection to the vocabulary: z = cap·tanh(scale·(x·Wᵀ + b)/cap) / temperature."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    @property
    def gradient_scale(self) -> float:
        """d z / d (x·Wᵀ + b) without the soft cap's own factor."""
        return self.logit_scale / self.temperature

    def slope(self, logits: Tensor) -> Tensor:
        """The soft cap's derivative where these logits came out, in their shape."""
        if self.softcap is None:
            return torch.ones_like(logits)
        return 1 - (logits * (self.temperature / self.softcap)).square()

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same head with weight and bias detached, in `dtype` and laid out as engines read it:
        the weight is copied only where neither its rows nor its columns are contiguous.
        """
        weight = self.weight.detach().to(dtype)
        if weight.stride(1) != 1 and not transposed(weight):
            weight = weight.contiguous()
        bias = None if self.bias is None else self.bias.detach().to(dtype).contiguous()
        return replace(self, weight=weight, bias=bias)


@dataclass(frozen=True)
class Layout(ABC):
    """How the tiles of a head (V, H) that computes in `dtype` are cut on a kind of device."""

    vocab: int
    width: int
    dtype: torch.dtype
    device: str
    workspace_mib: int
    outputs: tuple[str, ...] = OUTPUTS
    """What a call asks for beside "logprob" and "lse", some of which take room."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many tokens a tile may hold."""

    @property
    def projects_once(self) -> bool:
        """Whether `Tiles.exponentials` is one projection, not `score` and `probabilities`."""
        return True

    @abstractmethod
    def bytes(self, tokens: int, softcap: bool) -> WorkspaceBytes:
        """What a call for so many scored tokens needs, the gradient of the head included."""


class Tiles(ABC):
    """Scores a few thousand tokens at a time through one head, on one device.

    A tile is a (t, V) buffer E such that, for every token of it and every vocabulary entry,

        ∂logp_t / ∂(x_t·Wᵀ + b)_v = −gradient_scale · row_scale_t · E_tv

    so that a coefficient c_t per token touches (t, H) tensors only. Tokens whose target is negative
    are ignored: their statistics and their `row_scale` are 0, and E is finite. A target outside
    the vocabulary makes its log-probability NaN, and row_scale · E.

    Hidden states (t, H) have contiguous rows, targets (t,) int64 are contiguous, and the head comes
    from `Head.cast`, as `begin` makes them.
    """

    head: Head
    rows: int
    """How many tokens a tile may hold."""
    projects_once = True
    """See `Layout`."""

    @abstractmethod
    def empty_tile(self, tokens: int) -> Tensor:
        """(tokens, V) of the workspace, whatever it holds."""

    @abstractmethod
    def score(self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        """ "logprob", "lse" and `outputs` of any number of tokens, 0 included: 2TVH operations."""

    @abstractmethod
    def exponentials(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Stats]:
        """A tile E (t, V), its `row_scale` (t,), and the same statistics as `score`, in one pass.

        The tile is overwritten by the next call.
        """

    @abstractmethod
    def probabilities(self, hidden: Tensor, targets: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        """A tile and its `row_scale` once more, from the statistics that `score` gave."""

    def put_targets(self, tile: Tensor, targets: Tensor, values: Tensor) -> None:
        """Put values (t,) into the entries of the targets (t,), anywhere for those outside the
        vocabulary.
        """
        index = targets.clamp(0, tile.shape[1] - 1).unsqueeze(1)
        tile.scatter_(1, index, values.unsqueeze(1).to(tile.dtype))

    def loss_and_coefficients(
        self,
        problem: Problem,
        tokens: slice,
        stats: Stats,
        logps: Tensor,
        selected: Selection,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """From statistics of tokens to the loss and the coefficient of every token.

        Adds "logprob" (t,) of the range `tokens` to the responses' `logps` (R,) fp64 in place;
        returns the loss () fp64 of the units `selected`, all of whose tokens are in the range, and
        with `differentiate` ∂loss/∂logp_t (t,) in the dtype of "logprob". The index tensors of
        `problem` are on the tiles' device. An engine may do it in one kernel where it knows the
        loss by its name.
        """
        return problem.loss_and_coefficients(tokens, stats, logps, selected, differentiate)
