"""Bad models and tokenizers: what `fastdpo train` has to say of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import CHAT, lines
from bad_inputs import Case
from safetensors.torch import load_file, save_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 123\n"


def model(what: str, change: Callable[[Path], object], expected: str, *flags: str) -> Case:
    """The model directory with a change."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        change(path / "model")

    return Case(f"model: {what}", expected, ("train", "config.yaml", *flags), prepare)


def settings(**values: Any) -> Callable[[Path], object]:
    """Changes keys of `config.json`; a value of ... removes the key."""

    def change(path: Path) -> None:
        known = json.loads((path / "config.json").read_text())
        known = {name: v for name, v in (known | values).items() if v is not ...}
        (path / "config.json").write_text(json.dumps(known))

    return change


def content(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Replaces the bytes of a file, or changes them."""

    def change(path: Path) -> None:
        old = (path / name).read_bytes() if (path / name).exists() else b""
        (path / name).write_bytes(data if isinstance(data, bytes) else data(old))

    return change


def without(*names: str) -> Callable[[Path], object]:
    """Removes files."""

    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Changes the tensors of the model."""

    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def _shards(missing: str | None, index: dict[str, Any] | None = None) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        for file, kept in parts.items():
            if file != missing:
                save_file({n: tensors[n] for n in kept}, path / file, metadata={"format": "pt"})
        places = {name: file for file, kept in parts.items() for name in kept}
        found = {"metadata": {}, "weight_map": places} if index is None else index
        (path / "model.safetensors.index.json").write_text(json.dumps(found))

    return change


def _tokenizer(**values: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        file = path / "tokenizer_config.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in (known | values).items() if v is not ...}))

    return change


def _no_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    (path.parent / "rows.jsonl").write_bytes(lines(CHAT))


def _bad_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{% for m in messages %}")
    (path.parent / "rows.jsonl").write_bytes(lines(CHAT))


def _pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] = torch.nan


def _small(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings(vocab_size=100, eos_token_id=3)(path)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
CASES = [
    Case(
        "model: missing",
        "model_name_or_path: ./no does not exist",
        ("train", "config.yaml", "--model_name_or_path", "./no"),
    ),
    Case(
        "reference: missing",
        "ref_model_name_or_path: ./no does not exist",
        ("train", "config.yaml", "--ref_model_name_or_path", "./no"),
    ),
    Case(
        "model: a file",
        "model_name_or_path: pairs.jsonl is …directory",
        ("train", "config.yaml", "--model_name_or_path", "pairs.jsonl"),
    ),
    model("an empty directory", lambda p: [f.unlink() for f in p.iterdir()], "model: no …"),
    model("no config.json", without("config.json"), "model: no model could be loaded"),
    model("config.json empty", content("config.json", b""), "model/config.json…"),
    model("config.json cut off", content("config.json", half), "model/config.json…JSON"),
    model("config.json a list", content("config.json", b"[]"), "model/config.json…"),
    model("config.json Latin-1", content("config.json", b'{"a": "\xe9"}'), "model/config.json…"),
    model("config.json a pointer", content("config.json", POINTER), "model/config.json…Git LFS"),
    model("no model_type", settings(model_type=..., architectures=...), "model: …model_type"),
    model("unknown model_type", settings(model_type="nothing"), "model: …nothing"),
    model("an encoder", settings(model_type="vit"), "model: …"),
    model("a translator", settings(model_type="t5"), "model: …"),
    model("odd heads", settings(num_attention_heads=3), "model: …"),
    model("no heads", settings(num_attention_heads=0), "model: …"),
    model("negative size", settings(hidden_size=-4), "model: …"),
    model("size as text", settings(hidden_size="big"), "model: …"),
    model("another size", settings(hidden_size=64, head_dim=8), "model: …"),
    model("more layers", settings(num_hidden_layers=4), "model: …"),
    model("unknown activation", settings(hidden_act="swoosh"), "model: …swoosh"),
    model("unknown rope", settings(rope_parameters={"rope_type": "x"}), "model: …"),
    model("quantised", settings(quantization_config=QUANTISED), "model: …"),
    model("no weights", without("model.safetensors"), "model: …safetensors"),
    model("pickle alone", _pickle, "model: …safetensors"),
    model("weights empty", content("model.safetensors", b""), "model/model.safetensors…"),
    model("weights cut off", content("model.safetensors", half), "model/model.safetensors…"),
    model(
        "weights a pointer", content("model.safetensors", POINTER), "model/model.safetensors…LFS"
    ),
    model(
        "weights garbage", content("model.safetensors", b"\xff" * 999), "model/model.safetensors…"
    ),
    model("weights of JSON", content("model.safetensors", b"{}"), "model/model.safetensors…"),
    model("a tensor missing", weights(lambda t: t.pop("lm_head.weight")), "model: …lm_head.weight"),
    model(
        "other names",
        weights(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)]),
        "model: …",
    ),
    model("not a number", weights(_nan), "model: its logits are not finite"),
    model("a shard missing", _shards("model-2-of-2.safetensors"), "model…model-2-of-2.safetensors"),
    model("an empty index", _shards(None, {}), "model…index.json…"),
    model("an index of nothing", _shards(None, {"weight_map": {}}), "model…index.json…"),
    model("an index elsewhere", _shards(None, {"weight_map": {"a": "../x.safetensors"}}), "model…"),
    model(
        "no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "model: no tokenizer"
    ),
    model("tokenizer.json cut off", content("tokenizer.json", half), "model/tokenizer.json…"),
    model("tokenizer.json empty", content("tokenizer.json", b""), "model/tokenizer.json…"),
    model(
        "tokenizer.json of another kind", content("tokenizer.json", b'{"a": 1}'), "model: no token"
    ),
    model(
        "tokenizer config cut off", content("tokenizer_config.json", half), "model/tokenizer_con"
    ),
    model("no end of text", _tokenizer(eos_token=..., pad_token=...), "…eos_token"),
    model("no template", _no_template, "…chat template", "--dataset_name=rows.jsonl"),
    model(
        "a broken template",
        _bad_template,
        "rows.jsonl, line 1…template",
        "--dataset_name=rows.jsonl",
    ),
    model("small vocabulary", _small, "pairs.jsonl, line 1: …vocabulary"),
    model(
        "no such target",
        lambda p: None,
        "lora_target_modules: …no_proj",
        "--use_peft",
        "--lora_target_modules=no_proj",
    ),
    model(
        "a broken pattern",
        lambda p: None,
        "--lora_target_modules: …pattern",
        "--use_peft",
        "--lora_target_modules=(q_proj",
    ),
    model(
        "norms as targets",
        lambda p: None,
        "lora_target_modules: …",
        "--use_peft",
        "--lora_target_modules=norm",
    ),
    model(
        "nothing to save",
        lambda p: None,
        "--lora_modules_to_save: the model has no module no_head",
        "--use_peft",
        "--lora_target_modules=q_proj",
        "--lora_modules_to_save=no_head",
    ),
]
