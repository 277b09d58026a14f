"""The head under every causal language model of transformers that is trained with labels.

A model's own `forward` runs as it is, but for two things that it calls: its head, which only keeps
the states it is given, and its loss, which is made out of those states. What a model does with its
logits in between, soft caps and scales, is seen once from what it makes of known numbers, so that
no model and no name of a setting need be known here.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..cross_entropy import linear_cross_entropy

PROBES = (0.5, -0.5, 1.0, -4.0, 16.0, -64.0, 1e30, -1e30)


class Rule(NamedTuple):
    """A model's logits: `softcap·tanh(logit_scale·z / softcap)` of what its head gives."""

    softcap: float | None
    logit_scale: float


class Unfit(Exception):
    """Why a model computes its loss itself."""


_rules: "WeakKeyDictionary[nn.Module, Rule | None]" = WeakKeyDictionary()
"""Of the models that were trained so far; None where a model keeps its own loss."""


def patch_transformers(undo: bool = False) -> None:
    """Make transformers' causal language models compute their training loss without logits.

    To be called once, before the trainer is made, for the models of this process, made already or
    later. In training mode and with `labels`, the output's `loss` comes from the hidden states and
    `logits` is None; losses and gradients stay the same to rounding, `num_items_in_batch`,
    `shift_labels` and `ignore_index` mean what they do in transformers. In evaluation, without
    labels and under `torch.compile` nothing changes. A model whose head is no plain linear layer
    with its whole weight at hand, or whose loss or logits are made in another way, keeps its own
    loss, and a warning says why. `undo=True` restores all.

    Raises:
        ImportError: transformers is missing.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("patch_transformers needs transformers, which is missing") from error
    begin = PreTrainedModel.__init_subclass__.__func__
    if undo == hasattr(begin, "fastdpo_original"):
        begin = begin.fastdpo_original if undo else _then_patched(begin)
        PreTrainedModel.__init_subclass__ = classmethod(begin)
    _rules.clear()
    for model_class in _subclasses(PreTrainedModel):
        if undo:
            _restore(model_class)
        else:
            _patch(model_class)


def _then_patched(begin: Callable[..., None]) -> Callable[..., None]:
    """`__init_subclass__`, which also patches the class that is made."""

    @functools.wraps(begin)
    def init_subclass(cls: type, **kwargs: Any) -> None:
        begin(cls, **kwargs)
        _patch(cls)

    init_subclass.fastdpo_original = begin  # type: ignore[attr-defined]
    return init_subclass


def _subclasses(parent: type) -> Iterator[type]:
    child: type
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def _patch(model_class: type) -> None:
    forward = vars(model_class).get("forward")
    if not inspect.isfunction(forward) or hasattr(forward, "fastdpo_original"):
        return
    if "loss_function" in inspect.unwrap(forward).__code__.co_names:
        model_class.forward = _without_logits(forward)  # type: ignore[attr-defined]


def _restore(model_class: type) -> None:
    forward = vars(model_class).get("forward")
    if hasattr(forward, "fastdpo_original"):
        model_class.forward = forward.fastdpo_original  # type: ignore[union-attr, attr-defined]


def _without_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a model class, that trains without logits where the model allows it."""
    names = list(inspect.signature(forward).parameters)
    place = names.index("labels") if "labels" in names else None

    @functools.wraps(forward)
    def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if place is not None and len(args) >= place:  # place counts the model itself
            labels = args[place - 1]
        if labels is None or not model.training or torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        if isinstance(
            vars(model).get("_loss_function"), HeadLoss
        ):  # of a class that calls this one
            return forward(model, *args, **kwargs)
        random = None if model in _rules else _random_states(model)
        try:
            return _trained(forward, model, args, kwargs)
        except Unfit as reason:
            if random is not None:  # a second step must not have other random numbers
                _set_random_states(*random)
                _rules[model] = None
                said = f"{type(model).__name__} keeps its own loss: {reason}"
                warnings.warn(f"patch_transformers: {said}", stacklevel=3)
        return forward(model, *args, **kwargs)

    wrapped.fastdpo_original = forward  # type: ignore[attr-defined]
    return wrapped


def _random_states(model: nn.Module) -> tuple[Tensor, list[int], list[Tensor]]:
    """The random state of the host, the devices of the model, and theirs."""
    return torch.get_rng_state(), *get_device_states(*model.parameters())


def _set_random_states(host: Tensor, devices: list[int], states: list[Tensor]) -> None:
    torch.set_rng_state(host)
    set_device_states(devices, states)


def _trained(forward: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    """The model's output, its loss made from hidden states, and no logits."""
    head = _head(model)
    first = model not in _rules
    loss = HeadLoss(model, head)
    with _in_place(model, head, loss):
        try:
            output = forward(model, *args, **kwargs)
        except (Unfit, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if not first or loss.rule is not None:
                raise
            raise Unfit("its logits are used before its loss") from error
    if loss.rule is None:
        raise Unfit("its loss is not transformers' loss function")
    _rules[model] = loss.rule
    if isinstance(output, tuple):
        return (output[0], *output[2:])
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _head(model: Any) -> nn.Linear:
    """The layer that makes the logits.

    Raises:
        Unfit: it is none that this head can take the place of.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model in _rules and _rules[model] is None:
        raise Unfit("as was said")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Unfit(f"its head is a {type(head).__name__}, not a linear layer")
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        raise Unfit("its head has hooks")
    if type(head.weight) not in (Tensor, nn.Parameter):
        raise Unfit(f"its head's weight is a {type(head.weight).__name__}")
    if head.weight.shape != (head.out_features, head.in_features):
        raise Unfit("its head's weight is not all here")
    if model.loss_function is not ForCausalLMLoss:
        raise Unfit("its loss is not ForCausalLMLoss")
    return head


class HeadLoss:
    """In a model's head and its loss function while it is trained: `keep` takes the states, a call
    gives the loss.
    """

    def __init__(self, model: Any, head: nn.Linear) -> None:
        self.head, self.known = head, _rules.get(model)
        self.states: Tensor | None = None
        self.rule: Rule | None = None
        """What the loss was made with, None before it was."""

    def keep(self, states: Tensor) -> Tensor:
        """(..., V) known numbers for logits, one row of them, of the states (..., H)."""
        if self.states is not None:
            raise Unfit("its head is used twice")
        self.states = states
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        row = torch.tensor(PROBES, dtype=wide, device=states.device)
        count = self.head.out_features
        row = row.repeat(-(-count // len(PROBES)))[:count]
        return row.view((1,) * (states.ndim - 1) + (count,))

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """transformers' `ForCausalLMLoss` of the states that were kept."""
        if self.states is None:
            raise Unfit("its loss does not come from its head")
        self.rule = self.known or _rule_of(logits, self.head.out_features)
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss: Tensor = linear_cross_entropy(
            self.states,
            self.head.weight,
            shift_labels.to(self.states.device).view(self.states.shape[:-1]),
            self.head.bias,
            ignore_index=ignore_index,
            softcap=self.rule.softcap,
            reduction="mean" if num_items_in_batch is None else "sum",
            logit_scale=self.rule.logit_scale,
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


@contextmanager
def _in_place(model: Any, head: nn.Linear, loss: HeadLoss) -> Iterator[None]:
    own = vars(model).get("_loss_function")
    # A module's attribute of that name comes before its class's method.
    vars(head)["forward"], vars(model)["_loss_function"] = loss.keep, loss
    try:
        yield
    finally:
        del vars(head)["forward"], vars(model)["_loss_function"]
        if own is not None:
            vars(model)["_loss_function"] = own


def _rule_of(logits: Tensor, count: int) -> Rule:
    """What made these logits of `PROBES`, over and over, of a head of `count` rows.

    Raises:
        Unfit: it is not a scale and a soft cap.
    """
    found = logits.detach().flatten().double().cpu()
    if found.numel() != count or count < len(PROBES):
        raise Unfit("its logits are not all that its head gives")
    given = torch.tensor(PROBES, dtype=torch.float64).repeat(-(-count // len(PROBES)))[:count]
    probe, top = found[0].item(), found[PROBES.index(1e30)].item()
    if 0 < abs(probe) < top < 1e20:
        rule = Rule(top, top * math.atanh(probe / top) / PROBES[0])
        expected = top * torch.tanh(rule.logit_scale * given / top)
    else:
        rule = Rule(None, probe / PROBES[0])
        expected = rule.logit_scale * given
    if not torch.allclose(found, expected, rtol=1e-5, atol=0.0) or not rule.logit_scale > 0:
        raise Unfit("its logits are neither scaled nor capped by a tanh")
    return rule
