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

from .report import record
from .report.heads import head_summary, head_tables
from .report.memory import memory_table
from .report.rows import Row, is_ours, read
from .report.trainers import trainer_tables

ROOT = Path(__file__).parent.parent
HEADS = "qwen2.5-0.5b,gemma-3-1b,llama-3.1-8b"
OURS = "fastdpo,products"
TRL = f"{OURS},trl"
PEERS = f"{TRL},liger-flce,torch-lce,cce,naive"
KERNEL_TESTS = [
    f"test_{subject}*.py" for subject in ("kernel", "triton", "library", "tiles", "integration")
]
NOTHING_COLLECTED, TIMED_OUT = 5, 124


class Stage(NamedTuple):
    """A process: its arguments after `python -m`, and its limit in seconds."""

    name: str
    arguments: str
    seconds: int


def _heads(
    name: str,
    seconds: int,
    regimes: str,
    providers: str,
    repeats: int,
    heads: str = HEADS,
    tokens: str = "16384",
    more: str = "",
) -> Stage:
    words = f"--heads {heads} --tokens {tokens} --regimes {regimes} --providers {providers}"
    return Stage(name, f"bench.heads {words} --repeats {repeats} {more}".strip(), seconds)


def _trainers(name: str, seconds: int, more: str, module: str = "bench.trainers") -> Stage:
    words = "--model_config qwen2.5-0.5b --providers fastdpo,trl,trl-patched --pairs_per_step 32"
    words += " --steps 7 --warm_up 3 --repetitions 2 --batches 8,16"
    return Stage(name, f"{module} {words} {more}", seconds)


def _pair(name: str, seconds: int, more: str, module: str = "bench.trainers") -> Stage:
    words = "--gradient_checkpointing on --pairs_per_step 1 --batches 1 --steps 3 --warm_up 1"
    return Stage(name, f"{module} {words} --repetitions 1 {more}", seconds)


def _longest(name: str, more: str) -> Stage:
    words = "--limit_gib 80 --shortest 32768 --longest 524288 --providers fastdpo,trl"
    return _pair(f"longest pair, {name}", 500, f"{words} {more}", "bench.trainers.memory")


LLAMA_LORA = "--model_config llama-3.1-8b --lora"
LEAN = (
    "--keys fastdpo.activation_offloading=true fastdpo.layer_tile_tokens=4096"
    " trl.activation_offloading=true"
)
OFFLOAD = "--providers fastdpo --keys fastdpo.activation_offloading"
FOUR_BITS = "fastdpo.load_in_4bit=true trl.load_in_4bit=true"
TESTS = (
    Stage("tests", "pytest -q -p no:cacheprovider -m gpu", 150),
    Stage("kernel tests", "pytest -q -p no:cacheprovider -m 'not gpu and not slow' KERNELS", 100),
)
FIGURES = (
    _heads("dpo", 100, "dpo", TRL, 10),
    _heads("regimes", 120, "frozen,no_grad,trainable,dpo_frozen", TRL, 7),
    _heads("peers", 170, "dpo", f"{PEERS},naive-compiled,liger,liger-8", 5),
    _trainers("trainers, hh-rlhf", 100, "--data hh-rlhf"),
    _trainers("trainers, ultrafeedback", 100, "--data ultrafeedback"),
    _heads("long", 40, "dpo_long", TRL, 5, "qwen2.5-0.5b"),
    _heads(
        "small workspace", 40, "dpo,trainable", OURS, 3, "gemma-3-1b", more="--workspace-mib 32"
    ),
    *(
        _heads(f"from few tokens to many, {head}", 100, "dpo", PEERS, 5, head, "512,4096,65536")
        for head in HEADS.split(",")
    ),
    _heads(
        "more than 2**31 logits in a tile",
        40,
        "dpo,trainable,frozen",
        "fastdpo",
        1,
        "qwen2.5-0.5b",
        more="--workspace-mib 8192",
    ),
    _heads(
        "more than 2**31 weights",
        60,
        "dpo,trainable,no_grad",
        "fastdpo,trl",
        1,
        heads="large",
        tokens="2048",
    ),
    _trainers(
        "trainers, 8b",
        200,
        f"{LLAMA_LORA} --data ultrafeedback --pairs_per_step 16 --steps 6 --repetitions 1"
        " --batches 4 --providers fastdpo,trl",
    ),
    _trainers("trainers, 1.5b", 150, "--model_config qwen2.5-1.5b --data ultrafeedback"),
    _trainers(
        "gaps", 60, "--model_config qwen2.5-1.5b --data ultrafeedback", "bench.trainers.gaps"
    ),
    _trainers("trainers, n-best", 100, "--data n-best"),
    _trainers("trainers, long-prompt", 120, "--data long-prompt --pairs_per_step 4 --batches 1,2"),
    _heads("configurations", 100, "dpo,no_grad", OURS, 5, more="--configs"),
    _pair(
        "memory at 16k",
        120,
        f"--model_config qwen2.5-1.5b --data pair-16384 --providers fastdpo,trl {LEAN}",
    ),
    *(
        _pair(
            f"32k tokens, offloading {switch}",
            120,
            f"{LLAMA_LORA} --data pair-32768 {OFFLOAD}={switch}",
        )
        for switch in ("true", "false")
    ),
    _longest("8b lora", f"{LLAMA_LORA} {LEAN}"),
    _longest("8b qlora", f"{LLAMA_LORA} {LEAN} {FOUR_BITS}"),
    _longest("1.5b", f"--model_config qwen2.5-1.5b {LEAN}"),
)
TINY_TRAINER = (
    "--model_config nano --data n-best --pairs_per_step 2 --steps 3 --warm_up 1 --batches 1"
    " --repetitions 1 --dtype fp32"
)
TINY = "--device cpu --dtype fp32 --heads tiny --repeats 1"


def dry(stage: Stage) -> Stage:
    """The same stage on a CPU in seconds, the fused kernels through Triton's interpreter."""
    arguments = stage.arguments.replace("KERNELS", "--collect-only KERNELS")
    if "bench.trainers" in arguments:
        arguments = f"{arguments} {TINY_TRAINER}"
        if "--keys" in arguments:  # offloading and 4 bits need a GPU
            arguments = f"{arguments} --keys fastdpo.layer_tile_tokens=64"
        if "bench.trainers.memory" in arguments:
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
    files = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if files:
        options = "--quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target"
        pip = [sys.executable, "-m", "pip", "install", *options.split(), str(site)]
        if subprocess.run([*pip, *files], check=False).returncode:
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
    selected = [stage for stage in order if only is None or stage.name in only]
    return [dry(stage) for stage in selected if stage != TESTS[0]] if dry_run else selected


def command(stage: Stage) -> list[str]:
    """Arguments of a stage, its files filled in."""
    parts = shlex.split(stage.arguments)
    if parts[-1] == "KERNELS":
        files = (file for glob in KERNEL_TESTS for file in (ROOT / "tests").glob(glob))
        return [*parts[:-1], *sorted(map(str, files))]
    return parts


def failures(rows: list[Row]) -> list[str]:
    """What our own providers did wrong."""
    wrong = []
    for row in rows:
        where = f"{row['provider']}, {row['case']['regime']}, {row['case']['head']}"
        if not is_ours(row["provider"]):
            continue
        if "error" in row:
            wrong.append(f"{where}: {row['error']}")
        elif not row["deterministic"]:
            wrong.append(f"{where}: two calls differ")
    return sorted(set(wrong))


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
    pages = {
        "heads.md": head_tables(rows),
        "trainers.md": trainer_tables(read(rows_folder, "trainers-*.jsonl")),
        "memory.md": memory_table(read(rows_folder, "memory-*.jsonl")),
    }
    for folder in options.results:
        for name, text in pages.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")
    bad += failures(rows)
    print("", head_summary(rows), pages["trainers.md"], pages["memory.md"], sep="\n\n")
    print("\n".join(["", *bad]) if bad else "\nall of our own passed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
