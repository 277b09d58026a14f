"""A language model behind an OpenAI-compatible endpoint as a judge."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from typing import Any

import xxhash

from ..config.rounds import RoundsConfig
from ..data.messages import Text
from ..errors import ConfigError, FastDPOError, one_line
from .judges import Judge, Question, count_one

KEY = "OPENAI_API_KEY"
"""The environment variable of the endpoint's key."""
_TRIES = 5
_SECONDS = 60.0
_AT_ONCE = 8
_WAIT = 1.0
_RUBRIC = "Which is more helpful, correct and honest? A longer answer is not a better one."
_ABSOLUTE = (
    "Judge the answer to the prompt by this rubric:\n{rubric}\n\n[Prompt]\n{prompt}\n\n[Answer]\n"
    "{first}\n\nGive a score from 0 (worst) to 10 (best). End with a line: Score: NUMBER"
)
_PAIRWISE = (
    "Compare two answers to the prompt by this rubric:\n{rubric}\n\n[Prompt]\n{prompt}\n\n"
    "[Answer A]\n{first}\n\n[Answer B]\n{second}\n\nEnd with a line: Better: A, Better: B or "
    "Better: tie"
)
_SCORE = re.compile(
    r"score[^\w-]{0,6}(-?\d+(?:\.\d+)?)\s*(?:(?:/|out of)\s*10)?\W*$", re.IGNORECASE
)
_BETTER = re.compile(r"better\W{0,6}(a|b|tie)\b\W*$", re.IGNORECASE)


class Endpoint(Judge):
    """Scores of 0 to 10 over 10, or the share of the other answers that each one beats, where each
    two are asked about in both orders and count as a tie where the orders disagree.

    What the endpoint said is kept in a file and never asked for twice.
    """

    def __init__(self, config: RoundsConfig, folder: Path) -> None:
        super().__init__()
        self.url = str(config.judge).rstrip("/") + "/chat/completions"
        self.model, self.pairwise = config.judge_model, config.judge_mode == "pairwise"
        self.rubric = _RUBRIC
        if config.judge_rubric is not None:
            try:
                self.rubric = Path(config.judge_rubric).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"judge_rubric: cannot be read ({one_line(error)})") from None
        self.most = config.judge_max_tokens
        self.file = folder / "judge.jsonl"
        self.known: dict[str, str | None] = {}
        self.spent = 0
        self.writing = threading.Lock()
        self._read_known()

    def __call__(self, questions: Sequence[Question]) -> list[list[float | None]]:
        judged = self._compared if self.pairwise else self._scored
        return [judged(question) for question in questions]

    def _read_known(self) -> None:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        for line in text.splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a line that a kill cut off
            self.known[said["key"]] = said["text"]
            self.spent += said["tokens"]
        if text and not text.endswith("\n"):
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _scored(self, question: Question) -> list[float | None]:
        asked = [self._text(_ABSOLUTE, question.prompt, answer) for answer in question.answers]
        return [self._read(text, _SCORE, _tenth) for text in self._ask(asked)]

    def _compared(self, question: Question) -> list[float | None]:
        count = len(question.answers)
        pairs = list(itertools.permutations(range(count), 2))
        asked = [
            self._text(_PAIRWISE, question.prompt, question.answers[i], question.answers[j])
            for i, j in pairs
        ]
        said = {
            pair: self._read(text, _BETTER, _side)
            for pair, text in zip(pairs, self._ask(asked), strict=True)
        }
        wins: list[list[float]] = [[] for _ in range(count)]
        for i, j in itertools.combinations(range(count), 2):
            first, swapped = said[i, j], said[j, i]
            if first is None or swapped is None:
                continue
            share = (first + 1 - swapped) / 2
            count_one(self.comparisons, "comparisons")
            if first != 1 - swapped:
                count_one(self.comparisons, "orders disagree")
            elif share == 0.5:
                count_one(self.comparisons, "ties")
            wins[i].append(share)
            wins[j].append(1 - share)
        return [sum(won) / len(won) if won else None for won in wins]

    def _text(self, form: str, prompt: Text, first: str, second: str = "") -> str:
        return form.format(rubric=self.rubric, prompt=_as_text(prompt), first=first, second=second)

    def _read(self, text: str | None, pattern: re.Pattern[str], value: Any) -> float | None:
        if text is None:
            count_one(self.failures, "the endpoint refused")
            return None
        found = pattern.search(text.strip())
        if found is None:
            count_one(self.failures, "the endpoint's answer holds no verdict")
            return None
        number: float | None = value(found[1])
        if number is None:
            count_one(self.failures, "the endpoint's score is not from 0 to 10")
        return number

    def _ask(self, texts: Sequence[str]) -> list[str | None]:
        """What the model says to each text, None where it refuses; the first failure is raised
        once all that was asked meanwhile is kept.
        """
        new = [t for t in dict.fromkeys(texts) if self._key(t) not in self.known]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = [pool.submit(self._ask_one, text) for text in new]
            try:
                for one in as_completed(asked):
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [self.known[self._key(text)] for text in texts]

    def _ask_one(self, text: str) -> None:
        if self.most is not None and self.spent >= self.most:
            raise FastDPOError(
                f"judge: {self.spent} tokens were used, judge_max_tokens is {self.most}; raise it "
                "and start the same command again to go on"
            )
        said, tokens = self._post(text)
        key = self._key(text)
        line = json.dumps({"key": key, "text": said, "tokens": tokens}) + "\n"
        with self.writing, self.file.open("a", encoding="utf-8") as file:
            file.write(line)
            self.known[key] = said
            self.spent += tokens

    def _key(self, text: str) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.url}\n{self.model}\n{text}".encode())

    def _post(self, text: str) -> tuple[str | None, int]:
        """What the model says, None where it refuses, and the tokens that it took."""
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": text}],
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_WAIT * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                    said = json.load(answer)
                message = said["choices"][0]["message"]
                tokens = int((said.get("usage") or {}).get("total_tokens") or 0)
                refused = message.get("refusal") or not message.get("content")
                return None if refused else str(message["content"]), tokens
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    break
            except (OSError, HTTPException) as error:
                problem = one_line(error)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"no answer in the form of OpenAI's ({one_line(error)})"
        raise FastDPOError(
            f"judge: {self.url}: {problem}; what was judged is kept, start the same command again "
            "to go on"
        )


def _tenth(text: str) -> float | None:
    value = float(text)
    return value / 10 if 0 <= value <= 10 else None


def _side(text: str) -> float:
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[text.lower()]


def _as_text(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
