"""Everything that needs a GPU, in one command of under nine minutes: `make gpu-check`.

Tests come first, then the figures, the most important first. Each stage is a process with its own
limit, and one that fails or runs too long does not stop the next. Rows are written as they come, to
bench/results and to the folders of `--results`; a short table is printed last. The exit status is 1
if a test failed, or if one of our own providers failed or did not repeat its bits.

It runs with the interpreter that starts it and needs no network: where there is a folder of wheels
(`--wheels`), what it holds is installed beside that interpreter for the run. Where the sources came
without their repository, `FASTDPO_COMMIT` tells the rows which commit they are.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from . import record, tables
from .rows import Row, is_ours, read

ROOT = Path(__file__).parent.parent
PEERS = "fastdpo,products,trl,liger-flce,torch-lce,cce,naive,naive-compiled,liger,liger-8"
TRAINERS = (
    "--model_config qwen2.5-0.5b --providers fastdpo,trl,trl-patched --pairs_per_step 32 --steps 7"
    " --warm_up 3 --repetitions 2 --batches 8,16"
)
HEADS = "qwen2.5-0.5b,gemma-3-1b,llama-3.1-8b"
KERNEL_TESTS = [
    f"test_{subject}*.py" for subject in ("kernel", "triton", "library", "tiles", "integration")
]
NOTHING_COLLECTED, TIMED_OUT = 5, 124


class Stage(NamedTuple):
    """A process: its arguments after `python -m`, and its limit in seconds."""

    name: str
    arguments: str
    seconds: int


TESTS = (
    Stage("tests", "pytest -q -p no:cacheprovider -m gpu", 150),
    Stage("kernel tests", "pytest -q -p no:cacheprovider -m 'not gpu and not slow' KERNELS", 100),
)
ONE_PAIR = (
    "--gradient_checkpointing on --pairs_per_step 1 --batches 1 --steps 3 --warm_up 1"
    " --repetitions 1"
)
LEAN = (
    "fastdpo.activation_offloading=true fastdpo.layer_tile_tokens=4096"
    " trl.activation_offloading=true"
)
FOUR_BITS = "fastdpo.load_in_4bit=true trl.load_in_4bit=true"
FIGURES = (
    Stage(
        "dpo",
        f"bench.heads --heads {HEADS} --tokens 16384 --regimes dpo"
        " --providers fastdpo,products,trl --repeats 10",
        100,
    ),
    Stage(
        "regimes",
        f"bench.heads --heads {HEADS} --tokens 16384 --regimes frozen,no_grad,trainable,dpo_frozen"
        " --providers fastdpo,products,trl --repeats 7",
        120,
    ),
    Stage(
        "peers",
        f"bench.heads --heads {HEADS} --tokens 16384 --regimes dpo --providers {PEERS} --repeats 5",
        170,
    ),
    *(
        Stage(f"trainers, {data}", f"bench.trainers {TRAINERS} --data {data}", 100)
        for data in ("hh-rlhf", "ultrafeedback")
    ),
    Stage(
        "long",
        "bench.heads --heads qwen2.5-0.5b --tokens 16384 --regimes dpo_long"
        " --providers fastdpo,products,trl --repeats 5",
        40,
    ),
    Stage(
        "small workspace",
        "bench.heads --heads gemma-3-1b --tokens 16384 --regimes dpo,trainable"
        " --providers fastdpo,products --repeats 3 --workspace-mib 32",
        40,
    ),
    *(
        Stage(
            f"from few tokens to many, {head}",
            f"bench.heads --heads {head} --tokens 512,4096,65536 --regimes dpo"
            " --providers fastdpo,products,trl,liger-flce,torch-lce,cce,naive --repeats 5",
            100,
        )
        for head in HEADS.split(",")
    ),
    Stage(
        "more than 2**31 logits in a tile",
        "bench.heads --heads qwen2.5-0.5b --tokens 16384 --regimes dpo,trainable,frozen"
        " --providers fastdpo --repeats 1 --workspace-mib 8192",
        40,
    ),
    Stage(
        "more than 2**31 weights",
        "bench.heads --heads large --tokens 2048 --regimes dpo,trainable,no_grad"
        " --providers fastdpo,trl --repeats 1",
        60,
    ),
    Stage(
        "trainers, 8b",
        "bench.trainers --model_config llama-3.1-8b --lora --data ultrafeedback --pairs_per_step 16"
        " --steps 6 --repetitions 1 --batches 4 --providers fastdpo,trl",
        200,
    ),
    Stage(
        "trainers, 1.5b",
        f"bench.trainers {TRAINERS} --model_config qwen2.5-1.5b --data ultrafeedback",
        150,
    ),
    Stage(
        "gaps",
        f"bench.gaps {TRAINERS} --model_config qwen2.5-1.5b --data ultrafeedback",
        60,
    ),
    Stage("trainers, n-best", f"bench.trainers {TRAINERS} --data n-best", 100),
    Stage(
        "trainers, long-prompt",
        f"bench.trainers {TRAINERS} --data long-prompt --pairs_per_step 4 --batches 1,2",
        120,
    ),
    Stage(
        "configurations",
        f"bench.heads --heads {HEADS} --tokens 16384 --regimes dpo,no_grad"
        " --providers fastdpo,products --configs --repeats 5",
        100,
    ),
    Stage(
        "memory at 16k",
        f"bench.trainers --model_config qwen2.5-1.5b --data pair-16384 {ONE_PAIR}"
        f" --providers fastdpo,trl --keys {LEAN}",
        120,
    ),
    *(
        Stage(
            f"32k tokens, offloading {switch}",
            f"bench.trainers --model_config llama-3.1-8b --lora --data pair-32768 {ONE_PAIR}"
            f" --providers fastdpo --keys fastdpo.activation_offloading={switch}",
            120,
        )
        for switch in ("true", "false")
    ),
    *(
        Stage(
            f"longest pair, {name}",
            f"bench.memory {model} {ONE_PAIR} --limit_gib 80 --shortest 32768 --longest 524288"
            f" --providers fastdpo,trl --keys {LEAN} {keys}",
            500,
        )
        for name, model, keys in (
            ("8b lora", "--model_config llama-3.1-8b --lora", ""),
            ("8b qlora", "--model_config llama-3.1-8b --lora", FOUR_BITS),
            ("1.5b", "--model_config qwen2.5-1.5b", ""),
        )
    ),
)
TINY_TRAINER = (
    "--model_config nano --data n-best --pairs_per_step 2 --steps 3 --warm_up 1 --batches 1"
    " --repetitions 1 --dtype fp32"
)
TINY = "--device cpu --dtype fp32 --heads tiny --repeats 1"


def dry(stage: Stage) -> Stage:
    """The same stage on a CPU in seconds, the fused kernels through Triton's interpreter."""
    arguments = stage.arguments.replace("KERNELS", "--collect-only KERNELS")
    if any(name in arguments for name in ("bench.trainers", "bench.gaps", "bench.memory")):
        arguments = f"{arguments} {TINY_TRAINER}"
        if "--keys" in arguments:  # offloading and 4 bits need a GPU
            arguments = f"{arguments} --keys fastdpo.layer_tile_tokens=64"
        if "bench.memory" in arguments:
            arguments = f"{arguments} --shortest 64 --longest 64"
    elif stage in FIGURES:
        tokens = 2048 if "dpo_long" in stage.arguments else 16
        arguments = f"{stage.arguments} {TINY} --tokens {tokens}"
        if stage.name == "regimes":
            fused = "--providers fastdpo,fastdpo-triton"
            arguments = arguments.replace("--providers fastdpo", fused)
    return stage._replace(arguments=arguments)


def install(wheels: Path, site: Path) -> None:
    """Unpack every wheel of a folder into `site`, without a network."""
    found = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if found:
        options = "--quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target"
        pip = [sys.executable, "-m", "pip", "install", *options.split(), str(site)]
        if subprocess.run([*pip, *found], check=False).returncode:
            print(f"{wheels}: not installed, so peers may be missing", flush=True)


def run(stage: Stage, arguments: list[str], seconds: float, log: Path, env: dict[str, str]) -> int:
    """Run one stage and print the end of its log; its exit status, `TIMED_OUT` at its limit."""
    begin, start = log.stat().st_size if log.exists() else 0, time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n=== {stage.name}: {' '.join(arguments)}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = TIMED_OUT
    text = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    print(f"=== {stage.name}: status {status} after {time.monotonic() - start:.0f} s", flush=True)
    if status or "pytest" in arguments:
        print("\n".join(line[:200] for line in text[-12:]), flush=True)
    return status


def stages(dry_run: bool, only: list[str] | None) -> list[Stage]:
    """What to run, in order: the GPU's tests, the figures, the tests that any device could run."""
    order = [TESTS[0], *FIGURES[:3], TESTS[1], *FIGURES[3:]]
    chosen = [stage for stage in order if only is None or stage.name in only]
    return [dry(stage) for stage in chosen if stage != TESTS[0]] if dry_run else chosen


def command(stage: Stage) -> list[str]:
    """Arguments of a stage, its files filled in."""
    parts = shlex.split(stage.arguments)
    if parts[-1] == "KERNELS":
        files = (file for glob in KERNEL_TESTS for file in (ROOT / "tests").glob(glob))
        return [*parts[:-1], *sorted(map(str, files))]
    return parts


def failures(rows: list[Row]) -> list[str]:
    """What our own providers did wrong."""
    found = []
    for row in rows:
        where = f"{row['provider']}, {row['case']['regime']}, {row['case']['head']}"
        if not is_ours(row["provider"]):
            continue
        if "error" in row:
            found.append(f"{where}: {row['error']}")
        elif not row["deterministic"]:
            found.append(f"{where}: two calls differ")
    return sorted(set(found))


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, print the summary; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, keeping no rows")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--minutes", type=float, default=8.7, help="all stages together")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="*",
        default=[Path(os.environ["OUT"])] if os.environ.get("OUT") else [],
        help="further folders for rows, log and tables; default: $OUT, if that is set",
    )
    options = parser.parse_args(arguments)
    options.results = [folder.resolve() for folder in options.results]
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        return _run_all(options, Path(scratch), end)


def _run_all(options: argparse.Namespace, scratch: Path, end: float) -> int:
    rows_folder, log = scratch / "rows", scratch / "gpu-check.log"
    folders = [rows_folder, *options.results, *([] if options.dry_run else [record.RESULTS])]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    path = [str(scratch / "site"), str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    env["FASTDPO_RESULTS"] = os.pathsep.join(map(str, folders))
    if options.dry_run:
        env["TRITON_INTERPRET"] = "1"
    install(options.wheels, scratch / "site")
    bad = []
    for stage in stages(options.dry_run, options.stages):
        seconds = min(stage.seconds, end - time.monotonic())
        if seconds < 10:
            print(f"=== {stage.name}: no time left", flush=True)
            continue
        arguments = command(stage)
        status = run(stage, arguments, seconds, log, env)
        if status not in (0, TIMED_OUT, NOTHING_COLLECTED) or (
            status == TIMED_OUT and "pytest" in arguments
        ):
            bad.append(f"{stage.name}: status {status}")
        for folder in options.results:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, folder)
    rows = read(rows_folder)
    trained = tables.trainer_tables(read(rows_folder, "trainers-*.jsonl"))
    for folder in options.results:
        (folder / "heads.md").write_text(tables.head_tables(rows) + "\n", encoding="utf-8")
        (folder / "trainers.md").write_text(trained + "\n", encoding="utf-8")
    bad += failures(rows)
    print(f"\n{tables.head_summary(rows)}\n\n{trained}")
    print("\n".join(["", *bad]) if bad else "\nall of our own passed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
