"""Two sets of rows differ where they do by more than their spread."""

import itertools
import random
from pathlib import Path

import pytest
from bench_rows import row, speeds

from bench.jsonl import write_rows
from bench.report import compare


def test_p_is_the_share_of_all_deals() -> None:
    rng = random.Random(0)
    for _ in range(60):
        sizes = rng.randint(1, 5), rng.randint(1, 5)
        a, b = ([rng.randint(0, 6) for _ in range(size)] for size in sizes)
        both = [*a, *b]
        ranks = [sum((y < x) + (y == x) / 2 for y in both) for x in both]

        def apart(
            ranks: tuple[float, ...], share: float = sum(ranks) * len(a) / len(both)
        ) -> float:
            return abs(sum(ranks) - share)

        deals = list(itertools.combinations(ranks, len(a)))
        extreme = sum(apart(deal) >= apart(tuple(ranks[: len(a)])) - 1e-9 for deal in deals)
        assert compare.p_value(a, b) == pytest.approx(extreme / len(deals))
    assert compare.p_value([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)


def test_verdicts_in_each_direction() -> None:
    slow, fast = [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]
    assert compare.verdict(slow, fast, True) == "differs: B is faster (p = 0.029)"
    assert compare.verdict(fast, slow, True) == "differs: B is slower (p = 0.029)"
    assert compare.verdict(slow, fast, False) == "differs: B is slower (p = 0.029)"
    assert compare.verdict(slow, slow, True) == "same within spread (p = 1.0)"
    assert compare.verdict(slow, [1.05, 1.15, 1.25, 2.0], True).startswith("same within spread")
    few = compare.verdict(slow[:3], fast[:3], True)
    assert few == "too few repetitions to tell (3 and 3: p is 0.10 at least)"


def test_compare() -> None:
    a = [*speeds("trl", 1.0, 1.1, 1.2, 1.3), *speeds("fastdpo", 4.0, 4.1, 4.2, 4.3)]
    a += [row("old"), row("big"), *speeds("moved", 1.0, 1.1, 1.2, 1.3)]
    b = [*speeds("trl", 1.0, 1.1, 1.2, 1.3), *speeds("fastdpo", 5.0, 5.1, 5.2, 5.3)]
    b += [row("big", error="OutOfMemory: x")]
    b += speeds("moved", 1.0, 1.1, 1.2, 1.3, loss=[0.6931, 0.66, 0.71, 0.7])
    text = compare.compare(a, b)

    def end(provider: str) -> list[str]:
        (line,) = [line for line in text.splitlines() if f"| {provider} |" in line]
        return [cell.strip() for cell in line.strip("|").split("|")][3:]

    spreads = ["4.150 (4.000–4.300)", "5.150 (5.000–5.300)"]
    assert end("fastdpo") == [*spreads, "1.24", "differs: B is faster (p = 0.029)"]
    assert end("trl")[2:] == ["1.00", "same within spread (p = 1.0)"]
    assert end("old")[-1] == "in B: not measured" and end("big")[-1] == "in B: out of memory"
    assert end("moved")[2:] == ["", "refused: losses differ by 0.0800"]
    assert "Of 2 tests at p ≤ 0.05, 0.10 differ by chance." in text
    # Devices are not compared with each other.
    other = compare.compare(a, [{**each, "device": "a GPU"} for each in b])
    assert "differs" not in other and "in B: not measured" in other


def test_compare_of_heads() -> None:
    case = {"regime": "dpo", "head": "tiny", "tokens": 16, "dtype": "fp32"}
    facts = {"case": case, "provider": "fastdpo", "device": "a CPU", "commit": "1", "command": "c"}
    a, b = ([{**facts, "total_s": i + j} for j in (0.1, 0.2, 0.3, 0.4)] for i in (1, 2))
    assert "| 1250 (1100–1400) | 2250 (2100–2400) | 1.80 | differs: B is slower" in (
        compare.compare(a, b)
    )


def test_compare_takes_files_and_commits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = speeds("trl", 1.0, 1.1, 1.2, 1.3)
    rows += [{**each, "commit": "def5678", "pairs_per_s": 9.0} for each in rows]
    rows.append({**row("trl"), "case": "an old row"})
    write_rows(file, rows)
    assert compare.main([f"{file}@abc", f"{file}@def5678"]) == 0
    assert "differs: B is faster" in capsys.readouterr().out
    assert compare.main([f"{file}@abc", str(file)]) == 0
    for wrong, message in ((f"{file}@0000", "abc1234, def5678"), (f"{file}x", "no such file")):
        assert compare.main([str(file), wrong]) == 2
        assert message in capsys.readouterr().err
