"""The command line: `fastdpo train | precompute | pairs | check | score | sample | chat
| merge | rounds | plan | report | bench | doctor`.

What a user got wrong is one line on stderr and exit code 2, never a traceback. As in a shell, an
interrupted run is 130, and 141 one whose output nobody reads any more. Nothing heavy is imported
before it is needed, so that `--help` and mistakes answer at once.
"""

import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import terminal
from .arguments import own_flags
from .config import TrainConfig
from .config.text import key_help
from .errors import ConfigError, FastDPOError
from .parallel.orphan import end_with_parent
from .version import __version__

if TYPE_CHECKING:
    from .training.run import TrainResult

USAGE = """\
fastdpo trains language models on preferences (DPO), without padding, repeated prompts or logits.

  fastdpo train config.yaml --beta 0.2
  fastdpo train --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir out

Commands:
  train         train a model, and evaluate and save it
  precompute    compute and cache the reference's log-probabilities, without training
  pairs         preference data from a request log with ratings, edits or retries
  check         what is wrong with a data set
  score         log-probabilities and implicit rewards of the responses in a file
  sample        answers of a model, to one prompt or to those of a file
  chat          talk to a model
  merge         add an adapter to its base's weights
  rounds        sample, judge and train, again and again
  plan          what a run would need of a GPU's memory, before anything runs
  report        a run, or several beside each other, as a page for the browser
  bench         compare with other trainers and heads, on this machine
  doctor        what is installed here, and which kernels would run and why

Options:
  --help        this text; after a command, the text of that command
  --version     the version
"""

KEY_USAGE = """\
fastdpo {command}: {summary}

  fastdpo {command} config.yaml
  fastdpo {command} config.yaml --beta 0.2 --max_steps 50
  fastdpo {command} --model_name_or_path MODEL --dataset_name pairs.jsonl

Every key can stand in the YAML file (key: value) or on the command line (--key value), which wins.
True or false keys may do without a value (--use_peft), or take a no_ (--no_gradient_checkpointing).
Lists are separated by spaces. Keys, meanings and defaults are TRL's wherever it has the same key.
--accelerate_config FILE reads a configuration of accelerate's, as TRL's commands do.
"""

DOCTOR_USAGE = """\
fastdpo doctor: what is installed here, and which kernels would run and why

  fastdpo doctor
  fastdpo doctor config.yaml
  fastdpo doctor --model_name_or_path MODEL --use_cpu
  torchrun --nproc_per_node 8 -m fastdpo doctor

With a model, it also says how its rows would be laid out. It takes the keys of fastdpo train.
Under torchrun, or with --devices N, it first says what each rank sees, in what the ranks differ,
and how fast they exchange.
"""

PLAN_USAGE = """\
fastdpo plan: what a run would need of a GPU's memory, by component, and how long a step would take

  fastdpo plan config.yaml
  fastdpo plan config.yaml --gpu rtx4090-24gb
  fastdpo plan --model_name_or_path MODEL --max_length 4096 --gpu h100-80gb --json
  fastdpo plan config.yaml --gpu h100-80gb --devices 8 --hosts 4

It takes the keys of fastdpo train, loads the tokenizer, the data and the model's configuration, and
no weights. Without a dataset_name, rows of max_length tokens are assumed. Where the run does not
fit, it says which switches make it fit and what each costs in time.

With --devices N it plans for N devices on each host: what each of them holds, what they send each
other in a step, which data_parallel that makes, and what more devices would bring.

  --gpu NAME     plan for this GPU instead of the device at hand:
                 {gpus}
  --hosts N      so many hosts, with --devices each
  --link NAME    what joins the devices of a host, instead of the GPU's own:
                 {links}
  --network NAME what joins hosts, a port a device; 400g unless it is given:
                 {networks}
  --json         the same as JSON
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit code.

    0 is success, 2 an error of the user's, 130 an interruption, 141 an output that nobody reads any
    more. Errors of the program are raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    end_with_parent()
    return terminal.guarded(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return 2
    command, rest = arguments[0], arguments[1:]
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if command in ("--version", "-V"):
        print(f"fastdpo {__version__}")
        return 0
    if command not in COMMANDS:
        nearest = get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown command {command}; the nearest is {nearest} (fastdpo --help)")
    run, help_text = COMMANDS[command]
    if help_text and ("--help" in rest or "-h" in rest):
        print(help_text(), end="")
        return 0
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current directory has gone ({error.strerror})") from error
    try:
        run(rest)
    except SystemExit as done:  # of bench, whose parser and measurements end so
        if not isinstance(done.code, int):
            raise
        return done.code
    return 0


def _train(arguments: Sequence[str]) -> None:
    config = _runnable(arguments)
    if _launched("train", arguments, config):
        return
    from .training.run import train

    with terminal.heard(_is_first_process()):
        result = train(config)
    if _is_first_process():
        print(_summary(result))


def _summary(result: "TrainResult") -> str:
    """The last lines of a run, as wide and as bold as the terminal allows."""
    from .training.summary import summary

    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return summary(result, shutil.get_terminal_size((80, 24)).columns, bold)


def _precompute(arguments: Sequence[str]) -> None:
    config = _runnable(arguments)
    if _launched("precompute", arguments, config):
        return
    from .training.run import precompute

    with terminal.heard(_is_first_process()):
        result = precompute(config)
    _print_result(result)


def _launched(command: str, arguments: Sequence[str], config: TrainConfig) -> bool:
    """Whether the command has run in processes that were started for `devices`."""
    if "WORLD_SIZE" in os.environ:
        return False
    from .memory.spread import spread_of

    devices = config.devices or 1
    config.check_contexts(devices)
    if config.data_parallel != "auto" and devices > 1:
        spread_of(config, devices, devices, config.data_parallel)
    if devices == 1:
        return False
    from .parallel.launch import launch

    if status := launch([command, *arguments], devices):
        raise SystemExit(status)
    return True


def _doctor(arguments: Sequence[str]) -> None:
    config = TrainConfig.parse(arguments)
    if _launched("doctor", arguments, config):
        return
    from .doctor import report, report_of_ranks

    text = report_of_ranks(config) if "WORLD_SIZE" in os.environ else report(config)
    if text is not None:
        print(text)


def _plan(arguments: Sequence[str]) -> None:
    from .memory.plan import NETWORK, plan

    values = {"gpu": "the name of a GPU", "hosts": "a number"}
    values |= {name: f"the name of a {name}" for name in ("link", "network")}
    words, flags, switches = own_flags(arguments, values, ("json",), "fastdpo plan --help")
    hosts = flags.get("hosts", "1")
    if not hosts.isascii() or not hosts.isdecimal() or int(hosts) < 1:
        raise ConfigError(f"--hosts: expected a whole number of at least 1, got {hosts}")
    print(
        plan(
            TrainConfig.parse(words, (*values, "json")),
            gpu=flags.get("gpu"),
            json="json" in switches,
            hosts=int(hosts),
            link=flags.get("link"),
            network=flags.get("network", NETWORK),
        )
    )


def _plan_usage() -> str:
    from .devices import GPUS, LINKS, NETWORKS

    def listed(names: Iterable[str]) -> str:
        return ("\n" + " " * 17).join(textwrap.wrap(", ".join(names), 80))

    return PLAN_USAGE.format(gpus=listed(GPUS), links=listed(LINKS), networks=listed(NETWORKS))


def _bench(arguments: Sequence[str]) -> None:
    root = Path(__file__).parent.parent
    if not (root / "bench" / "cli.py").is_file():
        raise ConfigError(
            "fastdpo bench runs from the repository: clone it, pip install -e ./kernels "
            "-e '.[test]' there, and call it again"
        )
    sys.path.insert(0, str(root))
    importlib.import_module("bench.cli").main(arguments)


def _runnable(arguments: Sequence[str]) -> TrainConfig:
    try:
        config = TrainConfig.parse(arguments)
        config.require("model_name_or_path", "dataset_name")
    except FastDPOError as error:
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            raise
        from .parallel.meeting import refused

        raise refused(error) from None
    if _is_first_process() and (config.devices in (None, 1) or "WORLD_SIZE" in os.environ):
        print(config.describe(defaults=False), flush=True)
    return config


def _print_result(result: Mapping[str, Any]) -> None:
    if _is_first_process():
        for name, value in result.items():
            print(f"{name}: {value}")


def _is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _elsewhere(module: str) -> tuple[Callable[[Sequence[str]], None], Callable[[], str]]:
    """A command that a module of its own holds, imported when it is called."""

    def run(arguments: Sequence[str]) -> None:
        importlib.import_module(module, __package__).run(arguments)

    return run, lambda: importlib.import_module(module, __package__).USAGE


def _key_usage(command: str, summary: str) -> Callable[[], str]:
    usage = KEY_USAGE.format(command=command, summary=summary)
    return lambda: f"{usage}\n{key_help(TrainConfig.key_fields())}\n"


# A command without a text has its own --help.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], Callable[[], str] | None]] = {
    "train": (_train, _key_usage("train", "train a model, and evaluate and save it")),
    "precompute": (
        _precompute,
        _key_usage("precompute", "compute and cache the reference's log-probabilities"),
    ),
    "pairs": _elsewhere(".logs.command"),
    "check": _elsewhere(".scoring.check_command"),
    "score": _elsewhere(".scoring.command"),
    "sample": _elsewhere(".generation.sample"),
    "chat": _elsewhere(".generation.chat"),
    "merge": _elsewhere(".generation.merge"),
    "rounds": _elsewhere(".rounds.command"),
    "plan": (_plan, _plan_usage),
    "report": _elsewhere(".report.command"),
    "bench": (_bench, None),
    "doctor": (_doctor, lambda: DOCTOR_USAGE),
}


if __name__ == "__main__":
    sys.exit(main())
