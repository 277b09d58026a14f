"""`fastdpo pairs`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ..arguments import own_flags
from ..errors import ConfigError, DataError
from ..files import atomic_file
from .exchange import FIELDS
from .lines import NO_JSON, NO_OBJECT
from .mask import Masker
from .pairs import Made, To, make_rows

USAGE = """\
fastdpo pairs: preference data from a request log with ratings, thumbs, edits or retries

  fastdpo pairs requests.jsonl -o pairs.jsonl
  fastdpo pairs logs/*.jsonl.gz -o pairs.jsonl --min_margin 2
  fastdpo pairs requests.jsonl -o labels.jsonl --to labels --columns rating=meta.stars

Each line is a request with its response, as OpenAI's interface or its batches write them, or flat:
messages and response, with a rating, score, thumb or feedback, an edited_response, or retry_of the
id of another line. An edit beats what it changed, the best rated answer to a prompt the worst one,
and a retry the answer that it retries. Mail addresses, phone and card numbers, IBANs, IP addresses
and keys are masked by their patterns; names of people are not.

  -o, --output FILE      a .jsonl file that fastdpo train reads
  --to KIND              pairs, labels (desirable above the middle of the ratings' scale) or groups
                         (all rated answers to a prompt); pairs by default
  --min_margin NUMBER    ratings that differ by less make no pair
  --columns A=B,C=D      what fields are called: {fields}
  --no_mask              keep personal data
  --mask_pattern REGEX   mask this too
""".format(fields=", ".join(FIELDS))


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: a log that cannot be read, nothing to make, or a flag that is wrong.
    """
    values = {
        "output": "a file",
        "to": "pairs, labels or groups",
        "min_margin": "a number",
        "columns": "names such as rating=stars",
        "mask_pattern": "a regular expression",
    }
    words, given, switches = own_flags(arguments, values, ("no_mask",), "fastdpo pairs --help")
    if unknown := [word for word in words if word.startswith("-")]:
        raise ConfigError(f"{unknown[0]}: unknown (fastdpo pairs --help)")
    if not words or not given.get("output", "").endswith(".jsonl"):
        raise ConfigError("expected fastdpo pairs LOG -o FILE.jsonl (fastdpo pairs --help)")
    logs, path = [Path(word) for word in words], Path(given["output"])
    if path.exists() and any(log.exists() and log.samefile(path) for log in logs):
        raise ConfigError(f"-o {path}: is a log that is read; expected another file")
    to = given.get("to", "pairs")
    if to not in ("pairs", "labels", "groups"):
        raise ConfigError(f"--to: expected pairs, labels or groups, got {to}")
    masker = None if "no_mask" in switches else Masker(given.get("mask_pattern"))
    made = make_rows(
        logs,
        cast(To, to),
        names=_names(given.get("columns")),
        min_margin=_margin(given.get("min_margin", "0")),
        masker=masker,
    )
    print(f"{_write(made.rows, path, made)} rows: {path}")
    print(table(made))


def _write(rows: Iterator[dict[str, Any]], path: Path, made: Made) -> int:
    first = next(rows, None)
    if first is None:
        found = table(made, ", ") or "the log is empty"
        if made.outcomes.keys() <= {NO_JSON, NO_OBJECT}:
            found += "; expected JSONL or a JSON list, plain or packed as .gz or .zst"
        raise DataError(f"no rows to make; {found}")
    count = 1
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(first, ensure_ascii=False) + "\n")
        for row in rows:
            count += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def table(made: Made, between: str = "\n") -> str:
    """What became of the lines, each counted once, and what was masked."""
    width = len(str(max(made.outcomes.values(), default=0)))
    lines = [f"{count:{width}} lines: {what}" for what, count in made.outcomes.most_common()]
    if made.masked:
        masked = ", ".join(f"{count} {name}" for name, count in made.masked.most_common())
        lines.append(f"masked: {masked}")
    return between.join(lines)


def _margin(text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = -1.0
    if not 0 <= margin < float("inf"):
        raise ConfigError(f"--min_margin: expected a number of at least 0, got {text}")
    return margin


def _names(text: str | None) -> dict[str, str]:
    names = {}
    for part in text.split(",") if text else ():
        field, equals, name = part.partition("=")
        if field not in FIELDS or not equals or not name:
            raise ConfigError(
                f"--columns: expected FIELD=NAME with a field of {', '.join(FIELDS)}, got {part}"
            )
        names[field] = name
    return names
