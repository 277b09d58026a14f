"""Which rows a loss can be trained on, and what a run on others says."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import DataError
from .columns import PREFERENCES, RowKind, row_kind, row_kinds
from .messages import BadRow
from .preferences import Preferences

Known: TypeAlias = Literal["comparisons", "label", "scores", "ranks"]
Convert: TypeAlias = Literal["unpair", "pair"]

# What each conversion reads and what it makes.
CONVERSIONS: Mapping[Convert, tuple[RowKind, RowKind]] = {
    "unpair": ("pair", "label"),
    "pair": ("label", "group"),
}
# Of what each layout is made.
_COLUMNS: Mapping[RowKind, tuple[str, ...]] = {
    "pair": ("prompt", "chosen", "rejected"),
    "group": ("prompt", "responses", *PREFERENCES),
    "label": ("prompt", "completion", "label"),
}
_EXPECTED: Mapping[frozenset[Known], str] = {
    frozenset({"comparisons"}): "prompt, chosen, rejected, or of prompt, responses and "
    "comparisons, scores or rankings",
    frozenset({"label"}): "prompt, completion, label",
    frozenset({"scores"}): "prompt, responses, scores",
    frozenset({"scores", "comparisons"}): "prompt, responses and scores or comparisons",
    frozenset({"ranks"}): "prompt, responses and rankings or scores",
}


@dataclass(frozen=True)
class Needs:
    """What a loss has to know of the responses to a prompt.

    Attributes:
        columns: any one of these is enough: `("comparisons",)` for a loss of comparisons,
            `("label",)` for kto, bco and apo_zero_unpaired, `("scores",)` for the grpo family,
            `("scores", "comparisons")` for sppo, `("ranks",)` for listwise; none where responses
            are scored and not trained on.
        loss: its name in messages.
    """

    columns: tuple[Known, ...] = ("comparisons",)
    loss: str = "the loss"

    def choose_kind(
        self, columns: Collection[str], where: str, convert: Convert | None = None
    ) -> RowKind:
        """The layout to read a data set of these columns in: the first that has what is needed.

        Args:
            columns: of the data set, once it is converted.
            where: what to call it.
            convert: the conversion that made them.

        Raises:
            DataError: where none has, naming the columns found and those the loss needs.
        """
        kind = row_kind(columns, where)
        if not self.columns:
            return kind
        for held in row_kinds(columns):
            if not _known(held, columns).isdisjoint(self.columns):
                return held
        found = describe_kind(kind, columns)
        if convert is not None:
            found += f", which convert: {convert} has made"
        for way, (old, new) in CONVERSIONS.items():
            helps = not _known(new, ("comparisons",)).isdisjoint(self.columns)
            if convert is None and old == kind and helps:
                found += f"; convert: {way} makes them"
        expected = _EXPECTED[frozenset(self.columns)]
        raise DataError(f"{where}: {self.loss} needs rows of {expected}; found {found}")

    def check_row(self, said: Preferences, count: int) -> None:
        """One row of a layout that has what is needed, with `count` responses.

        Raises:
            BadRow: where this row has not.
        """
        known = {
            "comparisons": said.label is None,
            "label": said.label is not None,
            "scores": bool(said.scores),
            "ranks": bool(said.ranks),
        }
        if self.columns and not any(known[name] for name in self.columns):
            field = "rankings" if "ranks" in self.columns else "scores"
            raise BadRow.expected(f"a list of {count} numbers, one a response", field, None)


COMPARISONS = Needs()
NOTHING = Needs((), "scoring")


def describe_kind(kind: RowKind, columns: Collection[str]) -> str:
    """The columns of a layout that a data set has, in words."""
    return ", ".join(name for name in _COLUMNS[kind] if name in columns)


def _known(kind: RowKind, columns: Collection[str]) -> set[Known]:
    """What rows of a layout say, as far as their columns tell."""
    if kind == "label":
        return {"label"}
    known: set[Known] = {"comparisons"}
    if kind == "group" and "scores" in columns:
        known |= {"scores", "ranks"}
    if kind == "group" and "rankings" in columns:
        known.add("ranks")
    return known
