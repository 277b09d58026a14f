"""An optimizer's state as plain tensors and numbers, for safetensors and JSON, and back, exactly.

Three things are not plain: an offloading optimizer is many small ones, torchao's 8-bit moments are
tensors made of tensors, and bitsandbytes wraps its own and shares lookup tables among them.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from ..extras import need

_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that hold the state: itself, or those of torchao's CPUOffloadOptimizer."""
    hosts = getattr(optimizer, "optim_dict", None)
    if hosts is None:
        return [optimizer]
    small = optimizer.d_opt  # type: ignore[attr-defined]
    return [*hosts.values(), *([small] if small else [])]


def flatten(optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Its tensors, which share no memory, and the rest as JSON can hold it, for every part."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    rest = []
    for number, part in enumerate(parts(optimizer)):
        state = part.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        subclasses: dict[str, list[Any]] = {}
        for index, values in state["state"].items():
            named: dict[str, Any] = {**values, **values.get(_BITSANDBYTES_WRAPPER, {})}
            for name, value in named.items():
                key = f"{number}.{index}.{name}"
                if name == _BITSANDBYTES_WRAPPER:
                    continue
                if hasattr(value, "codes"):
                    pieces, [signed, dtype] = value.__tensor_flatten__()
                    subclasses[f"{index}.{name}"] = [signed, str(dtype)]
                    for inner in pieces:
                        tensors[f"{key}.{inner}"] = _own(getattr(value, inner), seen)
                elif isinstance(value, torch.Tensor):
                    tensors[key] = _own(value, seen)
                else:
                    numbers.setdefault(str(index), {})[name] = value
        groups = [{k: plain(v) for k, v in group.items()} for group in state["param_groups"]]
        rest.append({"param_groups": groups, "numbers": numbers, "subclasses": subclasses})
    return tensors, rest


def restore(
    optimizer: Optimizer, tensors: dict[str, torch.Tensor], rest: list[dict[str, Any]]
) -> None:
    """Put what `flatten` gave into an optimizer of the same kind over the same weights.

    Raises:
        ValueError, KeyError: it is of another kind, or over other weights.
    """
    own = parts(optimizer)
    if len(own) != len(rest):
        raise ValueError(f"{len(rest)} optimizers where this run has {len(own)}")
    states: list[dict[int, dict[str, Any]]] = [
        {int(index): dict(values) for index, values in part["numbers"].items()} for part in rest
    ]
    for key, value in tensors.items():
        number, index, name = key.split(".", 2)
        states[int(number)].setdefault(int(index), {})[name] = value
    for part, saved, state in zip(own, rest, states, strict=True):
        for key, (signed, dtype) in saved["subclasses"].items():
            index, name = key.split(".")
            _join(state[int(index)], name, signed, dtype)
        groups = part.state_dict()["param_groups"]
        if [g["params"] for g in groups] != [g["params"] for g in saved["param_groups"]]:
            raise ValueError("its weights are grouped otherwise")
        part.load_state_dict({"state": state, "param_groups": groups})
    _refresh(optimizer)


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


def _join(state: dict[str, Any], name: str, signed: bool, dtype: str) -> None:
    """Put a torchao 8-bit tensor together from its saved pieces."""
    kind = need("torchao.optim.subclass_8bit", "resume_from_checkpoint").OptimState8bit
    pieces = [state.pop(f"{name}.{inner}") for inner in kind.tensor_attrs]
    state[name] = kind(*pieces, signed, dtype=getattr(torch, dtype.removeprefix("torch.")))


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
