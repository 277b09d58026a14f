"""Arguments of a command that are no keys of a configuration."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .errors import ConfigError

SHORT = {"-o": "--output", "-n": "--number"}


def own_flags(
    arguments: Sequence[str],
    values: Mapping[str, str],
    switches: Collection[str] = (),
    see: str = "fastdpo --help",
) -> tuple[list[str], dict[str, str], set[str]]:
    """Tell a command's own flags from the rest of its line.

    Args:
        arguments: the command line.
        values: flags with a value, and what that is in an error: "a file".
        switches: flags without one.
        see: the command that explains them.

    Returns:
        The other words; the values of the flags that were given; the switches that were.

    Raises:
        ConfigError: a flag without its value.
    """
    words: list[str] = []
    given: dict[str, str] = {}
    on: set[str] = set()
    rest = iter(arguments)
    for word in rest:
        word = SHORT.get(word, word)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in {*values, *switches}:
            words.append(word)
        elif name in switches and not equals:
            on.add(name)
        else:
            found = value if equals else next(rest, None)
            if found is None:
                raise ConfigError(f"--{name}: expected {values.get(name, 'nothing')} ({see})")
            given[name] = found
    return words, given, on


def check_output(output: Path, read: Iterable[Path]) -> None:
    """Refuse to write over what is read, or over a file of a directory that is read.

    Args:
        output: the file to write.
        read: files and directories, some of which may not be there.

    Raises:
        ConfigError: it is one of them.
    """
    if not output.exists():
        return
    for path in read:
        if not path.exists():
            continue
        if output.samefile(path) or path.resolve() in output.resolve().parents:
            raise ConfigError(f"{output}: is read here; expected another file to write to")
