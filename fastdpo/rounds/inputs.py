"""Whether the files that rounds began with are still what they were."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import xxhash

from .. import files
from ..config.rounds import RoundsConfig
from .prompts import Prompts

logger = logging.getLogger(__name__)

INPUTS = "inputs.json"
"""Digests of what was read, in `output_dir`."""


def check_inputs(config: RoundsConfig, folder: Path, prompts: Prompts, begun: bool) -> None:
    """Compare prompts, other columns and the judge's files with those of the last start.

    Args:
        begun: whether anything was sampled.

    Raises:
        ConfigError: other prompts than those that were answered. Other columns, and another judge,
            are a line: they may have been mended.
    """
    both = [prompts, prompts.held_out]
    asked = [(one.number, one.text, one.template) for some in both for one in some.all]
    judge = str(config.judge).rpartition(":")[0]
    now = {
        "prompts": _digest([asked, len(prompts)]),
        "columns": _digest([one.row for some in both for one in some.all]),
        "judge": _digest_of_file(judge if judge.endswith(".py") else None),
        "judge_rubric": _digest_of_file(config.judge_rubric),
    }
    file = folder / INPUTS
    before = files.read_json(file) if begun and file.exists() else now
    if before["prompts"] != now["prompts"]:
        raise config.error(
            "dataset_name",
            f"these are not the prompts that the rounds in {folder} began with; expected another "
            "output_dir",
        )
    for name, what in (
        ("columns", "columns beside the prompts have"),
        ("judge", f"{judge} has"),
        ("judge_rubric", f"{config.judge_rubric} has"),
    ):
        if before[name] != now[name]:
            logger.warning(
                f"{what} changed since the last start: scores of earlier rounds stay as they are"
            )
    files.write_text(file, json.dumps(now))


def _digest(value: Any) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _digest_of_file(path: str | None) -> str | None:
    if path is None:
        return None
    return xxhash.xxh3_128_hexdigest(Path(path).expanduser().read_bytes())
