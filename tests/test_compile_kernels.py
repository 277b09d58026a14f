"""Every kernel compiled for every card without a GPU: rows of all cases, and a few taken anew."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastdpo_kernels import linear_dpo_loss, linear_logprob
from fastdpo_kernels.triton import compile as ahead
from fastdpo_kernels.triton import configs
from fastdpo_kernels.triton.cases import CARDS, DTYPES, KERNELS, cases, few
from triton.runtime.interpreter import InterpretedFunction

from bench.jsonl import read_rows

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "bench/results/cards.jsonl"
LOGITS = ("score", "exponential", "again")
OLDEST = {card.table: name for name, card in reversed(CARDS.items())}
"""Of each table, the card that it was made for: the newer ones take its blocks."""
TENSOR_CORES = {card.instruction for card in CARDS.values()}


@pytest.fixture(scope="module")
def committed():
    rows = read_rows(ROWS)
    if rows[0]["triton"] != importlib.metadata.version("triton"):
        pytest.skip(f"bench/results/cards.jsonl is of triton {rows[0]['triton']}")
    return rows


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Rows of a few cases of a card of each table, compiled now."""
    file = tmp_path_factory.mktemp("cards") / "rows.jsonl"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-m", "fastdpo_kernels.triton.compile", "--few", "--jobs", "1"]
    command += ["--json", str(file), "--card", *OLDEST.values()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return read_rows(file)


def assert_sound(rows):
    """Nothing spills, everything fits, products are made by the units that are for them."""
    for row in rows:
        card = CARDS[row["card"]]
        assert row["spilled"] == 0, row
        assert row["shared"] <= card.shared << 10, row
        # 255 registers of a thread on NVIDIA, 512 on CDNA (accumulators among them), 256 on RDNA.
        most = {"sm": 255, "gf": 512 if row["card"].startswith("gfx9") else 256}
        assert 0 < row["registers"] <= most[row["card"][:2]], row
        if row["kernel"] not in LOGITS:
            assert row["instruction"] == "", row
        elif row["dtype"] != "fp32" and not row["block"].startswith("32×"):
            assert row["instruction"] == card.instruction, row
        elif row["dtype"] == "fp32" and card.instruction == "v_wmma":
            # RDNA multiplies no fp32 matrices.
            assert row["instruction"] == "", row
        else:  # the newest take blocks of 64 rows and more
            assert row["instruction"] in TENSOR_CORES, row


def named(row):
    return tuple(row[name] for name in ("card", "kernel", "dtype", "block", "flags"))


def test_the_rows_are_of_these_kernels_and_cover_every_case(committed):
    expected = {named(ahead.identity(case)) for card in CARDS for case in cases(card)}
    assert {named(row) for row in committed} == expected
    assert len(committed) == len(expected)
    current = {kernel: ahead.sources(kernel) for kernel in KERNELS}
    assert all(row["sources"] == current[row["kernel"]] for row in committed), "run make cards"


def test_nothing_spills_on_any_card(committed):
    assert_sound(committed)


def test_every_kernel_is_compiled_for_every_card(committed):
    for rows in (committed, [ahead.identity(case) for card in CARDS for case in few(card)]):
        assert {(row["card"], row["kernel"]) for row in rows} == {
            (card, kernel) for card in CARDS for kernel in KERNELS
        }


def test_a_few_compiled_now_are_as_their_rows_say(fresh, committed):
    assert {row["card"] for row in fresh} == set(OLDEST.values())
    assert_sound(fresh)
    known = {named(row): row for row in committed}
    for row in fresh:
        if named(row) in known:
            assert row["shared"] == known[named(row)]["shared"], row


def test_shared_memory_is_bounded_from_above_and_not_by_far(committed):
    """Never below what compiling says; and of the first choices none is refused that fits."""
    blocks = {c.name: c for entry in configs.TABLE.values() for f in entry.values() for c in f}
    most = {}
    for row in committed:
        if row["block"]:
            config = blocks[row["block"]]
            bound = configs.shared_bytes(config, DTYPES[row["dtype"]].itemsize)
            assert row["shared"] <= bound, row
            key = (row["card"], row["block"], DTYPES[row["dtype"]].itemsize)
            most[key] = max(most.get(key, 0), row["shared"])
    for (card, block, itemsize), shared in most.items():
        bound = configs.shared_bytes(blocks[block], itemsize)
        # Some cards keep a stage less than is asked for.
        stages = blocks[block].stages
        assert bound <= 2 * shared * stages / (stages - 1) + 4096, (card, block, itemsize)
    for card in CARDS.values():
        for kind, family in configs.TABLE[card.table].items():
            itemsize = 4 if kind in ("float32", "columns") else 2
            assert configs.shared_bytes(family[0], itemsize) <= card.shared << 10, (card, kind)


def test_the_digest_sees_code_and_not_comments(monkeypatch):
    before = {kernel: ahead.sources(kernel) for kernel in KERNELS}
    source = ahead.inspect.getsource

    def changed(old, new):
        monkeypatch.setattr(
            ahead.inspect, "getsource", lambda module: source(module).replace(old, new)
        )
        return {kernel for kernel in KERNELS if ahead.sources(kernel) != before[kernel]}

    assert not changed("# A ", "# One ")
    assert changed("rows < tokens", "rows <= tokens") >= {"score", "exponential", "finish"}
    assert changed("def at_most(x, limit)", "def at_most(x, limit, more)") == {
        "again",
        "exponential",
    }
    assert changed("raw * (scale", "raw + (scale") >= {"score", "exponential", "again"}


def test_rows_of_the_same_sources_are_not_made_again(tmp_path, monkeypatch):
    some = list(cases("sm_80"))[:3]
    monkeypatch.setattr(ahead, "cases", lambda card: some)
    compiled = []

    def made(chosen, jobs):
        compiled.extend(chosen)
        return ({**ahead.identity(c), "registers": 1, "spilled": 0, "shared": 0, "instruction": ""}
                for c in chosen)  # fmt: skip

    monkeypatch.setattr(ahead, "rows", made)
    file = tmp_path / "cards.jsonl"
    monkeypatch.setattr("sys.argv", ["compile", "--card", "sm_80", "--json", str(file)])
    ahead.main()
    first = file.read_text()
    lines = first.splitlines()
    lines[1] = lines[1].replace(ahead.sources(some[1].kernel), "another")
    file.write_text("\n".join(lines) + "\n")
    ahead.main()
    assert compiled == [*some, some[1]] and file.read_text() == first


def test_what_is_launched_is_among_the_cases(monkeypatch):
    """Kernels and their compile-time options as calls launch them, but for the block."""
    launched, run = set(), InterpretedFunction.run

    def noted(self, *args, grid, warmup, **kwargs):
        flags = {name for name, value in kwargs.items() if name.isupper() and value is True}
        launched.add((self.fn.__name__.removesuffix("_kernel"), frozenset(flags)))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    call()
    names = {name for name, _ in launched}
    assert names == set(KERNELS)
    known = {
        (case.kernel, frozenset(name for name, value in case.options if value is True))
        for card in ("sm_80", "sm_90")
        for case in cases(card)
    }
    ignored = {"WHOLE_H", "DESCRIPTORS", "PERSISTENT"}
    known = {(name, flags - ignored) for name, flags in known}
    assert {(name, flags - ignored) for name, flags in launched} <= known


def call():
    """Calls that launch every kernel: TRL's outputs, each alone, all; a bias, a soft cap."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 32, generator=g, requires_grad=True)
    w = torch.randn(80, 32, generator=g, requires_grad=True)
    y = torch.randint(80, (12,), generator=g)
    every = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
    bias = torch.zeros(80)
    for outputs in ((), *((name,) for name in every), every[:3], every):
        linear_logprob(x, w, y, outputs=outputs, backend="triton")
    for more in ({"bias": bias}, {"softcap": 5.0}, {"bias": bias, "softcap": 5.0}):
        linear_logprob(x, w, y, backend="triton", **more)
        with torch.no_grad():
            linear_logprob(x, w, y, backend="triton", **more)
    ids = torch.tensor([0] * 6 + [1] * 6)
    for weight in (w, w.detach().T.contiguous().T):
        loss, _ = linear_dpo_loss(
            x, weight, y, ids, torch.tensor([[0, 1]]), torch.zeros(2), backend="triton", beta=0.1
        )
        loss.backward()
