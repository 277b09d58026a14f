"""The pages are made from the rows, and the check notices whatever was changed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from bench_rows import a_run, evaluations, head_rows, row, texts

from bench.jsonl import read_rows, write_rows
from bench.report import heads, pages, trainers
from bench.report.robustness import kill_block, kill_devices_block, soak_block
from bench.report.rows import Row
from bench.report.summary import summary_block, tokens_block
from bench.report.trainers import losses_block

KEEP = {name: row("trl")[name] for name in ("device", "commit", "date", "command", "versions")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with made-up rows and markers."""
    results = tmp_path / pages.RESULTS
    results.mkdir(parents=True)
    marks = [f"<!-- bench:{name} -->\nold\n<!-- /bench -->" for name in pages.BLOCKS]
    for page in ("README.md", "docs/benchmarks.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("\n\n".join(["# Title", *marks, "prose"]))
    for page in pages.PAGES[2:-1]:
        (tmp_path / page).write_text("no markers\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/README.md").write_text("no markers\n")
    write_rows(results / "trainers-cpu.jsonl", a_run())
    write_rows(results / "convergence-cpu.jsonl", evaluations())
    return tmp_path


def test_pages_are_made_from_the_rows(tree: Path) -> None:
    assert pages.main(["--check"], tree) == 1
    assert "old" in (tree / "README.md").read_text()
    assert pages.main([], tree) == 0 and pages.main(["--check"], tree) == 0
    text = (tree / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- bench:summary -->\n| measured |") and text.endswith(
        "\n\nprose"
    )
    line = "| tiny-llama | gsm8k | fp32 | 5.50 (5.00–6.00) | 1.10 (1.00–1.20) | 5.00× | 0.60× |"
    assert line in text
    assert "trl 1.16.0; commit abc1234, 2026-11-21: `fastdpo bench --steps 4`." in text
    assert "<!-- bench:heads -->\nNot measured yet.\n<!-- /bench -->" in text
    assert not (tree / pages.RESULTS / "heads.svg").exists()
    shown = texts((tree / pages.RESULTS / "trainers.svg").read_text())
    assert {"5.50 5.00×", "1.10", "not installed", "out of memory"} <= set(shown)
    assert any(text.startswith("refused: the loss of step 3") for text in shown)
    assert "Largest difference between providers: accuracy 0.05" in text
    assert "accuracy, texts" in texts((tree / pages.RESULTS / "convergence.svg").read_text())
    assert (tree / "kernels/README.md").read_text() == "no markers\n"
    assert "refused" in (tree / pages.FULL).read_text()


def test_links_lead_to_files_from_every_page(tree: Path) -> None:
    pages.main([], tree)
    for page in ("README.md", "docs/benchmarks.md"):
        links = re.findall(r"\]\(([^)]*)\)", (tree / page).read_text())
        assert len(links) >= 4
        assert all((tree / page).parent.joinpath(link).is_file() for link in links), links


def test_the_summary_has_a_row_that_we_lose(tree: Path) -> None:
    results = tree / pages.RESULTS
    write_rows(
        results / "trainers-cpu.jsonl",
        [
            *(row("fastdpo", speed=8.0, peak_mib=500.0), row("trl"), row("trl-patched", speed=2.0)),
            *(row(name, speed=speed, case={"data": "b"}) for name, speed in SLOWER.items()),
            *(row(name, speed=speed, case={"data": "c"}) for name, speed in MIDDLE.items()),
        ],
    )
    write_rows(results / "heads-cpu.jsonl", head_rows(**KEEP))
    one = row("trl", case={"data": "pair-64"})
    lean = {"data": "pair-64", "keys": ["fastdpo.memory=auto"]}
    write_rows(
        results / "memory-cpu.jsonl", [one, row("fastdpo", 0, 2.0, case=lean, peak_mib=250.0)]
    )
    lines = [line for line in summary_block(results).splitlines() if line.startswith("| ")][2:]
    assert lines == [
        "| tiny-llama, gsm8k, fp32 | TRL | 8.00× | 0.50× |",
        "| tiny-llama, b, fp32 | TRL | 3.00× | 1.00× |",
        "| tiny-llama, pair-64, fp32, [frugal keys](docs/memory.md) | TRL |  | 0.25× |",
        "| the head alone, tiny, 16 tokens, fp32 | trl, the fastest peer | 2.00× |  |",
        "| tiny-llama, b, fp32: where we do worst | TRL with our head | **0.75×** | 1.00× |",
    ]


SLOWER = {"fastdpo": 3.0, "trl": 1.0, "trl-patched": 4.0}
MIDDLE = {"fastdpo": 5.0, "trl": 1.0}


def test_what_else_reaches_a_page(tree: Path) -> None:
    results = tree / pages.RESULTS
    options = {"options": {"batch": 8}}
    shares = {"gsm8k": 0.3198, "texts": 0.4075}
    write_rows(
        results / "tokens.jsonl",
        [{"data": name, "epoch_over_padded": share, **options} for name, share in shares.items()],
    )
    assert "an epoch computes 32 % on `gsm8k`, 41 % on `texts`." in tokens_block(results)
    kto = {"loss": "kto", "unit": "rows"}
    write_rows(results / "losses-cpu.jsonl", [row("fastdpo", case=kto), row("trl", case=kto)])
    assert "| run | fastdpo, pairs or rows/s |" in losses_block(results)
    assert "| tiny-llama | gsm8k | kto, fp32 | 1.00 | 1.00 | 1.00× |" in losses_block(results)
    assert "| rows/s (least–most) |" in pages.full_tables(results)
    kills = [{"phase": "saving"}, {"phase": "saving"}, {"phase": "training"}]
    trial = {"kind": "full", "kills": kills, "bit_for_bit": True, **KEEP}
    write_rows(results / "kill.jsonl", [trial, {**trial, "bit_for_bit": False}])
    assert "| full | saving 4, training 2 | 6 | 2 | 1 |" in kill_block(results)
    elsewhere = {**trial, "bit_for_bit": None, "off": 2.5e-7}
    write_rows(results / "kill-devices.jsonl", [trial, elsewhere])
    line = "| full | saving 4, training 2 | 6 | 1 of 1 | 1 | 2.5e-07 |"
    assert line in kill_devices_block(results)
    growth = {"resident_mib": 1.25, "files": 0.0, "threads": 0.0, "mappings": -1.0, "blocks": 5.5}
    long = {"kind": "lora", "steps": 900, "growth": growth, "flat": True, **KEEP}
    write_rows(results / "soak.jsonl", [long])
    assert "| lora | 900 | 1.25 | 0 | 0 | -1.00 | 5.50 | yes |" in soak_block(results)


def test_the_check_fails_when_anything_was_changed(tree: Path) -> None:
    pages.main([], tree)
    results = tree / pages.RESULTS
    slower = [row | {"pairs_per_s": 0.9 * row.get("pairs_per_s", 0.0)} for row in a_run()]
    for file, text in (
        (results / "trainers-cpu.jsonl", "\n".join(map(json.dumps, slower))),
        (results / "convergence-cpu.jsonl", ""),
        (results / "trainers.svg", "<svg/>"),
        (results / "heads.svg", "<svg/>"),
        (tree / "README.md", (tree / "README.md").read_text().replace("5.00×", "9.00×")),
    ):
        kept = file.read_text(encoding="utf-8") if file.exists() else None
        file.write_text(text, encoding="utf-8")
        assert pages.main(["--check"], tree) == 1, file
        if kept is None:
            assert pages.main([], tree) == 0 and not file.exists()
        else:
            file.write_text(kept, encoding="utf-8")
        assert pages.main(["--check"], tree) == 0


def test_the_table_shows_what_is_lost_refused_and_failed(tree: Path) -> None:
    def line(rows: list[Row]) -> str:
        write_rows(tree / pages.RESULTS / "trainers-cpu.jsonl", rows)
        (found,) = [
            line
            for line in trainers.trainers_block(tree / pages.RESULTS).splitlines()
            if line.startswith("| tiny-llama")
        ]
        return found.split("fp32 | ")[1]

    assert line([row("trl", speed=2.0), row("fastdpo")]) == "1.00 | 2.00 | 0.50× | 1.00× |"
    # TRL at its best is the measure.
    rows = [row("trl"), row("fastdpo", speed=3.0), row("trl-flash", speed=2.0)]
    assert line(rows) == "3.00 | 2.00, trl-flash | 1.50× | 1.00× |"
    gone = line([row("trl", error="OutOfMemory: no"), row("fastdpo", speed=3.0)])
    assert gone == "3.00 | out of memory |  |  |"
    refused = line([row("trl"), row("fastdpo", speed=3.0, loss=[0.1] * 4)])
    assert refused.startswith("refused: ") and "3.00" not in refused and "×" not in refused


def test_an_unknown_marker_is_an_error(tree: Path) -> None:
    (tree / "README.md").write_text("<!-- bench:nothing -->\n<!-- /bench -->")
    with pytest.raises(KeyError, match="nothing"):
        pages.main([], tree)


def test_head_charts_and_tables(tree: Path) -> None:
    rows = [*head_rows(16, **KEEP), *head_rows(64, **KEEP)]
    rows += [each | {"provider": "Config(1)"} for each in rows if each["provider"] == "fastdpo"]
    write_rows(tree / pages.RESULTS / "heads-cpu.jsonl", rows)
    shown = texts(heads.heads_chart(tree / pages.RESULTS) or "")
    assert {"3000 1.50×", "6000 3.00×", "2000", "not installed"} <= set(shown)
    # The most tokens only, and no candidates of a search.
    assert any("T=64" in text for text in shown)
    assert not any("T=16" in text or "Config" in text for text in shown)
    block = heads.heads_block(tree / pages.RESULTS)
    for tokens in (16, 64):
        line = f"| dpo | tiny | {tokens} | fp32 | 3000 | 1.50 | 2.00 | not installed |"
        assert line in block and line in heads.heads_all_block(tree / pages.RESULTS)


def test_the_readme_and_the_charts_agree_with_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pages.main(["--check"]) == 0, capsys.readouterr().out
    # And would not if a row were another.
    shutil.copytree(pages.ROOT / pages.RESULTS, tmp_path / pages.RESULTS)
    for page in pages.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(pages.ROOT / page, tmp_path / page)
    assert pages.main(["--check"], tmp_path) == 0
    file = next((tmp_path / pages.RESULTS).glob("heads-*.jsonl"))
    slower = [each | {"total_s": 2 * each.get("total_s", 1.0)} for each in read_rows(file)]
    write_rows(file, slower)
    assert pages.main(["--check"], tmp_path) == 1
