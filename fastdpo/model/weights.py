"""Are a model's files whole, and did all of its weights come from them?

Files are looked at before anything heavy is loaded: what they are, and the headers of safetensors
against their sizes. transformers fills weights that a checkpoint lacks with random numbers and
shows a table; here that is an error.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ModelError, some

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
)
_LFS = b"version https://git-lfs"
_INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


def lies_there(file: Path) -> bool:
    """Whether there is something of that name, be it a link that leads nowhere."""
    return file.exists() or file.is_symlink()


def check_file(file: Path) -> None:
    """Raise ModelError for what is no file, cannot be read, is empty or points to Git LFS."""
    if file.is_symlink() and not file.exists():
        raise ModelError(f"{file}: is a link to {file.readlink()}, which is not there")
    if not file.exists():
        raise ModelError(f"{file}: is missing")
    if not file.is_file():
        raise ModelError(f"{file}: expected a file, found a directory")
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    if not start:
        raise ModelError(f"{file}: is empty")
    if start == _LFS:
        raise ModelError(
            f"{file}: is a pointer of Git LFS, not the file itself; git lfs pull fetches it"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ModelError: no such file, not JSON, or not a mapping.
    """
    check_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a mapping, found {type(content).__name__}")
    return content


def read_header(file: Path) -> dict[str, str]:
    """The type of each tensor of a safetensors file, such as F32, by name; no tensor is read.

    Raises:
        ModelError: no such file, cut off, or something else than safetensors.
    """
    check_file(file)
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return {name: tensors.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{file}: is cut off or damaged: its {file.stat().st_size} bytes are not whole "
            f"safetensors ({error})"
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a local model; empty where it has none.

    Raises:
        ModelError: an index that is no index, or that names a file that is not there.
    """
    whole, index = directory / WEIGHTS, directory / INDEX
    if lies_there(whole):
        return [whole]
    if not lies_there(index):
        return []
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise ModelError(f"{index}: expected a weight_map from names of weights to names of files")
    if not placed:
        raise ModelError(f"{index}: its weight_map is empty")
    files = [directory / name for name in sorted(set(placed.values()))]
    for file in files:
        if not lies_there(file):
            raise ModelError(f"{index}: names {file.name}, which is missing in {directory}")
    return files


def check_files(directory: Path) -> dict[str, str]:
    """Look at the configuration and weight files of a local model; its tensors' types by name.

    transformers passes a damaged generation_config.json over, and a model would be saved without.

    Raises:
        ModelError: a file that is missing, cut off, damaged, or a pointer of Git LFS.
    """
    settings = read_json(directory / "config.json")
    if (directory / GENERATION).exists():
        read_json(directory / GENERATION)
    files, types = weight_files(directory), dict[str, str]()
    if not files and "transformers_weights" not in settings:
        others = sorted(file.name for file in directory.glob("*.bin"))
        problem = f"found {some(others)}" if others else f"there is no {WEIGHTS}"
        raise ModelError(
            f"{directory}: no causal language model in safetensors could be loaded ({problem})"
        )
    for file in files:
        types |= read_header(file)
    return types


def check_loaded(
    model: nn.Module,
    info: dict[str, Any],
    types: dict[str, str],
    where: str,
) -> None:
    """Hold the `loading_info` of `from_pretrained` against the model; left-over weights are logged.

    Raises:
        ModelError: weights that the checkpoint lacks, or has in another shape or as integers.
    """
    name, own = type(model).__name__, dict(model.named_parameters())
    if info["mismatched_keys"]:
        wrong = sorted(info["mismatched_keys"])
        shapes = [f"{key} {list(has)} (expected {list(wants)})" for key, has, wants in wrong]
        raise ModelError(f"{where}: {_count(shapes, 'weight')} of another shape: {some(shapes)}")
    missing = sorted(set(info["missing_keys"]) & own.keys())
    left = sorted(info["unexpected_keys"])
    if missing:
        rest = f"; it holds {some(left)}, which {name} has not" if left else ""
        raise ModelError(
            f"{where}: lacks {_count(missing, 'weight')} of {name}: {some(missing)}{rest}"
        )
    if getattr(model, "hf_quantizer", None) is None:
        whole = [key for key in own if types.get(key) in _INTEGERS]
        if whole:
            raise ModelError(
                f"{where}: holds integers for {_count(whole, 'weight')}: {some(whole)}; expected "
                "floating point, or a quantization_config in config.json"
            )
    if buffers := sorted(set(info["missing_keys"]) - own.keys()):
        lacks = f"lacks {_count(buffers, 'buffer')}, left as made: {some(buffers)}"
        logger.warning(f"note: {where}: {lacks}")
    if left:
        out = f"{_count(left, 'weight')} not of {name} left out: {some(left)}"
        logger.warning(f"note: {where}: {out}")


def check_adapter(model: nn.Module, result: Any, file: Path, base: str) -> None:
    """Hold the result of peft's loading against the adapter that the model has now.

    Raises:
        ModelError: the file lacks weights of the adapter, or has some that belong nowhere.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained & set(result.missing_keys)):
        raise ModelError(
            f"{file}: lacks {_count(missing, 'weight')} of the adapter on {base}: {some(missing)}"
        )
    if left := sorted(result.unexpected_keys):
        raise ModelError(
            f"{file}: {_count(left, 'weight')} have no place on {base}, so it was made for another "
            f"model: {some(left)}"
        )


@contextmanager
def no_report() -> Iterator[None]:
    """Without transformers' table of missing and left-over weights: `check_loaded` replaces it."""
    loading = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loading.addFilter(other)
    try:
        yield
    finally:
        loading.removeFilter(other)


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"
