"""What one decoder layer needs, counted on a run of it without numbers.

Activations differ by architecture, precision and adapter in ways that no formula keeps up with. So
the first layer of the model is run forward and backward once on fake tensors, which have shapes,
types and lifetimes and no memory, and the bytes that live at the same time are counted. Attention
alone is replaced, by a stand-in that allocates what the kernel of the planned device would:
formulas are in `_Attention`. A run takes a fraction of a second, however long the row is.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from ..model.head import base_causal_lm, hidden_states
from .shapes import RowShape, decoder_layers

Bytes = dict[str, int]
"""Bytes by component."""

NAME = "fastdpo_plan"
"""The stand-in's name among transformers' attention implementations."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one row in one layer, by component ("layer", "attention").

    Parameters and the gradients that they already have are left out everywhere; the layer's input
    is in `kept` where the backward needs it, in `recomputed` always.
    """

    input: int
    """The hidden states between two layers (S, H)."""
    kept: Bytes
    """Held from the forward to the backward by a layer that is not checkpointed."""
    forward: Bytes
    """Most that is alive during a forward that keeps nothing."""
    backward: Bytes
    """Most that is alive during the backward of a layer that is not checkpointed, `kept` included.
    """
    recomputed: Bytes
    """The same for a checkpointed one: input, recomputation and backward."""
    rest: int
    """What embedding, rotary tables and final norm hold beside the layers."""
    states: int
    """Bytes of one element of the decoder's output."""


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Bytes = {}
        self.label = "layer"
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def known(self, *tensors: Tensor) -> None:
        """Leave these tensors, which are made outside, out of the count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage()._cdata)

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        label, size = self.label, storage.nbytes()
        self.live[label] += size
        weakref.finalize(storage, self._remove, key, label, size)
        if self.live.total() > sum(self.peak.values()):
            self.peak = dict(self.live)

    def _remove(self, key: int, label: str, size: int) -> None:
        self._known.discard(key)
        self.live[label] -= size

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = dict(self.live)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count what is made inside under another name."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before


class _Attention(torch.autograd.Function):
    """Allocates what attention does for query (B, Hq, L, D), key and value (B, Hkv, L, D), with S =
    B·L queries and K gathered keys.

    Kept: query, key and value, gathered where a prompt is shared (2·K·Hkv·D), the output (S·Hq·D)
    and its log-sum-exp (4·S·Hq bytes). One call a segment (`sdpa`) keeps its pieces of the output
    beside the whole, and a mask in the query's type for each rectangle (queries × keys). Backward:
    gradients of all three; flash kernels add up the query's in fp32 (4·S·Hq·D bytes) and make the
    keys' and values' for each query head (2·K·Hq·D).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, probe: Any, masked: int
    ) -> Tensor:
        row: RowShape = probe.row
        batch, heads, length, _ = query.shape
        gathered = row.keys != row.tokens
        with probe.live.labelled("attention"):
            k, v = (
                x.new_empty(row.keys, x.shape[1], x.shape[3]) if gathered else x
                for x in (key, value)
            )
            out = query.new_empty(batch, length, heads, value.shape[3])
            lse = query.new_empty(heads, batch * length, dtype=torch.float32)
            kept = [query, k, v, lse]
            if not probe.flash and row.segments > 1:
                kept.append(torch.empty_like(out))
            if not probe.flash and masked:
                kept.append(query.new_empty(masked))
        ctx.save_for_backward(*kept, out)
        ctx.probe, ctx.row, ctx.shapes = probe, row, (key.shape, value.shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, k, v, *_ = ctx.saved_tensors
        probe, heads = ctx.probe, query.shape[1]
        with probe.live.labelled("attention"):
            dq, dk, dv = (torch.empty_like(x) for x in (query, k, v))
            if probe.flash:
                sums = [query.new_empty(query.shape, dtype=torch.float32)]
                if k.shape[1] != heads:
                    sums += [x.new_empty(ctx.row.keys, heads, x.shape[-1]) for x in (k, v)]
                del sums
            elif ctx.row.segments > 1:
                dq = torch.empty_like(dq)
            if ctx.row.keys != ctx.row.tokens:
                dk, dv = (x.new_empty(shape) for x, shape in zip((k, v), ctx.shapes, strict=True))
        return dq, dk, dv, None, None


class _Join(torch.autograd.Function):
    """A scalar from a layer's output, whose backward gives the layer a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.like = out.shape, out.dtype
        return out.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return grad.new_empty(shape, dtype=dtype)


@dataclass
class LayerProbe:
    """A model of one layer on fake tensors; `of_row` counts what a row needs in it."""

    model: Any
    flash: bool
    """Whether attention is one call of a flash kernel a row, as on a GPU."""
    autocast: torch.dtype | None
    prepare: Callable[[Any], Any] | None = None
    """Applied to the model of one layer: what a run does to its layers (tiles)."""
    live: LiveBytes = field(default_factory=LiveBytes)
    row: RowShape | None = None
    _counted: dict[tuple[RowShape, bool], LayerBytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = _first_layer(self.model)
        _make_fake(self.model, self.mode)
        if self.prepare is not None:
            self.prepare(self.model)
        (self.layer,) = decoder_layers(self.model)

    def of_row(self, row: RowShape, accumulate: bool) -> LayerBytes:
        """The bytes of a row; `accumulate`: parameters have another row's gradient already."""
        key = (row, accumulate)
        if key not in self._counted:
            self._counted[key] = self._count(row, accumulate)
        return self._counted[key]

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", self.autocast)

    def _count(self, row: RowShape, accumulate: bool) -> LayerBytes:
        AttentionInterface.register(NAME, self._attention)
        base_causal_lm(self.model).set_attn_implementation(NAME)
        self.row = row
        for parameter in self.model.parameters():
            parameter.grad = None
        with self.mode:
            x, arguments, rest, states = self._whole()
            if accumulate:
                for parameter in self.layer.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
            kept, backward, _ = self._layer(x, arguments, hold=False)
            if not accumulate:
                for parameter in self.layer.parameters():
                    parameter.grad = None
            _, _, recomputed = self._layer(x, arguments, hold=True)
            forward = self._forward(x, arguments)
        rest = max(0, rest - sum(kept.values()))
        return LayerBytes(x.nbytes, kept, forward, backward, recomputed, rest, states)

    def _whole(self) -> tuple[Tensor, dict[str, Any], int, int]:
        """The layer's input and other arguments in a run of the decoder, the bytes that are held
        after it without its result, and the bytes of an element of that.
        """
        assert self.row is not None
        arguments: dict[str, Any] = {}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
            x = given.pop("hidden_states")
            arguments.update(given, shape=x.shape, dtype=x.dtype)

        def differentiate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # As every layer's input but the first one's, also where the embedding is frozen.
            return output if output.requires_grad else output + anchor

        anchor = torch.zeros((), requires_grad=True)
        embedding = base_causal_lm(self.model).get_input_embeddings()
        hooks = [
            self.layer.register_forward_pre_hook(look, with_kwargs=True),
            embedding.register_forward_hook(differentiate),
        ]
        lines = self.row.sequences
        ids = torch.zeros(lines, self.row.tokens // lines, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        self._follow()
        try:
            with self.live, self._precision():
                states = hidden_states(self.model, input_ids=ids, position_ids=positions)
        finally:
            for hook in hooks:
                hook.remove()
        held, size = self.live.live.total() - states.nbytes, states.element_size()
        x = torch.empty(arguments.pop("shape"), dtype=arguments.pop("dtype"))
        return x, arguments, held, size

    def _layer(
        self, x: Tensor, arguments: dict[str, Any], *, hold: bool
    ) -> tuple[Bytes, Bytes, Bytes]:
        """Kept bytes, the peak of the backward and the peak of both; `hold`: the input stays."""
        leaf = torch.empty_like(x, requires_grad=True)
        self._follow(leaf, *tree_leaves(arguments))
        with self.live:
            given = leaf + 0
            self.live.restart()
            with self._precision():
                out = _first(self.layer(given, **arguments))
            if not hold:
                del given
            held = dict(self.live.live)
            held["layer"] -= out.nbytes
            end = _Join.apply(out)
            del out
            whole = self.live.peak
            self.live.restart()
            end.backward()
            backward = self.live.peak
        return held, backward, max(whole, backward, key=lambda peak: sum(peak.values()))

    def _forward(self, x: Tensor, arguments: dict[str, Any]) -> Bytes:
        self._follow(x, *tree_leaves(arguments))
        with torch.no_grad(), self.live, self._precision():
            self.layer(x, **arguments)
        return self.live.peak

    def _follow(self, *given: Any) -> None:
        """Begin to count, without parameters, their gradients and what is `given`."""
        self.live = LiveBytes()
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters]
        known = (*parameters, *self.model.buffers(), *gradients, *given)
        self.live.known(*(t for t in known if isinstance(t, Tensor)))

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        sliding_window: int | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        assert self.row is not None
        slides = sliding_window is not None and sliding_window < self.row.longest
        masked = self.row.rectangles if slides else self.row.masked
        if self.autocast is not None:
            query, key, value = (t.to(self.autocast) for t in (query, key, value))
        return _Attention.apply(query, key, value, self, masked), None


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _first_layer(model: Any) -> Any:
    """A copy of a model on the meta device with its first decoder layer alone."""
    layers = decoder_layers(model)
    everything = list(layers)
    name = next(n for n, module in model.named_modules() if module is layers)
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, own, nn.ModuleList(everything[:1]))
    try:
        return copy.deepcopy(model)
    finally:
        setattr(holder, own, nn.ModuleList(everything))


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU in place of all parameters and buffers."""
    made: dict[int, tuple[Tensor, Any]] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            with mode:
                empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, empty
        return made[id(tensor)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
