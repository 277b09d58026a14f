"""Engines that are not installed here, by stand-ins with their interfaces: what they are asked for,
and what is made of their answers.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastdpo.config.rounds import RoundsConfig
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.rounds.engines import load_engine


def config(model: Any, engine: str, **keys: Any) -> RoundsConfig:
    fixed = {"dataset_name": "p.jsonl", "judge": "exact", "use_cpu": True, "seed": 5}
    return RoundsConfig(model_name_or_path=str(model), engine=engine, **fixed | keys)


@pytest.fixture
def vllm(monkeypatch):
    """Two answers to each prompt: one that ended, one that was cut off."""
    seen = SimpleNamespace(loaded=None, asked=None, parameters=None, lora=None)

    class LLM:
        def __init__(self, **options):
            if "broken" in options["model"]:
                raise ValueError("architecture Odd is not supported\nby this engine")
            seen.loaded = options

        def generate(self, prompts, parameters, *, lora_request, use_tqdm):
            seen.asked, seen.lora = prompts, lora_request
            assert not use_tqdm
            logps = [{7: SimpleNamespace(logprob=-0.5)}, {2: SimpleNamespace(logprob=-1.5)}]
            ended = SimpleNamespace(text="yes", finish_reason="stop", token_ids=[7, 2])
            cut = SimpleNamespace(text="no", finish_reason="length", token_ids=[7])
            ended.logprobs, cut.logprobs = logps, logps[:1]
            return [SimpleNamespace(outputs=[ended, cut]) for _ in prompts]

    def parameters(**options):
        seen.parameters = options
        return options

    made, lora, request = (
        ModuleType("vllm"),
        ModuleType("vllm.lora"),
        ModuleType("vllm.lora.request"),
    )
    made.LLM, made.SamplingParams = LLM, parameters
    request.LoRARequest = lambda *given: given
    for module in (made, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.fixture
def sglang(monkeypatch):
    seen = SimpleNamespace(loaded=None, asked=None)

    class Engine:
        def __init__(self, **options):
            seen.loaded = options

        def generate(self, **asked):
            seen.asked = asked
            return [
                {
                    "text": f"answer {place}",
                    "meta_info": {
                        "finish_reason": {"type": "length" if place % 2 else "stop"},
                        "output_token_logprobs": [(-0.25, 7, "a"), (-0.5, place, "b")],
                    },
                }
                for place in range(len(asked["input_ids"]))
            ]

    made = ModuleType("sglang")
    made.Engine = Engine
    monkeypatch.setitem(sys.modules, "sglang", made)
    return seen


SAMPLED = {"temperature": 0.7, "top_p": 0.9, "max_completion_length": 11}


def test_vllm_has_tokens_and_the_keys_of_sampling(tiny_model, vllm):
    engine = load_engine(config(tiny_model, "vllm", **SAMPLED))
    found = engine.answer([[1, 2], [3]], 2, seed=9)
    assert vllm.loaded["model"] == str(tiny_model) and vllm.loaded["seed"] == 5
    assert vllm.loaded["logprobs_mode"] == "raw_logprobs" and "enable_lora" not in vllm.loaded
    assert vllm.asked == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    expected = {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 11, "seed": 9}
    assert vllm.parameters == expected | {"logprobs": 0} and vllm.lora is None
    for ended, cut in found:
        assert (ended.text, ended.complete, ended.ids, ended.logps) == (
            "yes", True, (7, 2), (-0.5, -1.5),
        )  # fmt: skip
        assert (cut.complete, cut.ids, cut.logps) == (False, (7,), (-0.5,))


def test_an_adapter_goes_to_its_base_as_one(adapter, tiny_model, vllm, sglang):
    load_engine(config(adapter, "vllm")).answer([[1]], 2, seed=0)
    assert vllm.loaded["model"] == str(tiny_model)
    assert vllm.loaded["enable_lora"] and vllm.loaded["max_lora_rank"] >= 8
    assert vllm.lora[2] == str(adapter)
    load_engine(config(adapter, "sglang")).answer([[1]], 2, seed=0)
    assert sglang.loaded["model_path"] == str(tiny_model)
    assert sglang.loaded["lora_paths"] == {"policy": str(adapter)}
    assert sglang.asked["lora_path"] == ["policy"] * 2


def test_sglang_has_a_seed_for_each_answer(tiny_model, sglang):
    engine = load_engine(config(tiny_model, "sglang", **SAMPLED))
    (first, second), (third, fourth) = engine.answer([[1, 2], [3]], 2, seed=9)
    assert sglang.loaded == {"model_path": str(tiny_model), "random_seed": 5}
    assert sglang.asked["input_ids"] == [[1, 2], [1, 2], [3], [3]]
    asked = sglang.asked["sampling_params"]
    assert [one["sampling_seed"] for one in asked] == [9, 10, 11, 12]
    assert asked[0]["max_new_tokens"] == 11 and asked[0]["temperature"] == 0.7
    assert [one.text for one in (first, second, third, fourth)] == [f"answer {i}" for i in range(4)]
    assert (first.complete, second.complete) == (True, False)
    assert (second.ids, second.logps) == ((7, 1), (-0.25, -0.5))


def test_an_engine_that_cannot_load_a_model_is_one_line(vllm, monkeypatch):
    with pytest.raises(FastDPOError) as caught:
        load_engine(config("broken", "vllm"))
    assert "engine: vllm cannot load the model (architecture Odd is not supported" in str(
        caught.value
    )
    assert "\n" not in str(caught.value) and "engine: transformers loads" in str(caught.value)
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ConfigError, match="pip install sglang"):
        load_engine(config("broken", "sglang"))
