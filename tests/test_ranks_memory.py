"""What each of four processes holds of a model that they share: a quarter, and little beside it."""

from pathlib import Path
from typing import Any

import pytest
from ranks import ranks
from training import settings
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.scaling.memory import held, optimizer_alive
from fastdpo import TrainConfig, train

SHARED = ("weights", "gradients", "states")


@pytest.fixture(scope="module")
def started():
    with ranks(4) as made:
        yield made


def held_after(step: int, keys: dict[str, Any]) -> dict[str, int]:
    """Bytes of this process once it has taken a step and keeps what the next one needs."""
    found: dict[str, int] = {}

    def look(number: int, metrics: dict[str, float]) -> None:
        if number == step:
            found.update(held(optimizer_alive()))

    train(TrainConfig.from_dict(keys), on_step=look)
    return found


def test_a_quarter_of_weights_gradients_and_states(
    started, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """And 5 % of that; whatever else is alive on a rank is no part of the model."""
    known = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config = LlamaConfig(
        vocab_size=known.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in tiny_model.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    count = sum(p.numel() for p in model.parameters())
    keys = {"global_batch_size": 8, "per_device_train_batch_size": 4, "dtype": "float32"}
    one, many = (
        settings(folder, pairs_file, tmp_path / name / "out", max_steps=2, **keys)
        for name in ("one", "many")
    )
    (whole,) = started(1, held_after, 2, one)
    sizes = {"weights": 4 * count, "gradients": 4 * count, "states": 8 * count}
    counters = 4 * len(list(model.parameters()))
    assert sizes | {"states": 8 * count + counters} == {name: whole[name] for name in SHARED}
    beside = whole["all"] - sum(sizes.values())
    for mode in ({}, {"head_parallel": "vocabulary"}):
        shares = started(4, held_after, 2, many | {"data_parallel": "fsdp"} | mode)
        for share in shares:
            for name in SHARED:
                assert share[name] < 1.05 * whole[name] / 4, name
            others = share["all"] - sum(share[name] for name in SHARED)
            assert others < beside + 0.05 * sum(sizes.values()) / 4
        assert all(sum(share[name] for share in shares) >= sizes[name] for name in SHARED)
        many["output_dir"] += "-2"
