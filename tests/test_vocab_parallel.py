"""A head sharded over the vocabulary has the numbers of one device, on every rank."""

import contextlib
import pickle

import pytest
import torch
from fastdpo_kernels import LOSSES, linear_logprob, workspace_bytes
from fastdpo_kernels.head import OUTPUTS
from fastdpo_kernels.sharded import exchange
from head_problems import HEADS, assert_same, differentiated, make, numbers, uneven
from loss_problems import by_full_logits, options_of
from ranks import ranks as processes
from vocab_cases import (
    FAR_OUTPUTS,
    costs,
    far_apart,
    far_problem,
    in_one_group,
    logprob_problem,
    logprobs,
    losses,
    padded,
    refused,
    squared_ratios,
    tasks_of,
)

COLUMNS = {1: (101,), 2: (60, 41), 4: (26, 26, 49, 0)}
COUNTS = {1: (23,), 2: (9, 14), 4: (11, 0, 7, 16)}
"""Of 101 columns; one rank of four has none, another no tokens."""
TRAIN = [(True, True), (True, False), (False, True), (False, False)]
EXACT = 1e-12


@pytest.fixture(scope="module")
def ranks():
    with processes(4) as started:
        yield Group(started)


class Group:
    """Four processes in one group, for as long as the tests of this file last."""

    def __init__(self, processes):
        self._processes = processes

    def run(self, function, *args, **kwargs):
        """What a function returns on every rank, which it gets first."""
        packed = pickle.dumps((function, args, kwargs))
        return [pickle.loads(found) for found in self._processes(4, in_one_group, packed)]


def joined(found, size):
    """What the ranks of each group found, one after the other: tokens, and rows of the head."""
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [
        {name: torch.cat([one[name] for one in group]) for name in group[0]} for group in groups
    ]


def on_one_device(
    counts,
    train,
    dtype=torch.float64,
    bias=True,
    backend="naive",
    problem=None,
    sizes=None,
    **options,
):
    x, w, b, y = problem or logprob_problem(counts, **sizes or {})
    operands = {"hidden": torch.cat(x), "weight": w} | ({"bias": b} if bias else {})
    leaves = {
        name: t.to(dtype, copy=True).requires_grad_(train[name != "hidden"])
        for name, t in operands.items()
    }
    out = linear_logprob(targets=torch.cat(y), **leaves, backend=backend, **options)
    values = out._asdict() if options.get("outputs") else {"logprob": out}
    if any(train):
        values |= differentiated(values, leaves, *uneven(sum(counts)))
    return numbers(values, leaves)


@pytest.mark.parametrize("rows", [4, 1000], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("size", COLUMNS)
@pytest.mark.parametrize("head", HEADS)
def test_log_probabilities_and_every_output(ranks, head, size, rows):
    options = {k: v for k, v in HEADS[head].items() if k != "bias"} | {"outputs": OUTPUTS}
    for train in TRAIN:
        for backend in ("torch", "naive")[: 1 + (rows == 4)]:
            found = ranks.run(
                *(logprobs, COUNTS[size], COLUMNS[size], train),
                rows=rows,
                backend=backend,
                **options,
            )
            for whole in joined(found, size):
                assert_same(whole, on_one_device(COUNTS[size], train, **options), EXACT)


EMPTY = {2: (), 4: (1,)}
SPLIT = {2: (4, 9), 4: (4, 4, 5, 0)}
"""Of 13 columns."""


def one_by_one(kind, size, function, train, prompt=False, head=None, **own):
    """Each rank's loss from full logits, with the head's gradient added up."""
    tasks = tasks_of(kind, size, (), prompt, **head or {})
    held = [task for rank, task in enumerate(tasks) if rank not in EMPTY[size]]
    found = [by_full_logits(task, function, train, **own) for task in held]
    for name in ("gradient of weight", "gradient of bias"):
        if name in found[0]:
            total = sum(one[name] for one in found)
            for one in found:
                one[name] = total
    return found


def check_losses(found, size, exact, tolerance):
    """Those of the ranks that hold tokens; every rank's rows of the head."""
    for start in range(0, len(found), size):
        group = found[start : start + size]
        whole = {
            name: torch.cat([one[name] for one in group])
            for name in exact[0]
            if name in ("gradient of weight", "gradient of bias")
        }
        held = [one for rank, one in enumerate(group) if rank not in EMPTY[size]]
        for one, right in zip(held, exact, strict=True):
            assert_same({**one, **whole}, right, tolerance)
        for rank in EMPTY[size]:
            assert not group[rank]["loss"] and not len(group[rank]["token_logps"])


def registered(name):
    options = options_of(name)
    return lambda scored: LOSSES[name](scored, **options)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_registered_loss(ranks, name):
    kind, prompt = LOSSES[name].kind, LOSSES[name].prompt
    options = options_of(name) | {"loss": name, "prompt": prompt}
    for size, train, rows in ((2, TRAIN[1], 9), (4, TRAIN[0], 9), (4, TRAIN[2], 1000)):
        found = ranks.run(losses, kind, SPLIT[size], train, empty=EMPTY[size], rows=rows, **options)
        exact = one_by_one(kind, size, registered(name), train, prompt)
        check_losses(found, size, exact, EXACT)


OWN = {
    "sigmoid": [{"ld_alpha": 0.3}, {"use_weighting": True}],
    "ipo": [{"ld_alpha": 0.0, "use_weighting": True}],
}


@pytest.mark.parametrize("name", OWN)
def test_options_of_losses_and_heads(ranks, name):
    head = {"softcap": 3.0, "logit_scale": 0.6}
    for own in OWN[name]:
        for size, train, rows in ((2, TRAIN[0], 9), (4, TRAIN[0], 4)):
            options = {"empty": EMPTY[size], "rows": rows, "loss": name, "head": head}
            arguments = ("comparison", SPLIT[size], train)
            found = ranks.run(losses, *arguments, **options, **own, **options_of(name))
            exact = one_by_one("comparison", size, registered(name), train, head=head, **own)
            check_losses(found, size, exact, EXACT)


@pytest.mark.parametrize("kind", ["response", "group"])
def test_a_function_and_the_naive_way(ranks, kind):
    exact = one_by_one(kind, 4, squared_ratios, TRAIN[0])
    for backend in ("torch", "naive"):
        options = {"loss": squared_ratios, "backend": backend, "empty": EMPTY[4], "rows": 9}
        check_losses(ranks.run(losses, kind, SPLIT[4], **options), 4, exact, EXACT)


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


LOW = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""What a norm may be off; of gradients in 16 bits, twice their own rounding."""


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounding_is_that_of_one_device(ranks, dtype):
    """A gradient of hidden states is rounded as it is sent and once more as it arrives."""
    counts, columns = (50, 70, 0, 72), (600, 600, 600, 248)
    sizes = {"hidden": 64, "vocab": 2048, "dtype": dtype}
    problem = logprob_problem(counts, **sizes)
    options = {"bias": True, "problem": problem, "outputs": ("entropy", "lse")}
    for train in TRAIN[:3]:
        exact = on_one_device(counts, train, **options)
        one = on_one_device(counts, train, dtype=dtype, backend="torch", **options)
        found = joined(ranks.run(logprobs, counts, columns, train, dtype=dtype, **options), 4)[0]
        for name, value in exact.items():
            limit = 1.1 if dtype == torch.bfloat16 else 2.0
            assert error(found[name], value) <= limit * error(one[name], value) + 2e-7, name
            assert error(found[name], value) <= LOW[dtype], name


def far_on_one_device(dtype, backend):
    x, w, b, y = far_problem()
    leaves = {"hidden": x, "weight": w, "bias": b}
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in leaves.items()}
    found = linear_logprob(targets=y, **leaves, outputs=FAR_OUTPUTS, backend=backend)
    found.logprob.sum().backward()
    return numbers(found._asdict() | {"kept": leaves["hidden"].grad}, leaves)


def test_logits_far_apart(ranks):
    exact = far_on_one_device(torch.float64, "naive")
    assert exact["logprob"].min() < -300 and exact["logprob"].max() == 0
    assert_same(joined(ranks.run(far_apart, torch.float64), 4)[0], exact, EXACT)
    found, one = (
        joined(ranks.run(far_apart, torch.float32), 4)[0],
        far_on_one_device(torch.float32, "torch"),
    )
    for name, value in exact.items():
        assert error(found[name], value) <= 2 * error(one[name], value) + 1e-7, name


CASES = {"score": 2, "frozen": 4, "units": 6, "any": 8}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_operations(ranks, case):
    """2·T·H·2 bytes forward and backward in bf16, T·H·2 without a gradient, and some bytes a token;
    each rank its share of the operations.
    """
    ways = 1 if case == "score" else 2
    for columns in ((60, 41), (26, 26, 49, 0)):
        tokens = 32 * len(columns)
        found = [ranks.run(costs, case, columns, width, torch.bfloat16, 32) for width in (64, 128)]
        for count, (narrow, operations), (wide, again) in zip(columns * 2, *found, strict=False):
            assert operations == again == (CASES[case] if count else 0)
            assert wide - narrow <= ways * tokens * 64 * 2
            assert wide - ways * tokens * 128 * 2 <= 64 * tokens + 400


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_and_what_is_exchanged_fit_the_workspace(engine, dtype):
    """No more than on one device, however little of a rank's memory is logits."""
    sizes = {"width": 4096, "dtype": dtype, "device": torch.device("cuda"), "backend": engine}
    for shards in (2, 8, 64):
        one, many = (
            workspace_bytes(10**6, 151936, **sizes, shards=n, outputs=("entropy",))
            for n in (1, shards)
        )
        assert many.tile <= one.tile and sum(many) <= max(512 << 20, sum(one))
        rows = many.tile // (-(-151936 // shards) * dtype.itemsize)
        assert rows * 4096 * dtype.itemsize * 3 < many.beside


def test_no_tokens_anywhere(ranks):
    for train in TRAIN:
        for one in ranks.run(logprobs, (0,) * 4, COLUMNS[4], train, outputs=OUTPUTS):
            assert not any(value.any() for value in one.values())
        options = {"loss": "sigmoid", "empty": range(4)}
        for one in ranks.run(losses, "comparison", SPLIT[4], train, **options):
            assert not any(value.any() for value in one.values())


REFUSED = {
    "start": "vocab_start: expected 10 on rank 2 of the group, got 11",
    "size": "vocab_size: expected 1 to 20 rows, got 21",
    "options": "rank 1 of the group was given another",
    "width": "rank 1 of the group was given another",
    "dtype": "rank 3 of the group was given another",
    "training": "weight, bias: trained on rank 1 of the group or on 0, not both",
    "targets": "20 is outside the vocabulary of 20",
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_rank_refuses_what_does_not_fit(ranks, case):
    for message in ranks.run(refused, case):
        assert REFUSED[case] in message


def test_padding_is_no_token(ranks):
    found = ranks.run(padded)
    parts = [make(9, vocab=95, seed=rank, ignore=0.0) for rank in range(4)]
    x, y = (torch.cat([part[i] for part in parts]) for i in (0, 3))
    w = make(1, vocab=95)[1].requires_grad_()
    exact = linear_logprob(x, w, y, backend="naive")
    exact.sum().backward()
    gradient = torch.cat([one for _, one in found])
    torch.testing.assert_close(
        torch.cat([one for one, _ in found]), exact.detach(), rtol=EXACT, atol=EXACT
    )
    torch.testing.assert_close(gradient[:95], w.grad, rtol=EXACT, atol=EXACT)
    assert not gradient[95:].any()


FUSED = {"rows": 16, "backend": "triton", "dtype": torch.float32}


@pytest.mark.parametrize("train", TRAIN[:2], ids=["trained", "frozen"])
def test_the_fused_kernels(ranks, train):
    """In Triton's interpreter, against one device in fp64."""
    pytest.importorskip("triton")
    counts, options = (6, 0, 7, 9), {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.8}
    options["outputs"] = OUTPUTS
    found = ranks.run(logprobs, counts, COLUMNS[4], train, **FUSED, **options)
    exact = on_one_device(counts, train, **options)
    assert_same(joined(found, 4)[0], exact, 400 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("train", [(False, False), (True, False)], ids=["scored", "trained"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_target_is_the_highest_beside_nan(ranks, backend, train):
    """The targets are, until a logit of the first rank is NaN, which a maximum may drop."""
    pytest.importorskip("triton")
    x, w, b, y = logprob_problem(COUNTS[4])
    y = [(states @ w.T + b)[:, 1:].argmax(1) + 1 for states in x]
    spoilt = w.clone()
    spoilt[0, 0] = torch.nan
    for weight, expected in ((w, 1), (spoilt, 0)):
        problem = [x, weight, b, y]
        options = {"problem": problem, "backend": backend, "outputs": ("is_top1",)}
        found = ranks.run(logprobs, COUNTS[4], COLUMNS[4], train, dtype=torch.float32, **options)
        highest = joined(found, 4)[0]["is_top1"]
        assert len(highest) == sum(COUNTS[4]) and (highest == expected).all()


def test_a_loss_through_the_fused_kernels(ranks):
    pytest.importorskip("triton")
    options = {"loss": "sigmoid", "empty": EMPTY[4]} | options_of("sigmoid") | FUSED
    found = ranks.run(losses, "comparison", SPLIT[4], TRAIN[0], **options)
    check_losses(found, 4, one_by_one("comparison", 4, registered("sigmoid"), TRAIN[0]), 5e-5)
    arguments = (losses, "comparison", SPLIT[4], TRAIN[0])
    found = ranks.run(*arguments, **options, outputs=OUTPUTS)
    naive = {"backend": "naive", "dtype": torch.float64, "outputs": OUTPUTS}
    for one, right in zip(found, ranks.run(*arguments, **options | naive), strict=True):
        assert_same(*({name: of[name] for name in OUTPUTS} for of in (one, right)), 5e-5)


def test_integers_stay_on_the_host_where_the_group_has_a_backend_for_it(monkeypatch):
    """Else they go to the device: a group that was made for "nccl" alone has none."""
    monkeypatch.setattr(exchange.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(exchange.dist, "get_world_size", lambda group: 2)
    seen = []

    def gather(every, mine, **options):
        seen.append(mine.device.type)
        every.copy_(mine.repeat(2)) if mine.device.type == "cpu" else None

    monkeypatch.setattr(exchange, "_gather_equal", gather)
    for backends in ("cpu:gloo,cuda:nccl", "cuda:nccl"):
        monkeypatch.setattr(exchange.dist, "get_backend_config", lambda group, b=backends: b)
        with contextlib.suppress(NotImplementedError):  # numbers of a meta tensor
            exchange.Exchange(None).integers([3], torch.device("meta"))
    assert seen == ["cpu", "meta"]


def test_logits_far_apart_through_the_fused_kernels(ranks):
    """Over the clamp, where tokens are scored once more."""
    pytest.importorskip("triton")
    exact = far_on_one_device(torch.float64, "naive")
    one = far_on_one_device(torch.float32, "torch")
    found = joined(ranks.run(far_apart, torch.float32, "triton"), 4)[0]
    for name, value in exact.items():
        assert error(found[name], value) <= 2 * error(one[name], value) + 1e-7, name
