"""`python -m fastdpo.demo`: all of DPO in a few minutes on a CPU, on a real model and real text.

A small chat model learns to prefer direct answers to evasive ones. It is asked the same question
before and after, and its preferences are measured on pairs that it was not trained on. Arguments
are those of `fastdpo train` (`--max_steps 10`, `--output_dir out`). With `--rounds` it learns from
its own answers: see `fastdpo.demo.rounds`.
"""

import json
import os
import sys
import textwrap
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from ..config import TrainConfig
from ..terminal import guarded, heard, progress_bars
from . import rounds
from .model import demo_model_path

PROMPT = "How can I make new friends in a new city?"
_HERE = Path(__file__).parent
_ACCURACY = "eval_rewards/accuracies"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, 2 for an error of the user's, or 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv

    def demo() -> int:
        with heard(), progress_bars(None):
            page = rounds.run(arguments) if rounds.FLAG in arguments else run(arguments)
            if page is not None:
                open_page(page)
        return 0

    return guarded(demo)


def run(arguments: Sequence[str]) -> Path | None:
    """Train the demo's model with `arguments` over the demo's configuration, and show what changed.

    Returns:
        The report; None where none was asked for.

    Raises:
        FastDPOError: wrong arguments, or no model to be had.
    """
    config = demo_config(arguments)
    assert config.model_name_or_path is not None
    from ..training.run import train

    before = answer(config.model_name_or_path, PROMPT)
    start = time.perf_counter()
    output_dir = train(config).output_dir
    minutes = (time.perf_counter() - start) / 60
    after = answer(str(output_dir), PROMPT)
    print(summary(before, after, held_out_accuracies(output_dir), minutes, output_dir))
    return output_dir / "report.html" if config.report else None


def demo_config(arguments: Sequence[str]) -> TrainConfig:
    """`config.yaml` of this directory with the demo's data and model, overridden by `arguments`.

    The model is fetched only if none is named and the arguments are right.

    Raises:
        FastDPOError: wrong arguments, or no model to be had.
    """
    files = ("dataset_name", _HERE / "train.jsonl"), ("eval_dataset_name", _HERE / "test.jsonl")
    shipped = [word for key, path in files for word in (f"--{key}", str(path))]
    known = [str(_HERE / "config.yaml"), *shipped]
    config = TrainConfig.parse([*known, *arguments])
    if config.model_name_or_path is None:
        model = ["--model_name_or_path", str(demo_model_path())]
        config = TrainConfig.parse([*known, *model, *arguments])
    return config


def answer(model_path: str, prompt: str, max_new_tokens: int = 60) -> str:
    """The greedy answer of the chat model in `model_path` to one user message."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    text = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    return text if new[-1] == tokenizer.eos_token_id else f"{text} ..."


def held_out_accuracies(output_dir: Path) -> list[float]:
    """Every held-out reward accuracy in a run's `metrics.jsonl`, in order."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row[_ACCURACY] for row in rows if _ACCURACY in row]


def open_page(path: Path) -> None:
    """Say where a page is, and open it in the browser of the desktop that is looked at, if any."""
    print(f"Report: {path}")
    desktop = sys.platform in ("darwin", "win32") or os.environ.keys() & {
        "DISPLAY",
        "WAYLAND_DISPLAY",
    }
    if desktop and sys.stdout.isatty():
        webbrowser.open(path.resolve().as_uri())


def summary(
    before: str, after: str, accuracies: Sequence[float], minutes: float, output_dir: Path
) -> str:
    """What the demo prints at its end."""

    def quoted(text: str) -> str:
        lines = (textwrap.fill(line, 88) for line in text.splitlines())
        return textwrap.indent("\n".join(lines), "    ")

    change = " -> ".join(f"{value:.2f}" for value in accuracies)
    lines = [
        "",
        f"Prompt: {PROMPT}",
        "  Before:",
        quoted(before),
        "  After:",
        quoted(after),
        "",
        f"Held-out reward accuracy: {change or 'not evaluated'}",
        f"Trained and evaluated in {minutes:.1f} minutes",
        f"Model, metrics.jsonl and configuration: {output_dir}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
