"""What a plan says of many devices, beside counts by hand and what FSDP2 does.

A fake process group stands for the other ranks: sizes and lifetimes of what the first one holds and
sends are those of a run, the numbers are not.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from counted import peak_bytes
from fastdpo_kernels.tiles import release_workspace
from planned import CONFIG, Real, plan_of
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.cli import main
from fastdpo.config import TrainConfig
from fastdpo.devices import GIB, GPUS, LINKS, NETWORKS
from fastdpo.errors import ConfigError
from fastdpo.memory import components, estimate
from fastdpo.memory.exchange import LINK_UTILISATION, Links, traffic, waits
from fastdpo.memory.parallel import choose_data_parallel, choose_spread, scaling
from fastdpo.memory.report import as_json, as_text
from fastdpo.memory.spread import ONE, Spread, spread_of
from fastdpo.model.sharding import shard_model

HIDDEN, VOCAB, WIDE, LAYERS = 4096, 100000, 14336, 5
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + 3 * HIDDEN * WIDE + HIDDEN + 2 * 1024 + 2 * HIDDEN
"""Weights of a layer of `CONFIG`: q, o; k, v; the MLP; the biases of q, k and v; two norms."""
ROOT = VOCAB * HIDDEN + HIDDEN
"""Embedding, which is the head too, and last norm."""
ALL = LAYERS * LAYER + ROOT


@pytest.fixture(scope="module")
def eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def shard(real: Real, replicas: int = 1) -> Spread:
    """Shard the model of `real` over eight ranks, four a host."""
    ranks = torch.arange(8).view(replicas, -1)
    shard_model(real.model, DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard")))
    name = "fsdp" if replicas == 1 else "hsdp"
    return Spread(name, 8, 4, replicas)


class Wire(TorchDispatchMode):
    """Bytes that a rank sends, by collective, from the sizes of what it gives and gets."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.shared_out = self.summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_allgather_base_" in str(func):
            self.gathered += args[0].nbytes - args[1].nbytes
        elif "_reduce_scatter_base_" in str(func):
            self.shared_out += args[1].nbytes - args[0].nbytes
        elif "allreduce_" in str(func):
            self.summed += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


# Beside FSDP2


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("keys", [{}, {"use_peft": True}, {"dtype": "bfloat16"}])
def test_bytes_are_those_that_fsdp_sends(keys, replicas, eight_ranks):
    real = Real(pairs=1, **keys)
    spread = shard(real, replicas)
    real.step()
    with Wire() as wire:
        real.step()
    sent = traffic(replace(real.run, spread=spread))
    assert sent.weights == wire.gathered
    assert sent.gradients == wire.shared_out
    assert sent.sums == 2 * (replicas - 1) / replicas * wire.summed
    assert sent.head == sent.context == 0


@pytest.mark.parametrize("keys", [{"bf16": True}, {"use_peft": True}])
def test_the_peak_of_a_share_is_as_near_as_that_of_one_device(keys, eight_ranks):
    """What is over or missing of one device's peak, to 3 %, is so of a share's."""
    whole, real = Real(**keys), Real(**keys)
    of_one = whole.predicted_peak() - whole.peak()
    run = replace(real.run, spread=shard(real))
    with whole.scorer.precision():  # what it keeps of weights is of whole ones
        assert torch.is_autocast_cache_enabled()
    with real.scorer.precision():
        assert torch.is_autocast_cache_enabled() == (real.autocast is None)
    real.step()
    release_workspace()
    shares = [p.to_local().nbytes for p in real.model.parameters()]
    shares += [p.grad.to_local().nbytes for p in real.model.parameters() if p.grad is not None]
    peak = peak_bytes(real.step) + sum(shares)
    found = estimate.estimate(run)
    tensors = components.row_tensors(run, real.row) - real.row.masked
    predicted = found.peak - found.components["optimizer"] - tensors
    assert predicted - of_one == pytest.approx(peak, rel=0.03)
    assert predicted < 0.97 * whole.predicted_peak() or "use_peft" in keys


# Beside counts by hand


@pytest.fixture
def planner(tmp_path):
    """A plan for the model of `CONFIG` in fp32, with one row a step."""
    assert CONFIG["num_hidden_layers"] == LAYERS

    def make(device="h100-80gb", **keys):
        return plan_of(tmp_path, device, **{"bf16": False, **keys})

    return make


def predicted(planner, spread):
    return planner.over(spread).predict(planner.config)


def test_a_share_of_weights_and_states_and_what_is_whole_for_a_while(planner):
    made = planner()
    model = made.run(made.config).model
    assert (model.weights, model.layer_weights, model.root_weights) == (
        4 * ALL,
        4 * LAYER,
        4 * ROOT,
    )
    for spread in (Spread("fsdp", 8, 8), Spread("hsdp", 32, 8, 4)):
        run = made.over(spread).run(made.config)
        always = components.constant(run)
        assert always == {"weights": 4 * ALL // 8, "reference": 0, "optimizer": 8 * ALL // 8}
        (row,) = estimate.largest_rows(run.steps)
        assert estimate.forward(run, row).components["gathered"] == 4 * (ROOT + 2 * LAYER)
        assert estimate.head(run, row).components["gathered"] == 4 * ROOT
        last, before, *_, first = estimate.backward(run, row)
        head = 4 * VOCAB * HIDDEN
        assert last.components["gathered"] == 4 * (ROOT + 2 * LAYER)
        assert last.components["exchanged"] == head
        assert before.components["exchanged"] == head + 4 * LAYER
        assert first.components["gathered"] == 4 * (ROOT + LAYER)
        end = estimate.embedding(run, row)
        assert end.components["exchanged"] == 2 * 4 * ROOT
        step = estimate.optimizer_step(run)
        assert step.peak == 16 * ALL // 8


def test_whole_models_add_gradients_up_in_buckets(planner):
    made = planner()
    run = made.over(Spread("replicate", 8, 8, 8)).run(made.config)
    moment = estimate.sum_over_devices(run)
    assert moment.components["gradients"] == 4 * ALL
    # The embedding comes first and is a bucket; q of the first layer is the next one.
    assert moment.components["exchanged"] == 4 * (VOCAB * HIDDEN + HIDDEN * HIDDEN + HIDDEN)
    assert predicted(made, Spread("replicate", 8, 8, 8)).estimate.peak >= moment.peak


@pytest.mark.parametrize(
    ("spread", "weights", "gradients", "sums"),
    [
        (Spread("replicate", 8, 8, 8), 0, 0, 2 * 7 / 8 * 4 * ALL),
        (Spread("fsdp", 8, 8), 7 / 8 * 4 * (2 * LAYERS * LAYER + ROOT), 7 / 8 * 4 * ALL, 0),
        (
            Spread("hsdp", 32, 8, 4),
            7 / 8 * 4 * (2 * LAYERS * LAYER + ROOT),
            7 / 8 * 4 * ALL,
            2 * 3 / 4 * 4 * ALL / 8,
        ),
    ],
)
def test_bytes_by_hand(planner, spread, weights, gradients, sums):
    """Of a step of one row, and of one of four, where replicas still add up once."""
    one = planner()
    sent = traffic(one.over(spread).run(one.config))
    assert sent.weights == pytest.approx(weights, rel=1e-12)
    assert sent.gradients == pytest.approx(gradients, rel=1e-12)
    assert sent.sums == pytest.approx(sums, rel=1e-12)
    four = planner(per_device_train_batch_size=32)
    run = four.over(spread).run(four.config)
    rows = {len(step) for step in run.steps}
    assert rows == {len(run.steps[0])} and rows != {1}
    many = traffic(run)
    assert many.weights == pytest.approx(weights * len(run.steps[0]), rel=1e-12)
    assert many.sums == pytest.approx(sums, rel=1e-12)


def test_bytes_of_a_sharded_head_and_of_shared_rows(planner):
    made = planner(dtype="bfloat16", bf16=True)
    spread = Spread("fsdp", 8, 8, vocabulary=True)
    run = made.over(spread).run(made.config)
    ((row,),) = run.steps
    ideal = 2 * 8 * row.scored * HIDDEN * 2
    assert 7 / 8 * ideal < traffic(run).head <= ideal + 32 * 8 * row.scored
    halves = made.over(Spread("fsdp", 8, 8, cp_size=2)).run(made.config)
    ((half,),) = halves.steps
    assert half.tokens == -(-row.tokens // 2)
    width = (32 + 2 * 8 + 32) * 128 * 2  # q, k and v, output; bf16
    assert traffic(halves).context == pytest.approx(half.tokens / 2 * width * LAYERS * 3)


def test_activations_of_shared_rows_are_a_share(planner):
    made = planner()
    held = []
    for size in (1, 2, 4):
        run = made.over(Spread("replicate", size, size, size, cp_size=size)).run(made.config)
        (row,) = estimate.largest_rows(run.steps)
        parts = estimate.backward(run, row)[0].components
        held.append(sum(parts[name] for name in ("checkpoints", "activations", "layer", "rows")))
    assert held[0] / 2 <= held[1] < 1.1 * held[0] / 2
    assert held[0] / 4 <= held[2] < 1.1 * held[0] / 4


def test_links_are_as_fast_as_the_slower_of_a_device_and_the_ports_of_its_host():
    links = Links.of("nvlink4", "400g")
    link, port = LINKS["nvlink4"] * LINK_UTILISATION, NETWORKS["400g"] * LINK_UTILISATION
    assert (links.link, links.network) == (link, port)
    assert links.among(8, 8) == link
    assert links.among(16, 8) == min(link, 8 * port) == 8 * port
    assert links.among(4, 1) == port
    assert Links.of("pcie5", "800g").among(16, 8) == LINKS["pcie5"] * LINK_UTILISATION


def test_waits(planner):
    """Sums of whole models are waited for; gathers only where they are longer than the work."""
    made = planner(gradient_accumulation_steps=4)
    device, fast = GPUS["h100-80gb"], Links(1e15, 1e15)
    whole = made.over(Spread("replicate", 8, 8, 8)).run(made.config)
    slow = Links(1e9, 1e9)
    found = waits(whole, device, slow)
    assert found.exchanged == found.waited == traffic(whole).total / 1e9
    shares = made.over(Spread("fsdp", 8, 8)).run(made.config)
    sent = traffic(shares)
    found = waits(shares, device, fast)
    rows = len(shares.steps[0])
    assert found.exchanged == pytest.approx(sent.total / 1e15)
    assert found.waited == pytest.approx(rows * 7 / 8 * 4 * ROOT / 1e15)
    found = waits(shares, device, slow)
    seconds = made.predict(made.config).seconds
    computed = seconds.total - seconds.update
    assert found.waited == pytest.approx(found.exchanged - computed, rel=1e-9)


# What is chosen


@pytest.mark.parametrize(
    ("keys", "devices", "local", "name", "reason"),
    [
        ({}, 1, 1, "replicate", "there is one device"),
        ({}, 8, 8, "replicate", "the whole model fits"),
        ({"seed": 1}, 8, 8, "fsdp", "the whole model needs"),
        ({"seed": 1}, 16, 8, "hsdp", "shares of one host"),
        ({"seed": 1}, 4, 1, "fsdp", "shares of all"),
        ({"use_peft": True, "load_in_4bit": True}, 8, 8, "replicate", "cannot be sharded"),
        ({"optim": "adamw_bnb_8bit"}, 8, 8, "replicate", "optim: the states"),
    ],
)
def test_what_auto_is(planner, keys, devices, local, name, reason):
    small = "seed" in keys
    made = planner("rtx4090-24gb" if small else "h100-80gb", **keys)
    found = choose_data_parallel(made, devices, local)
    assert found[0] == name and reason in found[1], found
    if small:
        assert not made.fits(predicted(made, Spread("replicate", devices, local, devices)))
        assert made.fits(predicted(made, choose_spread(made, devices, local)))


def test_a_host_that_is_too_small_for_a_model_shares_it_with_others(planner):
    for gib, enough in ((14, True), (6, False)):
        device = replace(GPUS["rtx4090-24gb"], memory=gib * GIB)
        made = planner(device, per_device_train_batch_size=1)
        assert not made.fits(predicted(made, spread_of(made.config, 16, 2, "hsdp")))
        assert made.fits(predicted(made, Spread("fsdp", 16, 2))) == enough
        name, reason = choose_data_parallel(made, 16, 2)
        assert name == "fsdp" and ("too much as well" in reason) != enough
        assert choose_spread(made, 16, 2).reason == reason


def test_what_was_asked_for_is_kept(planner):
    keys = {"data_parallel": "hsdp", "dp_replicate_size": 4, "cp_size": 2}
    made = planner(**keys)
    assert choose_spread(made, 16, 8) == Spread("hsdp", 16, 8, 4, 2)
    assert choose_spread(planner(data_parallel="fsdp"), 16, 8).shards == 16
    sharded = planner(data_parallel="fsdp", head_parallel="vocabulary")
    with pytest.raises(ConfigError, match="a head of its own, and this model's is the embedding"):
        choose_spread(sharded, 8, 8)
    assert spread_of(sharded.config, 8, 8, "fsdp").vocabulary


@pytest.mark.parametrize(
    ("keys", "devices", "problem"),
    [
        ({"cp_size": 3}, 8, "cp_size: 3 devices share each row, and the run has 8"),
        ({"data_parallel": "hsdp", "dp_replicate_size": 3}, 8, "dp_replicate_size: expected a div"),
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0},
            2,
            "optimizer_in_backward: cannot go",
        ),
        ({"data_parallel": "fsdp", "optim": "adamw_bnb_8bit"}, 2, "optim: the states of adamw_bnb"),
    ],
)
def test_what_cannot_be(planner, keys, devices, problem):
    with pytest.raises(ConfigError) as caught:
        choose_spread(planner(**keys), devices, devices)
    assert problem in str(caught.value)


# What is said


def test_one_device_is_as_before(planner):
    made = planner(devices=1)
    assert choose_spread(made, 1, 1) == ONE
    assert "parallel" not in json.loads(as_json(made))
    same = made.over(choose_spread(made, 1, 1))
    assert as_json(same) == as_json(made) and as_text(same) == as_text(made)
    names = {*estimate.COMPONENTS, "overhead"}
    assert set(json.loads(as_json(made))["components"]) == names


def test_more_devices_have_as_much_to_do_each(planner):
    made = replace(planner(), links=Links.of("nvlink4", "400g"))
    made = made.over(choose_spread(made, 16, 8))
    rows = scaling(made, 8)
    assert [row.spread.devices for row in rows] == [1, 8, 16, 64, 256, 1024]
    assert rows[0].efficiency == 1
    assert rows == sorted(rows, key=lambda row: -row.efficiency)
    assert rows[-1].efficiency < 1
    fixed = replace(made, config=made.config.choose("test", global_batch_size=16 * 8))
    for now, before in zip(scaling(fixed, 8), rows, strict=True):
        assert now.prediction.estimate == before.prediction.estimate


def test_the_command_for_many_devices(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["plan", "--model_name_or_path", str(tmp_path), "--gpu", "rtx4090-24gb"]
    words += ["--devices", "8", "--hosts", "2", "--max_length", "64"]
    assert main([*words, "--json", "--link=pcie5", "--network", "100g"]) == 0
    found = json.loads(capsys.readouterr().out)
    several = found["parallel"]
    assert (several["devices"], several["hosts"], several["data_parallel"]) == (16, 2, "hsdp")
    assert (several["replicas"], several["shards"]) == (2, 8)
    assert several["links"] == ["pcie5", "100g"]
    parts = dict(several["bytes_sent"])
    assert parts.pop("total") == sum(parts.values()) > 0
    assert (
        found["peak_bytes"] == sum(found["components"].values()) - found["components"]["overhead"]
    )
    assert found["step_seconds"] > several["waited_seconds"] > 0
    assert several["exchange_seconds"] >= several["waited_seconds"]
    assert main(words) == 0
    text = capsys.readouterr().out
    said = " ".join(text.split())
    assert "on 16 x rtx4090-24gb on 2 hosts" in said
    assert "data_parallel hsdp, 2 x the model in 8 shares: the whole model needs" in said
    assert f"each device sends {several['bytes_sent']['total'] / GIB:.2f} GiB a step" in said
    assert "s over pcie4, 400g between hosts at 80% of their rates (assumed, not meas" in said
    assert "no latencies" in said


def test_a_device_whose_links_are_not_known_has_no_times(planner):
    made = planner()
    made = made.over(choose_spread(made, 8, 8))
    facts = json.loads(as_json(made))
    assert facts["step_seconds"] is None and facts["parallel"]["waited_seconds"] is None
    assert "--link says it" in as_text(made)
    assert TrainConfig().devices is None
