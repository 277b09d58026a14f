"""What is recomputed, tiled or offloaded changes no number, and less is kept for the backward."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import GROUPS, build, gradients, pack, random_groups, relative_error, row_logps
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training import metrics, run
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo.data.segments import Segments
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.model import offload
from fastdpo.model.layers import layers_of, recompute_layers
from fastdpo.model.layout import choose_layout
from fastdpo.model.offload import LEAVING, Offloader, ScratchFile, SideStream
from fastdpo.model.tiles import tile_layers

FP32 = torch.finfo(torch.float32).eps
LAYERS = 5


class Queue:
    """Stands in for the side stream: a copy is made when the computation waits for it, or for a
    later one, and until then its target holds NaN.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.queued: list[tuple[int, Callable[[], Any]]] = []
        self.numbers: dict[int, int] = {}
        self.sizes: list[int] = []

    def buffer(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def send(self, tensor: Tensor, host: Tensor) -> int:
        number = sum(what == "send" for what, _ in self.log)
        self.numbers[host.data_ptr()] = number
        return self._queue("send", number, tensor, host)

    def fetch(self, host: Tensor) -> tuple[Tensor, int]:
        tensor = torch.full_like(host, float("nan"))
        return tensor, self._queue("fetch", self.numbers[host.data_ptr()], host, tensor)

    @torch.no_grad()
    def wait(self, copy: int) -> None:
        while self.queued and self.queued[0][0] <= copy:
            self.queued.pop(0)[1]()
        self.log.append(("wait", self.log[copy][1]))

    def _queue(self, what: str, number: int, source: Tensor, target: Tensor) -> int:
        self.log.append((what, number))
        self.queued.append((len(self.log) - 1, lambda: target.copy_(source)))
        return len(self.log) - 1


@pytest.fixture(autouse=True)
def tiny_inputs_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1)


def offloaded(model: Any, queue: Queue, every: int = 1) -> Offloader:
    recompute_layers(model, every=every, offload=queue)
    (offloader,) = {layer._gradient_checkpointing_func for layer in layers_of(model)}
    return offloader


COMBINATIONS: dict[str, Callable[[Any], Any]] = {
    "all recomputed": recompute_layers,
    "every second": lambda model: recompute_layers(model, every=2),
    "the first": lambda model: recompute_layers(model, every=99),
    "tiles": lambda model: tile_layers(model, 4),
    "tiles, recomputed": lambda model: (tile_layers(model, 7), recompute_layers(model)),
    "offloaded": lambda model: offloaded(model, Queue()),
    "every second offloaded, tiles": lambda model: (
        tile_layers(model, 4),
        offloaded(model, Queue(), every=2),
    ),
}


def prepared(family: str = "llama", lora: bool = False, **fields: Any) -> Any:
    """A model of five layers in training mode, attention of packed rows, perhaps with adapters on
    everything, whose second matrices are not zero.
    """
    model: Any = build(family, num_hidden_layers=LAYERS, **fields)
    choose_layout(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model.train()


def assert_same(model: Any, change: Callable[[Any], Any], row: Any) -> None:
    expected = row_logps(model, row)
    expected_gradients = gradients(model, expected)
    change(model)
    logps = row_logps(model, row)
    torch.testing.assert_close(logps, expected, rtol=0, atol=16 * FP32)
    assert relative_error(gradients(model, logps), expected_gradients) < 16 * FP32


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_loss_and_gradients_stay_what_they_were(name: str, lora: bool) -> None:
    for share in (True, False):
        assert_same(prepared(lora=lora), COMBINATIONS[name], pack(GROUPS, share=share))


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "cohere", "mixtral", "gpt_oss", "phi3"])
def test_other_architectures(family: str) -> None:
    fields = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}
    model = prepared(family, **(fields if family in ("gemma2", "gpt_oss") else {}))
    assert_same(model, COMBINATIONS["every second offloaded, tiles"], pack(GROUPS, share=True))


def kept_bytes(model: Any, row: Any) -> int:
    """Bytes that one forward leaves on the device for the backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = Counter[int]()

    def pack_(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
        logps = row_logps(model, row)
    del logps
    return sum(sizes.values())


def test_less_is_kept() -> None:
    row = pack(random_groups([(40, [30, 30])]), share=True)
    kept = {}
    for name in ("all recomputed", "every second", "the first", "tiles", "offloaded"):
        model = prepared()
        kept["nothing"] = kept_bytes(model, row)
        COMBINATIONS[name](model)
        kept[name] = kept_bytes(model, row)
    assert kept["all recomputed"] < kept["every second"] < kept["the first"] < kept["nothing"]
    hidden = 100 * 32 * 8  # tokens, hidden size, fp64
    assert kept["all recomputed"] - kept["offloaded"] == LAYERS * hidden
    mlp = 100 * 40 * 8  # gate, its activation, up and their product
    assert kept["nothing"] - kept["tiles"] >= LAYERS * 4 * mlp


def test_a_tile_is_all_that_is_computed_at_once_and_twice_in_all() -> None:
    """Once forward, once backward: the recomputation of the layer stops ahead of its MLP."""
    model = prepared()
    COMBINATIONS["tiles, recomputed"](model)
    seen: list[int] = []
    layers_of(model)[2].mlp.gate_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1])
    )
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: counts.update([name]))
    row = pack(GROUPS, share=True)
    row_logps(model, row).sum().backward()
    assert max(seen) == 7 and sum(seen) == 2 * len(row.ids)
    assert set(counts.values()) == {1}


def test_tiles_repeat_dropout_and_autocast() -> None:
    model = get_peft_model(
        build("llama", torch.float32),
        LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], lora_dropout=0.5),
    ).train()
    mlp = model.get_base_model().model.layers[0].mlp
    nn.init.normal_(mlp.down_proj.lora_B["default"].weight)
    weights = [weight for weight in mlp.parameters() if weight.requires_grad]
    hidden = torch.randn(1, 10, 32, requires_grad=True)

    def grads(output: Tensor) -> list[Tensor]:
        torch.manual_seed(1)  # what was drawn since then must not matter
        return list(torch.autograd.grad(output.float().square().sum(), [hidden, *weights]))

    def autocast() -> Any:  # with its cache, gradients of the pieces would be summed in bf16
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    torch.manual_seed(0)
    with autocast():
        expected = torch.cat([mlp(piece) for piece in hidden.split(4, dim=1)], dim=1)
    after = torch.get_rng_state()
    expected_grads = grads(expected)
    tile_layers(model, 4)
    torch.manual_seed(0)
    with autocast():
        output = mlp(hidden)
    assert torch.equal(torch.get_rng_state(), after)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    for ours, expected_grad in zip(grads(output), expected_grads, strict=True):
        torch.testing.assert_close(ours, expected_grad, rtol=1e-5, atol=1e-6)
    copied = copy.deepcopy(mlp)
    for weight in copied.parameters():
        nn.init.zeros_(weight)
    assert not copied(hidden).any()


def test_weight_gradients_of_tiles_are_summed_in_fp32() -> None:
    model = build("llama", torch.bfloat16).train()
    mlp = model.model.layers[0].mlp
    hidden = torch.randn(1, 512, 32, dtype=torch.bfloat16)
    exact = copy.deepcopy(mlp).double()
    exact(hidden.double()).sum().backward()
    mlp(hidden).sum().backward()
    whole, mlp.down_proj.weight.grad = mlp.down_proj.weight.grad, None
    tile_layers(model, 2)
    mlp(hidden).sum().backward()

    def error(grad: Tensor) -> float:
        return (grad.double() - exact.down_proj.weight.grad).norm().item()

    assert error(mlp.down_proj.weight.grad) < 2 * error(whole)


def test_what_is_not_token_wise_is_left_alone() -> None:
    said = tile_layers(build("mixtral"), 4)
    assert (
        said == "5 norms in tiles of 4 tokens; not MixtralSparseMoeBlock, which is not token-wise"
    )
    assert tile_layers(build("llama"), 4) == "2 MLPs and 5 norms in tiles of 4 tokens"
    model = build("llama")
    layers_of(model)[1].mlp.register_forward_hook(lambda *call: call[2].cumsum(dim=1))
    assert "1 MLPs and 5 norms in tiles of 4 tokens; not LlamaMLP" in tile_layers(model, 4)
    with pytest.raises(ConfigError, match="layer_tile_tokens: BloomForCausalLM has no MLPs"):
        tile_layers(build("bloom"), 4)


def test_inputs_come_back_one_layer_ahead() -> None:
    model, queue, row = prepared(), Queue(), pack(GROUPS, share=True)
    offloader = offloaded(model, queue)
    for number, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: queue.log.append(("layer", n)))
    logps = row_logps(model, row)
    on_device = [ref().device is not None for ref in offloader.order]
    assert on_device == [False] * (LAYERS - LEAVING) + [True] * LEAVING
    expected: list[tuple[str, int]] = []
    for number in range(LAYERS):
        expected += [("wait", number - 2)] if number >= LEAVING else []
        expected += [("send", number), ("layer", number)]
    assert queue.log == expected
    logps.sum().backward()
    expected += [("wait", 4), ("layer", 4), ("wait", 3), ("fetch", 2), ("layer", 3)]
    expected += [("wait", 2), ("fetch", 1), ("layer", 2), ("wait", 1), ("fetch", 0), ("layer", 1)]
    expected += [("wait", 0), ("layer", 0)]
    assert queue.log == expected


def test_host_buffers_serve_step_after_step() -> None:
    model, queue = prepared(), Queue()
    offloader = offloaded(model, queue)
    short, long = (pack(GROUPS[:n], share=True) for n in (1, 3))
    for row in (short, long, short, long):
        row_logps(model, row).sum().backward()
        assert len(offloader.pool.free) == LAYERS
    sizes = [len(row.ids) * 32 * 8 for row in (short, long)]
    assert queue.sizes == [sizes[0]] * LAYERS + [sizes[1]] * LAYERS


def test_a_backward_may_come_twice_or_never() -> None:
    model, queue, row = prepared(), Queue(), pack(GROUPS, share=True)
    expected = gradients(model, row_logps(model, row))
    offloader = offloaded(model, queue)
    logps = row_logps(model, row)
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    (logps * weights).sum().backward(retain_graph=True)
    twice = gradients(model, logps)
    for name, gradient in expected.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-6, atol=1e-9)
    del logps
    assert len(offloader.pool.free) == LAYERS

    hook = layers_of(model)[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        row_logps(model, row)
    hook.remove()
    gc.collect()
    assert len(offloader.pool.free) == LAYERS and not queue.sizes[LAYERS:]
    again = gradients(model, row_logps(model, row))
    for name, gradient in expected.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9)


def test_inputs_are_freed_once_they_have_left(tmp_path) -> None:
    """Tensors that live on, whoever holds them: hooks and graphs of C++ too."""
    model, row = prepared(), pack(GROUPS, share=True)
    alive: list[weakref.ref[Tensor]] = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    recompute_layers(model, offload=ScratchFile(tmp_path))
    logps = row_logps(model, row)
    assert len(alive) == LAYERS and sum(ref() is not None for ref in alive) <= LEAVING
    logps.sum().backward()


@pytest.mark.gpu
def test_offloading_on_a_gpu() -> None:
    """The side stream's copies change nothing, step after step, and the inputs' memory is saved."""
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=500, num_hidden_layers=12, num_key_value_heads=4, **shape)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    assert choose_layout(model).name == "shared"
    model.train()
    length = 16384
    ids = torch.randint(500, (1, length), device="cuda", generator=torch.Generator("cuda"))
    inputs = {
        "input_ids": ids,
        "position_ids": torch.arange(length, device="cuda")[None],
        "fastdpo_segments": Segments.build([(0, length, 0, 0)], "cuda"),
    }

    def step() -> tuple[list[Tensor], int]:
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        states = model.model(use_cache=False, **inputs).last_hidden_state
        kept = torch.cuda.memory_allocated()
        (states.float() ** 2).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept

    recompute_layers(model)
    expected, plain = step()
    recompute_layers(model, offload=SideStream(torch.device("cuda")))
    for _ in range(3):
        offloaded, kept = step()
        for ours, plainly in zip(offloaded, expected, strict=True):
            # Flash kernels add with atomics.
            assert (ours - plainly).float().norm() <= 1e-2 * plainly.float().norm()
        assert plain - kept >= (12 - LEAVING - 1) * length * 512 * 2


def test_only_what_is_worth_it_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, queue, row = prepared(), Queue(), pack(GROUPS, share=True)
    offloaded(model, queue)
    with torch.no_grad():
        row_logps(model, row)
    row_logps(model.eval(), row).sum().backward()
    monkeypatch.setattr(offload, "MIN_BYTES", len(row.ids) * 32 * 8 + 1)
    row_logps(model.train(), row).sum().backward()
    assert not queue.log


def test_what_cannot_be_honoured_is_an_error(tiny_model, pairs_file, tmp_path) -> None:
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no support"):
        recompute_layers(model)
    model = build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match="gradient_checkpointing_every: LlamaForCausalLM"):
        recompute_layers(model, every=2)


def test_inputs_in_a_file_take_no_memory(tmp_path) -> None:
    """What is mapped and resident, as the kernel counts it, before and after."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(x.split()[1]) >> 10 for x in lines if x.startswith(("RssFile", "RssShmem")))

    side, tensor = ScratchFile(tmp_path), torch.arange(16 << 20, dtype=torch.int32).view(16, -1)
    before = resident()
    host = side.buffer(tensor.nbytes)
    view = host.view(tensor.dtype).view(tensor.shape)
    side.send(tensor, view)
    assert resident() - before < 16
    back, _ = side.fetch(view)
    assert resident() - before < 16 and torch.equal(back, tensor)
    assert not list(tmp_path.iterdir())
    del host, view
    assert not side.maps
    with pytest.raises(FastDPOError, match=r"activation_offloading: .*No space left|too large"):
        side.buffer(1 << 60)


def test_a_run_with_inputs_in_a_file_is_the_plain_run(
    tiny_model, pairs_file, tmp_path, monkeypatch
) -> None:
    sent = []
    send = ScratchFile.send
    monkeypatch.setattr(ScratchFile, "send", lambda *args: sent.append(1) or send(*args))
    keys = {"gradient_checkpointing": True, "max_steps": 2}
    run(tiny_model, pairs_file, tmp_path / "plain", **keys)
    _, said = run(tiny_model, pairs_file, tmp_path / "out", **keys, activation_offloading=True)
    assert sent and any("inputs kept in a file in output_dir" in line for line in said)
    for plain, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "out"), strict=True):
        assert (plain["loss"], plain["grad_norm"]) == (other["loss"], other["grad_norm"])
