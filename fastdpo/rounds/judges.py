"""What scores answers. A failure is None, and is counted; it is never taken for a score."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config.rounds import RoundsConfig
from ..data.columns import TEMPLATE_FIELDS
from ..data.messages import Text
from ..errors import ConfigError, DataError, FastDPOError, one_line
from ..model.paths import run_device
from ..scoring.reward import RewardModel as Implied
from .prompts import as_columns, as_completion

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt with its answers, the row that it stands in, and what the chat template is given
    beside the prompt.
    """

    prompt: Text
    answers: Sequence[str]
    row: Row
    template: Mapping[str, Any] = field(default_factory=dict)


class Judge(ABC):
    """Scores the answers to a prompt, the higher the better.

    Attributes:
        failures: how many answers could not be scored, by reason.
        comparisons: of a judge that compares: how many there were, were ties, and came out
            otherwise in the other order.
    """

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}
        self.comparisons: dict[str, int] = {}

    @abstractmethod
    def __call__(self, questions: Sequence[Question]) -> list[list[float | None]]:
        """A score for each answer, None where there is none."""


class OfEach(Judge):
    """A judge that scores one answer at a time."""

    def __init__(self, score: Callable[[Text, str, Row], float], name: str) -> None:
        super().__init__()
        self.score, self.name = score, name

    def __call__(self, questions: Sequence[Question]) -> list[list[float | None]]:
        return [[self._one(q, answer) for answer in q.answers] for q in questions]

    def _one(self, question: Question, answer: str) -> float | None:
        try:
            found = self.score(question.prompt, answer, question.row)
        except FastDPOError:
            raise
        except Exception as error:
            raise FastDPOError(
                f"judge: {self.name} raised {type(error).__name__} ({one_line(error)}) on the "
                f"answer {answer[:60]!r}; what was sampled is kept, and the same command goes on"
            ) from error
        value = None if isinstance(found, str | bytes) else _number(found)
        if value is None:
            kind = "None" if found is None else f"a {type(found).__name__}"
            count_one(self.failures, f"{self.name} returned {kind} for a score")
        elif not math.isfinite(value):
            count_one(self.failures, f"{self.name} returned no finite number")
            value = None
        return value


def _number(found: Any) -> float | None:
    """A number of any library as a float; None where it is none."""
    try:
        return float(found)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


class NoScores(Judge):
    """No judge: the row's own answer is the better one, whatever is sampled (SPIN)."""

    def __call__(self, questions: Sequence[Question]) -> list[list[float | None]]:
        return [[None] * len(question.answers) for question in questions]


def count_one(counts: dict[str, int], name: str) -> None:
    """Count one more of a kind."""
    counts[name] = counts.get(name, 0) + 1


def from_file(name: str) -> Judge:
    """FILE.py:FUNCTION.

    Raises:
        ConfigError: a file that cannot be run, or that has no such function.
    """
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("fastdpo_judge", Path(file).expanduser())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks up its annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"judge: {file}: {type(error).__name__}: {one_line(error)}") from None
    score = getattr(module, function, None)
    if not callable(score):
        raise ConfigError(f"judge: {file} has no function {function}")
    return OfEach(score, function)


# Against the row's own answer


def exact(column: str) -> Judge:
    """1 where an answer is the row's, white space and case aside, and 0 elsewhere."""

    def score(prompt: Text, answer: str, row: Row) -> float:
        return float(_plain(answer) == _plain(_expected(row, column)))

    return OfEach(score, "exact")


def same_value(column: str) -> Judge:
    """1 where math-verify finds an answer equal to the row's, as it does for benchmarks, and 0
    elsewhere.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        math_verify = importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(
            f"judge: math needs math-verify ({one_line(error)}); pip install math-verify"
        ) from None

    def score(prompt: Text, answer: str, row: Row) -> float:
        expected = math_verify.parse(_expected(row, column))
        if not expected:
            raise DataError(f"{column}: {_expected(row, column)[:60]!r} holds no value to compare")
        return float(math_verify.verify(expected, math_verify.parse(answer)))

    return OfEach(score, "math")


def _expected(row: Row, column: str) -> str:
    if row.get(column) is None:
        raise DataError(f"judge: the rows have no column {column} to compare with (judge_answer)")
    return str(row[column])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# Models


class RewardModel(Judge):
    """A sequence classifier of one number, over prompt and answer as its chat template writes
    them, in batches of like length.
    """

    def __init__(self, path: str, config: RoundsConfig, *, batch_size: int = 8) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        super().__init__()
        self.device, self.batch_size = run_device(config), batch_size
        self.check(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_pretrained(path)
        except Exception as error:
            raise ConfigError(f"judge: {path}: cannot be loaded ({one_line(error)})") from None
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        self.pad: int = model.config.pad_token_id
        self.model = model.to(self.device).eval()

    @staticmethod
    def check(path: str) -> None:
        """Look at a model's configuration.

        Raises:
            ConfigError: there is none, or it is that of no reward model.
        """
        from transformers import AutoConfig

        try:
            labels = AutoConfig.from_pretrained(path).num_labels
        except Exception as error:
            raise ConfigError(f"judge: {path}: cannot be loaded ({one_line(error)})") from None
        if labels != 1:
            raise ConfigError(f"judge: {path} has {labels} labels; expected a reward model, of 1")

    def __call__(self, questions: Sequence[Question]) -> list[list[float | None]]:
        tokens = [self._encode(q, answer) for q in questions for answer in q.answers]
        scores: list[float | None] = [None] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            for index, value in zip(some, self._rewards([tokens[i] for i in some]), strict=True):
                if math.isfinite(value):
                    scores[index] = value
                else:
                    count_one(self.failures, "the reward model gave no finite number")
        rest = iter(scores)
        return [[next(rest) for _ in q.answers] for q in questions]

    @torch.no_grad()
    def _rewards(self, rows: Sequence[list[int]]) -> list[float]:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        out = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return [float(value) for value in out.logits[:, 0].float().cpu()]

    def _encode(self, question: Question, answer: str) -> list[int]:
        prompt = question.prompt
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt + answer)["input_ids"])
        talk = [*prompt, *as_completion(prompt, answer)]
        if self.tokenizer.chat_template is None:
            raise DataError("judge: the reward model has no chat template; expected text prompts")
        found = self.tokenizer.apply_chat_template(talk, **question.template, return_dict=True)
        return list(found["input_ids"])


class Implicit(Judge):
    """The policy as its own judge: β (log π(y|x) − log π_ref(y|x)), measured from what the model
    was before it was trained on preferences.
    """

    def __init__(self, config: RoundsConfig) -> None:
        super().__init__()
        keys = {name: getattr(config, name) for name in ("dtype", "use_cpu", "bf16", "max_length")}
        self.reward = Implied(
            str(config.model_name_or_path), config.judge_model, config.beta, **keys
        )

    def __call__(self, questions: Sequence[Question]) -> list[list[float | None]]:
        each = [(q, answer) for q in questions for answer in q.answers]
        columns = [as_columns(q.template) for q, _ in each]
        rest = iter(
            self.reward(
                [q.prompt for q, _ in each],
                [as_completion(q.prompt, answer) for q, answer in each],
                **{name: [one.get(name) for one in columns] for name in TEMPLATE_FIELDS},
            )
        )
        found = [[next(rest) for _ in q.answers] for q in questions]
        for value in itertools.chain(*found):
            if value is None:
                count_one(self.failures, "the prompt reaches max_length")
        return found
