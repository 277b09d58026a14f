"""The trainer benchmark: its rows and models, what it counts, and what it makes of a failure."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import CHATML, make_tokenizer, tokenize_rows
from like_trl import reference_free_pairs, trl_metrics
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from bench import cli, workloads
from bench.jsonl import read_rows
from bench.report import record
from bench.report.rows import agreed, read
from bench.report.trainers import unit_of
from bench.tokens import mismatched_tokens
from bench.trainers import cases
from bench.trainers import run as trainers
from bench.trainers.clock import NotInstalled
from bench.trainers.job import keys_of, loss_for, measure, sizes_for
from bench.trainers.process import reason, run_job
from bench.trainers.providers import PROVIDERS
from bench.trainers.with_trl import LABELLED


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes where the measurements are."""
    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def lengths(rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Words of every prompt and of every response."""
    prompts = [len(prompt.split()) for prompt in dict.fromkeys(row["prompt"] for row in rows)]
    texts = dict.fromkeys(text for row in rows for text in (row["chosen"], row["rejected"]))
    return prompts, [len(text.split()) for text in texts]


@pytest.mark.parametrize(
    "name, together, ratio", [("hh-rlhf", 186, 2.15), ("ultrafeedback", 409, 0.42)]
)
def test_lengths_have_the_published_medians(name: str, together: float, ratio: float) -> None:
    rows = workloads.pairs_of(name, 4000)
    sums = [len((row["prompt"] + row["chosen"]).split()) for row in rows]
    ratios = [len(row["prompt"].split()) / len(row["chosen"].split()) for row in rows]
    assert statistics.median(sums) == pytest.approx(together, rel=0.05)
    assert statistics.median(ratios) == pytest.approx(ratio, rel=0.1)


def test_prompts_with_several_responses() -> None:
    rows = workloads.pairs_of("n-best", 500)
    prompts, responses = lengths(rows)
    assert statistics.median(prompts) == pytest.approx(60, rel=0.1)
    assert statistics.median(responses) == pytest.approx(122, rel=0.1)
    assert len(responses) == pytest.approx(5 * len(prompts), abs=5)
    assert len(rows) / len(prompts) == pytest.approx(5, abs=0.1)
    assert lengths(workloads.pairs_of("long-prompt", 2)) == ([8192, 8192], [512] * 4)


def test_a_word_is_a_token(tmp_path: Path) -> None:
    path = workloads.model_path("nano", "hh-rlhf", torch.float32, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    row = workloads.pairs_of("hh-rlhf", 1)[0]
    words = (row["prompt"] + row["chosen"]).split()
    ids = tokenizer(row["prompt"] + row["chosen"]).input_ids
    assert len(ids) == len(words) and tokenizer.unk_token_id not in ids
    model = AutoModelForCausalLM.from_pretrained(path)
    assert (
        model.config.vocab_size == 1000 and model.lm_head.weight is model.model.embed_tokens.weight
    )
    with pytest.raises(KeyError, match="expected a directory or one of nano"):
        workloads.model_path("nothing", "hh-rlhf", torch.float32, torch.device("cpu"))
    with pytest.raises(KeyError, match="smaller than the tokenizer"):
        workloads.model_path("nano", "gsm8k", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("smollm2-135m", 134.5),
        ("qwen2.5-0.5b", 494.0),
        ("qwen2.5-1.5b", 1543.7),
        ("llama-3.1-8b", 8030.3),
        ("gemma-3-1b", 999.9),
    ],
)
def test_named_models_have_their_published_sizes(name: str, millions: float) -> None:
    config = AutoConfig.for_model(**workloads.MODEL_CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_what_a_case_counts(tmp_path: Path) -> None:
    words = "--model_config nano --steps 3 --warm_up 1 --pairs_per_step 2 --batches 1"
    options = trainers.parse(
        [*words.split(), "--reference", "precomputed,online", "--dtype", "fp32"]
    )
    first, second = cases.workloads(options, tmp_path)
    assert (first.case["reference"], second.case["reference"]) == ("precomputed", "online")
    rows = workloads.pairs_of("hh-rlhf", 6)
    sizes = [[len(row[key].split()) for key in ("prompt", "chosen", "rejected")] for row in rows]
    # Each response ends in an EOS.
    pairs = [2 * p + a + b + 2 for p, a, b in sizes]
    assert first.useful_tokens == [sum(pairs[i : i + 2]) for i in (0, 2, 4)]
    assert sum(first.response_tokens) == sum(a + b + 2 for _, a, b in sizes)
    model = AutoModelForCausalLM.from_pretrained(first.model)
    assert first.head_weights == 32 * 1000
    assert first.layer_weights + first.head_weights == sum(p.numel() for p in model.parameters())
    measured = {"step_s": [9.0, 1.0, 3.0], "tokens": [7, 100, 300], "peak_mib": 1.0}
    measured |= {"loss": [0.7, 0.6, 0.5], "grad_norm": [1.0] * 3, "product_tflops": 1e-6}
    found = trainers.figures(first, measured | {"head_passes": [8.0, 6.0, 7.0]})
    assert found["head_passes"] == 6.5
    for unknown in ({}, {"head_passes": [None] * 3}):
        assert trainers.figures(first, measured | unknown)["head_passes"] is None
    assert found["step_s"] == [1.0, 3.0] and found["loss"] == [0.7, 0.6, 0.5]
    assert found["pairs_per_s"] == 1.0 and found["computed_tokens_per_s"] == 100.0
    assert found["useful_tokens_per_s"] == sum(first.useful_tokens[1:]) / 4
    if found["peak_tflops"] == 1e-6:
        flops = first.layer_weights * 400 + first.head_weights * sum(first.response_tokens[1:])
        assert found["mfu"] == pytest.approx(6 * flops / 4 / 1e6)


@pytest.mark.parametrize(
    "status, text, expected",
    [
        (
            1,
            "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried",
            "OutOfMemory: CUDA out",
        ),
        (1, "x\nbench.trainers.clock.NotInstalled: no | flash", "NotInstalled: no / flash"),
        (1, "ValueError: a\nException ignored in: <x>", "ValueError: a"),
        (-9, "", "OutOfMemory: killed"),
        (3, "something", "something: "),
    ],
)
def test_why_a_run_failed(status: int, text: str, expected: str) -> None:
    assert reason(status, text).startswith(expected)


def test_the_batch_search_stops_where_memory_ends(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {1: 1.0, 2: 3.0, 4: 2.0}

    def run(workload: Any, name: str, batch: int, *rest: Any) -> dict[str, Any]:
        assert name == "trl"
        return {"pairs_per_s": speed[batch]} if batch in speed else {"error": "OutOfMemory: no"}

    monkeypatch.setattr(trainers, "run", run)
    options = trainers.parse(["--pairs_per_step", "16", "--batches", "1,2,4,8,16"])
    case = cases.Workload({}, Path(), Path(), [], [], 0, 0)
    assert trainers.fastest_batch(case, options, record.Results("x", options)) == 2
    kept = read_rows(results / "x.jsonl")
    assert [row["kind"] for row in kept] == ["batch search"] * 4 and "error" in kept[-1]


@pytest.mark.parametrize(
    "words", ["--providers x", "--reference no", "--pairs_per_step 8 --batches 3", "--steps 2"]
)
def test_mistakes_on_the_command_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainers.parse(words.split())
    assert "error" in capsys.readouterr().err


def test_options_reach_both_trainers() -> None:
    options = trainers.parse(["--lora", "--dtype", "bf16", "--gradient_checkpointing", "on"])
    case = {**vars(options), "gradient_checkpointing": True, "reference": "online", "max_length": 9}
    found = keys_of(case)
    assert found["use_peft"] and found["bf16"] and found["dtype"] == "bfloat16"
    assert not found["precompute_ref_log_probs"] and found["gradient_checkpointing"]
    assert found["max_length"] == 9


def test_a_loss_reaches_both_trainers() -> None:
    options = trainers.parse(["--loss", "cpo_hinge", "--pairs_per_step", "8", "--batches", "2,4"])
    assert options.providers == list(PROVIDERS)  # the peers that stand apart have DPO alone
    case = {**vars(options), "reference": "precomputed", "gradient_checkpointing": False}
    assert "precompute_ref_log_probs" not in keys_of(case)
    assert loss_for("trl", "cpo_hinge") == {"trainer": "cpo", "loss_type": "hinge"}
    assert loss_for("fastdpo", "kto") == {"loss_type": ["kto"]} and not loss_for("trl", None)
    job = {"pairs_per_step": 8, "batch": 2, "loss": "cpo"}
    assert sizes_for("trl", job) == {"per_step": 8, "batch": 2}
    same = {"per_step": 2, "batch": 0, "gradient_accumulation_steps": 4}
    assert sizes_for("fastdpo", job) == same
    del job["loss"]
    assert sizes_for("fastdpo", job) == {"per_step": 8, "batch": 2}


def test_kto_has_no_batch_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainers.parse(["--loss", "kto"]).batches == [2, 4, 8]
    with pytest.raises(SystemExit):
        trainers.parse(["--loss", "kto", "--batches", "1"])
    assert "two rows a batch" in capsys.readouterr().err


def test_labelled_rows_of_a_case(tmp_path: Path) -> None:
    words = "--loss kto --model_config nano --steps 3 --warm_up 1 --pairs_per_step 4 --batches 2"
    (made,) = cases.workloads(trainers.parse([*words.split(), "--dtype", "fp32"]), tmp_path)
    assert made.case["loss"] == "kto" and made.case["unit"] == unit_of(made.case) == "rows"
    rows = read_rows(made.rows)
    assert [row["label"] for row in rows] == [True, False] * 6
    sizes = [(len(row["prompt"].split()), len(row["completion"].split()) + 1) for row in rows]
    assert sum(made.useful_tokens) == sum(map(sum, sizes))
    assert sum(made.response_tokens) == sum(length for _, length in sizes)


def test_groups_as_pairs_and_as_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 0, 1]}]
    groups.append({"prompt": "q" * 3000, "responses": ["a", "b"], "scores": [1, 0]})
    monkeypatch.setattr("bench.data.gsm8k_groups", lambda: groups)
    assert workloads.pairs_of("gsm8k-groups", 9) == [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "c", "rejected": "b"},
    ]
    assert workloads.labelled_of("gsm8k-groups", 2) == [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
    ]


@pytest.mark.parametrize("trainer", [ORPOTrainer, CPOTrainer])
@pytest.mark.parametrize("kind", ["text", "spaced", "messages"])
@pytest.mark.parametrize("bos", [False, True])
def test_written_out_rows_have_the_same_tokens_in_every_trainer(
    trainer: Any, kind: str, bos: bool, pairs_file: Path
) -> None:
    tokenizer = make_tokenizer(CHATML, bos=bos)
    rows = read_rows(pairs_file)
    if kind == "text":
        starts = {"prompt": "", "chosen": " ", "rejected": " "}
        rows = [{name: start + row[name].strip() for name, start in starts.items()} for row in rows]
    if kind == "messages":
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [
            {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
            for row in rows
        ]
    written = workloads.written_out(rows, tokenizer)
    ours = tokenize_rows(written, tokenizer)
    theirs = reference_free_pairs(written, tokenizer, trainer)
    for a, b in zip(ours, theirs, strict=True):
        assert b["prompts"] == [a["prompt_ids"]] * 2
        assert b["response_ids"] == a["response_ids"]
    untouched = reference_free_pairs(rows, tokenizer, trainer)
    whole = [(p + r) for row in untouched for p, r in zip(*row.values(), strict=True)]
    assert whole == [row["prompt_ids"] + ids for row in ours for ids in row["response_ids"]]


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired", "orpo", "simpo", "cpo_hinge"])
@pytest.mark.parametrize("adapter", [{}, {**LORA, "lora_target_modules": "all-linear"}])
def test_the_trainer_of_a_loss(
    loss: str, adapter: dict[str, Any], still_model: Path, pairs_file: Path
) -> None:
    rows: Any = read_rows(pairs_file)
    if loss in LABELLED:
        rows = workloads.labelled_of(str(pairs_file), 24)
    got = trl_metrics(loss, rows, still_model, 2, 8, 4, learning_rate=1e-2, **adapter)
    assert len(got) == 2 and got[0]["loss"] != got[1]["loss"]
    wanted = {"loss", "grad_norm", "rewards/chosen", "logps/rejected", "rewards/margins"}
    wanted |= {"kl"} if loss in LABELLED else {"nll_loss", "rewards/accuracies"}
    wanted |= {"log_odds_chosen", "log_odds_ratio"} if loss == "orpo" else set()
    assert wanted <= got[1].keys()


def test_a_peer_that_cannot_run_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(NotInstalled, match="flash-attn"):
        PROVIDERS["trl-flash"]([], Path("m"), 1, 1, 1)


def test_tokens_of_the_mismatched_pairs() -> None:
    p, q, a, b, c = (1, 1, 1), (2, 2), (3,), (4, 4), (5, 5, 5, 5)
    rows = [(p, a), (p, b), (q, c), (q, a), (q, b)]

    def count(batch: int, per_step: int) -> list[int]:
        return list(mismatched_tokens(rows, batch, per_step).values())

    # In batches of two: p with b and a; q with a and c; q with b.
    assert count(2, 2) == [9 + 9 + 4, 10 + 12 + 4, 6 + 7 + 4, 0]
    # In one of five: p with b and a; q with b, c and a.
    assert count(5, 5) == [22, 30, 5 + 10, 0]
    # In batches of three, two in a step: p with c and a, q with b; q with b and a.
    assert count(3, 6) == [22, 21 + 8, 5 + 8, 4]


def run_in(processes: set[str]) -> Callable[..., dict[str, Any]]:
    """`run_job` with a process for these providers alone: most of its time goes into imports."""

    def run(job: dict[str, Any], timeout: float) -> dict[str, Any]:
        return run_job(job, timeout) if job["provider"] in processes else measure(job)

    return run


def test_trainers_side_by_side(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainers, "run_job", run_in({"trl-patched"}))
    flags = "--providers fastdpo,trl,trl-patched --repetitions 1 --batches 4"
    try:
        cli.main(["trainers", "--quick", *flags.split()])
    except SystemExit as done:
        assert done.code == 0
    rows = [row for row in read(results, "trainers-*.jsonl") if row["kind"] == "measurement"]
    verdicts = agreed(rows)
    assert verdicts == {"fastdpo": None, "trl": None, "trl-patched": None}
    by_name = {row["provider"]: row for row in rows}
    ours, theirs = by_name["fastdpo"], by_name["trl"]
    assert len(ours["step_s"]) == 2 and len(ours["loss"]) == 4
    assert abs(ours["loss"][-1] - math.log(2)) > 1e-3
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert ours["head_passes"] == 6 and theirs["head_passes"] is None
    useful = ours["useful_tokens_per_s"] * sum(ours["step_s"])
    assert useful == pytest.approx(theirs["useful_tokens_per_s"] * sum(theirs["step_s"]))
    computed = [row["computed_tokens_per_s"] * sum(row["step_s"]) for row in (ours, theirs)]
    assert computed[0] < useful < computed[1]
    printed = capsys.readouterr().out
    assert "| trl-patched |" in printed and "model FLOPs utilisation" in printed
    assert json.loads((results / "trainers-cpu.jsonl").read_text().splitlines()[0])["commit"]


@pytest.mark.parametrize("loss, unit", [("kto", "rows"), ("orpo", "pairs"), ("simpo", "pairs")])
def test_losses_side_by_side(
    loss: str,
    unit: str,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainers, "run_job", run_in(set()))
    monkeypatch.setattr("bench.trainers.clock.product_tflops", lambda dtype: 1.0)
    flags = f"--loss {loss} --providers fastdpo,trl --repetitions 1 --batches 2"
    trainers.main(["--quick", *flags.split()])
    rows = read(results, "losses-*.jsonl")
    assert agreed(rows) == {"fastdpo": None, "trl": None}
    ours, theirs = rows
    assert ours["case"]["loss"] == loss and ours["settings"]["batch"] == 2
    assert max(ours["loss"]) - min(ours["loss"]) > 1e-3
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert f"4 {unit} a step" in capsys.readouterr().out
