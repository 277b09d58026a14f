"""The command line: help, exit codes, errors in one line, nothing heavy imported."""

import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastdpo import __version__
from fastdpo.cli import main
from fastdpo.config import TrainConfig
from fastdpo.errors import DataError

ROOT = Path(__file__).parents[1]
PATHS = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; "
RUNNABLE = ["--model_name_or_path", "m", "--dataset_name", "d", "--beta", "0.2"]


def fastdpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    code = f"{PATHS}from fastdpo.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def runs(monkeypatch):
    """Stands in for `fastdpo.training.run`: what it was called with, and what it does."""
    seen: dict[str, Any] = {"configs": [], "effect": lambda: {"loss": 0.5}}

    def precompute(config: TrainConfig) -> dict[str, Any]:
        seen["configs"].append(config)
        return seen["effect"]()

    def train(config: TrainConfig) -> Any:
        values = {"metrics": precompute(config), "output_dir": Path("out"), "url": None}
        return types.SimpleNamespace(**values, seconds=1.0, tokens=10, step=1)

    module = types.ModuleType("fastdpo.training.run")
    module.train, module.precompute, module.TrainResult = train, precompute, Any
    monkeypatch.setitem(sys.modules, "fastdpo.training.run", module)
    return seen


def raises(error: BaseException) -> Any:
    def effect() -> None:
        raise error

    return effect


# Help and errors


def test_help_lists_the_commands():
    result = fastdpo("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("train", "precompute", "doctor"):
        assert f"\n  {command} " in result.stdout
    assert "fastdpo train config.yaml --beta 0.2" in result.stdout


def test_help_of_train_has_an_example_and_every_key_with_its_default():
    result = fastdpo("train", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    assert text.index("fastdpo train config.yaml --beta 0.2") < text.index("Model:")
    places = [text.index(f" --{name} ", text.index("Model:")) for name in TrainConfig.key_fields()]
    assert places == sorted(places)
    assert text.count("(default: ") == len(places)
    assert "(default: 1e-06)" in text
    assert "(default: sigmoid)" in text
    assert "TRL's default is false" in text
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--bta", "1"], "--bta: unknown key bta; the nearest known key is beta"),
        (["train", "--beta", "0"], "--beta: expected a number greater than 0, got 0.0"),
        (["train", "none.yaml"], "none.yaml: cannot read the configuration file"),
        (["train"], "model_name_or_path: expected a value (--model_name_or_path, or"),
        (["precompute", "--model_name_or_path", "m"], "dataset_name: expected a value"),
        (["doctor", "--beta", "x"], "--beta: expected a number, got x"),
        (["trian"], "unknown command trian; the nearest is train (fastdpo --help)"),
        (["--beta", "0.2"], "unknown command --beta; the nearest is"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own():
    result = fastdpo("train", "--max_steps", "soon")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: --max_steps: expected a whole number, got soon\n"


def test_no_command_prints_the_help_as_an_error(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastdpo trains language models")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdpo {__version__}\n"


@pytest.mark.parametrize("command", ["precompute", "doctor"])
def test_help_of_the_other_commands(command, capsys):
    assert main([command, "config.yaml", "-h"]) == 0
    assert capsys.readouterr().out.startswith(f"fastdpo {command}: ")


def test_reading_a_configuration_imports_neither_torch_nor_transformers():
    code = (
        f"{PATHS}from fastdpo.cli import main; main(['train', '--help']); main(['train']); "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Running


@pytest.mark.parametrize("command", ["train", "precompute"])
def test_commands_run_with_the_configuration(command, runs, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main([command, *RUNNABLE]) == 0
    assert runs["configs"] == [TrainConfig(model_name_or_path="m", dataset_name="d", beta=0.2)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["model_name_or_path", "m", "--model_name_or_path"],
        ["dataset_name", "d", "--dataset_name"],
        ["beta", "0.2", "--beta"],
    ]
    if command == "train":
        assert [line.split()[0] for line in lines[3:]] == [
            "Held",
            "Took",
            "Model",
            "Figures",
            "Try",
        ]
        assert lines[-1].endswith("fastdpo chat out")
    else:
        assert lines[3:] == ["loss: 0.5"]


def test_only_the_first_process_prints(runs, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", *RUNNABLE]) == 0
    assert capsys.readouterr().out == ""


def test_an_error_while_running_is_one_line(runs, capsys):
    runs["effect"] = raises(DataError("pairs.jsonl, line 3: chosen: expected text,\n  got 7"))
    assert main(["train", *RUNNABLE]) == 2
    assert capsys.readouterr().err == ("error: pairs.jsonl, line 3: chosen: expected text, got 7\n")


def test_an_interruption_is_130(runs, capsys):
    runs["effect"] = raises(KeyboardInterrupt())
    assert main(["train", *RUNNABLE]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interruption_that_a_library_turned_into_another_error_is_one_still(runs, capsys):
    error = ModuleNotFoundError("Could not import module 'set_seed'")
    error.__cause__ = KeyboardInterrupt()
    runs["effect"] = raises(error)
    assert main(["train", *RUNNABLE]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def process(arguments: str, **options: Any) -> subprocess.Popen[str]:
    code = f"{PATHS}from fastdpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments.split()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_goes_away_ends_the_command():
    reading, writing = os.pipe()
    os.close(reading)
    running = process("train --help", stdout=writing)
    os.close(writing)
    assert running.communicate()[1] == "" and running.returncode == 141


def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        running = process("train --help", stdout=full)
        error = running.communicate()[1]
    assert error == "error: the output cannot be written (No space left on device)\n"
    assert running.returncode == 2


def test_closed_and_narrow_streams(tmp_path):
    closed = process("--version", preexec_fn=partial(os.close, 1))
    assert closed.communicate()[1] == "" and closed.returncode == 0
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    narrow = process("train dätä.yaml", env=env, cwd=tmp_path, stdout=subprocess.PIPE)
    assert narrow.communicate()[1].startswith(r"error: d\xe4t\xe4.yaml: cannot read the config")


def test_a_directory_that_has_gone(tmp_path):
    gone = partial(os.rmdir, tmp_path)
    # No relative paths, for which Python does not start there: the `fastdpo` script has none.
    env = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    pipe = {"stdout": subprocess.PIPE, "env": env}
    running = process("train config.yaml", cwd=tmp_path, preexec_fn=gone, **pipe)
    assert running.communicate()[1].startswith("error: the current directory has gone (")
    assert running.returncode == 2


def test_an_error_of_the_program_keeps_its_traceback(runs):
    runs["effect"] = raises(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        main(["train", *RUNNABLE])
