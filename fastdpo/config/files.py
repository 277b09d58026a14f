"""Configuration files: YAML and JSON, each value with the words for where it stood."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .values import show_short


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


def read_json(path: str | Path, before: str = "") -> Any:
    """What a JSON file holds; `before` begins every error.

    Raises:
        ConfigError: not there, not UTF-8, or not JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{before}{path}, line {error.lineno}: expected JSON") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{before}{path}: expected UTF-8 text ({error.reason})") from error
    except (OSError, RuntimeError, ValueError) as error:  # ~name of nobody; nested too deep
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{before}{path}: cannot read the file ({reason})") from error


class Loader(yaml.SafeLoader):
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
    loader = Loader(text)
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
