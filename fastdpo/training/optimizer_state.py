"""An optimizer's state as plain tensors and numbers, for safetensors and JSON, and back, exactly.

Four things are not plain: an offloading optimizer is many small ones, torchao's 8-bit moments are
tensors made of tensors, bitsandbytes wraps its own and shares lookup tables among them, and where
ranks hold shares of the weights, the moments are shares as well (DTensors).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..parallel.shares import Stored
from .blocks import Blocks, pieces_of

_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that hold the state: itself, or those of torchao's CPUOffloadOptimizer."""
    hosts = getattr(optimizer, "optim_dict", None)
    if hosts is None:
        return [optimizer]
    small = optimizer.d_opt  # type: ignore[attr-defined]
    return [*hosts.values(), *([small] if small else [])]


@torch.no_grad()
def flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Its tensors, which share no memory, and the rest as JSON can hold it, for every part. Of
    moments in blocks, a rank that holds shares names its own stretch.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    rest = []
    for number, part in enumerate(parts(optimizer)):
        state = part.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        subclasses: dict[str, list[Any]] = {}
        for index, values in state["state"].items():
            named: dict[str, Any] = {**values, **values.get(_BITSANDBYTES_WRAPPER, {})}
            for name, value in named.items():
                if name == _BITSANDBYTES_WRAPPER:
                    continue
                key = f"{number}.{index}.{name}"
                if not isinstance(value, Tensor):
                    numbers.setdefault(str(index), {})[name] = value
                elif isinstance(value, DTensor) and not hasattr(part, "block_size"):
                    tensors[key] = value
                elif (pieces := pieces_of(value)) is not None:
                    tensors |= {f"{key}.{piece}": _own(v, seen) for piece, v in pieces.items()}
                    subclasses |= _subclass(f"{index}.{name}", value)
                else:
                    tensors[key] = _own(value, seen)
        groups = [{k: plain(v) for k, v in group.items()} for group in state["param_groups"]]
        rest.append({"param_groups": groups, "numbers": numbers, "subclasses": subclasses})
    return tensors, rest


def restore(optimizer: Optimizer, stored: Stored, rest: list[dict[str, Any]]) -> bool:
    """Put what `flatten` gave into an optimizer of the same kind over the same weights, in whatever
    shares they were and are. Returns whether everything is exactly as it was; blocks of 8-bit
    moments may have to be cut anew.

    Raises:
        ValueError, LookupError, CheckpointError: it is of another kind, or over other weights.
    """
    own = parts(optimizer)
    if len(own) != len(rest):
        raise ValueError(f"{len(rest)} optimizers where this run has {len(own)}")
    states: list[dict[int, dict[str, Any]]] = [
        {int(index): dict(values) for index, values in part["numbers"].items()} for part in rest
    ]
    weights = [[p for group in part.param_groups for p in group["params"]] for part in own]
    targets, blocks = dict[str, Tensor](), dict[tuple[int, int, str], Blocks]()
    for key in stored.sizes:
        first, second, name = key.split(".", 2)
        number, index = int(first), int(second)
        name, _, piece = name.partition(".")
        weight = weights[number][index]
        if piece:
            place = number, index, name
            blocks.setdefault(place, Blocks(own[number], weight, stored)).add(piece, key)
            continue
        shares = isinstance(weight, DTensor) and stored.sizes[key] == weight.shape
        dtype = stored.dtypes[key]
        targets[key] = (
            torch.empty_like(weight, dtype=dtype)
            if shares
            else torch.empty(stored.sizes[key], dtype=dtype)
        )
        states[number].setdefault(index, {})[name] = targets[key].detach()
    stored.read(targets)
    exact = True
    for (number, index, name), found in blocks.items():
        signed, _ = rest[number]["subclasses"].get(f"{index}.{name}", [name == "exp_avg", None])
        states[number].setdefault(index, {})[name] = found.join(signed)
        exact &= found.exact
    for part, saved, state in zip(own, rest, states, strict=True):
        groups = part.state_dict()["param_groups"]
        if [g["params"] for g in groups] != [g["params"] for g in saved["param_groups"]]:
            raise ValueError("its weights are grouped otherwise")
        part.load_state_dict({"state": state, "param_groups": groups})
    _refresh(optimizer)
    return exact


def _subclass(place: str, value: Tensor) -> dict[str, list[Any]]:
    """How a tensor of torchao's is to be read, where it is one."""
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    if not hasattr(local, "codes"):
        return {}
    signed, dtype = local.__tensor_flatten__()[1]
    return {place: [signed, str(dtype)]}


def plain(value: Any) -> Any:
    """Tensors in it as numbers."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _own(value: torch.Tensor, seen: set[int]) -> torch.Tensor:
    """The tensor, or a copy where its memory is among those seen: safetensors refuses to share."""
    value = value.detach().contiguous()
    address = value.untyped_storage().data_ptr()
    if address in seen:
        return value.clone()
    seen.add(address)
    return value


@torch.no_grad()
def _refresh(optimizer: Any) -> None:
    """Mend what loading leaves behind: host copies of the old weights, groups that the schedule
    would no longer reach, moments outside of paged memory.
    """
    if getattr(optimizer, "d_opt", None):
        optimizer.d_param_groups = optimizer.d_opt.param_groups
    for device, host in getattr(optimizer, "param_d2h_map", {}).items():
        host.copy_(device)
    if getattr(optimizer, "is_paged", False):
        for parameter, state in optimizer.state.items():
            for name in ("state1", "state2"):
                page = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = page.copy_(state[name])
