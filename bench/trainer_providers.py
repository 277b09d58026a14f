"""The trainers that are compared: each trains rows in their order, one call a run.

All of them get the same rows, the same number of comparisons a step, AdamW with a linear schedule,
no dropout and no evaluation. A step is timed from the end of the one before to its own end, with
the device idle at both, so that loading the rows and logging are in it. A provider may raise
whatever it has to; the benchmark writes that down as its row.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .workloads import Row


class NotInstalled(Exception):
    """What this provider needs is not here."""


class Clock:
    """The duration, the metrics and the computed tokens of every optimizer step; a trace where one
    was asked for, and the peak memory that `fastdpo plan` predicts, on a GPU.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.attention = ""
        self.trace: dict[str, Any] = {}
        self.planned_mib: float | None = None
        self._last = time.perf_counter()
        self._computed = 0
        self._model: Any = None

    def start(self, model: Any) -> None:
        """The first step of this model begins now; later calls change nothing."""
        if self._model is None:
            self._model = model
            self.attention = str(model.config._attn_implementation)
            model.get_input_embeddings().register_forward_pre_hook(self._count)
            self._last = self._now()

    def stop(self) -> None:
        """A step ends now."""
        now = self._now()
        self.seconds.append(now - self._last)
        self.tokens.append(self._computed)
        self._last, self._computed = now, 0

    def _count(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._computed += inputs[0].numel()

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


Provider = Callable[..., Clock]
PROVIDERS: dict[str, Provider] = {}


def provider(name: str) -> Callable[[Provider], Provider]:
    """Make a function available as `--providers NAME`."""

    def add(function: Provider) -> Provider:
        PROVIDERS[name] = function
        return function

    return add


@provider("fastdpo")
def run_fastdpo(
    rows: list[Row], model: Path, steps: int, per_step: int, batch: int, **options: Any
) -> Clock:
    """fastdpo; `batch` is the token budget of a row, 0 the default one; `options`
    are keys of its configuration.
    """
    from fastdpo.config import TrainConfig
    from fastdpo.devices import at_hand
    from fastdpo.memory.planner import make_planner
    from fastdpo.training.retry import Retry
    from fastdpo.training.run import train

    clock, take = Clock(), Retry.take

    def timed(self: Any, step: Any) -> bool:
        clock.start(self.trainer.model)
        done = take(self, step)
        clock.stop()
        return done

    with tempfile.TemporaryDirectory() as output:
        file = Path(output) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"gradient_checkpointing": False, "learning_rate": 1e-5, "bf16": False}
        config = TrainConfig.from_dict(
            {
                "model_name_or_path": str(model),
                "dataset_name": str(file),
                "output_dir": f"{output}/run",
                "reference_cache_dir": f"{output}/reference",
                "shuffle": False,
                "max_steps": steps,
                "per_device_train_batch_size": per_step,
                "max_tokens_per_batch": batch or None,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": not torch.cuda.is_available(),
                **settings,
                **options,
            }
        )
        Retry.take = timed  # type: ignore[method-assign]
        try:
            train(config, say=lambda text: None)
        finally:
            Retry.take = take  # type: ignore[method-assign]
        lines = (Path(output) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        clock.metrics = [json.loads(line) for line in lines]
        if torch.cuda.is_available():  # on a CPU the libraries weigh as much as the tensors
            planner = make_planner(config, at_hand(torch.device("cuda")))
            clock.planned_mib = planner.predict(config).estimate.peak / 2**20
        if options.get("profile_steps"):
            trace = Path(output) / "run" / "trace.json"
            clock.trace = json.loads(trace.read_text(encoding="utf-8"))
    return clock


@provider("trl")
def run_trl(
    rows: list[Row], model: Any, steps: int, per_step: int, batch: int, **options: Any
) -> Clock:
    """TRL's `DPOTrainer` with its fused head: `per_step / batch` accumulated batches a step;
    `options` are keys of its `DPOConfig`, or of the LoRA configuration, as `fastdpo` has them.
    `model` is a path, or a model that has been loaded and is trained in place.
    """
    try:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import BitsAndBytesConfig, TrainerCallback
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise NotInstalled(str(error)) from error

    clock = Clock()

    class Timer(TrainerCallback):
        def on_train_begin(self, *arguments: Any, model: Any = None, **kwargs: Any) -> None:
            clock.start(model)

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            clock.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            if logs and "loss" in logs:
                clock.metrics.append({k: float(v) for k, v in logs.items()})

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    adapter = _lora(options)
    load = {key: options.pop(key) for key in ("dtype", "attn_implementation") if key in options}
    if options.pop("load_in_4bit", False):
        load["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "precompute_ref_log_probs": True,
            "gradient_checkpointing": False,
            "learning_rate": 1e-5,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            **options,
        }
        args = DPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=per_step // batch,
            per_device_eval_batch_size=batch,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs=load or None,
            **settings,
        )
        trainer = InOrder(
            model=str(model) if isinstance(model, Path) else model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Timer()],
            peft_config=adapter,
        )
        trainer.train()
    return clock


@provider("trl-patched")
def run_trl_patched(*arguments: Any, **options: Any) -> Clock:
    """TRL with `patch_trl()`: its trainer, our head."""
    from fastdpo_kernels import patch_trl

    patch_trl()
    try:
        return run_trl(*arguments, **options)
    finally:
        patch_trl(undo=True)


@provider("trl-flash")
def run_trl_flash(*arguments: Any, **options: Any) -> Clock:
    """TRL with flash-attn in place of PyTorch's attention."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise NotInstalled("flash-attn is not here, or has no GPU to run on")
    return run_trl(*arguments, **options, attn_implementation="flash_attention_2")


@provider("trl-liger")
def run_trl_liger(*arguments: Any, **options: Any) -> Clock:
    """TRL with Liger's kernels in the layers of the model."""
    if not torch.cuda.is_available():
        raise NotInstalled("Liger's kernels need a GPU")
    return run_trl(*arguments, **options, use_liger_kernel=True)


def _lora(options: dict[str, Any]) -> Any:
    """Take the adapter's keys out of `options`; its configuration, None without `use_peft`."""
    found = {key: options.pop(key) for key in list(options) if key.startswith("lora_")}
    if not options.pop("use_peft", False):
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=found["lora_r"],
        lora_alpha=found["lora_alpha"],
        lora_dropout=found["lora_dropout"],
        target_modules=found["lora_target_modules"],
        task_type="CAUSAL_LM",
    )
