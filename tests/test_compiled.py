"""torch.compile of the layers: the same numbers, and one compilation for rows of all lengths."""

import pytest
import torch
from families import GROUPS, build, gradients, pack, random_groups, row_logps
from torch._dynamo.utils import counters
from training import assert_close_metrics, run

from fastdpo.errors import ConfigError
from fastdpo.model.layers import compile_layers, recompute_layers
from fastdpo.model.layout import choose_layout


@pytest.fixture(autouse=True)
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch):
    """Captured and differentiated, but without C++, which takes seconds a graph."""
    compile_ = torch.nn.Module.compile

    def captured(module, **options):
        compile_(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", captured)


@pytest.mark.parametrize(("family", "checkpointed"), [("llama", True), ("gemma2", False)])
def test_compiled_layers_give_the_same_gradients(family, checkpointed, without_inductor):
    model = build(family)
    assert choose_layout(model).name == "shared"
    model.train()
    row = pack(GROUPS, share=True)
    plain = gradients(model, row_logps(model, row))
    if checkpointed:
        recompute_layers(model)
    compile_layers(model)
    compiled = gradients(model, row_logps(model, row))
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-9, atol=1e-11)


def test_rows_of_other_lengths_compile_nothing_new(graphs, without_inductor):
    model = build("llama")
    choose_layout(model)
    assert compile_layers(model) == model.config.num_hidden_layers > 1
    sizes = [[(6, [5, 2, 7]), (9, [1])], [(4, [3, 9])], [(11, [2, 2, 2]), (3, [8])], [(5, [6])]]
    counts = []
    for seed, groups in enumerate(sizes):
        row = pack(random_groups(groups, seed), share=True)
        gradients(model, row_logps(model, row))
        counts.append(graphs["unique_graphs"])
    assert counts[0] > 0
    assert counts == [counts[0]] * len(sizes)


def test_a_compiled_run_is_the_plain_run(tiny_model, pairs_file, tmp_path, without_inductor):
    run(tiny_model, pairs_file, tmp_path / "plain", max_steps=2)
    _, said = run(tiny_model, pairs_file, tmp_path / "out", max_steps=2, torch_compile=True)
    assert any(line.startswith("layers: ") and "compiled" in line for line in said)
    assert_close_metrics(tmp_path / "out", tmp_path / "plain")


def test_layers_that_are_not_known(without_inductor):
    with pytest.raises(ConfigError, match="torch_compile: the layers of Linear"):
        compile_layers(torch.nn.Linear(2, 2))
