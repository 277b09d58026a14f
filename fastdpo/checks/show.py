"""What was found as lines for a terminal."""

from typing import Any

from .check import Checked

_MARKS = {"error": "!!", "warning": " !", "note": "  "}


def describe(found: Checked) -> str:
    """What was found, as lines for a terminal."""
    said = found.summary
    part = "" if said["read"] == said["rows"] else f", of which {said['read']} were read"
    lines = [
        f"{said['source']}: {said['rows']} rows{part}: {said['responses']} responses, "
        f"{said['pairs']} pairs, in {said['seconds']:.1f} s"
    ]
    lines += [f"{name}: rows {first} to {last}" for name, first, last in said.get("parts", ())]
    lines += _length_table(found.lengths)
    for finding in found.findings:
        count = f"{finding.count} " if finding.rows else ""
        lines.append(f"{_MARKS[finding.level]} {count}{finding.text}")
        lines += [f"       row {row}: {text}" for row, text in finding.examples[:3]]
    grave = f"{said['error']} errors, {said['warning']} warnings"
    lines.append("nothing was found" if not found.findings else f"{grave}, {said['note']} notes")
    return "\n".join(lines)


def brief(found: Checked) -> list[str]:
    """The same in a line each, errors and warnings alone."""
    return [
        f"{finding.count} {finding.text}" if finding.rows else finding.text
        for finding in found.findings
        if finding.level != "note"
    ]


def _length_table(lengths: dict[str, Any]) -> list[str]:
    names = [name for name in ("prompt", "chosen", "rejected") if name in lengths]
    if not names:
        return []
    head = "".join(f"{title:>9}" for title in ("least", "median", "90 %", "99 %", "most", "mean"))
    lines = [f"{lengths['unit']:10}{head}"]
    for name in names:
        part = lengths[name]
        numbers = "".join(f"{value:9.0f}" for value in [*part["quantiles"], part["mean"]])
        lines.append(f"{name:10}{numbers}")
    return lines
