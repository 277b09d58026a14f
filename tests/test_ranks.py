"""Many processes and one: the same losses, gradients and weights, whatever holds what.

The processes are started once for the file, since each imports torch and transformers.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fastdpo_kernels import LOSSES
from loss_samples import one_of_each_kind
from ranks import Ranks, ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from training import metrics, settings, weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from fastdpo import TrainConfig, train
from fastdpo.data.groups import Group
from fastdpo.data.plan import make_plan
from fastdpo.losses import TrainingLoss, loss_of
from fastdpo.model.adapter import add_adapter
from fastdpo.model.attention import NAME, register
from fastdpo.model.context import ContextGroup
from fastdpo.model.head import find_head
from fastdpo.model.layers import recompute_layers
from fastdpo.model.layout import Layout
from fastdpo.model.scorer import Scorer
from fastdpo.parallel.world import ALONE, World, joined
from fastdpo.training.arrangement import shard_scorer
from fastdpo.training.metrics import StepSums
from fastdpo.training.step import Objective
from fastdpo.training.update import Update


class Mode(NamedTuple):
    """How a model and its rows are spread."""

    processes: int
    replicas: int | None = None
    """Whole models over all processes; None where each has one."""
    vocabulary: bool = False
    context: int = 1


MODES = {
    "replicate of 2": Mode(2),
    "fsdp of 2": Mode(2, 1),
    "hsdp of 2 x 2": Mode(4, 2),
    "fsdp of 2, head over the vocabulary": Mode(2, 1, vocabulary=True),
    "hsdp of 2 x 2, head over the vocabulary": Mode(4, 2, vocabulary=True),
    "replicate of 2 contexts of 2": Mode(4, context=2),
    "fsdp of 4 in 2 contexts": Mode(4, 1, context=2),
}

EVERY_LOSS = ("hsdp of 2 x 2, head over the vocabulary", "fsdp of 4 in 2 contexts")
"""Modes that have all of the others' parts: there every loss, and elsewhere one of each kind."""

KEYS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 1e-3}}
"""What a loss cannot do without."""


@pytest.fixture(scope="module")
def started():
    with ranks(4) as made:
        yield made


def a_model(tied: bool, lora: bool, dtype: torch.dtype) -> Any:
    """A Llama of two layers that recomputes them, attention over packed rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config).to(dtype)
    register()
    model.set_attn_implementation(NAME)
    if lora:
        keys = {"use_peft": True, "lora_r": 3, "lora_dropout": 0.0, "model_name_or_path": "m"}
        model = add_adapter(model, TrainConfig.from_dict(keys)).to(dtype)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    recompute_layers(model)
    return model.train()


def groups_of(loss: TrainingLoss, count: int = 7) -> list[Group]:
    """Prompts of unequal lengths with two responses each, and what the loss wants to know."""
    rng = np.random.default_rng(3)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, 211, rng.integers(low, high)).astype(np.int32)

    groups = []
    for _ in range(count):
        prompt, responses = ids(2, 20), [ids(1, 12) for _ in range(2)]
        if loss.unit == "comparison":
            group = Group(prompt, responses, [(0, 1, 1.0)])
        else:
            known = {"label": [1.0, 0.0], "advantage": [1.0, -1.0], "rank": [0.0, 1.0]}
            known["win_rate"] = [0.7, 0.3]
            given = {name: known[name] for one in loss.losses for name in one.columns}
            rows = [len(groups)] * 2
            group = Group(prompt, responses, unit=loss.unit, items=[0, 1], rows=rows, given=given)
        if loss.mismatched:
            group.responses += [ids(1, 12) for _ in range(2)]
            group.mismatched = [2, 3]
        if loss.by_tokens:
            group.ref_token_logps = [
                rng.normal(-5, 1, len(r)).astype(np.float32) for r in group.responses
            ]
        else:
            group.ref_logps = rng.normal(-20, 5, len(group.responses))
        groups.append(group)
    return groups


def one_step(scorer: Scorer, loss: TrainingLoss, world: World) -> dict[str, Tensor]:
    """The loss of a step, the norm of its gradient, and every gradient."""
    model = scorer.model
    objective = Objective(scorer, loss, 7, world=world)
    groups = groups_of(loss)
    units = sum(group.units for group in groups)
    plan = make_plan(groups, units_per_step=units, max_tokens=70, world_size=world.data_size)
    step = objective.batches(groups, plan[0])
    sums, terms = StepSums(torch.device("cpu")), objective.terms(step)
    for batch in step.batches:
        objective.score(batch, step.units, sums, terms).backward()
    sums.over(world, [])
    rows = scorer.head.weight if world.vocabulary else None
    update = Update(model, TrainConfig(max_grad_norm=0.0), torch.device("cpu"), world, rows)
    found = {"loss": sums.sums[:1].clone(), "norm": update.norm().clone()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad
            found[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()
    model.zero_grad(set_to_none=True)
    return found


def worst_error(found: dict[str, Tensor], known: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor; gradients beside that of the largest one."""
    assert found.keys() == known.keys()
    scale = max(known[name].norm() for name in known if name not in ("loss", "norm"))
    errors = [0.0]
    for name, value in known.items():
        size = value.norm() if name in ("loss", "norm") else max(value.norm(), 1e-3 * scale)
        errors.append(((found[name] - value).norm() / size).item())
    return max(errors)


def errors_of_losses(mode: Mode, tied: bool, lora: bool, losses: list[str]) -> dict[str, float]:
    """Of each loss, the error of a step in this world beside a step of one process, fp64; on the
    first rank.
    """
    with joined(TrainConfig(cp_size=mode.context)) as world:
        model = a_model(tied, lora, torch.float64)
        alone = Scorer(copy.deepcopy(model), find_head(model), Layout("shared", ""))
        alone.head = find_head(alone.model)
        scorer = Scorer(model, find_head(model), Layout("shared", ""))
        if world.context is not None:
            scorer.context = ContextGroup(world.context)
        if mode.replicas is not None:
            world = world.with_shares(mode.replicas, torch.device("cpu"), mode.vocabulary)
        shard_scorer(scorer, world)
        errors = {}
        for name in losses:
            loss = loss_of(TrainConfig(loss_type=[name], **KEYS.get(name, {})))
            found = one_step(scorer, loss, world)
            if world.first:
                errors[name] = worst_error(found, one_step(alone, loss, ALONE))
        return errors


@pytest.mark.parametrize("mode", MODES)
def test_losses_have_the_gradients_of_one_process(started: Ranks, mode: str) -> None:
    """In fp64 to 1e-12; each with one kind of model, since the losses see none of that."""
    kinds = [(False, False), (True, True), (True, False), (False, True)]
    if MODES[mode].vocabulary:
        kinds = [(False, False), (False, True)]
    names = list(LOSSES) if mode in EVERY_LOSS else one_of_each_kind(LOSSES)
    for number, (tied, lora) in enumerate(kinds):
        some = ["sigmoid", *names[number :: len(kinds)]]
        size = MODES[mode].processes
        errors = started(size, errors_of_losses, MODES[mode], tied, lora, some)[0]
        assert errors.keys() == set(some)
        assert max(errors.values()) < 1e-12, errors


def flagged() -> list[float]:
    """A weight's first element after a fused step, and after one that a flag forbids."""
    with joined(TrainConfig()) as world:
        mesh = world.with_shares(1, torch.device("cpu")).mesh
        assert mesh is not None
        ones = distribute_tensor(torch.ones(6, 4), mesh["shard"], [Shard(0)])
        weight = torch.nn.Parameter(ones)
        optimizer: Any = torch.optim.AdamW([weight], lr=0.1, fused=True)
        seen = []
        for flag in (0.0, 1.0):
            optimizer.found_inf = torch.tensor(flag)
            weight.grad = distribute_tensor(torch.ones(6, 4), mesh["shard"], [Shard(0)])
            optimizer.step()
            seen.append(weight.full_tensor()[0, 0].item())
        return seen


def test_the_flag_of_a_bad_step_leaves_shares_as_they_are(started: Ranks) -> None:
    """What stops a GPU's run without a wait of its host, see `training.pending`."""
    for first, second in started(2, flagged):
        assert first == second != 1


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicate": (2, {}),
    "fsdp": (4, {"data_parallel": "fsdp"}),
    "hsdp": (4, {"data_parallel": "hsdp", "dp_replicate_size": 2}),
    "context": (2, {"cp_size": 2}),
}
LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "o_proj"],
}
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def layer_norm_model(tied: bool, vocab_size: int) -> Any:
    """A model whose every operation is in the dtype of its weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Starcoder2Config(
        vocab_size=vocab_size,
        **sizes,
        **heads,
        max_position_embeddings=1024,
        use_bias=False,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return Starcoder2ForCausalLM(config)


def ended(keys: dict[str, Any]) -> int:
    """Train; the last step."""
    return train(TrainConfig.from_dict(keys)).step


@pytest.mark.parametrize(
    ("mode", "dtype", "tied", "keys"),
    [
        ("replicate", "float64", True, {}),
        ("replicate", "float32", False, LORA),
        ("context", "float64", False, {"precompute_ref_log_probs": False}),
        ("fsdp", "float64", False, {"head_parallel": "vocabulary"}),
        ("fsdp", "float32", True, {}),
        ("fsdp", "float64", True, LORA | {"precompute_ref_log_probs": False}),
        ("hsdp", "float32", False, LORA | {"lora_target_modules": ["q_proj", "lm_head"]}),
        ("hsdp", "float64", False, {"loss_type": ["kto"], "convert": "unpair"}),
    ],
)
def test_four_steps_end_with_the_weights_of_one_process(
    started: Ranks,
    tiny_model: Path,
    tied_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    mode: str,
    dtype: str,
    tied: bool,
    keys: dict[str, Any],
) -> None:
    """And with its metrics, of the evaluation too, the last step in a second epoch; Adam's steps
    would show an error in any of the gradients. In fp64 the model is one with LayerNorm: Llama's
    norms round to fp32 on the way, and differ by 1e-9 where rounding before them differs by 1e-16.
    """
    if dtype == "float64":
        model = layer_norm_model(tied, len(AutoTokenizer.from_pretrained(tiny_model)))
    else:
        model = AutoModelForCausalLM.from_pretrained(tied_model if tied else tiny_model)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    keys = {"dtype": "auto", "global_batch_size": 8, "max_steps": 4, "do_eval": True, **keys}
    keys |= {"eval_dataset_name": str(pairs_file), "max_tokens_per_batch": 80}
    keys |= {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
    known, found = (
        settings(tmp_path / "model", pairs_file, tmp_path / name / "out", **keys)
        for name in ("one", "many")
    )
    ended(known)
    size, own = RUNS[mode]
    assert started(size, ended, found | own) == [4] * size
    before, one, many = (weights(tmp_path / n) for n in ("model", "one/out", "many/out"))
    assert one.keys() == many.keys()
    for name, weight in one.items():
        error = (many[name] - weight).double().norm() / weight.double().norm()
        assert error < TOLERANCE[dtype], name
        assert name not in before or not torch.equal(weight, before[name]), "nothing was trained"
    for line, other in zip(
        metrics(tmp_path / "one/out"), metrics(tmp_path / "many/out"), strict=True
    ):
        # Left out where the vocabulary is spread over the ranks.
        assert line.keys() - {"head_passes"} == other.keys() - {"head_passes"}
        same = {
            name for name in line.keys() & other if "second" not in name and "memory" not in name
        }
        for name in same:
            assert other[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
