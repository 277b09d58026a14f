"""Where values come from: flags, and keys of other libraries that say what ours say."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from difflib import get_close_matches
from typing import Any, get_origin

import yaml

from ..errors import ConfigError
from .files import Given
from .parallel_peers import check_mesh, together
from .peers import PEER_KEYS
from .replaced import OTHER_NAMES, REPLACED_KEYS
from .values import members_of

_SWITCHED_ON = ("gradient_checkpointing",)


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
    types = {"config": {str}}
    for name, peer in PEER_KEYS.items():
        types[name] = {type(value) for value in (peer.default, *peer.also)}
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
    if peer.meaning(name, given) is None:
        default = yaml.safe_dump(peer.default, default_flow_style=True).split("\n")[0]
        raise ConfigError(
            f"{given.place}: {name} is a key of TRL's that fastdpo does not honour, so only its "
            f"default, {default}, is accepted. {peer.instead}"
        )


def with_peers(given: Mapping[str, Given]) -> dict[str, Given]:
    """What was given, and keys of ours that keys of TRL's stand for, with the place of those.

    A key of ours that was given too wins, but for `gradient_checkpointing: false`, which stands in
    TRL's files where FSDP recomputes the layers in its place.

    Raises:
        ConfigError: two of them contradict each other, or one does nothing without another.
    """
    meant: dict[str, Given] = {}
    for name, peer in PEER_KEYS.items():
        entry = given.get(name)
        if entry is None or peer.asks_nothing(entry.value):
            continue
        if peer.needs and (peer.needs not in given or not _means(peer.needs, given[peer.needs])):
            raise ConfigError(
                f"{entry.place}: {name} does nothing without {peer.needs}, as in TRL: add "
                f"{peer.needs}: true, or remove it"
            )
        for own, value in _means(name, entry).items():
            meant[own] = together(own, meant.get(own), value)
    if "parallelism_config" in given:
        started, key = os.environ.get("WORLD_SIZE"), "devices"
        devices = given.get(key, meant.get(key, Given(1, ""))).value
        there = (started, "WORLD_SIZE") if started else (devices, key)
        check_mesh(given["parallelism_config"], *there)
    return {**meant, **given, **{own: meant[own] for own in _SWITCHED_ON if own in meant}}


def _means(name: str, given: Given) -> dict[str, Given]:
    return PEER_KEYS[name].meaning(name, given) or {}
