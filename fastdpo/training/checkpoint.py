"""Checkpoints: what `from_pretrained` loads, and beside it everything that makes a resumed run
equal, bit for bit.

`checkpoint-N/` holds the model or adapter (`save_pretrained`), the tokenizer,
`optimizer.safetensors`, `rng.safetensors`, `trainer_state.json`, `reference.safetensors` where the
reference moves and, written last, `manifest.json` with the size and digest of every file. It
appears by one rename, so a killed process leaves it whole or not at all. Where ranks hold shares
(`saves`), `optimizer` and `reference` are directories; either kind is read by any run.
"""

import json
import logging
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from .. import files
from ..errors import CheckpointError, FastDPOError, one_line
from ..model.save import save_weights
from ..parallel.shares import Stored
from ..parallel.world import ALONE, World
from . import optimizer_state
from .random_state import joined_states, random_state, restore_random_state, state_of

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "trainer_state.json"
OPTIMIZER, REFERENCE = "optimizer", "reference"
_STATE_TYPES = {
    "step": int,
    "num_tokens": int,
    "pending": dict,
    "config": dict,
    "identity": dict,
    "optimizer": list,
    "best": dict,
}


def save_checkpoint(
    path: Path,
    *,
    model: Any,
    tokenizer: Any,
    optimizer: Optimizer | None,
    state: Mapping[str, Any],
    reference: dict[str, torch.Tensor] | None = None,
    randoms: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Write a checkpoint; without an optimizer, one that cannot be resumed (`save_only_model`).
    `reference` is the weights of one that moves, by name; `randoms` the random states of all ranks.
    """
    with files.explain(path), files.temporary_directory(path) as temporary:
        save_model(temporary, model, tokenizer)
        if optimizer is not None:
            tensors, rest = optimizer_state.flatten(optimizer)
            save_file(tensors, temporary / f"{OPTIMIZER}.safetensors")
            if reference is not None:
                save_file(reference, temporary / f"{REFERENCE}.safetensors")
            write_state(temporary, {**state, "optimizer": rest}, randoms or [random_state()])
        digests = {name: fingerprint(temporary / name) for name in files.names_below(temporary)}
        appear(temporary, path, digests)


def write_state(
    path: Path, state: Mapping[str, Any], randoms: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Write what a run goes on from beside the tensors of model and optimizer."""
    save_file(joined_states(randoms), path / "rng.safetensors")
    (path / STATE).write_text(json.dumps(state), encoding="utf-8")


def appear(made: Path, path: Path, digests: Mapping[str, Any]) -> None:
    """Write the manifest and rename the checkpoint, which is whole now. Where there is a directory
    of that name, it was damaged or holds files of the user's, and only a run's own files are
    replaced, the manifest last.
    """
    (made / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    files.flush(made)
    remove(path)
    if not path.exists():
        made.rename(path)
    else:
        (path / MANIFEST).unlink(missing_ok=True)
        names = sorted(files.names_below(made), key=lambda name: name == MANIFEST)
        files.move(names, made, path)
    files.sync(path.parent)


def save_model(
    path: Path, model: Any, tokenizer: Any, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """What `AutoModelForCausalLM` (or peft) and `AutoTokenizer` load, as safetensors; `weights` are
    those of a sharded model.
    """
    save_weights(model, path, weights)
    tokenizer.save_pretrained(path)


def read_state(path: Path, world: World = ALONE) -> dict[str, Any]:
    """The state that was saved with a checkpoint, after a check of all its files, which every rank
    has to see and of which each reads some.

    Raises:
        CheckpointError: files are missing, truncated or changed, or it holds no optimizer state.
    """
    found = world.gather_all((socket.gethostname(), damage(path, world.rank, world.size)))
    for host, problem in found:
        if problem is not None:
            where = "" if world.hosts == 1 else f" (on {host}; every host has to see it)"
            raise CheckpointError(f"{path}: {problem}{where}")
    if not (path / STATE).exists():
        raise CheckpointError(
            f"{path}: holds the model alone (save_only_model), so it cannot be resumed"
        )
    state = files.read_json(path / STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {STATE} is not a mapping in JSON")
    for name, kind in _STATE_TYPES.items():
        optional = name in ("config", "identity", "best")  # earlier versions lack them
        value = state.get(name, {} if optional else None)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{path}: {STATE} holds no {name} that can be read")
    return state


def restore(
    path: Path, state: Mapping[str, Any], optimizer: Optimizer, world: World = ALONE
) -> None:
    """Put the moments and the random state of a verified checkpoint back. What the configuration
    sets (rates, betas, decay) stays as the optimizer has it.

    Raises:
        CheckpointError: it was made with another optimizer or for another model.
    """
    saved = state["optimizer"]
    own = [part.state_dict()["param_groups"] for part in optimizer_state.parts(optimizer)]
    try:
        same = saved[0]["param_groups"][0].keys() == own[0][0].keys() and len(saved) == len(own)
    except (LookupError, TypeError, AttributeError):
        same = False
    if not same:
        raise CheckpointError(
            f"{path}: made with another optimizer than {type(optimizer).__name__}"
        )
    stored = Stored.at(path / OPTIMIZER)
    try:
        exact = optimizer_state.restore(optimizer, stored, saved)
    except (FastDPOError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch's optimizers fail in any way over another one's state
        raise CheckpointError(f"{path}: made for another model ({one_line(error)})") from error
    if not all(world.gather_all(exact)):
        logger.info("optimizer: 8-bit moments in other blocks than before, so rounded once more")
    randoms = state_of(_read_tensors(path / "rng.safetensors"), world.rank)
    if world.rank and not randoms:
        return  # there were fewer ranks: what it draws is its own already
    try:
        restore_random_state(randoms, state.get("python_rng"))
    except Exception as error:  # as above
        raise CheckpointError(
            f"{path}: its random state cannot be set ({one_line(error)})"
        ) from error


def read_reference(path: Path) -> Stored:
    """The weights of the reference that was moving, from a verified checkpoint.

    Raises:
        CheckpointError: it holds none.
    """
    stored = Stored.at(path / REFERENCE)
    if not stored.sizes:
        raise CheckpointError(
            f"{path}: holds no {REFERENCE}.safetensors, which a run with sync_ref_model goes on "
            "from"
        )
    return stored


def find_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there are none at all; damaged ones are
    passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(output_dir)):
        problem = damage(path)
        if problem is None:
            for passed in problems:
                logger.warning("%s; trying the one before it", passed)
            return path
        problems.append(f"{path}: {problem}")
    if problems:
        raise CheckpointError(
            f"resume_from_checkpoint: no checkpoint is whole: {'; '.join(problems)}"
        )
    return None


def damage(path: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with a checkpoint directory, None if nothing is. Each rank of `size` reads some
    of its files.
    """
    if not path.is_dir():
        return "there is no such checkpoint directory"
    manifest = _manifest(path)
    if manifest is None:
        return f"{MANIFEST} is missing or no JSON, so the checkpoint is incomplete"
    if not manifest:
        return f"{MANIFEST} names no files, so the checkpoint is incomplete"
    for number, (name, expected) in enumerate(manifest.items()):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        written = file.stat().st_size
        if written != expected["bytes"]:
            return f"{name} has {written} bytes where {expected['bytes']} were written"
        try:
            same = number % size != rank or fingerprint(file) == expected
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not what was written (digest differs)"
    return None


def rotate(output_dir: Path, keep: int | None, newest: int, best: Path | None = None) -> None:
    """Remove the oldest checkpoints so that `keep` are left up to the one of step `newest`, which
    stays, as the `best` one does. A later one was damaged and passed over when the run was resumed:
    it must not count as kept.
    """
    if keep is None:
        return
    found = [p for p in checkpoints(output_dir) if step_of(p) <= newest]
    best = best and best.resolve()
    stay = {p for p in found if p.resolve() == best or step_of(p) == newest}
    others = [p for p in found if p not in stay]
    for path in others[: max(0, len(others) - max(0, keep - len(stay)))]:
        remove(path)


def remove(path: Path) -> None:
    """Remove the files that a run wrote into a checkpoint, and the directory where that is all."""
    manifest = None if path.is_symlink() else _manifest(path)
    with files.explain(path):
        if manifest is not None:
            # The manifest last: what a kill leaves is known to be ours, and to be incomplete.
            files.remove((*manifest, MANIFEST), path)
        with suppress(OSError):  # not empty, or a link
            path.rmdir()


def checkpoints(output_dir: Path) -> list[Path]:
    """The directories named checkpoint-N, by N, whole or not."""
    named = output_dir.glob("checkpoint-*")
    return sorted((p for p in named if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.partition("-")[2])


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is not whole safetensors ({one_line(error)})") from error


def _manifest(path: Path) -> dict[str, dict[str, Any]] | None:
    """What a checkpoint's files were when they were written; None where that is not known."""
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not files.are_inside(manifest):
        return None
    kinds = (isinstance(entry, dict) and entry.keys() for entry in manifest.values())
    return manifest if all(keys == {"bytes", "xxh3_128"} for keys in kinds) else None


def fingerprint(file: Path) -> dict[str, Any]:
    """The size and the digest of a file."""
    content = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            content.update(block)
    return {"bytes": file.stat().st_size, "xxh3_128": content.hexdigest()}
