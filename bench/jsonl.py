"""Files of rows, one JSON object a line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows, in their order."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows in place of whatever the file held."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
