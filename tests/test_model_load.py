"""What is loaded is what was saved, whatever the architecture; `bad_models` has the files that are
refused.
"""

import json
import shutil

import pytest
import torch
from bad_models import WEIGHTS, change_weights, content, half
from families import ALONE, OTHER_HEADS, OTHERS, SHARED, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from training import heard, run, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastdpo.config import TrainConfig
from fastdpo.errors import FastDPOError, ModelError
from fastdpo.model.head import check_causal
from fastdpo.model.load import load_model
from fastdpo.model.save import save_weights
from fastdpo.model.weights import read_header

CPU = torch.device("cpu")


def test_a_reference_is_looked_at_before_the_data(tiny_model, tmp_path, pairs_file):
    path = tmp_path / "reference"
    shutil.copytree(tiny_model, path)
    content(WEIGHTS, half)(path)
    with pytest.raises(ModelError, match=r"reference/model.safetensors: is cut off"):
        run(tiny_model, tmp_path / "nodata", tmp_path / "out", ref_model_name_or_path=str(path))
    with pytest.raises(ModelError, match=r"ref_model_name_or_path: .* is a file"):
        file = str(path / WEIGHTS)
        run(tiny_model, pairs_file, tmp_path / "out", ref_model_name_or_path=file)


def test_left_over_weights_are_a_note(tiny_model, tmp_path, pairs_file, caplog):
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    more = {f"vision.{n}.weight": torch.zeros(2) for n in range(5)}
    change_weights(lambda tensors: tensors.update(more))(path)
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
    change_weights(lambda tensors: tensors.update(buffer))(path)
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
