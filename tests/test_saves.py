"""A checkpoint of shares is written beside training, and appears whole or not at all. One process
that holds the only share stands for many here.
"""

import errno
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from fastdpo.config import TrainConfig
from fastdpo.errors import CheckpointError, FastDPOError
from fastdpo.model.adapter import add_adapter
from fastdpo.model.sharding import shard_model
from fastdpo.model.shares import load_any_weights
from fastdpo.parallel.shares import Stored, tidy_whole
from fastdpo.parallel.world import World
from fastdpo.training import checkpoint, saves
from fastdpo.training.blocks import Blocks
from fastdpo.training.optimizer import make_optimizer
from fastdpo.training.saves import Saves


@pytest.fixture(scope="module")
def world():
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    mesh = DeviceMesh("cpu", torch.arange(1).view(1, 1), mesh_dim_names=("replicate", "shard"))
    yield World(mesh=mesh)
    dist.destroy_process_group()


@pytest.fixture
def trained(world, tiny_model):
    """A model after a step, with its optimizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shard_model(model, world.mesh)
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def save(world, trained, tiny_model):
    made = Saves(world, 20)
    model, optimizer = trained
    state = {"step": 1, "num_tokens": 1, "pending": {}}
    done: list[str] = []

    def begun(path: Path) -> Saves:
        made.save(
            path,
            lambda: done.append(path.name),
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(tiny_model),
            optimizer=optimizer,
            state=state,
        )
        return made

    begun.done = done  # type: ignore[attr-defined]
    return begun


def test_training_goes_on_while_it_is_written(save, trained, tmp_path, monkeypatch):
    model, go_on, appear = trained[0], threading.Event(), checkpoint.appear

    def when_told(*given: Any) -> None:
        go_on.wait(20)
        appear(*given)

    monkeypatch.setattr(checkpoint, "appear", when_told)
    name = "model.layers.0.mlp.up_proj.weight"
    known = model.get_parameter(name).full_tensor().detach().clone()
    made = save(tmp_path / "checkpoint-1")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert not (tmp_path / "checkpoint-1").exists() and save.done == []
    go_on.set()
    made.wait()
    assert save.done == ["checkpoint-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.damage(tmp_path / "checkpoint-1") is None
    assert torch.equal(load_file(tmp_path / "checkpoint-1" / "model.safetensors")[name], known)


def test_the_next_one_waits_for_the_one_before(save, tmp_path, monkeypatch):
    order, appear = [], checkpoint.appear

    def slowly(made: Path, path: Path, digests: Any) -> None:
        threading.Event().wait(0.2)
        appear(made, path, digests)
        order.append(path.name)

    monkeypatch.setattr(checkpoint, "appear", slowly)
    save(tmp_path / "checkpoint-1")
    made = save(tmp_path / "checkpoint-2")
    assert order == ["checkpoint-1"]
    made.wait()
    assert order == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("place", ["tidy_whole", "write_shares", "write_whole"])
def test_a_full_disk_is_told_at_the_next_step_that_waits(save, tmp_path, monkeypatch, place):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saves, place, full)
    made = save(tmp_path / "checkpoint-1")
    with pytest.raises(FastDPOError, match="checkpoint-1: the disk is full"), made:
        pass
    assert not list(tmp_path.iterdir()) and save.done == []
    made.wait()  # which has told it once


def test_a_host_that_does_not_see_the_directory_is_named(save, tmp_path):
    made = save(tmp_path / "checkpoint-1")
    made.wait()
    with pytest.raises(CheckpointError, match=r"output_dir: .* is not seen by .*all hosts share"):
        made._require_seen(tmp_path / "elsewhere")


def test_what_torch_cannot_put_together_is_saved_beside(world, tmp_path):
    tensors = {"weight": torch.randn(6, 3), "count": torch.tensor([3]), "scale": torch.tensor(0.5)}
    saves.write_whole(tmp_path, tensors, dist.group.WORLD)
    tidy_whole(tmp_path, tensors)
    stored = Stored(tmp_path.glob("*.safetensors"))
    assert all(torch.equal(stored.whole(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("cut", "exact"), [(4864, True), (5000, False)])
def test_blocks_are_copied_where_they_lie_alike(tmp_path, cut, exact):
    """Two stretches of a moment of 40 x 256 in 8 bits, brought together."""
    layer = torch.nn.Linear(256, 40, bias=False)
    optimizer = make_optimizer(layer, TrainConfig(optim="adamw_torch_8bit"))
    values, pieces, whole = torch.randn(10240) ** 3, {}, []
    for start, part in ((0, values[:cut]), (cut, values[cut:])):
        if part.numel() % 256:  # a share of such a size has no blocks
            pieces[f"0.0.exp_avg.plain@{start}"] = part.clone()
            whole.append(part)
            continue
        moment = optimizer._new_buffer(part, True).copy_(part)
        for name in ("codes", "scale", "qmap"):
            pieces[f"0.0.exp_avg.{name}@{start}"] = getattr(moment, name)
        whole.append(moment.dequantize())
    save_file(pieces, tmp_path / "optimizer.safetensors")
    blocks = Blocks(optimizer, layer.weight, Stored.at(tmp_path / "optimizer"))
    for key in pieces:
        blocks.add(key.split(".", 3)[3], key)
    joined = blocks.join(signed=True)
    assert blocks.exact == exact
    expected = torch.cat(whole)
    if not exact:
        expected = optimizer._new_buffer(layer.weight, True).copy_(expected.view(40, 256))
        expected = expected.dequantize().flatten()
    assert torch.equal(joined.dequantize().flatten(), expected)


def test_without_an_optimizer_it_holds_the_model_alone(world, trained, tiny_model, tmp_path):
    model, tokenizer = trained[0], AutoTokenizer.from_pretrained(tiny_model)
    with Saves(world, 20) as made:
        made.save(
            tmp_path / "one", print, model=model, tokenizer=tokenizer, optimizer=None, state={}
        )
    assert not list((tmp_path / "one").rglob("*optimizer*"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(saved[n], p.full_tensor()) for n, p in model.named_parameters())
    with pytest.raises(CheckpointError, match="holds the model alone"):
        checkpoint.read_state(tmp_path / "one")


MIXTURE = {"num_local_experts": 2, "hidden_size": 16, "intermediate_size": 8, "vocab_size": 40}


def test_weights_that_files_name_otherwise_are_found(world, tmp_path):
    """transformers keeps experts as one tensor in memory and as many in files."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**MIXTURE, **sizes))
    known = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert known.keys() != load_file(tmp_path / "model.safetensors").keys()
    shard_model(model, world.mesh)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    load_any_weights(model, TrainConfig(), tmp_path)
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name].full_tensor(), known[name]) for name in named)


def test_a_checkpoint_of_something_else_is_refused(
    world, trained, tiny_model, tied_model, tmp_path
):
    model = trained[0]
    with pytest.raises(CheckpointError, match="holds another model"):
        load_any_weights(model, TrainConfig(), tied_model)
    keys = {
        "use_peft": True,
        "model_name_or_path": str(tiny_model),
        "lora_target_modules": ["q_proj"],
    }
    with pytest.raises(CheckpointError, match="holds no adapter, but use_peft is set"):
        load_any_weights(model, TrainConfig(**keys), tiny_model)
    for rank, module, problem in (
        (2, "q_proj", "has other shapes"),
        (3, "k_proj", "other modules"),
    ):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        other = TrainConfig(**{**keys, "lora_r": rank, "lora_target_modules": [module]})
        add_adapter(base, other).save_pretrained(tmp_path / module)
        config = TrainConfig(**keys, lora_r=3)
        mine = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        shard_model(mine, world.mesh)
        with pytest.raises(CheckpointError, match=problem):
            load_any_weights(mine, config, tmp_path / module)
