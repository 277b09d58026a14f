"""Where a model lies: a directory or a hub name, of a whole model or of an adapter on one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..config import TrainConfig
from ..errors import ModelError
from .weights import lies_there, read_json, weight_files

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Place:
    """What `from_pretrained` takes for a model, and the adapter that belongs on it."""

    name: str
    """The base: a directory that is there, or a hub name."""
    revision: str
    """Of the base on the hub."""
    given: str
    """What the configuration names: the base, or the adapter."""
    adapter: Path | None = None
    """The directory that holds the adapter's files."""

    @property
    def directory(self) -> Path | None:
        """The base's directory, None for a model of the hub."""
        path = Path(self.name)
        return path if path.is_dir() else None


def find_model(config: TrainConfig, path: str | None = None) -> Place:
    """The model at `path` (default: the policy's); an adapter leads to its base.

    Raises:
        ModelError: nothing there, a file, or an adapter whose base is not there.
    """
    key = "ref_model_name_or_path" if path and path == config.ref_model_name_or_path else None
    given = _existing(path or config.model_name_or_path, key or "model_name_or_path")
    adapter = _adapter(given, config.model_revision)
    if adapter is None:
        return Place(given, config.model_revision, given)
    file = adapter / ADAPTER_CONFIG
    settings = read_json(file)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type: expected LORA, found {kind}")
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"{file}: task_type: expected CAUSAL_LM, found {task}")
    if Path(given).is_dir() and weight_files(Path(given)):
        raise ModelError(
            f"{given}: holds a whole model and an adapter ({ADAPTER_CONFIG}); expected one of them"
        )
    base = _base(file, settings.get("base_model_name_or_path"))
    return Place(base, settings.get("revision") or "main", given, adapter)


def tokenizer_place(place: Place, config: TrainConfig) -> tuple[str, str]:
    """What `AutoTokenizer.from_pretrained` takes, and its revision: an adapter's own tokenizer
    where it has one.
    """
    if place.adapter is not None:
        own = place.adapter / "tokenizer_config.json"
        if own.exists() or _cached(place.given, own.name, config.model_revision):
            return place.given, config.model_revision
    return place.name, place.revision


def _existing(name: str | None, key: str) -> str:
    if not name:
        raise ModelError(f"{key}: expected a local directory or a hub name")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(
            f"{key}: {name} is a file; expected the directory with config.json and safetensors"
        )
    if _looks_local(name):
        raise ModelError(f"{key}: {name} does not exist")
    return name


def _adapter(name: str, revision: str) -> Path | None:
    """The directory of an adapter's files, fetched from the hub where they lie there."""
    if Path(name).is_dir():
        return Path(name) if lies_there(Path(name) / ADAPTER_CONFIG) else None
    try:
        settings = find_adapter_config_file(name, revision=revision)
    except (OSError, ValueError):  # loading the model will say what is wrong with the name
        return None
    if settings is None:
        return None
    _cached(name, ADAPTER_WEIGHTS, revision)
    return Path(settings).parent


def _cached(name: str, file: str, revision: str) -> bool:
    """Whether a model of the hub has this file, which is fetched."""
    return not Path(name).is_dir() and bool(
        cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    )


def _base(file: Path, name: Any) -> str:
    """The base that an adapter names, as a directory that is there or a hub name."""
    where = f"{file}: base_model_name_or_path"
    if not isinstance(name, str) or not name:
        raise ModelError(f"{where}: expected the directory or hub name of the base, found {name!r}")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).exists():
            raise ModelError(f"{where}: {name} is an adapter itself; expected a whole model")
        return str(path)
    if path.exists() or _looks_local(name):
        relative = "" if path.is_absolute() else f" (looked for in {Path.cwd()})"
        raise ModelError(f"{where}: there is no directory {name}{relative}")
    return name


def _looks_local(name: str) -> bool:
    """Whether no hub has such a name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
