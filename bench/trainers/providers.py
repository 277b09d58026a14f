"""The trainers that run in this project's own interpreter: each trains rows in their order, one
call a run (others: `peers`).

All of them get the same rows, the same number of comparisons a step, AdamW with a linear schedule,
no dropout and no evaluation. A provider may raise whatever it has to; the benchmark writes that
down as its row.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .clock import Clock, NotInstalled, device
from .with_trl import REFERENCE_FREE, Rows, make_trainer

Provider = Callable[..., Clock]
PROVIDERS: dict[str, Provider] = {}
_DEFAULTS = {
    "gradient_checkpointing": False,
    "learning_rate": 1e-5,
    "bf16": False,
    "logging_steps": 1,
}


def provider(name: str) -> Callable[[Provider], Provider]:
    """Make a function available as `--providers NAME`."""

    def add(function: Provider) -> Provider:
        PROVIDERS[name] = function
        return function

    return add


def fastdpo_config(model: Path, output: str | Path, **keys: Any) -> Any:
    """The configuration of a run that takes its rows in their order and saves nothing."""
    from fastdpo import TrainConfig

    common = {
        "model_name_or_path": str(model),
        "output_dir": f"{output}/run",
        "reference_cache_dir": f"{output}/reference",
        "shuffle": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainConfig.from_dict({**common, **keys})


@provider("fastdpo")
def run_fastdpo(
    rows: Rows, model: Path, steps: int, per_step: int, batch: int, **keys: Any
) -> Clock:
    """`fastdpo.train`; `batch` is the token budget of a row, 0 the default one; `keys` are those of
    its configuration.
    """
    from fastdpo import train

    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        config = fastdpo_config(
            model,
            output,
            max_steps=steps,
            per_device_train_batch_size=per_step,
            max_tokens_per_batch=batch or None,
            **_DEFAULTS | keys,
        )
        train(config, rows=rows, on_step=lambda step, metrics: clock.stop(metrics))
        if device().type == "cuda":  # on a CPU the libraries weigh as much as the tensors
            clock.planned_mib = _planned_mib(config)
        if keys.get("profile_steps"):
            trace = Path(config.output_dir, "trace.json")
            clock.trace = json.loads(trace.read_text(encoding="utf-8"))
    return clock


def _planned_mib(config: Any) -> float:
    """The peak that `fastdpo plan` predicts for this run."""
    from fastdpo.devices import at_hand
    from fastdpo.memory.planner import make_planner

    planner = make_planner(config, at_hand(device()))
    return planner.predict(config).estimate.peak / 2**20


@provider("trl")
def run_trl(rows: Rows, model: Any, steps: int, per_step: int, batch: int, **keys: Any) -> Clock:
    """A trainer of TRL, as it is: `per_step / batch` accumulated batches a step; `keys` are
    `trainer` (dpo where it is left out), those of that trainer's configuration, and of the LoRA
    configuration, as `fastdpo` has them. `model` is a path, or a model that has been loaded and is
    trained in place.
    """
    clock, adapter, load = Clock(), _lora(keys), _loading(keys)
    keys = _DEFAULTS | {"precompute_ref_log_probs": True} | keys
    if keys.get("trainer") in REFERENCE_FREE:
        del keys["precompute_ref_log_probs"]
    trainer = make_trainer(
        model,
        rows,
        peft_config=adapter,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=per_step // batch,
        model_init_kwargs=load or None,
        **keys,
    )
    trainer.add_callback(clock.callback())
    trainer.train()
    return clock


@provider("trl-patched")
def run_trl_patched(*arguments: Any, **keys: Any) -> Clock:
    """TRL with `patch_trl()`: its trainer, our head."""
    from fastdpo_kernels import patch_trl

    patch_trl()
    try:
        return run_trl(*arguments, **keys)
    finally:
        patch_trl(undo=True)


@provider("trl-flash")
def run_trl_flash(*arguments: Any, **keys: Any) -> Clock:
    """TRL with flash-attn in place of PyTorch's attention."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise NotInstalled("flash-attn is not here, or has no GPU to run on")
    return run_trl(*arguments, **keys, attn_implementation="flash_attention_2")


@provider("trl-liger")
def run_trl_liger(*arguments: Any, **keys: Any) -> Clock:
    """TRL with Liger's kernels in the layers of the model."""
    if not torch.cuda.is_available():
        raise NotInstalled("Liger's kernels need a GPU")
    return run_trl(*arguments, **keys, use_liger_kernel=True)


def _loading(keys: dict[str, Any]) -> dict[str, Any]:
    """Take out of `keys` what says how a model is loaded, as transformers has it."""
    names = ("dtype", "attn_implementation")
    load: dict[str, Any] = {key: keys.pop(key) for key in names if key in keys}
    if keys.pop("load_in_4bit", False):
        from transformers import BitsAndBytesConfig

        load["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return load


def _lora(keys: dict[str, Any]) -> Any:
    """Take the adapter's keys out of `keys`; its configuration, None without `use_peft`."""
    lora = {key: keys.pop(key) for key in list(keys) if key.startswith("lora_")}
    if not keys.pop("use_peft", False):
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora["lora_r"],
        lora_alpha=lora["lora_alpha"],
        lora_dropout=lora["lora_dropout"],
        target_modules=lora["lora_target_modules"],
        task_type="CAUSAL_LM",
    )
