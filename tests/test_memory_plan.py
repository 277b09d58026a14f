"""What a plan predicts, beside what is counted on real runs of small models."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import FAMILIES, Real, plan_of
from training import heard, metrics, run, settings
from transformers import AutoConfig

from bench.workloads import MODEL_CONFIGS
from fastdpo import TrainConfig, train
from fastdpo.cli import main
from fastdpo.data.groups import Group
from fastdpo.data.plan import epoch_plan, make_plan
from fastdpo.devices import GIB, GPUS, Device, named
from fastdpo.errors import ConfigError
from fastdpo.memory import components, switches
from fastdpo.memory import planner as planning
from fastdpo.memory.report import as_json, as_text
from fastdpo.memory.shapes import row_shape, step_shapes, weight_bytes
from fastdpo.memory.spread import Spread
from fastdpo.model.layout import beyond_positions
from fastdpo.training.optimizer import make_optimizer

# Every component beside what is counted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bf16", [False, True])
def test_kept_activations_are_those_that_autograd_keeps(family, bf16):
    real = Real(family, bf16=bf16, gradient_checkpointing=False)
    held = components.held_by_layers(real.run, real.row, real.shape.layers)
    assert held["checkpoints"] == 0
    assert sum(held.values()) == pytest.approx(real.held(), rel=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpoints_are_the_inputs_of_recomputed_layers(every):
    plain, real = Real(), Real(gradient_checkpointing_every=every)
    held = components.held_by_layers(real.run, real.row, 4)
    inputs = real.row.tokens * 128 * 4
    assert held["checkpoints"] == len(range(0, 4, every)) * inputs
    # A recomputed layer's rotary tables hang on its recomputation and are not seen as saved.
    tables = 2 * real.row.tokens * 32 * 4 if every == 1 else 0
    assert sum(held.values()) - tables == pytest.approx(real.held(), rel=1e-5)
    assert plain.shape == real.shape


@pytest.mark.parametrize("keys", [{}, {"use_peft": True}, {"dtype": "bfloat16"}])
def test_weights_gradients_and_states_are_exact(keys):
    real = Real("qwen2", **keys)
    model, shape = real.model, real.shape
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.weights == sum(p.nbytes for p in model.parameters())
    real.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert components.gradients(shape) == sum(grad.nbytes for grad in grads)
    optimizer = make_optimizer(model, real.config)
    optimizer.step()
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert components.optimizer_states(shape, real.config) == sum(m.nbytes for m in moments)


def test_states_in_8_bits_are_exact():
    real = Real(optim="adamw_torch_8bit")
    real.step()
    optimizer = make_optimizer(real.model, real.config)
    optimizer.step()
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                inner = getattr(value, "tensor_attrs", None)
                parts = [value] if inner is None else [getattr(value, n) for n in inner]
                total += sum(part.nbytes for part in parts)
    assert components.optimizer_states(real.shape, real.config) == total


def test_weights_in_4_bits():
    four = TrainConfig.from_dict({"use_peft": True, "load_in_4bit": True})
    nested = four.choose("test", use_bnb_nested_quant=True)
    linear, other = [torch.empty(64, 96), torch.empty(10, 7)], torch.empty(5)
    packed, blocks = 64 * 96 // 2 + 10 * 7 // 2, 96 + 2
    assert weight_bytes([*linear, other], linear, four) == packed + 4 * blocks + 5 * 4
    assert weight_bytes([*linear, other], linear, nested) == packed + blocks + 4 + 4 + 5 * 4


def test_shapes_of_rows():
    tokens = [np.arange(n, dtype=np.int32) for n in (10, 3, 5)]
    groups = [Group(tokens[0], tokens[1:], [(0, 1, 1.0)])]
    (step,) = make_plan(groups, units_per_step=1, max_tokens=100)
    (row,) = step.ranks[0]
    shared = row_shape(groups, row, "shared")
    assert (shared.tokens, shared.keys, shared.scored) == (18, 28, 8)
    mask = [[k <= q for k in range(13)] for q in range(13)]
    pairs = np.sum(mask) + sum(10 + 1 + q for q in range(5))
    assert (shared.pairs, shared.masked, shared.segments) == (pairs, 5 * 15, 2)
    packed = row_shape(groups, row, "packed")
    assert (packed.tokens, packed.keys, packed.masked) == (28, 28, 0)
    padded = row_shape(groups, row, "padded")
    assert (padded.tokens, padded.sequences, padded.scored) == (30, 2, 8)


# The peak of a step


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"gradient_checkpointing": False}),
        ("llama", {}),
        ("llama", {"bf16": True}),
        ("llama", {"layout": "packed", "gradient_checkpointing": False}),
        ("llama", {"gradient_checkpointing_every": 2, "bf16": True}),
        ("llama", {"layer_tile_tokens": 512}),
        ("llama", {"use_peft": True}),
        ("qwen2", {"pairs": 8, "head_workspace_mib": 4}),
        ("qwen2", {"gradient_checkpointing": False, "bf16": True}),
        ("gemma3_text", {}),
        ("gemma3_text", {"gradient_checkpointing": False}),
    ],
)
def test_the_peak_is_within_a_tenth(family, keys):
    real = Real(family, **keys)
    assert real.predicted_peak() == pytest.approx(real.peak(), rel=0.1)


# Devices, switches and reports


@pytest.fixture
def planner(tmp_path):
    """A model of 1.5B parameters that is nowhere, and pairs of assumed lengths."""
    return partial(plan_of, tmp_path)


def test_the_least_that_fits(planner):
    tight = planner("rtx4090-24gb", max_length=256)
    assert not tight.fits(tight.predict(tight.config))
    assert switches.least(tight, exact=True, without={"optimizer_offload"}) is None
    found = switches.least(tight, exact=False)
    assert found is not None and tight.fits(found)
    assert found.config.optim == "adamw_torch_8bit" and not found.config.use_peft
    roomy = planner("h100-80gb", max_length=256)
    assert roomy.fits(roomy.predict(roomy.config))
    assert switches.least(roomy, exact=True).config == roomy.config


def test_the_workspace_of_the_head_is_that_of_the_device(planner):
    """Unless a key says; and to lower it begins with what the device would have given."""
    roomy, small = planner("h100-80gb"), planner("l4-24gb")
    for made, expected in ((roomy, 2048), (small, 628)):
        run = made.run(made.config)
        row = replace(run.steps[0][0], scored=10**6)
        tile, beside = components.head_workspace(run, row)
        assert 0.9 * expected < (tile + beside) / 2**20 <= expected
        told = made.run(made.config.choose("", head_workspace_mib=64))
        assert sum(components.head_workspace(told, row)) <= 64 << 20
        (lower,) = (s for s in switches.SWITCHES if s.name == "lower head_workspace_mib")
        demand = switches.demand(made.config, made)
        assert lower.values(made.config, demand) == {"head_workspace_mib": expected // 4}


def test_switches_are_dropped_where_a_cheaper_one_is_enough(planner):
    keys = {"max_length": 8192, "gradient_checkpointing": False, "max_tokens_per_batch": 65536}
    start = planner("h100-80gb", **keys)
    assert not start.fits(start.predict(start.config))
    found = switches.least(start, exact=True)
    assert found is not None and start.fits(found)
    assert found.config.layer_tile_tokens is None and found.config.head_workspace_mib is None
    assert start.longest <= found.max_tokens < 65536
    more = start.config.choose("more", max_tokens_per_batch=int(found.max_tokens * 1.2))
    kept = more.choose("", gradient_checkpointing=found.config.gradient_checkpointing)
    assert not start.fits(start.predict(kept)), "the row budget could have been larger"


def test_the_plan_has_the_rows_that_training_has(tiny_model, pairs_file):
    """In the order of `data_seed`, where it is given, and in the layout of the layers."""
    keys = {"model_name_or_path": str(tiny_model), "dataset_name": str(pairs_file)}
    keys |= {"per_device_train_batch_size": 5, "max_tokens_per_batch": 64}
    for changes in ({}, {"data_seed": 3}, {"seed": 3}, {"shuffle": False}):
        config = TrainConfig.from_dict({**keys, **changes})
        made = planning.make_planner(config, named("h100-80gb"))
        trained = epoch_plan(config, made.groups, layout="shared", max_tokens=64)
        assert made.steps(config) == step_shapes(made.groups, trained, "shared")


def test_the_report_says_what_json_says(planner):
    made = planner("rtx4090-24gb", max_length=128)
    found = json.loads(as_json(made))
    assert found["peak_bytes"] == sum(
        size for name, size in found["components"].items() if name != "overhead"
    )
    assert not found["fits"] and found["least"]["changes"]
    for width in (40, 72, 100):
        text = as_text(made, width)
        assert max(map(len, text.splitlines())) <= width or width == 40
        assert f"{found['total_bytes'] / GIB:.2f}" in text
        assert "does not fit" in text and "least that fits" in text
        assert "no data given: pairs of 128 tokens each are assumed" in " ".join(text.split())


def test_the_passes_through_the_head_are_those_of_the_run(llama, tokenizer, pairs_file, tmp_path):
    """Tiles of 8 tokens of a vocabulary of 32768: every comparison is longer."""
    model = llama(vocab_size=32768, hidden_size=32, intermediate_size=64)
    keys = {"head_workspace_mib": 1, "max_steps": -1, "num_train_epochs": 1}
    run(model, pairs_file, tmp_path / "run", **keys)
    lines = [line for line in metrics(tmp_path / "run") if "head_passes" in line]
    config = TrainConfig.from_dict(settings(model, pairs_file, tmp_path / "plan", **keys))
    made = planning.make_planner(config, Device("this one", "cpu", 1 << 34))
    found = json.loads(as_json(made))
    # Each line is weighted by the step's tokens, which it does not name.
    said = [line["head_passes"] for line in lines]
    assert 6.5 < min(said) <= found["head_passes"] <= max(said) < 8
    assert f"{found['head_passes']:.2f} times; 6 is the least" in as_text(made, 100)
    assert made.head_passes(replace(config, head_workspace_mib=64)) == 6
    assert made.head_passes(replace(config, use_peft=True)) == 4
    together = made.over(Spread("fsdp", devices=2, local=2, replicas=1, vocabulary=True))
    assert together.head_passes(config) is None


def test_the_command(tiny_model, pairs_file, capsys):
    words = ["plan", "--model_name_or_path", str(tiny_model), "--dataset_name", str(pairs_file)]
    assert main([*words, "--use_cpu", "--bf16", "false"]) == 0
    text = capsys.readouterr().out
    assert "this machine's CPU" in text and "24 comparisons in 13 groups" in text
    assert "the time of a step is not known for this device" in text
    words += ["--json"]
    assert main([*words, "--gpu", "h100-80gb"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["name"] == "h100-80gb" and found["fits"] and found["step_seconds"] > 0
    assert main([*words, "--gpu=rtx4090"]) == 2
    assert "--gpu: expected one of" in capsys.readouterr().err


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
RECIPES = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in PAGE.split("<!-- plans -->")[1].split("<!-- /plans -->")[0].splitlines()
    if line.startswith("| ") and "--" in line
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe[0]} on {recipe[1]}")
def test_the_peaks_of_the_page(recipe, tmp_path):
    model, gpu, keys, peak, _ = recipe
    name = model.split(",")[0].lower()
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIGS[name]))
    config = TrainConfig.parse(["--model_name_or_path", str(tmp_path), *keys.split()])
    made = planning.make_planner(config, named(gpu))
    found = made.predict(config)
    assert made.fits(found)
    total = (found.estimate.peak + named(gpu).overhead) / GIB
    assert f"{total:.1f}" == peak


def test_names_of_gpus():
    assert named("h100-80gb").budget < 80 * GIB < named("h200-141gb").budget
    assert all(gpu.kind == "cuda" and gpu.bf16 and gpu.host_link for gpu in GPUS.values())
    with pytest.raises(ConfigError, match=r"--gpu: expected one of .*, got h100"):
        named("h100")


# memory: auto, long rows and long positions


def test_auto_takes_the_least_that_fits(tiny_model, pairs_file, tmp_path, monkeypatch):
    free = 2 << 30
    monkeypatch.setattr(
        "fastdpo.memory.auto.at_hand", lambda device: Device("a small one", "cpu", free)
    )

    def go(name: str, **more: Any) -> tuple[list[str], TrainConfig]:
        keys = settings(tiny_model, pairs_file, tmp_path / name, memory="auto", max_steps=1)
        del keys["gradient_checkpointing"]
        with heard() as said:
            train(TrainConfig.from_dict(keys | {"optim": "sgd"} | more))
        lines = [line.removeprefix("memory: auto: ") for line in said if "memory: auto" in line]
        return lines, TrainConfig.load(tmp_path / name / "training_config.yaml")

    lines, saved = go("roomy")
    assert lines[0].startswith("peak ") and lines[1:] == ["gradient_checkpointing false"]
    assert saved.gradient_checkpointing is False
    free = 5 << 20
    rows = {"max_tokens_per_batch": 100000, "per_device_train_batch_size": 24}
    lines, saved = go("tight", gradient_checkpointing=True, **rows)
    assert lines[1:] == [f"max_tokens_per_batch {saved.max_tokens_per_batch}"]
    assert saved.max_tokens_per_batch < 2000  # of 2282 that the step has


def test_a_comparison_longer_than_every_budget_trains(tiny_model, tmp_path, tokenizer):
    """It is one row by itself, with the loss that it has in a row of its own size."""
    data = tmp_path / "long.jsonl"
    words = "one small dog saw the old hills and ran far over a mat "
    rows = [
        {"prompt": words * 24, "chosen": words * 22 + "yes", "rejected": words * 20 + "no"},
        {"prompt": words, "chosen": words + "yes", "rejected": words + "no"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {"max_length": None, "max_steps": 1, "per_device_train_batch_size": 2}
    found = {}
    for budget in (128, 100000):
        result, said = run(
            tiny_model, data, tmp_path / str(budget), max_tokens_per_batch=budget, **keys
        )
        found[budget] = result
    longest = len(tokenizer(rows[0]["prompt"] + rows[0]["chosen"])["input_ids"])
    assert longest > 512
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        assert found[128][name] == pytest.approx(found[100000][name], rel=1e-5)
    assert any("above the model's max_position_embeddings" in line for line in said)


def test_positions_beyond_those_of_the_model():
    llama = AutoConfig.for_model("llama", max_position_embeddings=2048)
    assert beyond_positions(llama, 2048) is None
    line = beyond_positions(llama, 4096)
    assert line is not None and "max_length 4096" in line and "2048" in line
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    stretched = AutoConfig.for_model(
        "llama", max_position_embeddings=2048, rope_parameters={**yarn, "rope_theta": 1e4}
    )
    assert beyond_positions(stretched, 8192) is None
    assert "8192" in str(beyond_positions(stretched, 8193))
