"""`head_passes` against what is really projected, and the figures of real packing."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from fastdpo_kernels import call, head_passes, linear_dpo_loss, linear_logprob
from fastdpo_kernels.backends import layout_of, make_tiles
from fastdpo_kernels.cuts import token_cuts
from fastdpo_kernels.head import default_workspace_mib
from fastdpo_kernels.losses import Loss
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.data.batch import idle_batch, make_batch
from fastdpo.data.groups import Group
from fastdpo.data.packing import Part
from fastdpo.data.plan import make_plan
from fastdpo.memory.shapes import row_shape
from fastdpo.model.passes import HeadCalls, mean_passes
from fastdpo.model.scorer import TOKEN_STATS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VOCAB, WIDTH = 4003, 8


class Counting:
    """Tiles that count the tokens of their projections."""

    def __init__(self, tiles):
        self.tiles, self.tokens = tiles, 0

    def __getattr__(self, name):
        value = getattr(self.tiles, name)
        if name not in ("score", "exponentials", "probabilities"):
            return value

        def counted(hidden, *rest):
            self.tokens += len(hidden)
            return value(hidden, *rest)

        return counted


def counted_passes(function):
    """Products with the head while `function` runs, in the sense of `head_passes`, by how many
    tokens are projected; the two gradients of each token are those of a trained head.
    """
    made = []

    def make(*arguments):
        made.append(Counting(make_tiles(*arguments)))
        return made[-1]

    with mock.patch.object(call, "make_tiles", make):
        function()
    return 2 * sum(tiles.tokens for tiles in made)


def packed_lengths(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    pairs = torch.arange(len(lengths)).view(-1, 2)
    cuts, _ = token_cuts(len(ids), len(lengths), ids, pairs)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), WIDTH, generator=g)
    w = torch.randn(VOCAB, WIDTH, generator=g)
    return x, w, torch.randint(VOCAB, (len(ids),), generator=g), ids, pairs, cuts


@pytest.mark.parametrize(
    "lengths", [(20, 30), (20, 30, 33, 31), (200, 30, 5, 6, 7, 40), (150, 150), (64, 1)], ids=str
)
@pytest.mark.parametrize("trained", [True, False])
def test_passes_are_what_is_projected(lengths, trained):
    x, w, y, ids, pairs, cuts = packed_lengths(lengths)
    sizes = (VOCAB, WIDTH, torch.float32, CPU)
    rows = layout_of(*sizes, workspace_mib=1).rows
    assert rows == 64
    x.requires_grad_()
    w.requires_grad_(trained)
    options = {"workspace_mib": 1}
    ref = torch.zeros(len(lengths))
    seen = counted_passes(lambda: linear_dpo_loss(x, w, y, ids, pairs, ref, **options))
    gradients = 4 if trained else 2
    said = head_passes(cuts, *sizes, trained=trained, **options)
    assert said == pytest.approx(seen / len(ids) + gradients)
    assert (said > (6 if trained else 4)) == (
        trained and max(a + b for a, b in pairs_of(lengths)) > rows
    )
    seen = counted_passes(lambda: linear_logprob(x, w, y, **options).sum().backward())
    said = head_passes(cuts, *sizes, trained=trained, separable=False, **options)
    assert said == pytest.approx(seen / len(ids) + gradients)
    assert said == (4 if not trained else 6 if len(ids) <= rows else 8)


def pairs_of(lengths):
    return zip(lengths[::2], lengths[1::2], strict=True)


def test_fp16_of_the_fused_kernels_and_no_tokens():
    sizes = {"vocab": VOCAB, "width": WIDTH, "device": CUDA, "backend": "triton"}
    assert head_passes([0, 9], dtype=torch.float16, workspace_mib=1, **sizes) == 8
    assert head_passes([0, 9], dtype=torch.bfloat16, workspace_mib=1, **sizes) == 6
    assert head_passes([0], dtype=torch.bfloat16, workspace_mib=1, **sizes) == 0


def test_a_product_is_two_of_them():
    """The unit is that of PyTorch's counter over T·V·H, for the products that it sees."""
    x, w, *_ = packed_lengths((20, 30))
    with FlopCounterMode(display=False) as counter:
        x @ w.T
    assert counter.get_total_flops() == 2 * 50 * VOCAB * WIDTH


def calls_of(trained=True, **options):
    """What is read of a scorer: a head whose tiles of 1 MiB have 64 tokens."""
    module = torch.nn.Linear(WIDTH, VOCAB).requires_grad_(trained)
    fixed = {"shares": None, "context": None, "autocast": None, "workspace_mib": 1}
    head = SimpleNamespace(module=module, weight=module.weight)
    return HeadCalls.of(SimpleNamespace(**fixed | {"head": head} | options))


def batch_of(*lengths):
    pairs = [(2 * i, 2 * i + 1, 1.0) for i in range(len(lengths) // 2)]
    group = Group(np.ones(3, np.int64), [np.ones(n, np.int64) for n in lengths], comparisons=pairs)
    places = tuple(range(len(pairs)))
    return make_batch([group], [Part(0, tuple(range(len(lengths))), places, places)], "shared")


def test_a_run_reports_the_mean_over_its_tokens():
    """Of 20 + 30 and of 100 + 50 tokens, of which 86 are projected twice."""
    loss = Loss.named("sigmoid", beta=0.1)
    batches = [batch_of(20, 30), batch_of(100, 50)]
    twice = 6 + 2 * 86 / 200
    assert mean_passes(calls_of(), batches, loss) == pytest.approx(twice)
    assert mean_passes(calls_of(), [*batches, idle_batch("shared")], loss) == pytest.approx(twice)
    assert mean_passes(calls_of(trained=False), batches, loss) == 4
    assert mean_passes(calls_of(workspace_mib=None), batches, loss) == 6
    assert mean_passes(calls_of(), [batch_of(20, 30, 10, 5)], loss) == 6
    assert mean_passes(calls_of(shares=object()), batches, loss) is None
    assert mean_passes(calls_of(), [idle_batch("shared")], loss) is None
    half = SimpleNamespace(part=lambda count: slice(0, count // 2))
    assert mean_passes(calls_of(context=half), batches[:1], loss) == 6
    assert mean_passes(calls_of(context=half), batches[1:], loss) == 8


HEADS = {
    "Qwen2.5-0.5B": (151936, 896),
    "Llama-3.1-8B": (128256, 4096),
    "Gemma-3-1B": (262144, 1152),
}
LENGTHS = {"HH-like": (150, 350, 1024), "UltraFeedback-like": (200, 700, 2048)}
"""Mean tokens of prompts and of responses, and `max_length`."""


def packed_passes(name, kind, mib):
    """Mean passes of the head over an epoch of packed rows with lengths of a heavy tail."""
    prompt, response, longest = LENGTHS[kind]
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(-(0.6**2) / 2, 0.6, (2048, 3)) * (prompt, response, response)
    groups = []
    for first, *rest in sizes.astype(int).clip(1).tolist():
        first = min(first, longest // 2)
        responses = [np.zeros(min(n, longest - first), np.int64) for n in rest]
        groups.append(Group(np.zeros(first, np.int64), responses, comparisons=[(0, 1, 1.0)]))
    plan = make_plan(groups, units_per_step=64, max_tokens=16384, layout="shared", seed=0)
    passes, tokens = 0.0, 0
    for step in plan:
        for row in (row for rank in step.ranks for row in rank):
            lengths = [len(groups[p.group].responses[r]) for p in row for r in p.responses]
            cuts = [0, *np.cumsum([sum(pair) for pair in pairs_of(lengths)]).tolist()]
            assert cuts[-1] == row_shape(groups, row, "shared").scored
            options = {"workspace_mib": mib, "outputs": TOKEN_STATS, "backend": "triton"}
            found = head_passes(cuts, *HEADS[name], torch.bfloat16, CUDA, **options)
            passes, tokens = passes + found * cuts[-1], tokens + cuts[-1]
    return passes / tokens


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", HEADS)
def test_packed_comparisons_go_through_the_head_about_once(name, kind):
    """With the default workspace of a card of 80 GB; with 512 MiB up to 6.8."""
    assert 6 <= packed_passes(name, kind, default_workspace_mib(79 << 30)) <= 6.1
    assert packed_passes(name, kind, 512) <= 6.8
