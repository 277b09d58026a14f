"""`fastdpo doctor`: what is installed, what the machine offers, what a run would choose and why.

It asks the functions that a run asks. Whatever is missing or fails becomes a line of the report.
"""

import platform
from collections.abc import Callable
from typing import Any

from .config import TrainConfig
from .devices import GIB, free_host_memory, total_host_memory
from .terminal import one_line
from .tried import installed, untried
from .version import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "datasets",
    "peft",
    "flash-attn",
    "liger-kernel",
    "bitsandbytes",
    "torchao",
    "trl",
)

_PATIENCE = 120
"""Seconds that a rank waits for the others."""


def report_of_ranks(config: TrainConfig) -> str | None:
    """The report of a process that torchrun started: what each rank sees comes first. None on all
    ranks but the first.

    Raises:
        ConfigError: what torchrun says does not fit the configuration.
    """
    from .parallel.survey import survey
    from .parallel.world import joined

    with joined(config.choose("doctor", ddp_timeout=_PATIENCE)) as world:
        lines = survey(world, _paths().run_device(config)) if world.size > 1 else []
    if not world.first:
        return None
    ranks = [f"Ranks, {world.size}", *(f"  {line}" for line in lines), ""] if lines else []
    return "\n".join([*ranks, report(config)])


def report(config: TrainConfig) -> str:
    """The report for a configuration, which may name a model or nothing at all."""
    sections = [("Versions", _versions), ("Machine", _machine), ("Choices", _choices)]
    if config.model_name_or_path is not None:
        sections.append(("Model", _model))
    lines: list[str] = []
    for title, section in sections:
        lines += ["", title, *(f"  {name:<14}{text}" for name, text in section(config))]
    return "\n".join(lines[1:])


def _versions(config: TrainConfig) -> list[tuple[str, str]]:
    found = [(name, installed(name) or "not installed") for name in ("python", *PACKAGES)]
    return [("fastdpo", __version__), *found, *(("", line) for line in untried())]


def _machine(config: TrainConfig) -> list[tuple[str, str]]:
    return [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("device", _told(lambda: _device_text(config))),
        ("memory", _told(_memory_text)),
    ]


def _choices(config: TrainConfig) -> list[tuple[str, str]]:
    return [
        ("precision", _told(lambda: _precision_text(config))),
        ("cpu_bf16", _told(_cpu_bf16_text)),
        ("attention", _told(lambda: _paths().attention_path(config))),
        ("head", _told(lambda: _paths().head_path(config))),
        ("activations", _told(lambda: _paths().activations_path(config))),
        ("optimizer", _told(lambda: _optimizer_text(config))),
    ]


def _model(config: TrainConfig) -> list[tuple[str, str]]:
    from .hub import reached
    from .terminal import progress_bars

    with progress_bars(config.disable_tqdm), reached(config):
        return _model_lines(config)


def _model_lines(config: TrainConfig) -> list[tuple[str, str]]:
    lines = [("model", str(config.model_name_or_path))]
    try:
        from .model.load import load_model_config

        shape = load_model_config(config)
        parameters = _count_parameters(shape, config.trust_remote_code)
    except Exception as error:
        return [*lines, ("layout", f"not known: {_reason(error)}")]
    width = 2 if config.dtype in ("bfloat16", "float16") else 4
    needed = parameters * width
    held = "of weights before load_in_4bit" if config.load_in_4bit else "of weights"
    return [
        *lines,
        ("size", f"{parameters / 1e6:,.0f} M parameters, {needed / GIB:.1f} GiB {held}"),
        ("attention", _told(lambda: _paths().attention_path(config, shape))),
        ("layout", _told(lambda: _layout_text(config, needed))),
    ]


def _told(text: Callable[[], str]) -> str:
    """What `text` says, or why it could not say it."""
    try:
        return text()
    except Exception as error:
        return f"not known: {_reason(error)}"


def _reason(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__


def _paths() -> Any:
    """The module that a run asks too; it imports torch."""
    from .model import paths

    return paths


def _device_text(config: TrainConfig) -> str:
    import torch

    if _paths().run_device(config).type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        each = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        return f"{torch.cuda.device_count()} x {each}"
    reason = "use_cpu is set" if torch.cuda.is_available() else "torch sees no GPU"
    return f"CPU with {torch.get_num_threads()} threads ({reason})"


def _memory_text() -> str:
    return f"{total_host_memory() / GIB:.1f} GiB, {free_host_memory() / GIB:.1f} GiB of it free"


def _precision_text(config: TrainConfig) -> str:
    from .model.precision import choose_precision

    dtype, reason = choose_precision(config.bf16, _paths().run_device(config))
    return f"{_dtype_name(dtype) if dtype else f'that of the weights, {config.dtype}'}: {reason}"


def _optimizer_text(config: TrainConfig) -> str:
    from .training.optimizer import optimizer_path

    return optimizer_path(config, _paths().run_device(config))


def _cpu_bf16_text() -> str:
    from .model.precision import cpu_bf16_is_faster

    faster, reason = cpu_bf16_is_faster()
    return f"{'faster' if faster else 'not faster'}: {reason}"


def _count_parameters(shape: Any, trust_remote_code: bool) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _layout_text(config: TrainConfig, needed: int) -> str:
    """The layout that a run's own start-up check chooses; it runs the model, so that has to fit."""
    from .model.adapter import adopt_adapter
    from .model.load_scorer import load_scorer
    from .model.precision import choose_precision

    free = free_host_memory()
    if needed > free / 2:
        return (
            f"not checked: the check runs the model, whose {needed / GIB:.1f} GiB of weights are "
            f"more than half of the {free / GIB:.1f} GiB of free memory"
        )
    device = _paths().run_device(config)
    autocast = choose_precision(config.bf16, device)[0]
    config = adopt_adapter(config)
    return load_scorer(config, device, autocast).layout.reason


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
