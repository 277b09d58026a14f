"""vLLM and SGLang in this process, loaded anew for each round."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.rounds import RoundsConfig
from ..errors import ConfigError, FastDPOError, one_line
from ..model.sampler import Answer, Sampling


class VLLM:
    """vLLM; an adapter goes to its base as one."""

    def __init__(self, config: RoundsConfig, how: Sampling) -> None:
        vllm = _installed("vllm")
        model, adapter = base_and_adapter(config)
        options = {"enable_lora": True, "max_lora_rank": adapter[1]} if adapter else {}
        self.engine = _loaded(
            "vllm",
            lambda: vllm.LLM(
                model=model, seed=config.seed, logprobs_mode="raw_logprobs", **options
            ),
        )
        self.request: Any = None
        if adapter:
            lora = importlib.import_module("vllm.lora.request")
            self.request = lora.LoRARequest("policy", 1, adapter[0])
        self.parameters = vllm.SamplingParams
        self.how = how

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        how = self.how
        parameters = self.parameters(
            n=number,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k or -1,
            max_tokens=how.max_new_tokens,
            seed=seed,
            logprobs=0,
        )
        found = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            lora_request=self.request,
            use_tqdm=False,
        )
        return [[_of_vllm(output) for output in one.outputs] for one in found]


def _of_vllm(output: Any) -> Answer:
    ids = tuple(output.token_ids)
    logps = tuple(each[token].logprob for each, token in zip(output.logprobs, ids, strict=True))
    return Answer(output.text, output.finish_reason == "stop", ids, logps)


class SGLang:
    """SGLang; an adapter goes to its base as one."""

    def __init__(self, config: RoundsConfig, how: Sampling) -> None:
        sglang = _installed("sglang")
        model, adapter = base_and_adapter(config)
        options: dict[str, Any] = {}
        if adapter:
            options = {"lora_paths": {"policy": adapter[0]}, "max_lora_rank": adapter[1]}
        self.how, self.adapter = how, bool(adapter)
        self.engine = _loaded(
            "sglang",
            lambda: sglang.Engine(model_path=model, random_seed=config.seed, **options),
        )

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        repeated = [list(prompt) for prompt in prompts for _ in range(number)]
        found = self.engine.generate(
            input_ids=repeated,
            sampling_params=sglang_parameters(self.how, seed, len(repeated)),
            return_logprob=True,
            **({"lora_path": ["policy"] * len(repeated)} if self.adapter else {}),
        )
        answers = [of_sglang(one["text"], one["meta_info"]) for one in found]
        return [answers[start : start + number] for start in range(0, len(answers), number)]


def sglang_parameters(how: Sampling, seed: int, count: int) -> list[dict[str, Any]]:
    """SGLang's parameters of `count` answers, each with a seed of its own."""
    return [
        {
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k or -1,
            "max_new_tokens": how.max_new_tokens,
            "sampling_seed": seed + place,
        }
        for place in range(count)
    ]


def of_sglang(text: str, said: Mapping[str, Any]) -> Answer:
    """An answer of SGLang's, with what it says of it."""
    logps, ids = zip(*((one[0], one[1]) for one in said["output_token_logprobs"]), strict=True)
    return Answer(text, said["finish_reason"]["type"] == "stop", ids, logps)


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"engine: {name} cannot be imported ({one_line(error)}); pip install {name}, or "
            "engine: transformers"
        ) from None


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        raise FastDPOError(
            f"engine: {name} cannot load the model ({one_line(error)}); engine: transformers loads "
            "every model that can be trained"
        ) from error


def base_and_adapter(config: RoundsConfig) -> tuple[str, tuple[str, int] | None]:
    """What an engine loads: a model, or a base with the directory and the rank of an adapter."""
    path = str(config.model_name_or_path)
    if not (Path(path) / "adapter_config.json").is_file():
        return path, None
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(path)
    return str(adapter.base_model_name_or_path), (path, getattr(adapter, "r", 16))
