"""Pairs that a model would state the other way round: where to look first for wrong labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from ..checks.findings import EXAMPLES, Finding, shown
from ..checks.texts import Texts, read_texts
from ..config import TrainConfig
from ..data.write import writer_of
from ..errors import DataError
from ..terminal import withheld
from .measures import TIE
from .responses import ResponseScorer, load_response_scorer
from .rows import make_encoder, windows

_MEASURES = {"reward": "implicit reward", "logp_per_token": "log-probability a token"}


@dataclass(frozen=True)
class Judged:
    """A stated pair, and what a model makes of it.

    Attributes:
        row: its row, from 1.
        winner: the better response, by its place in the row.
        loser: the worse one.
        margin: what is measured of the winner less that of the loser, in nats.
    """

    row: int
    winner: int
    loser: int
    margin: float


@dataclass(frozen=True)
class Verdicts:
    """All stated pairs of a data set, those that a model disagrees with most first.

    Attributes:
        pairs: in that order.
        measure: "reward" where there is a reference, else "logp_per_token".
        dataset: the rows.
        source: what to call them.
    """

    pairs: Sequence[Judged]
    measure: str
    dataset: datasets.Dataset
    source: str

    def findings(self) -> Iterator[Finding]:
        """One that names the rows of the pairs that the model turns round, in order."""
        turned = [pair for pair in self.pairs if pair.margin < -TIE]
        if not turned:
            return
        texts = self._texts(turned[:EXAMPLES])
        examples = tuple(
            (pair.row, shown(f"{pair.margin:+.3f}: not {chosen!r} but {rejected!r}"))
            for pair, (_, chosen, rejected) in zip(turned[:EXAMPLES], texts, strict=True)
        )
        text = (
            f"of {len(self.pairs)} pairs are the other way round by the model's "
            f"{_MEASURES[self.measure]}: wrong labels, if any, are most likely among the first"
        )
        rows = tuple(dict.fromkeys(pair.row for pair in turned))
        yield Finding("label_error", "note", len(turned), len(self.pairs), text, examples, rows)

    def write(self, path: Path) -> None:
        """Write all pairs in order: row, margin, prompt, chosen, rejected."""
        names = ("prompt", "chosen", "rejected")
        texts = zip(*self._texts(self.pairs), strict=True)
        numbers = {
            "row": [pair.row for pair in self.pairs],
            "margin": [pair.margin for pair in self.pairs],
        }
        rows = datasets.Dataset.from_dict({**numbers, **dict(zip(names, texts, strict=True))})
        writer_of(path)(rows)

    def _texts(self, pairs: Sequence[Judged]) -> list[tuple[str, str, str]]:
        """Prompt, winner and loser of each."""
        rows = sorted({pair.row for pair in pairs})
        texts = read_texts(self.dataset.select([row - 1 for row in rows]), self.source)
        places = {rows[number - 1]: place for place, number in enumerate(texts.rows)}
        return [_pair_of(texts, places[pair.row], pair) for pair in pairs]


def _pair_of(texts: Texts, place: int, pair: Judged) -> tuple[str, str, str]:
    start = int(texts.first[place])
    winner, loser = texts.responses[start + pair.winner], texts.responses[start + pair.loser]
    return texts.prompts[place], winner, loser


def judge(config: TrainConfig, dataset: datasets.Dataset, source: str) -> Verdicts:
    """Every pair that a data set states, by the implicit reward of the model that a configuration
    names, or its log-probability a token where it has no reference.

    Args:
        config: the keys of `fastdpo train`; read are those that `score` reads.
        dataset: rows in one of the layouts for training.
        source: what to call them.

    Raises:
        FastDPOError: a model that cannot be loaded; rows that state no pairs.
    """
    with withheld():
        scorer = load_response_scorer(config)
        pairs = list(_judged(scorer, dataset, source))
    if not pairs:
        raise DataError(f"{source}: states no pairs; expected chosen and rejected, or comparisons")
    pairs.sort(key=lambda pair: pair.margin)
    return Verdicts(pairs, _measure(scorer), dataset, source)


def _measure(scorer: ResponseScorer) -> str:
    return "logp_per_token" if scorer.reference is None else "reward"


def _judged(scorer: ResponseScorer, dataset: datasets.Dataset, source: str) -> Iterator[Judged]:
    config, number = scorer.config, 0
    encoder = make_encoder(dataset, scorer.tokenizer, source, config.max_length, scorer.vocab_size)
    for groups, rows in windows(dataset, encoder):
        found = scorer(groups)
        for row in rows:
            number += 1
            if row.reason is not None:
                continue
            values = found[row.group].of(row.places).values(config.beta)[_measure(scorer)]
            for winner, loser in row.comparisons:
                yield Judged(number, winner, loser, float(values[winner] - values[loser]))
