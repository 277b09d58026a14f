"""Tables say what the rows say: medians, refusals, failures; the newest complete run counts."""

import math

from bench_rows import LOSSES, a_run, evaluations, head_rows, row

from bench.report.convergence import convergence_table, largest_difference
from bench.report.heads import head_summary, head_tables
from bench.report.rows import LOSS_TOLERANCE, agreed, failure, newest, runs, vacuous
from bench.report.tables import number, ratio, spread
from bench.report.trainers import MFU_DEFINITION, trainer_tables


def line_of(table: str, provider: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {provider} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_trainer_table() -> None:
    text = trainer_tables(a_run())
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
    assert MFU_DEFINITION in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_searches_and_old_rows_are_not_in_tables() -> None:
    rows = [{**row("trl"), "kind": "batch search"}, {**row("trl"), "case": "tiny-llama gsm8k"}]
    assert runs(rows) == [] and trainer_tables(rows) == ""


def test_a_failed_repetition_is_told() -> None:
    rows = [*a_run(), row("fastdpo", 3, error="OutOfMemoryError: no")]
    assert "1 of 4 repetitions out of memory" in line_of(trainer_tables(rows), "fastdpo")[1]
    failed = [row("trl", error="OutOfMemoryError: no"), row("fastdpo", error="ValueError: no")]
    assert "| fastdpo |  | ValueError: no |" in trainer_tables(failed)


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
    assert vacuous(row("trl", loss=still)) == "losses within 1.0e-05 of ln 2 prove nothing"
    # The first step is before the first update.
    assert vacuous(row("trl", loss=[0.6, *still])) is not None
    assert vacuous(row("trl", loss=[0.6])) == "one step proves nothing"
    text = trainer_tables([row("trl", loss=still), row("fastdpo", loss=still)])
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


def test_convergence_table() -> None:
    text = convergence_table(evaluations())
    assert "| 20 | 0.800 | 0.750 | 0.300 | 0.250 | 0.690 | 0.690 |" in text
    # The accuracy of step 0 is one of ties.
    assert "| 0 |  |  | -0.100 | -0.500 |" in text
    assert "Largest difference between providers: accuracy 0.05, margin 0.4, loss 0." in text
    # Curves of other steps are not compared.
    assert math.isnan(largest_difference(evaluations()[:-1], "margin"))


def test_numbers() -> None:
    found = [number(value) for value in (0.0234567, 1.0, 12.345, 1234.5, 1e-7, math.inf)]
    assert found == ["0.0235", "1.00", "12.3", "1234", "1e-07", "inf"]
    assert spread([]) == "" and spread([2.0], 2) == "2.0"
    assert ratio(None, 1.0) == ratio(1.0, None) == ""


def test_head_tables() -> None:
    text = head_tables(head_rows())
    assert "| fastdpo | 1000 | 2000 | 3000 (2000–4000) | 1.50 | 1.00 | 400 |" in text
    assert "| trl | 1000 | 5000 | 6000 (5000–7000) | 3.00 | 2.00 |" in text
    assert "| cce | ImportError: no |" in text
    line = head_summary(head_rows()).splitlines()[2]
    figures = "3000 | 1.50 | 2.00 | not installed | 400 of 512"
    assert line == f"| dpo | tiny | 16 | fp32 | {figures} |  |  |"
    # Another process is another table: its ratios are its own.
    moved = [{**row, "command": "d"} for row in head_rows()]
    assert len(head_summary([*head_rows(), *moved]).splitlines()) == 4


def test_times_of_a_wrong_result_are_not_shown() -> None:
    rows = head_rows()
    wrong = [
        {**row, "provider": "torch-lce", "refused": "logps are off", "total_s": 0.1}
        for row in rows
        if row["provider"] == "trl"
    ]
    assert "| torch-lce | refused: logps are off |" in head_tables([*rows, *wrong])
    assert "| refused |" in head_summary([*rows, *wrong])
    assert head_tables(rows).splitlines()[2:] == [
        line for line in head_tables([*rows, *wrong]).splitlines()[2:] if "lce" not in line
    ]
