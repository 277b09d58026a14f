"""What a key of another library asks for: nothing, something that a key of ours says, or more."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .files import Given, Loader, read_json
from .values import show_short

Meant = dict[str, Given]
"""Keys of ours, each with its value and the place of the key that stands for it."""


@dataclass(frozen=True)
class PeerKey:
    """A key of TRL 1.16, of accelerate 1.15, or of a mapping that is the value of one, not ours.

    TRL's command lines read `ModelConfig`, `ScriptArguments`, `DatasetMixtureConfig` and one of
    `DPOConfig`, `KTOConfig`, `ORPOConfig` and `CPOConfig`.

    Attributes:
        default: its default there; that value asks for nothing and is accepted.
        instead: what to do for the effect it has there, one sentence.
        also: further values that describe what fastdpo does anyway, accepted too.
        means: further values, in lower case, each with the key of ours and its value that mean the
            same.
        read: what any other value means, of its name and itself; ConfigError for what is refused.
        needs: the key without which it does nothing there.
    """

    default: Any
    instead: str
    also: tuple[Any, ...] = ()
    means: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    read: Callable[[str, Given], Meant] | None = None
    needs: str = ""

    def asks_nothing(self, value: Any) -> bool:
        """Whether a raw value (text, from a flag) is the default or what fastdpo does anyway."""
        return any(same(value, accepted) for accepted in (self.default, *self.also))

    def meaning(self, name: str, given: Given) -> Meant | None:
        """What a value stands for; None for one that fastdpo does not honour.

        Raises:
            ConfigError: a part of a structured value is not honoured.
        """
        if self.asks_nothing(given.value):
            return {}
        if self.read is not None:
            return self.read(name, given)
        word = str(given.value).strip().lower()
        if word not in self.means:
            return None
        own, value = self.means[word]
        return {own: Given(value, given.place)}


def same(value: Any, accepted: Any) -> bool:
    """Whether a raw value (text, from a flag) says the same as `accepted`."""
    if isinstance(value, str) and not isinstance(accepted, str):
        try:
            value = yaml.load(value, Loader)
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


def read_options(
    name: str, given: Given, options: Mapping[str, PeerKey], prefix: str = ""
) -> tuple[Meant, dict[str, Any]]:
    """Check a mapping key by key, as a configuration is checked.

    Args:
        name: the key whose value it is.
        given: the mapping, its text, or the path of a JSON file that holds it.
        options: its keys.
        prefix: what may stand before each of them.

    Returns:
        What they mean, and their values by name, without the prefix.

    Raises:
        ConfigError: not a mapping, or an option that is unknown or not honoured.
    """
    meant: Meant = {}
    found = {}
    for option, value in _mapping(name, given).items():
        short = str(option).removeprefix(prefix)
        if short not in options:
            nearest = get_close_matches(short, options, n=1, cutoff=0.0)[0]
            problem = f"unknown option {show_short(option)}; the nearest is {nearest}"
            raise refusal(name, given, problem)
        peer = options[short]
        if (meaning := peer.meaning(f"{name}: {short}", Given(value, given.place))) is None:
            raise not_honoured(f"{name}: {short}", Given(value, given.place), peer)
        meant |= meaning
        found[short] = value
    return meant, found


def refusal(name: str, given: Given, problem: str) -> ConfigError:
    """The error for a key, or for an option of it (`key: option`): its place, its name, why."""
    key, _, option = name.partition(": ")
    named = option if given.place == f"--{key}" else name
    return ConfigError(": ".join(filter(None, (given.place, named, problem))))


def not_honoured(name: str, given: Given, peer: PeerKey) -> ConfigError:
    """The error for an option whose value fastdpo does not honour."""
    got = show_short(given.value)
    return refusal(name, given, f"{got} is not honoured. {peer.instead}")


def _mapping(name: str, given: Given) -> Mapping[Any, Any]:
    value = given.value
    if isinstance(value, str) and value.strip().endswith(".json"):
        value = read_json(Path(value.strip()), str(refusal(name, given, "")) + ": ")
    elif isinstance(value, str):
        try:
            value = yaml.load(value, Loader)
        except (yaml.YAMLError, RecursionError):
            value = given.value
    if not isinstance(value, Mapping):
        expected = "a mapping (JSON on the command line) or the path of a .json file"
        raise refusal(name, given, f"expected {expected}, got {show_short(value)}")
    return value
