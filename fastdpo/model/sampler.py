"""Answers of a model to prompts, by transformers' own `generate`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, set_seed

from ..config import TrainConfig
from ..data.messages import Text
from ..errors import ConfigError, DataError
from .load import check_model_files, load_model, load_tokenizer
from .paths import run_device


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        temperature: that logits are divided by; 0 takes the likeliest token each time.
        top_p: the share of probability that is drawn from.
        top_k: the number of tokens that is drawn from; 0 for all.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
        ):
            if not holds:
                raise ConfigError(f"--{name}: expected {expected}, got {getattr(self, name)}")

    def arguments(self) -> dict[str, Any]:
        """Those of transformers' `generate`, whatever the model's own configuration says."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        greedy = {"temperature": None, "top_p": None, "top_k": None}
        sample = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": sample,
            **(drawn if sample else greedy),
        }


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its text, and whether the model ended it itself."""

    text: str
    complete: bool


@dataclass
class Sampler:
    """A causal language model and its tokenizer; an adapter is merged into its base."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, config: TrainConfig) -> "Sampler":
        """The model that `model_name_or_path` names, on the device at hand.

        Raises:
            FastDPOError: it cannot be loaded.
        """
        check_model_files(config)
        return cls(load_model(config, run_device(config)).eval(), load_tokenizer(config))

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        known = [self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id]
        listed = [one if isinstance(one, list) else [one] for one in known]
        return {token for one in listed for token in one if token is not None}

    def encode(self, prompt: Text) -> list[int]:
        """The tokens of a prompt: text as it stands, messages by the chat template.

        Raises:
            DataError: messages without a chat template, or a prompt without tokens.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template; expected prompts of text")
        else:
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        if not ids:
            raise DataError("the prompt has no tokens; expected at least one")
        return list(ids)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], how: Sampling, number: int = 1, **options: Any
    ) -> list[list[Answer]]:
        """`number` answers to each of some prompts of tokens, in one batch padded on the left;
        further options are those of transformers' `generate`.
        """
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            num_return_sequences=number,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=pad,
            num_beams=1,
            use_cache=True,
            **how.arguments(),
            **options,
        )
        answers = [self._answer(row) for row in output[:, longest:].tolist()]
        return [answers[start : start + number] for start in range(0, len(answers), number)]

    @torch.no_grad()
    def generate_continuously(
        self, prompts: Sequence[list[int]], how: Sampling, number: int = 1
    ) -> list[list[Answer]]:
        """As `generate`, by transformers' continuous batching: without padding, and the place of an
        answer that has ended goes to the next one.
        """
        inputs = [prompt for prompt in prompts for _ in range(number)]
        found = self.model.generate_batch(
            inputs,
            generation_config=GenerationConfig(
                eos_token_id=sorted(self.ends) or None,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                **how.arguments(),
            ),
            warmup=False,
        )
        by_number = sorted(found.values(), key=lambda one: int(one.request_id.split("_")[-1]))
        answers = [self._answer(list(one.generated_tokens)) for one in by_number]
        return [answers[start : start + number] for start in range(0, len(answers), number)]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(str(text), end is not None)

    def sample(
        self,
        prompts: Sequence[Text],
        how: Sampling,
        number: int = 1,
        *,
        seed: int = 42,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """The index of each prompt with its answers, prompts of like length together; the same
        for the same arguments.
        """
        set_seed(seed)
        tokens = [self.encode(prompt) for prompt in prompts]
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            yield from zip(some, self.generate([tokens[i] for i in some], how, number), strict=True)
