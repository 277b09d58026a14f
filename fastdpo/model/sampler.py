"""Answers of a model to prompts, by transformers' own `generate`."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    set_seed,
)
from transformers.cache_utils import DynamicLayer

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
    """A sampled answer.

    Attributes:
        text: without what ends it.
        complete: whether the model ended it itself.
        ids: the tokens that were drawn, the end among them.
        logps: their log-probabilities as whoever sampled gave them, at temperature 1, nats; None
            where it gave none.
    """

    text: str
    complete: bool
    ids: tuple[int, ...]
    logps: tuple[float, ...] | None = None


class _Recorder(LogitsProcessor):
    """Keeps log π of the tokens that `generate` goes on with; it sees logits as the model gives
    them, and each token one call later.
    """

    def __init__(self) -> None:
        self.logps: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.chosen(input_ids[:, -1])
        self.last = scores.float().log_softmax(-1)
        return scores

    def chosen(self, ids: torch.Tensor) -> None:
        """The tokens that followed the last logits."""
        if self.last is not None:
            self.logps.append(self.last.gather(1, ids[:, None])[:, 0])


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

    def encode(self, prompt: Text, template: Mapping[str, Any] | None = None) -> list[int]:
        """The tokens of a prompt: text as it stands, messages by the chat template, which is given
        tools and other variables.

        Raises:
            DataError: messages without a chat template, or a prompt without tokens.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template; expected prompts of text")
        else:
            ids = self.tokenizer.apply_chat_template(
                prompt, **(template or {}), add_generation_prompt=True, return_dict=True
            )["input_ids"]
        if not ids:
            raise DataError("the prompt has no tokens; expected at least one")
        return list(ids)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        how: Sampling,
        number: int = 1,
        *,
        logps: bool = False,
        **options: Any,
    ) -> list[list[Answer]]:
        """`number` answers to each of some prompts of tokens, in one batch padded on the left,
        with log-probabilities if asked for; further options are those of transformers' `generate`.
        A prompt is computed once for its answers, where the model's cache can be repeated.
        """
        recorder = _Recorder()
        if logps:
            options["logits_processor"] = LogitsProcessorList([recorder])
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        if number > 1:
            options |= self._computed(ids, mask, number)
            ids, mask = (each.repeat_interleave(number, 0) for each in (ids, mask))
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=pad,
            num_beams=1,
            use_cache=True,
            **how.arguments(),
            **options,
        )
        drawn = output[:, longest:]
        known: list[Any] = [None] * len(drawn)
        if logps:
            recorder.chosen(drawn[:, -1])
            known = torch.stack(recorder.logps, 1).tolist()
        answers = [self._answer(*both) for both in zip(drawn.tolist(), known, strict=True)]
        return [answers[start : start + number] for start in range(0, len(answers), number)]

    def _computed(self, ids: torch.Tensor, mask: torch.Tensor, number: int) -> dict[str, Any]:
        """The keys and values of all but the last token, repeated for `number` answers; nothing
        where layers keep something else, or only a window.
        """
        cache = DynamicCache(config=self.model.config)
        if ids.shape[1] < 2 or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return {}
        decoder = self.model.get_decoder()
        newer = "cache" in inspect.signature(decoder.forward).parameters
        name = "cache" if newer else "past_key_values"  # before transformers 5.24
        decoder(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
            use_cache=True,
            **{name: cache},
        )
        cache.batch_repeat_interleave(number)
        return {name: cache}

    @torch.no_grad()
    def generate_continuously(
        self, prompts: Sequence[list[int]], how: Sampling, number: int = 1
    ) -> list[list[Answer]]:
        """As `generate`, by transformers' continuous batching: without padding, and the place of an
        answer that has ended goes to the next one. Log-probabilities are given where tokens are
        drawn from the model's own distribution.
        """
        inputs = [prompt for prompt in prompts for _ in range(number)]
        plain = how.temperature == 1 and how.top_p == 1 and how.top_k == 0
        found = self.model.generate_batch(
            inputs,
            generation_config=GenerationConfig(
                eos_token_id=sorted(self.ends) or None,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                **how.arguments(),
            ),
            continuous_batching_config=ContinuousBatchingConfig(return_logprobs=plain),
            warmup=False,
        )
        by_number = sorted(found.values(), key=lambda one: int(one.request_id.split("_")[-1]))
        answers = [
            self._answer(one.generated_tokens, one.logprobs if plain else None) for one in by_number
        ]
        return [answers[start : start + number] for start in range(0, len(answers), number)]

    def _answer(self, ids: Sequence[int], logps: Sequence[float] | None = None) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        count = len(ids) if end is None else end + 1
        kept = None if logps is None else tuple(logps[:count])
        return Answer(str(text), end is not None, tuple(ids[:count]), kept)

    def sample(
        self,
        prompts: Sequence[list[int]],
        how: Sampling,
        number: int = 1,
        *,
        seed: int = 42,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """The index of each prompt of tokens with its answers, prompts of like length together;
        the same for the same arguments.
        """
        set_seed(seed)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            yield from zip(
                some, self.generate([prompts[i] for i in some], how, number), strict=True
            )
