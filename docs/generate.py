"""What these pages say of the configuration: written from its declarations, never by hand.

    python docs/generate.py            # or: make readme
    python docs/generate.py --check    # exit status 1 where a page differs from the declarations

In a page, what stands between `<!-- keys:NAME -->` and `<!-- /keys -->` is replaced. NAME is a
section of keys, one of `LISTS`, "loss_table" or "layouts".
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from fastdpo_kernels import LOSSES

from fastdpo.config import TrainConfig
from fastdpo.config.declare import GROUPS, default_of
from fastdpo.config.rounds import RoundsConfig
from fastdpo.config.values import show
from fastdpo.data.layouts.registry import LAYOUTS
from fastdpo.training import changes

FOLDER = Path(__file__).resolve().parent
KEYS = TrainConfig.key_fields()
LISTS = {
    "fixed": changes.FIXED,
    "followed": changes.FOLLOWED,
    "compared": changes.COMPARED,
}
_BLOCK = re.compile(r"(<!-- keys:(\w+) -->\n).*?(<!-- /keys -->)", re.DOTALL)
# Words that are a key and nothing else: `beta` and `memory` are words of English too.
_NAMED = re.compile(rf"\b({'|'.join(name for name in KEYS if '_' in name)})\b")


ROWS = {
    "label": "prompt, completion, label",
    "advantage": "prompt, responses, scores",
    "win_rate": "prompt, responses, scores, rankings or comparisons",
    "rank": "prompt, responses, rankings or scores",
}
"""What the rows of a loss hold that is not one of comparisons, by what it needs of them."""


def _loss_table() -> str:
    """Every registered loss in a line."""
    lines = ["| loss | equation | rows | reference | passes | paper |", "|---|---|---|---|---|---|"]
    for name, loss in LOSSES.items():
        rows = ROWS[loss.columns[0]] if loss.columns else "pairs"
        passes = "one"
        if loss.mismatched:
            passes = "one, after one that scores mismatched pairs"
        elif loss.kind == "step" or loss.terms is not None:
            passes = "one, after one that scores the step"
        cells = (
            f"`{name}`",
            loss.equation,
            rows,
            "yes" if loss.reference else "no",
            passes,
            f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper else "TRL",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _layouts() -> str:
    """Every layout of data in a line."""
    lines = ["| layout | whose | columns |", "|---|---|---|"]
    for name, layout in LAYOUTS.items():
        columns = re.sub(r"\w+", lambda m: m[0] if m[0] == "or" else f"`{m[0]}`", layout.columns)
        lines.append(f"| `{name}` | {layout.origin} | {columns} |")
    return "\n".join(lines) + "\n"


def block(name: str) -> str:
    """The Markdown of a block."""
    if name == "loss_table":
        return _loss_table()
    if name == "layouts":
        return _layouts()
    if name in LISTS:
        return ", ".join(f"`{key}`" for key in LISTS[name]) + ".\n"
    if name not in GROUPS:
        raise KeyError(f"keys:{name}: expected one of {', '.join([*GROUPS, *LISTS])}")
    keys = RoundsConfig.key_fields()
    own = {key: item for key, item in keys.items() if item.metadata["group"] == name}
    rows = [f"| `{key}` | {_default(item)} | {_meaning(item)} |" for key, item in own.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _default(declared: "Field[Any]") -> str:
    default = default_of(declared)
    return "unset" if default is None else f"`{show(default)}`"


def _meaning(declared: "Field[Any]") -> str:
    text = _NAMED.sub(r"`\1`", declared.metadata["help"]).replace("|", "\\|")
    choices = declared.metadata["choices"]
    if choices is None or len(choices) == 1:
        return text
    return f"{text} One of {', '.join(f'`{choice}`' for choice in choices)}."


def page(text: str) -> str:
    """A page with its blocks as they should be."""
    return _BLOCK.sub(lambda match: f"{match[1]}{block(match[2])}{match[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Write the pages that differ, or with --check name them; the exit status."""
    status = 0
    for file in sorted(FOLDER.glob("*.md")):
        before = file.read_text(encoding="utf-8")
        after = page(before)
        if before == after:
            continue
        if "--check" in arguments:
            print(f"{file.name}: differs from the declarations; run make readme")
            status = 1
        else:
            file.write_text(after, encoding="utf-8")
            print(f"{file.name}: written")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
