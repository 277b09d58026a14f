"""What samples: an engine answers a batch of prompts with the weights of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from transformers import set_seed

from ..config.rounds import RoundsConfig
from ..model.sampler import Answer, Sampler, Sampling
from .libraries import VLLM, SGLang
from .servers import SGLangServer, VLLMServer


class Engine(Protocol):
    """A model that answers. The same prompts and seed give the same answers."""

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        """`number` answers to each prompt of tokens."""


class Transformers:
    """transformers' `generate`, in one batch; or its continuous batching, where each answer takes
    the place of one that has ended.
    """

    def __init__(self, config: RoundsConfig, how: Sampling, *, continuous: bool = False) -> None:
        self.sampler, self.how, self.continuous = Sampler.load(config), how, continuous

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        set_seed(seed)
        if not self.continuous:
            return self.sampler.generate(prompts, self.how, number, logps=True)
        return self.sampler.generate_continuously(prompts, self.how, number)


ENGINES: Mapping[str, Callable[[RoundsConfig, Sampling], Engine]] = {
    "transformers": Transformers,
    "continuous": lambda config, how: Transformers(config, how, continuous=True),
    "vllm": VLLM,
    "sglang": SGLang,
}
SERVERS: Mapping[str, Callable[[RoundsConfig, Sampling], Engine]] = {
    "vllm": VLLMServer,
    "sglang": SGLangServer,
}


def load_engine(config: RoundsConfig) -> Engine:
    """The engine that the configuration names, with the weights at `model_name_or_path`.

    Raises:
        FastDPOError: it is not installed or not there, or cannot load the model.
    """
    how = Sampling(
        config.max_completion_length or 256, config.temperature, config.top_p, config.top_k
    )
    known = ENGINES if config.engine_url is None else SERVERS
    return known[config.engine](config, how)


def free() -> None:
    """Give back what a model held that nobody names any more."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
