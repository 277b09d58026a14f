"""Reports say what the rows say: medians, refusals, failures, verdicts, charts, the README."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import charts, compare, readme, tables
from bench.charts import Bar
from bench.rows import LOSS_TOLERANCE, Row, agreed, failure, newest, runs, vacuous

LOSSES = [0.6931, 0.66, 0.71, 0.62]
SVG = "{http://www.w3.org/2000/svg}"


def row(provider: str, repetition: int = 0, speed: float = 1.0, **more: Any) -> Row:
    """A repetition of a trainer; `case` adds to the case, `error` takes the figures away."""
    case = {"model": "tiny-llama", "data": "gsm8k", "pairs_per_step": 8, "steps": 4, "warm_up": 2}
    case |= {"dtype": "fp32", "lora": False, "gradient_checkpointing": False}
    case |= {"reference": "precomputed", "learning_rate": 1e-5, **more.pop("case", {})}
    found = {"kind": "measurement", "case": case, "provider": provider, "repetition": repetition}
    found |= {"device": "a CPU, 2 threads", "commit": "abc1234", "date": "2026-11-21"}
    found |= {"command": "python /a/b/fastdpo bench --steps 4", "versions": {"trl": "1.16.0"}}
    if "error" not in more:
        found |= {"pairs_per_s": speed, "useful_tokens_per_s": 900 * speed, "peak_mib": 1000.0}
        found |= {"computed_tokens_per_s": 300 * speed, "mfu": 0.123, "loss": LOSSES}
        found |= {"grad_norm": [2.0] * 4, "settings": {"batch": 4, "attention": "sdpa"}}
    return found | more


def speeds(provider: str, *found: float, **more: Any) -> list[Row]:
    return [row(provider, i, speed, **more) for i, speed in enumerate(found)]


def a_run() -> list[Row]:
    return [
        *speeds("trl", 1.0, 1.2, 1.1),
        *speeds("fastdpo", 5.0, 5.5, 6.0, peak_mib=600.0),
        *speeds("wrong", 9.1, 9.2, 9.3, loss=[0.6931, 0.66, 0.69, 0.62]),
        row("trl-flash", error="NotInstalled: no flash-attn"),
        row("big", error="OutOfMemory: 9 GiB | asked"),
    ]


def line_of(table: str, provider: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {provider} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_trainer_table() -> None:
    text = tables.trainer_tables(a_run())
    assert "**tiny-llama, gsm8k, fp32, 8 pairs a step, a CPU, 2 threads**" in text
    ours = line_of(text, "fastdpo")
    assert ours[1:4] == ["batch 4, attention sdpa", "5.500 (5.000–6.000)", "5.00"]
    assert ours[4:] == ["4950", "1650", "12.3 %", "600", "0.60", "0.0e+00", "0.0e+00"]
    wrong = line_of(text, "wrong")
    assert wrong[2] == "refused: the loss of step 3 is 0.69, of trl 0.71"
    assert wrong[3:9] == [""] * 6 and wrong[9] == "2.0e-02"
    assert "9.2" not in text
    assert line_of(text, "trl-flash")[2] == "NotInstalled: no flash-attn"
    assert line_of(text, "big")[2] == "OutOfMemory: 9 GiB / asked"
    assert tables.MFU_DEFINITION in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_searches_and_old_rows_are_not_in_tables() -> None:
    rows = [{**row("trl"), "kind": "batch search"}, {**row("trl"), "case": "tiny-llama gsm8k"}]
    assert runs(rows) == [] and tables.trainer_tables(rows) == ""


def test_a_failed_repetition_is_told() -> None:
    rows = [*a_run(), row("fastdpo", 3, error="OutOfMemoryError: no")]
    assert "1 of 4 repetitions out of memory" in line_of(tables.trainer_tables(rows), "fastdpo")[1]
    failed = [row("trl", error="OutOfMemoryError: no"), row("fastdpo", error="ValueError: no")]
    assert "| fastdpo |  | ValueError: no |" in tables.trainer_tables(failed)


def test_agreement() -> None:
    tolerance = LOSS_TOLERANCE["fp32"]
    near = [loss + 0.9 * tolerance for loss in LOSSES]
    for losses, agrees in (
        (near, True),
        ([*LOSSES[:3], LOSSES[3] + 1.1 * tolerance], False),
        ([*LOSSES[:3], math.nan], False),
        (LOSSES[:3], False),
        ([], False),
    ):
        found = agreed([row("trl"), row("x", loss=losses), row("y", error="Boom: no")])
        assert (found["x"] is None) == agrees and found["trl"] is None and "y" not in found
    coarse = {"dtype": "bf16"}
    off = [loss + 1e-2 for loss in LOSSES]
    assert agreed([row("trl", case=coarse), row("x", case=coarse, loss=off)])["x"] is None
    # One repetition that is off is enough.
    rows = [row("trl"), row("x"), row("x", 1, loss=off)]
    assert (agreed(rows)["x"] or "").startswith("refused: the loss of step 1")
    # Without TRL, another of its variants is the measure, then whoever is there.
    assert agreed([row("a", loss=off), row("trl-patched")])["a"] is not None
    assert agreed([row("fastdpo")]) == {"fastdpo": None} and agreed([]) == {}


def test_gradients_are_told_apart_where_losses_are_not() -> None:
    rows = [row("trl", grad_norm=[2.0, 3.0]), row("a", grad_norm=[2.01, 3.0])]
    assert set(agreed(rows).values()) == {None}
    for wrong in (2.5, math.nan):
        found = agreed([*rows, row("b", grad_norm=[2.0, wrong])])
        assert found["a"] is None
        assert (found["b"] or "").startswith("refused: the gradient norm of step 2 is")


def test_losses_that_tell_nothing() -> None:
    still = [math.log(2) + 1e-5] * 4
    assert vacuous(row("trl")) is None
    assert "ln 2" in (vacuous(row("trl", loss=still)) or "")
    text = tables.trainer_tables([row("trl", loss=still), row("fastdpo", loss=still)])
    assert "see the gradient norm" in text


def test_failures_in_short() -> None:
    for error, short in (
        ("OutOfMemoryError: CUDA out of memory.", "out of memory"),
        ("MemoryError: needs 20 MiB", "out of memory"),
        ("NotInstalled: trl", "not installed"),
        ("ModuleNotFoundError: No module named 'x'", "not installed"),
        ("Unsupported: no such regime", "unsupported"),
        ("ValueError: wrong", "failed: ValueError: wrong"),
    ):
        assert failure([{"error": error}]) == short
    assert failure([row("trl")]) is None


def test_the_newest_complete_run_counts() -> None:
    old = a_run()
    new = [{**each, "commit": "def5678"} for each in old]
    assert newest(runs([*old, *new])) == runs(new)
    # Incomplete: `fastdpo` lacks a repetition, so the run was cut off.
    cut = [each for each in new if (each["provider"], each["repetition"]) != ("fastdpo", 2)]
    assert newest(runs([*old, *cut])) == runs(old)
    # Another device, or fewer providers, repeats nothing.
    other = [{**each, "device": "a GPU"} for each in new]
    assert newest(runs([*old, *other])) == [*runs(old), *runs(other)]
    some = [each for each in new if each["provider"] == "fastdpo"]
    assert newest(runs([*old, *some])) == [*runs(old), *runs(some)]


def evaluations() -> list[Row]:
    curves = {"fastdpo": [0.4, 0.5, 0.8, 0.9], "trl": [0.0, 0.5, 0.75, 0.9]}
    case = {"model": "llama", "data": "texts", "eval_pairs": 48}
    facts = ("device", "commit", "date", "command")
    return [
        {"case": case, "provider": provider, "step": 10 * step, "eval": figures}
        | {name: row("trl")[name] for name in facts}
        for provider, curve in curves.items()
        for step, accuracy in enumerate(curve)
        for figures in [{"accuracy": accuracy, "margin": accuracy - 0.5, "loss": 0.69}]
    ]


def test_convergence_table() -> None:
    text = tables.convergence_table(evaluations())
    assert "| 20 | 0.800 | 0.750 | 0.300 | 0.250 | 0.690 | 0.690 |" in text
    # The accuracy of step 0 is one of ties.
    assert "| 0 |  |  | -0.100 | -0.500 |" in text
    assert "Largest difference between providers: accuracy 0.05, margin 0.4, loss 0." in text


def test_numbers() -> None:
    found = [tables.number(value) for value in (0.0234567, 1.0, 12.345, 1234.5, 1e-7, math.inf)]
    assert found == ["0.0235", "1.00", "12.3", "1234", "1e-07", "inf"]
    assert tables.spread([]) == "" and tables.spread([2.0], 2) == "2.0"
    assert tables.ratio(None, 1.0) == tables.ratio(1.0, None) == ""


# -------------------------------------------------------------------------------------- compare


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
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    assert compare.main([f"{file}@abc", f"{file}@def5678"]) == 0
    assert "differs: B is faster" in capsys.readouterr().out
    assert compare.main([f"{file}@abc", str(file)]) == 0
    for wrong, message in ((f"{file}@0000", "abc1234, def5678"), (f"{file}x", "no such file")):
        assert compare.main([str(file), wrong]) == 2
        assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------- charts


def texts(svg: str) -> list[str]:
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [" ".join(" ".join(each.itertext()).split()) for each in found]


def test_bars() -> None:
    groups = {
        "a < b & c": {
            "fastdpo": Bar(8.0, 7.0, 10.0),
            "trl": Bar(2.0, 2.0, 2.0),
            "cce": "out of memory",
        },
        "second": {"fastdpo": Bar(0.02, 0.02, 0.02)},
    }
    svg = charts.bars("Title", "pairs/s", groups, "a device\nversions", "trl")
    root = ElementTree.fromstring(svg)
    assert root.findtext(f"{SVG}title") == "Title"
    shown = texts(svg)
    assert shown[:3] == ["Title", "pairs/s", "a < b & c"]
    assert shown[-2:] == ["a device", "versions"]
    assert "8.00 4.00×" in shown and "2.00" in shown and "out of memory" in shown
    assert "0.0200" in shown
    rects = list(root.iter(f"{SVG}rect"))
    assert [rect.get("class") for rect in rects] == ["ours", "peer", "ours"]
    widths = [float(rect.get("width", 0)) for rect in rects]
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=1e-3)
    # A group of its own scale; no whisker where all repetitions are the same.
    assert widths[2] == pytest.approx(widths[0] * 10 / 8, rel=1e-3)
    (whisker,) = [path.get("d", "") for path in root.iter(f"{SVG}path")]
    ends = [float(part) for part in whisker.split()[0].removeprefix("M").split(",")]
    assert ends[0] == pytest.approx(float(rects[0].get("x", 0)) + widths[0] * 7 / 8, rel=1e-3)
    assert max(float(each.get("y", 0)) for each in root.iter(f"{SVG}text")) < float(
        root.get("height", 0)
    )


def test_lines() -> None:
    series = {"trl": [(0, 0.5), (10, 0.75)], "fastdpo": [(0, 0.5), (10, 1.0)]}
    svg = charts.panels("Both", [charts.lines("accuracy", "step", "share", series)] * 3, "caption")
    root = ElementTree.fromstring(svg)
    nested = root.findall(f"{SVG}svg")
    assert len({(each.get("x"), each.get("y")) for each in nested}) == 3
    curves = [each for each in nested[0].iter(f"{SVG}polyline") if len(each)]
    assert [each.findtext(f"{SVG}title") for each in curves] == ["fastdpo", "trl"]
    (_, start), (_, ours) = _points(curves[0])
    theirs = _points(curves[1])[1][1]
    assert (start - theirs) / (start - ours) == pytest.approx(0.5, abs=1e-2)
    assert {"accuracy", "share", "step", "fastdpo", "trl"} <= set(texts(svg))


def _points(curve: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in curve.get("points", "").split()]


def test_ticks_span_the_interval() -> None:
    for least, most in ((0, 1), (0.51, 0.93), (-3e-4, 2e-3), (5, 5), (0, 0), (0, 137)):
        found = charts.ticks(least, most)
        assert found[0] <= least and found[-1] >= most and 2 <= len(found) <= 7
        assert found == sorted(set(found))


def contrast(a: str, b: str) -> float:
    """WCAG 2.1's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_charts_can_be_read_on_white_and_on_dark() -> None:
    dark = "#0d1117"
    for name, least in (("text", 4.5), ("faint", 4.5), ("ours", 4.5), ("peer", 3.0)):
        assert contrast(charts.LIGHT[name], "#ffffff") >= least, name
        assert contrast(charts.DARK[name], dark) >= least, name
        # A page may be dark without saying so.
        assert contrast(charts.LIGHT[name], dark) >= 2.9, name
    svg = charts.bars("t", "u", {})
    assert "prefers-color-scheme:dark" in svg and "<rect" not in svg


# --------------------------------------------------------------------------------------- README


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with made-up rows and markers."""
    results = tmp_path / readme.RESULTS
    results.mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    marks = [f"<!-- bench:{name} -->\nold\n<!-- /bench -->" for name in readme.BLOCKS]
    (tmp_path / "README.md").write_text("\n\n".join(["# Title", *marks, "prose"]))
    (tmp_path / "kernels/README.md").write_text("no markers\n")
    write(results / "trainers-cpu.jsonl", a_run())
    write(results / "convergence-cpu.jsonl", evaluations())
    return tmp_path


def write(file: Path, rows: list[Row]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


def test_readme_is_made_from_the_rows(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"], tree) == 1
    assert "old" in (tree / "README.md").read_text()
    assert readme.main([], tree) == 0 and readme.main(["--check"], tree) == 0
    text = (tree / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- bench:trainers -->\n![") and text.endswith("\n\nprose")
    line = "| tiny-llama | gsm8k | fp32 | 5.50 (5.00–6.00) | 1.10 (1.00–1.20) | **5.00×** | 0.60× |"
    assert line in text
    assert "trl 1.16.0; commit abc1234, 2026-11-21: `fastdpo bench --steps 4`." in text
    assert "<!-- bench:heads -->\nNot measured yet.\n<!-- /bench -->" in text
    assert not (tree / readme.RESULTS / "heads.svg").exists()
    shown = texts((tree / readme.RESULTS / "trainers.svg").read_text())
    assert {"5.50 5.00×", "1.10", "not installed", "out of memory"} <= set(shown)
    assert any(text.startswith("refused: the loss of step 3") for text in shown)
    assert "Largest difference between providers: accuracy 0.05" in text
    assert "accuracy, texts" in texts((tree / readme.RESULTS / "convergence.svg").read_text())
    assert (tree / "kernels/README.md").read_text() == "no markers\n"
    assert "refused" in (tree / readme.FULL).read_text()


def test_the_check_fails_when_anything_was_changed(tree: Path) -> None:
    readme.main([], tree)
    results = tree / readme.RESULTS
    slower = [row | {"pairs_per_s": 0.9 * row.get("pairs_per_s", 0.0)} for row in a_run()]
    for file, text in (
        (results / "trainers-cpu.jsonl", "".join(json.dumps(each) + "\n" for each in slower)),
        (results / "convergence-cpu.jsonl", ""),
        (results / "trainers.svg", "<svg/>"),
        (results / "heads.svg", "<svg/>"),
        (tree / "README.md", (tree / "README.md").read_text().replace("**5.00×**", "**9.00×**")),
    ):
        kept = file.read_text(encoding="utf-8") if file.exists() else None
        file.write_text(text, encoding="utf-8")
        assert readme.main(["--check"], tree) == 1, file
        if kept is None:
            assert readme.main([], tree) == 0 and not file.exists()
        else:
            file.write_text(kept, encoding="utf-8")
        assert readme.main(["--check"], tree) == 0


def test_the_table_shows_what_is_lost_refused_and_failed(tree: Path) -> None:
    def line(rows: list[Row]) -> str:
        write(tree / readme.RESULTS / "trainers-cpu.jsonl", rows)
        (found,) = [
            line
            for line in readme.trainers_block(tree / readme.RESULTS).splitlines()
            if line.startswith("| tiny-llama")
        ]
        return found.split("fp32 | ")[1]

    assert line([row("trl", speed=2.0), row("fastdpo")]) == "1.00 | 2.00 | **0.50×** | 1.00× |"
    # TRL at its best is the measure.
    rows = [row("trl"), row("fastdpo", speed=3.0), row("trl-flash", speed=2.0)]
    assert line(rows) == "3.00 | 2.00, trl-flash | **1.50×** | 1.00× |"
    gone = line([row("trl", error="OutOfMemory: no"), row("fastdpo", speed=3.0)])
    assert gone == "3.00 | out of memory |  |  |"
    refused = line([row("trl"), row("fastdpo", speed=3.0, loss=[0.1] * 4)])
    assert refused.startswith("refused: ") and "3.00" not in refused and "×" not in refused


def test_an_unknown_marker_is_an_error(tree: Path) -> None:
    (tree / "README.md").write_text("<!-- bench:nothing -->\n<!-- /bench -->")
    with pytest.raises(KeyError, match="nothing"):
        readme.main([], tree)


def test_head_charts_and_tables(tree: Path) -> None:
    case = {"regime": "dpo", "head": "tiny", "vocab": 331, "hidden": 48, "dtype": "fp32"}
    facts = {"workspace_mib": 400.0, "gradient_mib": 2.0, "deterministic": True}
    keep = {name: row("trl")[name] for name in ("device", "commit", "date", "command", "versions")}
    seconds = {"products": 1.0, "fastdpo": 1.5, "trl": 3.0, "Config(1)": 0.1}
    rows = [
        {"case": {**case, "tokens": tokens, "workspace_limit_mib": 512}, "provider": provider}
        | {"forward_s": 0.5, "total_s": tokens * total, "repetition": 0, **facts, **keep}
        for tokens in (16, 64)
        for provider, total in seconds.items()
    ]
    rows.append({"case": rows[-1]["case"], "provider": "cce", "error": "ImportError: no", **keep})
    write(tree / readme.RESULTS / "heads-cpu.jsonl", rows)
    shown = texts(readme.heads_chart(tree / readme.RESULTS) or "")
    assert {"96000 1.50×", "192000 3.00×", "64000", "not installed"} <= set(shown)
    # The most tokens only, and no candidates of a search.
    assert not any("T=16" in text or "Config" in text for text in shown)
    block = readme.heads_block(tree / readme.RESULTS)
    assert "| dpo | tiny | 16 | fp32 | 24000 | 1.50 | 2.00 |" in block
    assert "| dpo | tiny | 64 | fp32 | 96000 | 1.50 | 2.00 | not installed |" in block
    assert "| dpo | tiny | 64 |" in readme.heads_all_block(tree / readme.RESULTS)


def test_the_readme_and_the_charts_agree_with_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().out
    # And would not if a row were another.
    shutil.copytree(readme.ROOT / readme.RESULTS, tmp_path / readme.RESULTS)
    for page in readme.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(readme.ROOT / page, tmp_path / page)
    assert readme.main(["--check"], tmp_path) == 0
    file = next((tmp_path / readme.RESULTS).glob("heads-*.jsonl"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    write(file, [each | {"total_s": 2 * each.get("total_s", 1.0)} for each in rows])
    assert readme.main(["--check"], tmp_path) == 1
