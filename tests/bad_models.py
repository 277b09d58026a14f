"""Bad models and tokenizers: what `fastdpo train` has to say of each."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import CHAT, lines
from bad_inputs import Case
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 123\n"


def model(what: str, change: Callable[[Path], object], expected: str, *flags: str) -> Case:
    """The model directory with a change."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        change(path / "model")

    return Case(f"model: {what}", expected, ("train", "config.yaml", *flags), prepare)


def settings(file: str = "config.json", **values: Any) -> Callable[[Path], object]:
    """Changes keys of a file of settings; a value of ... removes the key."""

    def change(path: Path) -> None:
        known = json.loads((path / file).read_text())
        known = {name: v for name, v in (known | values).items() if v is not ...}
        (path / file).write_text(json.dumps(known))

    return change


def content(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Replaces the bytes of a file, or changes them."""

    def change(path: Path) -> None:
        old = (path / name).read_bytes() if (path / name).exists() else b""
        (path / name).write_bytes(data if isinstance(data, bytes) else data(old))

    return change


def directory(name: str) -> Callable[[Path], object]:
    """Puts a directory in the place of a file."""

    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return change


def dangling(name: str) -> Callable[[Path], object]:
    """Puts a link that leads nowhere in the place of a file."""

    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to("/nowhere/blob")

    return change


def replaced(make: Callable[..., PreTrainedModel]) -> Callable[[Path], object]:
    """Puts a model of another kind in the place of the model, made from sizes like its own."""

    def change(path: Path) -> None:
        size = json.loads((path / "config.json").read_text())["vocab_size"]
        (path / WEIGHTS).unlink()
        make(vocab_size=size, num_hidden_layers=2, num_attention_heads=4).save_pretrained(path)

    return change


def without(*names: str) -> Callable[[Path], object]:
    """Removes files."""

    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Changes the tensors of the model."""

    def apply(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    return apply


def sharded(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """The model's weights in two files and an index, with a change."""

    def apply(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        names = sorted(tensors)
        places = {name: SHARDS[number % 2] for number, name in enumerate(names)}
        for file in SHARDS:
            part = {name: tensors[name] for name in names if places[name] == file}
            save_file(part, path / file, metadata={"format": "pt"})
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        change(path)

    return apply


def _lost(data: bytes) -> bytes:
    """An index that sends the head to a file that is not there."""
    index = json.loads(data)
    index["weight_map"]["lm_head.weight"] = "nothere.safetensors"
    return json.dumps(index).encode()


def _no_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    (path.parent / "rows.jsonl").write_bytes(lines(CHAT))


def _bad_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{% for m in messages %}")
    (path.parent / "rows.jsonl").write_bytes(lines(CHAT))


def _pickle(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _small(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    settings(vocab_size=100, eos_token_id=3)(path)


def _encoder(kind: Any, **sizes: Any) -> Any:
    return kind(BertConfig(**sizes, hidden_size=32, intermediate_size=64))


def _llama(kind: Any, **sizes: Any) -> Any:
    return kind(LlamaConfig(**sizes, hidden_size=32, intermediate_size=64, pad_token_id=0))


def _t5(vocab_size: int, **sizes: Any) -> Any:
    config = T5Config(vocab_size=vocab_size, d_model=32, d_ff=64, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config)


UP = "model.layers.0.mlp.up_proj.weight"
LAYER = "model.layers.1."
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
DAMAGED = f"model/{WEIGHTS}: is cut off or damaged: its "
PLACES = [
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
    *(
        Case(
            f"model: a file, {file}",
            f"model_name_or_path: {file} is a file; expected the directory with config.json and",
            ("train", "config.yaml", "--model_name_or_path", file),
        )
        for file in ("pairs.jsonl", f"model/{WEIGHTS}")
    ),
    model(
        "an empty directory",
        lambda p: [f.unlink() for f in p.iterdir()],
        "model: no model could be loaded (it has neither config.json nor adapter_config.json)",
    ),
]
SETTINGS = [
    model("no config.json", without("config.json"), "model: no model …neither config.json nor"),
    model("config.json empty", content("config.json", b""), "model/config.json: is empty"),
    model(
        "config.json cut off", content("config.json", half), "model/config.json: is not valid JSON"
    ),
    model(
        "config.json a list", content("config.json", b"[]"), "model/config.json: expected a mapping"
    ),
    model("config.json Latin-1", content("config.json", b'{"a": "\xe9"}'), "model/config.json…"),
    model(
        "config.json a pointer",
        content("config.json", POINTER),
        "model/config.json: is a pointer of Git LFS",
    ),
    model("config.json a mapping of nothing", content("config.json", b"{}"), "model: …model_type"),
    model("no model_type", settings(model_type=..., architectures=...), "model: …model_type"),
    model("unknown model_type", settings(model_type="nosuch"), "model: …model type `nosuch`"),
    model("an encoder's settings", settings(model_type="vit"), "model: …"),
    model("a translator's settings", settings(model_type="t5"), "model: …"),
    model("odd heads", settings(num_attention_heads=3), "model: …"),
    model("no heads", settings(num_attention_heads=0), "model: no model could be loaded…by zero"),
    model("negative size", settings(hidden_size=-4), "model: …"),
    model("size as text", settings(hidden_size="big"), "model: …hidden_size…got str"),
    model("another size", settings(hidden_size=64, head_dim=8), "model: …"),
    model("unknown dtype", settings(dtype="floaty"), "model: no model could be loaded…floaty"),
    model("unknown activation", settings(hidden_act="swoosh"), "model: …KeyError: 'swoosh'"),
    model("unknown rope", settings(rope_parameters={"rope_type": "x"}), "model: …"),
    model("quantised", settings(quantization_config=QUANTISED), "model: …"),
    model(
        "generation cut off",
        content("generation_config.json", half),
        "model/generation_config.json: is not valid JSON",
    ),
    model(
        "generation impossible",
        settings("generation_config.json", early_stopping="x"),
        "model: …`early_stopping` must be a boolean",
    ),
]
FILES = [
    model("no weights", without(WEIGHTS), "model: no causal …safetensors…there is no model.safe"),
    model("pickle alone", _pickle, "model: no causal …safetensors…found pytorch_model.bin"),
    model("weights empty", content(WEIGHTS, b""), f"model/{WEIGHTS}: is empty"),
    model("weights cut off", content(WEIGHTS, half), DAMAGED),
    model("weights a byte short", content(WEIGHTS, lambda data: data[:-1]), DAMAGED),
    model("weights of four bytes", content(WEIGHTS, b"1234"), DAMAGED),
    model("weights garbage", content(WEIGHTS, b"\xff" * 999), DAMAGED),
    model("weights of JSON", content(WEIGHTS, b"{}"), DAMAGED),
    model(
        "weights a pointer",
        content(WEIGHTS, POINTER),
        f"model/{WEIGHTS}: is a pointer of Git LFS, …git lfs pull",
    ),
    model(
        "weights a directory", directory(WEIGHTS), f"model/{WEIGHTS}: expected a file, found a d"
    ),
    model(
        "weights a link", dangling(WEIGHTS), f"model/{WEIGHTS}: is a link to /nowhere/blob, which"
    ),
    model(
        "a shard missing",
        sharded(without(SHARDS[1])),
        f"model/{INDEX}: names {SHARDS[1]}, which is missing in model",
    ),
    model(
        "a shard cut off",
        sharded(content(SHARDS[1], half)),
        f"model/{SHARDS[1]}: is cut off or damaged",
    ),
    model(
        "a shard a pointer",
        sharded(content(SHARDS[1], POINTER)),
        f"model/{SHARDS[1]}: is a pointer of Git LFS",
    ),
    model(
        "an index to nowhere",
        sharded(content(INDEX, _lost)),
        f"model/{INDEX}: names nothere.safetensors, which is missing",
    ),
    model(
        "an index elsewhere",
        sharded(content(INDEX, b'{"weight_map": {"a": "../x.safetensors"}}')),
        "model…",
    ),
    *(
        model(f"an index {what}", sharded(content(INDEX, data)), f"model/{INDEX}: {expected}")
        for what, data, expected in (
            ("that is no JSON", b"{nope", "is not valid JSON"),
            ("that is a list", b"[]", "expected a mapping, found list"),
            ("without names", b"{}", "expected a weight_map"),
            ("of nothing", b'{"weight_map": {}}', "its weight_map is empty"),
            ("that is a pointer", POINTER, "is a pointer of Git LFS"),
        )
    ),
]
TENSORS = [
    model(
        "no head",
        change_weights(lambda t: t.pop("lm_head.weight")),
        "model: lacks 1 weight of LlamaForCausalLM: lm_head.weight",
    ),
    model(
        "no layer",
        change_weights(lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)]),
        f"model: lacks 9 weights of LlamaForCausalLM: {LAYER}input_layernorm.weight, …and 6 more",
    ),
    model(
        "a tensor missing",
        change_weights(lambda t: t.pop(UP)),
        f"model: lacks 1 weight of LlamaForCausalLM: {UP}",
    ),
    model("no tensors", change_weights(dict.clear), "model: lacks 21 weights of LlamaForCausalLM"),
    model(
        "other names",
        change_weights(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)]),
        "model: lacks 21 weights of …; it holds x.lm_head.weight, …, which LlamaForCausalLM has",
    ),
    model(
        "more layers",
        settings(num_hidden_layers=3),
        "model: lacks 9 weights of LlamaForCausalLM: model.layers.2.",
    ),
    model(
        "another architecture's biases",
        settings(model_type="qwen2"),
        "model: lacks 6 weights of Qwen2ForCausalLM: model.layers.0.self_attn.k_proj.bias",
    ),
    model(
        "a tensor of another shape",
        change_weights(lambda t: t.update({UP: torch.zeros(3, 3)})),
        f"model: 1 weight of another shape: {UP} [3, 3] (expected [64, 32])",
    ),
    model(
        "a larger vocabulary",
        settings(vocab_size=1000),
        "model: 2 weights of another shape: lm_head.weight …(expected [1000, 32])",
    ),
    model(
        "whole numbers",
        change_weights(lambda t: t.update({UP: t[UP].mul(99).to(torch.int8)})),
        f"model: holds integers for 1 weight: {UP}; expected floating point",
    ),
    model(
        "not a number",
        change_weights(lambda t: t["lm_head.weight"][0].fill_(torch.nan)),
        "model: its logits are not finite; a weight is infinite or not a number",
    ),
    model("small vocabulary", _small, "pairs.jsonl, line 1: …vocabulary"),
]
KINDS = [
    model(
        "a reward model",
        replaced(partial(_llama, LlamaForSequenceClassification)),
        "model: lacks 1 weight of LlamaForCausalLM: lm_head.weight; it holds score.weight, which",
    ),
    model(
        "a model without a head",
        replaced(partial(_llama, LlamaModel)),
        "model: lacks 1 weight of LlamaForCausalLM: lm_head.weight",
    ),
    model(
        "an encoder",
        replaced(partial(_encoder, BertModel)),
        "model: lacks 5 weights of BertLMHeadModel: cls.predictions",
    ),
    model(
        "an encoder with a head",
        replaced(partial(_encoder, BertForMaskedLM)),
        "…expected a causal language model, and here a token changes the hidden states before",
    ),
    model("an encoder and decoder", replaced(_t5), "model: no causal language model in "),
]
TOKENIZERS = [
    model(
        "no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "model: no tokenizer"
    ),
    model("no tokenizer.json", without("tokenizer.json"), "model: no tokenizer could be loaded"),
    *(
        model(f"{file} {what}", content(file, data), f"model/{file}: {expected}")
        for file in ("tokenizer.json", "tokenizer_config.json")
        for what, data, expected in (
            ("cut off", half, "is not valid JSON"),
            ("empty", b"", "is empty"),
            ("a list", b"[]", "expected a mapping"),
            ("a pointer", POINTER, "is a pointer of Git LFS"),
            ("null", b"null", "expected a mapping"),
        )
    ),
    model(
        "tokenizer.json of another kind", content("tokenizer.json", b'{"a": 1}'), "model: no token"
    ),
    model("tokenizer.json of nothing", content("tokenizer.json", b"{}"), "model: no tokenizer c"),
    model(
        "no end of text",
        settings("tokenizer_config.json", eos_token=..., pad_token=...),
        "…eos_token",
    ),
    model("no template", _no_template, "…chat template", "--dataset_name=rows.jsonl"),
    model(
        "a broken template",
        _bad_template,
        "rows.jsonl, line 1…template",
        "--dataset_name=rows.jsonl",
    ),
]
ADAPTERS = [
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
CASES = [*PLACES, *SETTINGS, *FILES, *TENSORS, *KINDS, *TOKENIZERS, *ADAPTERS]
