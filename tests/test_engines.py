"""Engines that are not installed here, and their servers, by stand-ins with their interfaces: what
they are asked for, and what is made of their answers.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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


def of_sglang(count: int) -> list[dict[str, Any]]:
    """So many answers in SGLang's form, every other one cut off."""
    return [
        {
            "text": f"answer {place}",
            "meta_info": {
                "finish_reason": {"type": "length" if place % 2 else "stop"},
                "output_token_logprobs": [(-0.25, 7, "a"), (-0.5, place, "b")],
            },
        }
        for place in range(count)
    ]


@pytest.fixture
def sglang(monkeypatch):
    seen = SimpleNamespace(loaded=None, asked=None)

    class Engine:
        def __init__(self, **options):
            seen.loaded = options

        def generate(self, **asked):
            seen.asked = asked
            return of_sglang(len(asked["input_ids"]))

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


@pytest.fixture
def server():
    """Answers as vLLM's and SGLang's servers do, to two answers of each prompt."""
    state = SimpleNamespace(seen=[], refuse={}, raw={})

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "served"}]}
        if path == "/update_weights_from_disk":
            return {"success": True}
        if path == "/v1/completions":
            count = len(body["prompt"]) * body["n"]
            choices = [
                {
                    "index": place,
                    "text": f"answer {place}",
                    "finish_reason": "length" if place % 2 else "stop",
                    "token_ids": [7, place],
                    "logprobs": {"token_logprobs": [-0.25, -0.5]},
                }
                for place in range(count)
            ]
            return {"choices": choices[::-1]}
        if path == "/generate":
            return of_sglang(len(body["input_ids"]))
        return None

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            state.seen.append((self.path, body, self.headers.get("Authorization")))
            data = state.raw.get(self.path)
            if data is None:
                data = json.dumps(answer(self.path, body)).encode()
            self.send_response(state.refuse.get(self.path, 200))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{made.server_port}"
    yield state
    made.shutdown()
    made.server_close()


WEIGHTS = {
    "vllm": lambda path: [
        (
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": path}},
        ),
        ("/reset_prefix_cache", {}),
        ("/v1/models", None),
    ],
    "sglang": lambda path: [("/update_weights_from_disk", {"model_path": path})],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_server_has_the_weights_by_their_path(name, tiny_model, server, monkeypatch):
    """From whatever directory the run was started."""
    monkeypatch.chdir(tiny_model.parent)
    monkeypatch.setenv("FASTDPO_ENGINE_KEY", "secret")
    keys = {"engine_url": f"{server.url}/", **SAMPLED}
    engine = load_engine(config(tiny_model.name, name, **keys))
    assert [one[:2] for one in server.seen] == WEIGHTS[name](str(tiny_model.resolve()))
    assert {one[2] for one in server.seen} == {"Bearer secret"}
    (first, second), (third, fourth) = engine.answer([[1, 2], [3]], 2, seed=9)
    assert [one.text for one in (first, second, third, fourth)] == [f"answer {i}" for i in range(4)]
    assert (first.complete, second.complete) == (True, False)
    assert (fourth.ids, fourth.logps) == ((7, 3), (-0.25, -0.5))
    path, asked, _ = server.seen[-1]
    if name == "vllm":
        expected = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 11, "seed": 9}
        expected |= {"model": "served", "prompt": [[1, 2], [3]], "n": 2}
        assert path == "/v1/completions"
        assert asked == expected | {"logprobs": 1, "return_token_ids": True}
    else:
        assert path == "/generate" and asked["input_ids"] == [[1, 2], [1, 2], [3], [3]]
        assert [one["sampling_seed"] for one in asked["sampling_params"]] == [9, 10, 11, 12]
        assert asked["return_logprob"] and "lora_path" not in asked


@pytest.mark.parametrize(("name", "prefix"), [("vllm", "/v1"), ("sglang", "")])
def test_a_server_has_an_adapter_as_one(name, prefix, adapter, server):
    """By a name of its weights; that it was not there before is no fault."""
    server.refuse[f"{prefix}/unload_lora_adapter"] = 404
    engine = load_engine(config(adapter, name, engine_url=server.url))
    engine.answer([[1]], 2, seed=0)
    unloaded, loaded, (_, asked, _) = server.seen
    assert unloaded[0] == f"{prefix}/unload_lora_adapter"
    called = loaded[1]["lora_name"]
    assert loaded[:2] == (
        f"{prefix}/load_lora_adapter",
        {"lora_name": called, "lora_path": str(Path(adapter).resolve())},
    )
    assert asked["model" if name == "vllm" else "lora_path"] in (called, [called] * 2)
    load_engine(config(adapter, name, engine_url=server.url))
    assert server.seen[-1][1]["lora_name"] == called
    weights = Path(adapter) / "adapter_model.safetensors"
    weights.touch()
    load_engine(config(adapter, name, engine_url=server.url))
    assert server.seen[-1][1]["lora_name"] != called


@pytest.mark.parametrize(
    ("name", "path", "status", "raw", "said"),
    [
        ("vllm", "/collective_rpc", 404, b"{}", "/collective_rpc: 404 Not Found"),
        ("vllm", "/v1/completions", 200, b'{"choices": [{}]}', "no answer in the form of vLLM"),
        ("vllm", "/v1/models", 200, b"<html>", "no answer in the form of vLLM"),
        ("sglang", "/update_weights_from_disk", 200, b'{"success": false}', "were not taken"),
        ("sglang", "/generate", 500, b"out of\nmemory", "500 Internal Server Error out of memory"),
        ("sglang", "/generate", 200, b"[{}]", "no answer in the form of SGLang"),
    ],
)
def test_a_server_that_refuses_is_one_line(tiny_model, server, name, path, status, raw, said):
    server.refuse[path], server.raw[path] = status, raw
    with pytest.raises(FastDPOError) as caught:
        load_engine(config(tiny_model, name, engine_url=server.url)).answer([[1]], 1, seed=0)
    assert said in str(caught.value) and "what was sampled is kept" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(tiny_model, server):
    url = server.url
    with pytest.raises(ConfigError, match="engine_url: transformers samples in this process"):
        config(tiny_model, "transformers", engine_url=url)
    with pytest.raises(ConfigError, match="engine_url: expected a URL such as http://host:8000"):
        config(tiny_model, "vllm", engine_url="host:8000")
    with pytest.raises(
        FastDPOError, match=r"engine_url: http://127\.0\.0\.1:9/collective_rpc: .*refus"
    ):
        load_engine(config(tiny_model, "vllm", engine_url="http://127.0.0.1:9"))
