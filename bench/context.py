"""What a rank keeps of a long pair that a context-parallel group computes together, and whether its
numbers are those of one device.

    python -m bench.context
    python -m bench.context --heads 6 --kv_heads 3 --hidden 192

One pair in a shared row through a small Llama in fp64, forward and backward, by one process and by
groups of 2 and 4 gloo processes, with and without gradient checkpointing. Kept is what autograd
saves in the forward of the loss, each storage once, without what does not grow with the tokens
(weights, the head's gradient) and without the masks that attention on a CPU makes of a segment, and
kernels on a GPU do not. Rows go to bench/results/context-cpu.jsonl.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastdpo_kernels.losses import Loss
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpo.data.batch import Batch, make_batch
from fastdpo.data.groups import Group
from fastdpo.data.packing import Part
from fastdpo.model.attention import NAME, register
from fastdpo.model.context import ContextGroup
from fastdpo.model.context_attention import by_heads
from fastdpo.model.head import find_head
from fastdpo.model.layers import recompute_layers
from fastdpo.model.layout import Layout
from fastdpo.model.scorer import Scorer

from .cli import Parser
from .report import record

VOCABULARY = 512


class Measured(NamedTuple):
    """One forward and backward."""

    kept: int
    """Bytes."""
    loss: Tensor
    token_logps: Tensor
    gradients: dict[str, Tensor]


def measure(
    options: argparse.Namespace, checkpointing: bool, context: ContextGroup | None
) -> Measured:
    """The pair on one device, or this rank's share of it."""
    model, batch = the_model(options, checkpointing), the_pair(options)
    scorer = Scorer(model, find_head(model), Layout("shared", ""), context=context)
    dpo = Loss.named("sigmoid", beta=0.1)
    kept = Kept(model, batch)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        found = scorer.loss(batch, dpo, batch.ref_logps, None, {}, 1)
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Measured(kept.total, found.loss.detach(), found.token_logps, gradients)


def the_model(options: argparse.Namespace, checkpointing: bool) -> Any:
    """A Llama with random weights, the same each time."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.prompt + options.response,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    register()
    model.set_attn_implementation(NAME)
    model.train()
    if checkpointing:
        recompute_layers(model)
    return model


def the_pair(options: argparse.Namespace) -> Batch:
    """A prompt and two responses of random tokens."""
    rng = np.random.default_rng(0)
    lengths = (options.prompt, options.response, options.response)
    prompt, *responses = (rng.integers(1, VOCABULARY, n).astype(np.int32) for n in lengths)
    logps = np.array([-6.0, -6.5]) * options.response
    group = Group(prompt, responses, [(0, 1, 1.0)], ref_logps=logps)
    return make_batch([group], (Part(0, (0, 1), (0,), (0,)),), "shared")


class Kept:
    """Counts the bytes of saved tensors."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.constant = {tuple(p.shape) for p in model.parameters()}
        assert batch.segments is not None
        segments = batch.segments
        masks = zip(segments.query_lengths, segments.key_lengths, strict=True)
        self.constant |= set(masks)
        self.storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self.storages.values())

    def add(self, tensor: Tensor) -> Tensor:
        """A saved tensor, which lives as long as the graph does."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights and tuple(tensor.shape) not in self.constant:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def on_rank(
    rank: int, ranks: int, folder: str, options: argparse.Namespace, checkpointing: bool
) -> None:
    """One process of a group; what it keeps, and how far its numbers are off, go to a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{ranks}-{checkpointing}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    here = measure(options, checkpointing, ContextGroup(dist.group.WORLD))
    one = Measured(*torch.load(f"{folder}/one-{checkpointing}.pt"))
    errors = [(here.loss - one.loss).abs() / one.loss.abs()]
    errors.append((here.token_logps - one.token_logps).abs().max() / one.token_logps.abs().max())
    for name, gradient in here.gradients.items():
        dist.all_reduce(gradient)
        errors.append((gradient - one.gradients[name]).norm() / one.gradients[name].norm())
    worst = torch.stack(errors).max().item()
    torch.save((here.kept, worst), f"{folder}/rank-{ranks}-{rank}-{checkpointing}.pt")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every group, write a row for each and print it."""
    parser = Parser("fastdpo bench context", __doc__)
    parser.add_argument("--prompt", type=int, default=6000)
    parser.add_argument("--response", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args(arguments)
    results = record.Results("context", options, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for checkpointing in (False, True):
            one = measure(options, checkpointing, None)
            torch.save(tuple(one), f"{folder}/one-{checkpointing}.pt")
            for ranks in options.ranks:
                mp.spawn(on_rank, (ranks, folder, options, checkpointing), ranks)
                names = (f"{folder}/rank-{ranks}-{r}-{checkpointing}.pt" for r in range(ranks))
                kept, errors = zip(*(torch.load(name) for name in names), strict=True)
                row = results.add(
                    ranks=ranks,
                    checkpointing=checkpointing,
                    attention="heads" if by_heads(options.heads, ranks) else "queries",
                    kept_one_device=one.kept,
                    kept_by_rank=kept,
                    beyond_share=max(kept) * ranks / one.kept - 1,
                    error=max(errors),
                )
                print(
                    f"{ranks} ranks, checkpointing {checkpointing}, by {row['attention']}: "
                    f"{max(kept) / 1e6:.1f} of {one.kept / 1e6:.1f} MB, "
                    f"{row['beyond_share']:+.1%} beyond 1/{ranks}; error {row['error']:.1e}"
                )


if __name__ == "__main__":
    main()
