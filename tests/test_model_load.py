"""Model files that are cut off, missing or something else, and weights that a checkpoint lacks: one
line each from the command line, never a traceback, never random numbers.
"""

import json
import re
import shutil

import pytest
import torch
from families import ALONE, OTHER_HEADS, OTHERS, SHARED, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from training import heard, run, weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fastdpo.cli import main
from fastdpo.config import TrainConfig
from fastdpo.errors import FastDPOError, ModelError
from fastdpo.model.head import check_causal
from fastdpo.model.load import load_model
from fastdpo.model.save import save_weights
from fastdpo.model.weights import read_header

CPU = torch.device("cpu")
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n".encode()
WEIGHTS, INDEX, SHARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00002-of-00005.safetensors",
)


@pytest.fixture(scope="module")
def sharded(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(tiny_model, path)
    (path / WEIGHTS).unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(path, max_shard_size="30KB")
    assert (path / SHARD).exists()
    return path


@pytest.fixture
def refused(tmp_path, pairs_file, capsys):
    """The one line on which the command line ends for a model; nothing is written."""

    def refused(model):
        out = tmp_path / "out"
        keys = {"model_name_or_path": model, "dataset_name": pairs_file, "output_dir": out}
        words = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
        capsys.readouterr()
        assert main(["train", *words, "--use_cpu", "--bf16", "false", "--disable_tqdm"]) == 2
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in errors and "LOAD REPORT" not in errors
        assert not out.exists() or not any(out.iterdir())
        return lines[0]

    return refused


def write(name, content):
    def write(path):
        (path / name).unlink(missing_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def cut(name, keep=0.5):
    def cut(path):
        content = (path / name).read_bytes()
        write(name, content[: int(len(content) * keep) if keep < 1 else -keep])(path)

    return cut


def gone(name):
    return lambda path: (path / name).unlink()


def directory(name):
    def directory(path):
        (path / name).unlink()
        (path / name).mkdir()

    return directory


def dangling(name):
    def dangling(path):
        (path / name).unlink()
        (path / name).symlink_to("/nowhere/blob")

    return dangling


def changed(name, **values):
    def changed(path):
        content = json.loads((path / name).read_text(encoding="utf-8"))
        (path / name).write_text(json.dumps({**content, **values}), encoding="utf-8")

    return changed


def pickled(path):
    torch.save(weights(path), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def lost(path):
    """The index sends the head to a file that is not there."""
    content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    content["weight_map"]["lm_head.weight"] = "nothere.safetensors"
    (path / INDEX).write_text(json.dumps(content), encoding="utf-8")


FILES = {
    "weights cut off": (cut(WEIGHTS), f"{WEIGHTS}: is cut off or damaged: its [0-9]+ bytes"),
    "weights a byte short": (cut(WEIGHTS, 1), f"{WEIGHTS}: is cut off or damaged"),
    "weights of four bytes": (write(WEIGHTS, b"1234"), f"{WEIGHTS}: is cut off or damaged"),
    "weights of noise": (write(WEIGHTS, b"\xff" * 99), f"{WEIGHTS}: is cut off or damaged"),
    "empty weights": (write(WEIGHTS, b""), f"{WEIGHTS}: is empty"),
    "weights of Git LFS": (
        write(WEIGHTS, LFS),
        f"{WEIGHTS}: is a pointer of Git LFS.*git lfs pull",
    ),
    "a directory of weights": (directory(WEIGHTS), f"{WEIGHTS}: expected a file, found a dir"),
    "a link to no weights": (dangling(WEIGHTS), f"{WEIGHTS}: is a link to /nowhere/blob, which"),
    "no weights": (
        gone(WEIGHTS),
        "no causal language model in safetensors .*there is no model.saf",
    ),
    "pickled weights": (pickled, "no causal .* in safetensors .*found pytorch_model.bin"),
    "no configuration": (gone("config.json"), "has neither config.json nor adapter_config.json"),
    "configuration cut off": (cut("config.json"), "config.json: is not valid JSON"),
    "empty configuration": (write("config.json", ""), "config.json: is empty"),
    "a list for configuration": (write("config.json", "[]"), "config.json: expected a mapping"),
    "configuration of Git LFS": (write("config.json", LFS), "config.json: is a pointer of Git LFS"),
    "no model_type": (write("config.json", "{}"), "no model could be loaded .*model_type"),
    "unknown model_type": (changed("config.json", model_type="nosuch"), "model type `nosuch`"),
    "a text for a size": (changed("config.json", hidden_size="big"), "hidden_size.* got str"),
    "no attention heads": (changed("config.json", num_attention_heads=0), "no model .*by zero"),
    "unknown dtype": (changed("config.json", dtype="floaty"), "no model could be loaded.*floaty"),
    "unknown activation": (changed("config.json", hidden_act="nosuch"), "KeyError: 'nosuch'"),
    "generation cut off": (cut("generation_config.json"), "n_config.json: is not valid JSON"),
    "generation impossible": (
        changed("generation_config.json", early_stopping="x"),
        "`early_stopping` must be a boolean",
    ),
    "tokenizer cut off": (cut("tokenizer.json"), "tokenizer.json: is not valid JSON"),
    "empty tokenizer": (write("tokenizer.json", ""), "tokenizer.json: is empty"),
    "tokenizer of Git LFS": (
        write("tokenizer.json", LFS),
        "tokenizer.json: is a pointer of Git LFS",
    ),
    "a list for tokenizer": (write("tokenizer.json", "[]"), "tokenizer.json: expected a mapping"),
    "an empty mapping for tokenizer": (write("tokenizer.json", "{}"), "no tokenizer could be load"),
    "no tokenizer": (gone("tokenizer.json"), "no tokenizer could be loaded"),
    "tokenizer's settings cut off": (cut("tokenizer_config.json"), "r_config.json: is not valid J"),
    "settings of Git LFS": (
        write("tokenizer_config.json", LFS),
        "r_config.json: is a pointer of G",
    ),
    "null for settings": (write("tokenizer_config.json", "null"), "r_config.json: expected a map"),
}
SHARDS = {
    "a shard missing": (gone(SHARD), f"{INDEX}: names {SHARD}, which is missing in "),
    "a shard cut off": (cut(SHARD), f"{SHARD}: is cut off or damaged"),
    "a shard of Git LFS": (write(SHARD, LFS), f"{SHARD}: is a pointer of Git LFS"),
    "an index to nowhere": (lost, f"{INDEX}: names nothere.safetensors, which is missing"),
    "an index that is no JSON": (write(INDEX, "{nope"), f"{INDEX}: is not valid JSON"),
    "an index that is a list": (write(INDEX, "[]"), f"{INDEX}: expected a mapping, found list"),
    "an index without names": (write(INDEX, "{}"), f"{INDEX}: expected a weight_map"),
    "an index of nothing": (
        write(INDEX, '{"weight_map": {}}'),
        f"{INDEX}: its weight_map is empty",
    ),
    "an index of Git LFS": (write(INDEX, LFS), f"{INDEX}: is a pointer of Git LFS"),
}


@pytest.mark.parametrize("name", [*FILES, *SHARDS])
def test_a_damaged_file_is_named(tiny_model, sharded, tmp_path, refused, name):
    damage, expected = (FILES | SHARDS)[name]
    path = tmp_path / "model"
    shutil.copytree(sharded if name in SHARDS else tiny_model, path)
    damage(path)
    line = refused(path)
    assert re.search(expected, line), line
    assert str(path) in line


def altered(change):
    def altered(path):
        save_file(change(weights(path)), path / WEIGHTS, metadata={"format": "pt"})

    return altered


UP = "model.layers.0.mlp.up_proj.weight"
LACKING = {
    "the head": (
        altered(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
        "lacks 1 weight of LlamaForCausalLM: lm_head.weight$",
    ),
    "a layer": (
        altered(lambda w: {k: v for k, v in w.items() if "layers.1" not in k}),
        "lacks 9 weights of .*: model.layers.1.input_layernorm.weight, .* and 6 more$",
    ),
    "one weight": (
        altered(lambda w: {k: v for k, v in w.items() if k != UP}),
        f"lacks 1 weight of LlamaForCausalLM: {UP}$",
    ),
    "all by their prefix": (
        altered(lambda w: {f"module.{k}": v for k, v in w.items()}),
        "lacks 21 weights of .*; it holds module.lm_head.weight, .*, which LlamaForCausalLM has",
    ),
    "everything": (altered(lambda w: {}), "lacks 21 weights of LlamaForCausalLM"),
    "a layer that the configuration counts": (
        changed("config.json", num_hidden_layers=3),
        "lacks 9 weights of LlamaForCausalLM: model.layers.2.",
    ),
    "another architecture's biases": (
        changed("config.json", model_type="qwen2"),
        "lacks 6 weights of Qwen2ForCausalLM: model.layers.0.self_attn.k_proj.bias",
    ),
    "a weight of another shape": (
        altered(lambda w: {**w, UP: torch.zeros(3, 3)}),
        rf"1 weight of another shape: {UP} \[3, 3\] \(expected \[64, 32\]\)$",
    ),
    "rows of the vocabulary": (
        changed("config.json", vocab_size=1000),
        r"2 weights of another shape: lm_head.weight .*\(expected \[1000, 32\]\)",
    ),
    "whole numbers": (
        altered(lambda w: {**w, UP: w[UP].mul(99).to(torch.int8)}),
        f"holds integers for 1 weight: {UP}; expected floating point",
    ),
    "a number": (
        altered(lambda w: {**w, UP: w[UP] * float("nan")}),
        "its logits are not finite; a weight is infinite or no number",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_weights_that_a_checkpoint_lacks_are_named(tiny_model, tmp_path, refused, name):
    change, expected = LACKING[name]
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    change(path)
    line = refused(path)
    assert re.search(expected, line), line


def other_models(tokenizer):
    """Checkpoints of anything but a causal language model, and what is said of each."""
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    llama, bert = LlamaConfig(**size, pad_token_id=0), BertConfig(**size)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=64, num_layers=2, num_heads=4)
    return {
        "a reward model": (
            LlamaForSequenceClassification(llama),
            "lacks 1 weight of LlamaForCausalLM: lm_head.weight; it holds score.weight, which",
        ),
        "a model without a head": (LlamaModel(llama), "lacks 1 weight of .*: lm_head.weight"),
        "an encoder": (BertModel(bert), "lacks 5 weights of BertLMHeadModel: cls.predictions"),
        "an encoder with a head": (
            BertForMaskedLM(bert),
            "expected a causal language model, and here a token changes the hidden states before",
        ),
        "an encoder and decoder": (T5ForConditionalGeneration(t5), "no causal language model in "),
    }


def test_models_of_another_kind_are_named(tokenizer, tmp_path, refused):
    for name, (model, expected) in other_models(tokenizer).items():
        path = tmp_path / name
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        line = refused(path)
        assert re.search(expected, line), line


def test_what_is_no_model_directory_is_named(tiny_model, tmp_path, refused):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(99))
    for file in (gguf, tiny_model / WEIGHTS):
        assert f"model_name_or_path: {file} is a file; expected the directory" in refused(file)
    (tmp_path / "empty").mkdir()
    assert "has neither config.json nor adapter_config.json" in refused(tmp_path / "empty")


def test_a_reference_is_looked_at_before_the_data(tiny_model, tmp_path, pairs_file):
    path = tmp_path / "reference"
    shutil.copytree(tiny_model, path)
    cut(WEIGHTS)(path)
    with pytest.raises(ModelError, match=r"reference/model.safetensors: is cut off"):
        run(tiny_model, tmp_path / "nodata", tmp_path / "out", ref_model_name_or_path=str(path))
    with pytest.raises(ModelError, match=r"ref_model_name_or_path: .* is a file"):
        file = str(path / WEIGHTS)
        run(tiny_model, pairs_file, tmp_path / "out", ref_model_name_or_path=file)


def test_left_over_weights_are_a_note(tiny_model, tmp_path, pairs_file, caplog):
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    more = {f"vision.{n}.weight": torch.zeros(2) for n in range(5)}
    altered(lambda w: {**w, **more})(path)
    _, said = run(path, pairs_file, tmp_path / "out", max_steps=1)
    notes = [line for line in said if line.startswith("note: ") and "vision" in line]
    assert notes == [
        f"note: {path}: 5 weights not of LlamaForCausalLM left out: vision.0.weight, "
        "vision.1.weight, vision.2.weight and 2 more"
    ]
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("family", [*SHARED, *OTHERS, *ALONE, *OTHER_HEADS])
def test_no_architecture_lacks_what_it_saved(tmp_path, family):
    """Tied heads, buffers and fused experts included; and each is causal."""
    build(family, dtype=torch.float32).save_pretrained(tmp_path)
    with heard() as said:
        check_causal(load_model(TrainConfig(model_name_or_path=str(tmp_path)), CPU))
    assert said == []


def test_a_tied_head_and_old_buffers_are_not_missed(tied_model, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tied_model, path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    assert "lm_head.weight" not in weights(path)
    altered(lambda w: {**w, **buffer})(path)
    model = load_model(TrainConfig(model_name_or_path=str(path)), CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_configuration_in_half_precision_is_trained_in_the_type_asked_for(
    tiny_model, tmp_path, pairs_file, dtype
):
    path = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    assert json.loads((path / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    run(path, pairs_file, tmp_path / "out", max_steps=1)
    assert weights(tmp_path / "out")["lm_head.weight"].dtype == torch.float32
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"]
        == "float32"
    )


def test_a_generation_configuration_that_transformers_refuses_is_saved_as_it_was(
    tiny_model, tmp_path
):
    """After a whole run, `save_pretrained` alone raises for sampling flags without do_sample."""
    model = load_model(TrainConfig(model_name_or_path=str(tiny_model)), CPU)
    kept = GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=1)
    model.generation_config = kept
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "theirs")
    save_weights(model, tmp_path / "ours")
    assert model.generation_config is kept
    saved = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (saved.temperature, saved.top_p, saved.eos_token_id) == (0.6, 0.9, 1)
    assert weights(tmp_path / "ours").keys() == weights(tiny_model).keys()


def test_tokens_beyond_the_embedding_are_an_error_only_where_they_occur(
    tiny_model, tmp_path, pairs_file
):
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(path)
    run(path, pairs_file, tmp_path / "a", max_steps=1)
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "the ", "chosen": "zebra yes", "rejected": "no"}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(FastDPOError, match=r"vocabulary") as caught:
        run(path, file, tmp_path / "b")
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_bytes_of_any_kind_are_read_or_refused(header_file, data):
    """safetensors whose bytes were changed, cut or lengthened: a header, or one line."""
    whole, file = header_file
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(content), 400) - 1))
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content) + 9))
    file.write_bytes(bytes(content[:end]) + bytes(max(0, end - len(content))))
    try:
        assert isinstance(read_header(file), dict)
    except ModelError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)


@pytest.fixture(scope="module")
def header_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("header") / WEIGHTS
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int8)}, file)
    return file.read_bytes(), file
