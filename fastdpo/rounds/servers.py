"""vLLM and SGLang as servers that see the same disk: the weights of a round go there by their path,
an adapter as one.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from ..config.rounds import RoundsConfig
from ..errors import FastDPOError, one_line
from ..model.sampler import Answer, Sampling
from .libraries import base_and_adapter, of_sglang, sglang_parameters

KEY = "FASTDPO_ENGINE_KEY"
"""The environment variable of the server's key."""
_SECONDS = 3600.0
_Read = TypeVar("_Read")


class _Server:
    """A server at `engine_url`."""

    name = ""

    def __init__(self, config: RoundsConfig, how: Sampling) -> None:
        self.url, self.how = str(config.engine_url).rstrip("/"), how
        base, adapter = base_and_adapter(config)
        self.base, self.adapter = _on_disk(base), None if adapter is None else _on_disk(adapter[0])

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the server answers to a body, or to none.

        Raises:
            FastDPOError: it is not there, or refuses.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                text = answer.read()
            return json.loads(text) if text.strip().startswith((b"{", b"[")) else None
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())
            problem = f"{error.code} {error.reason} {said[:200]}"
        except (OSError, HTTPException, ValueError) as error:
            problem = one_line(error)
        raise self._failed(path, problem)

    def _read(
        self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], _Read]
    ) -> _Read:
        """What is read of an answer."""
        found = self._call(path, body)
        try:
            return read(found)
        except (LookupError, TypeError, ValueError) as error:
            problem = f"no answer in the form of {self.name} ({one_line(error)})"
            raise self._failed(path, problem) from None

    def _failed(self, path: str, problem: str) -> FastDPOError:
        return FastDPOError(
            f"engine_url: {self.url}{path}: {problem}; what was sampled is kept, start the same "
            "command again to go on"
        )

    def _load_adapter(self, prefix: str, adapter: str) -> str:
        """The name that the server has the adapter by: another one for other weights, as prompts
        are cached by it.
        """
        times = [file.stat().st_mtime_ns for file in sorted(Path(adapter).glob("adapter*"))]
        name = f"fastdpo-{xxhash.xxh3_64_hexdigest(json.dumps([adapter, times]).encode())}"
        with contextlib.suppress(FastDPOError):  # it may not be there
            self._call(f"{prefix}/unload_lora_adapter", {"lora_name": name})
        self._call(f"{prefix}/load_lora_adapter", {"lora_name": name, "lora_path": adapter})
        return name


class VLLMServer(_Server):
    """`vllm serve`, with VLLM_SERVER_DEV_MODE=1, which lets weights be loaded; for adapters with
    `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
    """

    name = "vLLM"

    def __init__(self, config: RoundsConfig, how: Sampling) -> None:
        super().__init__(config, how)
        if self.adapter is not None:
            self.model = self._load_adapter("/v1", self.adapter)
            return
        weights = {"weights_path": self.base}
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": weights})
        self._call("/reset_prefix_cache", {})
        self.model = self._read("/v1/models", None, lambda found: str(found["data"][0]["id"]))

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        body = {
            "model": self.model,
            "prompt": list(prompts),
            "n": number,
            "temperature": self.how.temperature,
            "top_p": self.how.top_p,
            "top_k": self.how.top_k or -1,
            "max_tokens": self.how.max_new_tokens,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }
        answers = self._read("/v1/completions", body, _of_vllm)
        return [answers[start : start + number] for start in range(0, len(answers), number)]


def _of_vllm(found: Mapping[str, Any]) -> list[Answer]:
    return [
        Answer(
            one["text"],
            one["finish_reason"] == "stop",
            tuple(one["token_ids"]),
            tuple(one["logprobs"]["token_logprobs"]),
        )
        for one in sorted(found["choices"], key=lambda one: int(one["index"]))
    ]


class SGLangServer(_Server):
    """`sglang.launch_server`; for adapters with `--enable-lora`."""

    name = "SGLang"

    def __init__(self, config: RoundsConfig, how: Sampling) -> None:
        super().__init__(config, how)
        self.lora: str | None = None
        if self.adapter is not None:
            self.lora = self._load_adapter("", self.adapter)
            return
        path = "/update_weights_from_disk"
        done = self._call(path, {"model_path": self.base})
        if not (isinstance(done, dict) and done.get("success")):
            raise self._failed(path, f"weights were not taken ({done})")

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        repeated = [list(prompt) for prompt in prompts for _ in range(number)]
        body: dict[str, Any] = {
            "input_ids": repeated,
            "sampling_params": sglang_parameters(self.how, seed, len(repeated)),
            "return_logprob": True,
        }
        if self.lora is not None:
            body["lora_path"] = [self.lora] * len(repeated)
        answers = self._read(
            "/generate", body, lambda found: [of_sglang(o["text"], o["meta_info"]) for o in found]
        )
        return [answers[start : start + number] for start in range(0, len(answers), number)]


def _on_disk(model: str) -> str:
    """A model as a server finds it, whatever its working directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
