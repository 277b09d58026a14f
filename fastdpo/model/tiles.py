"""Token-wise modules of a layer, an MLP or a norm, run in tiles of some tokens.

What such a module computes on its way (an MLP's two products of S × intermediate values, a norm's
fp32 copies) is needed for one tile at a time. The backward recomputes each tile from the module's
input, so that input is all that is kept, and adds the tiles' weight gradients up.

Under gradient checkpointing the layer is recomputed first. That recomputation ends with the last
tensor that the layer's own backward needs, which for most architectures is the input of the MLP:
it is kept by a node of its own ahead of the tiles, so the MLP is not run a third time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from .frozen import compare, compute_dtype, frozen_state
from .head import base_causal_lm
from .layers import layers_of

PROBE_TOKENS, PROBE_TILE = 7, 3


def tile_layers(model: nn.Module, tokens: int) -> str:
    """Run the MLPs and the norms of `model`, which may be a PeftModel, in tiles of `tokens` tokens.

    Call it under the autocast that training uses, before or after adapters are added. Rows of
    `tokens` tokens and fewer run whole. Each module is first proved to be token-wise on random
    tokens; what is not, and mixtures of experts, are left alone.

    Returns:
        One line that says what runs in tiles and what does not.

    Raises:
        ConfigError: nothing in the model can run in tiles.
    """
    base = base_causal_lm(model)
    counts, left = {"MLPs": 0, "norms": 0}, set()
    with frozen_state(base):
        for kind, module in candidates(base):
            if _is_token_wise(module, base):
                run_in_tiles(module, tokens)
                counts[kind] += 1
            elif kind == "MLPs":
                left.add(type(module).__name__)
    if not any(counts.values()):
        raise ConfigError(
            f"layer_tile_tokens: {type(base).__name__} has no MLPs or norms that are token-wise; "
            "leave it unset"
        )
    done = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    whole = f"; not {', '.join(sorted(left))}, which is not token-wise" if left else ""
    return f"{done} in tiles of {tokens} tokens{whole}"


def candidates(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """MLPs and norms of the layers, and the norm after the last one."""
    layers = layers_of(base)
    stacks = [m for m in base.children() if any(layer in m.modules() for layer in layers)]
    for owner in [*layers, *stacks]:
        for name, child in owner.named_children():
            # torch's own LayerNorm is one kernel and keeps nothing but its input.
            if type(child).__name__.endswith("Norm") and not isinstance(child, nn.LayerNorm):
                yield "norms", child
            elif name == "mlp" and owner in layers:
                yield "MLPs", child


def _is_token_wise(module: nn.Module, base: Any) -> bool:
    """Whether tiles of a few random tokens give what all of them together give."""
    if hasattr(module, "experts"):  # each tile would read every expert's weights
        return False
    weight = base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    size = base.config.get_text_config().hidden_size
    hidden = torch.randn(1, PROBE_TOKENS, size, generator=generator).to(weight.device, weight.dtype)
    try:
        whole = module(hidden)
        tiles = torch.cat([module(tile) for tile in hidden.split(PROBE_TILE, dim=1)], dim=1)
    except (RuntimeError, TypeError, ValueError):  # other arguments, another shape, a tuple
        return False
    if not isinstance(whole, Tensor) or whole.shape != hidden.shape:
        return False
    difference, tolerance = compare(tiles, whole, compute_dtype(base, weight.dtype))
    return difference <= tolerance


def run_in_tiles(module: Any, tokens: int) -> None:
    # Bound methods, not closures: a deep copy of the module (peft's modules_to_save) has to run
    # its own weights.
    if not hasattr(module, "_whole_forward"):
        module._whole_forward = module.forward
        module.forward = MethodType(_forward, module)
    module._tile_tokens = tokens


def run_whole(model: nn.Module) -> None:
    """Undo `run_in_tiles` in every part of a model."""
    for module in model.modules():
        if "_whole_forward" in vars(module):
            del module.forward, module._whole_forward


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A module's forward, in tiles where it was called with hidden states (B, S, …) alone."""
    hidden = args[0] if args else None
    if len(args) != 1 or kwargs or not isinstance(hidden, Tensor) or hidden.dim() != 3:
        return module._whole_forward(*args, **kwargs)
    tile = max(1, module._tile_tokens // hidden.shape[0])
    if hidden.shape[1] <= tile:
        return module._whole_forward(hidden)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if not torch.is_grad_enabled() or not (weights or hidden.requires_grad):
        return _run(module._whole_forward, hidden, tile)
    # The anchor makes a node even where the hidden states need no gradient.
    kept = _Keep.apply(hidden, torch.empty(0, requires_grad=True))
    return _Tiles.apply(kept, kept.grad_fn, hidden.requires_grad, module, tile, *weights)


def _run(function: Callable[[Tensor], Tensor], hidden: Tensor, tile: int) -> Tensor:
    """function(hidden) of (B, S, …), tile by tile into one tensor."""
    output = None
    for start in range(0, hidden.shape[1], tile):
        piece = hidden[:, start : start + tile]
        result = function(piece.contiguous())
        if output is None:
            output = result.new_empty((*hidden.shape[:2], *result.shape[2:]))
        output[:, start : start + tile] = result
    assert output is not None
    return output


class _Keep(torch.autograd.Function):
    """The identity, whose node keeps its input for `_Tiles`, before any tile has run."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


class _Tiles(torch.autograd.Function):
    """A token-wise module in tiles; recomputes each one in the backward.

    Weight gradients come back as one sum a weight, as from the whole module, so that hooks on the
    weights run once. They are summed in fp32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, keeper: Any, wanted: bool, module: Any, tile: int, *weights: Tensor
    ) -> Tensor:
        ctx.keeper, ctx.wanted, ctx.state = keeper, wanted, _State(kept)
        ctx.module, ctx.tile, ctx.weights = module, tile, weights
        return _run(module._whole_forward, kept, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.keeper.saved_tensors
        into = torch.empty_like(hidden) if ctx.wanted else None
        sums: list[Tensor | None] = [None] * len(ctx.weights)
        with ctx.state.random_numbers():
            for start in range(0, hidden.shape[1], ctx.tile):
                part = slice(start, start + ctx.tile)
                piece = hidden[:, part].detach().contiguous().requires_grad_(ctx.wanted)
                with torch.enable_grad(), ctx.state.autocast():
                    result = ctx.module._whole_forward(piece)
                sources = [piece, *ctx.weights] if ctx.wanted else list(ctx.weights)
                grads: list[Tensor | None] = list(
                    torch.autograd.grad(result, sources, grad[:, part], allow_unused=True)
                )
                if into is not None:
                    first = grads.pop(0)
                    into[:, part] = 0 if first is None else first
                _add(sums, grads)
        typed = [
            None if total is None else total.to(weight.dtype)
            for total, weight in zip(sums, ctx.weights, strict=True)
        ]
        return into, None, None, None, None, *typed


def _add(sums: list[Tensor | None], grads: list[Tensor | None]) -> None:
    for index, grad in enumerate(grads):
        total = sums[index]
        if grad is None:
            continue
        if total is None:
            sums[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad


class _State:
    """Autocast and random numbers as they are now, for a recomputation later."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.enabled = torch.is_autocast_enabled(self.device.type)
        self.dtype = torch.get_autocast_dtype(self.device.type)
        self.host = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast; without its cache, which may hold weights that were cast without a
        gradient.
        """
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """The generators as they were then; afterwards they are as they are now."""
        with torch.random.fork_rng([] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.host)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
