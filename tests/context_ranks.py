"""What the processes of tests/test_context_parallel.py compute: rows on one device and, by a group
of ranks, in stretches; how far the two are apart.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from families import VOCABULARY, build
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bench import context as bench
from fastdpo.config import TrainConfig
from fastdpo.data.batch import Batch
from fastdpo.data.groups import Group
from fastdpo.data.plan import make_plan
from fastdpo.losses import loss_of
from fastdpo.model.attention import NAME, register
from fastdpo.model.context import ContextGroup
from fastdpo.model.head import find_head
from fastdpo.model.layers import recompute_layers
from fastdpo.model.layout import Layout
from fastdpo.model.scorer import TOKEN_STATS, Scorer
from fastdpo.training.step import Objective

WORLD = 4
THREE_GROUPS = ((7, (8, 2)), (6, (6, 3, 3)), (2, (5, 7)))
"""Prompts and responses, 49 tokens in all: 2 and 4 do not divide them, and cut inside responses."""
PROMPT_FIRST = ((30, (7, 6)),)
"""All scored tokens but the first of each lie on the last rank, of two and of four."""
SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


@dataclass(frozen=True)
class Case:
    """A model and a row, and over how many ranks."""

    family: str = "llama"
    ranks: int = 4
    layout: str = "shared"
    lengths: tuple[tuple[int, tuple[int, ...]], ...] = THREE_GROUPS
    keys: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    adapter: bool = False
    frozen_head: bool = False


CASES = {
    "by heads, two ranks": Case(ranks=2),
    "by heads, fewer keys than ranks": Case(),
    "by heads, keys that ranks do not divide": Case(ranks=2, model=SIX_HEADS),
    "by queries": Case(model=SIX_HEADS),
    "by queries, packed": Case(layout="packed", model=SIX_HEADS, checkpointing=True),
    "by heads, packed": Case(layout="packed", lengths=PROMPT_FIRST),
    "a window and a soft cap by heads": Case("gemma2", ranks=2, checkpointing=True),
    "a window and a soft cap by queries": Case("gemma2", model=SIX_HEADS, checkpointing=True),
    "a window alone by queries": Case("mistral", model=SIX_HEADS, lengths=PROMPT_FIRST),
    "sinks by heads": Case("gpt_oss", checkpointing=True),
    "sinks by queries": Case("gpt_oss", model=SIX_HEADS, lengths=PROMPT_FIRST),
    "values of another size": Case("minicpm3", lengths=PROMPT_FIRST),
    "learned positions": Case("gpt2", ranks=2),
    "an adapter": Case(adapter=True, checkpointing=True, lengths=PROMPT_FIRST),
    "an adapter and a frozen head, by queries": Case(adapter=True, model=SIX_HEADS),
    "a frozen head": Case(ranks=2, frozen_head=True, checkpointing=True),
    "fewer tokens than ranks": Case(lengths=((1, (1, 1)),)),
    "fewer tokens than ranks by queries": Case(lengths=((1, (1, 1)),), model=SIX_HEADS),
    "weighted, discounted": Case(
        lengths=PROMPT_FIRST, keys={"use_weighting": True, "ld_alpha": 0.5}
    ),
    "responses": Case(keys={"loss_type": "bco_pair"}),
    "prompts that are scored": Case(keys={"loss_type": "orpo"}, checkpointing=True),
}


class Row:
    """A policy and one row of all groups of a case."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)  # what a model draws for itself, each rank has to draw alike
        model: Any = build(case.family, **case.model)
        register()
        model.set_attn_implementation(NAME)
        if case.adapter:
            model = adapted(model)
        model.train()
        if case.checkpointing:
            recompute_layers(model)
        keys = {"model_name_or_path": "m", "use_cpu": True, **case.keys}
        self.loss = loss_of(TrainConfig.from_dict(keys))
        self.model, head = model, find_head(model)
        if case.frozen_head:
            head.weight.requires_grad_(False)
        self.scorer = Scorer(model, head, Layout(case.layout, ""))
        groups = groups_of(case, self.loss.by_tokens)
        self.units = sum(group.units for group in groups)
        steps = make_plan(groups, units_per_step=self.units, max_tokens=10**6, layout=case.layout)
        batches = Objective(self.scorer, self.loss, self.units).batches(groups, steps[0])
        (self.batch,) = batches.batches

    def numbers(self) -> dict[str, Tensor]:
        """Everything that a scorer says of the row, and every gradient."""
        batch: Batch = self.batch
        self.model.zero_grad()
        refs = (None, batch.ref_token_logps) if self.loss.by_tokens else (batch.ref_logps, None)
        found = self.scorer.loss(
            batch, self.loss.loss, *refs, dict(batch.given), self.units, TOKEN_STATS
        )
        found.loss.backward()
        numbers = {
            "loss": found.loss.detach(),
            "response_logps": found.response_logps,
            "token_logps": found.token_logps,
            "token_logps summed": self.scorer.response_logps(batch),
            **{name: getattr(found.stats, name).double() for name in TOKEN_STATS},
        }
        named = self.model.named_parameters()
        grads = {name: p.grad for name, p in named if p.grad is not None}
        self.model.zero_grad()
        return numbers | {f"gradient of {name}": grad for name, grad in grads.items()}


def adapted(model: Any) -> Any:
    """With an adapter that changes what the model says."""
    names = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).double() / 4
            assert "lora" in name
    return model


def groups_of(case: Case, by_tokens: bool) -> list[Group]:
    """Groups of a comparison of each response with the next."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, count).astype(np.int32)

    groups = []
    for prompt, lengths in case.lengths:
        responses = [tokens(count) for count in lengths]
        pairs = [(i, i + 1, 1.0 + i) for i in range(len(lengths) - 1)]
        group = Group(tokens(prompt), responses, pairs)
        per_token = [-rng.random(count).astype(np.float32) for count in lengths]
        if by_tokens:
            group.ref_token_logps = per_token
        else:
            group.ref_logps = np.array([values.sum() for values in per_token], np.float64)
        groups.append(group)
    return groups


def errors(row: Row, context: ContextGroup) -> dict[str, float]:
    """How far the numbers of a group of ranks are from those of one device: the largest error of
    each kind of number, as a share of the largest or of 1, and of the gradients by parameter.
    """
    alone = row.numbers() if context.rank == 0 else {}
    row.scorer.context = context
    found = row.numbers()
    grads = [name for name in found if name.startswith("gradient of ")]
    flat = torch.cat([found[name].flatten() for name in grads])
    dist.all_reduce(flat, group=context.group)
    sizes = [found[name].numel() for name in grads]
    found |= dict(zip(grads, flat.split(sizes), strict=True))
    expected = one_of_all(alone, found, context)
    total = torch.stack([expected[name].norm() for name in grads]).norm()
    wrong = {}
    for name, value in expected.items():
        if name in grads:
            # Where a response sees one token, a key's gradient is 0 but for rounding.
            error = (found[name] - value).norm() / (value.norm() + 1e-3 * total)
        else:
            error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1)
        wrong[name] = error.item()
    return wrong


def one_of_all(
    alone: dict[str, Tensor], like: dict[str, Tensor], context: ContextGroup
) -> dict[str, Tensor]:
    """What the first rank has, on all of them; each tensor flat, as long as those of `like`."""
    sizes = [value.numel() for value in like.values()]
    flat = torch.empty(sum(sizes), dtype=torch.float64)
    if context.rank == 0:
        assert {n: v.numel() for n, v in alone.items()} == {n: v.numel() for n, v in like.items()}
        flat = torch.cat([value.flatten() for value in alone.values()])
    dist.broadcast(flat, group=context.group, group_src=0)
    return dict(zip(like, flat.split(sizes), strict=True))


def keep_fp64(tensor: Tensor) -> Tensor:
    """In place of `Tensor.float`."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


@contextmanager
def world(rank: int, folder: Path) -> Iterator[dict[int, ContextGroup]]:
    """This process among the others; the groups of two and of four ranks that it belongs to."""
    torch.set_num_threads(1)
    torch.Tensor.float = keep_fp64  # gemma's norms would add up in fp32
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    assert dist.group.WORLD is not None
    yield {2: ContextGroup(pairs[rank // 2]), 4: ContextGroup(dist.group.WORLD)}
    dist.destroy_process_group()


def shares(context: ContextGroup) -> dict[str, float]:
    """What this rank has, as a share of what one device has: activations that it keeps, with and
    without gradient checkpointing, and hidden states that it scores.
    """
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2}
    options = Namespace(prompt=601, response=97, **sizes)
    found = {}
    for checkpointing in (False, True):
        one, here = (bench.measure(options, checkpointing, group) for group in (None, context))
        found[f"kept, checkpointing {checkpointing}"] = here.kept / one.kept
    row = Row(Case(lengths=((40, (8, 8)),)))
    row.scorer.context = context
    found["scored"] = len(row.scorer.scored_states(row.batch)) / len(row.batch.targets)
    return found


def run(rank: int, folder: Path) -> None:
    """All cases; what this rank saw goes to a file."""
    with world(rank, folder) as groups:
        seen = {
            name: errors(Row(case), groups[case.ranks])
            for number, (name, case) in enumerate(CASES.items())
            if case.ranks == WORLD or number % 2 == rank // 2  # one pair has the one, one the other
        }
        held = {ranks: shares(context) for ranks, context in groups.items()}
        torch.save((seen, held), folder / f"{rank}.pt")
