"""Where values come from: YAML files and flags, each value with the words for where it stood."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

import yaml

from ..errors import ConfigError
from .peers import PEER_KEYS
from .replaced import OTHER_NAMES, REPLACED_KEYS
from .values import members_of, show_short


@dataclass(frozen=True)
class Given:
    """A raw value and its place: `config.yaml, line 3` or `--beta`."""

    value: Any
    place: str


def read_yaml(path: str | Path) -> dict[str, Given]:
    """The top level of a YAML file, each key with its line.

    Raises:
        ConfigError: not there, not UTF-8, not YAML, not a mapping, or a key that is there twice.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text ({error.reason})") from error
    except (OSError, RuntimeError, ValueError) as error:  # ~name of nobody; NUL in a name
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{path}: cannot read the configuration file ({reason})") from error
    try:
        return _mapping_with_lines(text, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        raise ConfigError(f"{path}{line}: expected YAML ({problem})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: expected YAML (lists nested too deep to be read)") from error


class _Loader(yaml.SafeLoader):
    """YAML whose aliases stand for single values: no key takes more, and aliases of lists of
    aliases are a few bytes that unfold to gigabytes, or without end.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if mark is not None and not isinstance(node, yaml.ScalarNode):
            problem = "an alias of a list or a mapping, which is not read"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError, AttributeError, KeyError, IndexError) as error:
            # A date, a number or a tag that is like one, and none.
            kind = node.tag.rpartition(":")[2]
            problem = f"{kind} that cannot be read: {show_short(str(node.value))}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _mapping_with_lines(text: str, path: str) -> dict[str, Given]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected a mapping of keys to values, one a line")
        given: dict[str, Given] = {}
        for key_node, value_node in node.value:
            place = f"{path}, line {key_node.start_mark.line + 1}"
            name = loader.construct_object(key_node, deep=True)
            if not isinstance(name, str):
                raise ConfigError(f"{place}: expected the name of a key, got {show_short(name)}")
            name = name.replace("-", "_")
            if name in given:
                raise ConfigError(f"{place}: {name} was already given at {given[name].place}")
            given[name] = Given(loader.construct_object(value_node, deep=True), place)
        return given
    finally:
        loader.dispose()


def read_flags(
    arguments: Sequence[str], keys: Mapping[str, Field[Any]]
) -> tuple[list[str], dict[str, Given]]:
    """Split a command line into the words before its first flag and its flags.

    `--key value`, `--key=value`, `--list one two`, `--flag` (true) and `--no_flag` (false); `-` and
    `_` are the same in a key, and the last of several wins.

    Args:
        arguments: the command line after the command.
        keys: our own, by their names.

    Raises:
        ConfigError: a key without its value, or with too many.
    """
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    current = words
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            current = flags[name.replace("-", "_")] = [value] if equals else []
        else:
            current.append(argument)
    types = {name: {type(peer.default)} for name, peer in PEER_KEYS.items()} | {"config": {str}}
    for name, declared in keys.items():
        types[name] = {get_origin(member) or member for member in members_of(declared.type)}
    given = {}
    for name, values in flags.items():
        place = f"--{name}"
        positive = name.removeprefix("no_")
        if positive != name and bool in types.get(positive, set()):
            if values:
                raise ConfigError(f"{place}: takes no value, got {' '.join(values)}")
            given[positive] = Given(False, place)
        elif values and name in keys and list in types[name]:
            given[name] = Given(values, place)
        elif len(values) > 1:
            raise ConfigError(f"{place}: expected one value, got {len(values)}: {' '.join(values)}")
        elif not values and bool not in types.get(name, {bool}):
            raise ConfigError(f"{place}: expected a value after it")
        else:
            given[name] = Given(values[0] if values else True, place)
    return words, given


def check_foreign_key(name: str, given: Given, known: Iterable[str]) -> None:
    """Let a key of TRL's pass whose value asks for nothing; refuse every other that is not ours.

    Raises:
        ConfigError: a key that we do not honour, that is gone, or that nobody knows.
    """
    if name in REPLACED_KEYS:
        raise ConfigError(f"{given.place}: {name} does not exist any more. {REPLACED_KEYS[name]}")
    if name not in PEER_KEYS:
        candidates = [*known, *PEER_KEYS]
        nearest = OTHER_NAMES.get(name) or get_close_matches(name, candidates, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{given.place}: unknown key {name}; the nearest known key is {nearest}")
    peer = PEER_KEYS[name]
    accepted = (peer.default, *peer.also, *peer.means)
    if not any(_same(given.value, value) for value in accepted):
        default = yaml.safe_dump(peer.default, default_flow_style=True).split("\n")[0]
        raise ConfigError(
            f"{given.place}: {name} is a key of TRL's that fastdpo does not honour, so only its "
            f"default, {default}, is accepted. {peer.instead}"
        )


def meant_by_peers(given: Mapping[str, Given]) -> dict[str, Given]:
    """Keys of ours that keys of TRL's stand for, with the place of those."""
    meant = {}
    for name, entry in given.items():
        peer = PEER_KEYS.get(name)
        if peer is not None and str(entry.value) in peer.means:
            own, value = peer.means[str(entry.value)]
            meant[own] = Given(value, entry.place)
    return meant


def _same(value: Any, accepted: Any) -> bool:
    """Whether a raw value (text, from a flag) says the same as `accepted`."""
    if isinstance(value, str) and not isinstance(accepted, str):
        try:
            value = yaml.load(value, _Loader)
        except (yaml.YAMLError, RecursionError):
            return False
        if isinstance(value, str) and isinstance(accepted, int | float):
            try:
                value = float(value)
            except ValueError:
                return False
        if isinstance(value, str) and value.lower() == "none":
            value = None
    if isinstance(value, bool) != isinstance(accepted, bool):
        return False
    return bool(value == accepted)
