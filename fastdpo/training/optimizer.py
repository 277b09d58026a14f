"""Optimizers and transformers' schedules, grouped and stepped as `transformers.Trainer` does.

AdamW is torch's, with moments as wide as the weights, or torchao's or bitsandbytes', with moments
in 8 bits (blocks of 256 share an fp32 scale) for every weight of 4096 and more elements.
"""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from ..config import TrainConfig
from ..config.optimizer import BITSANDBYTES, TORCHAO
from ..errors import ConfigError
from ..extras import need
from ..quiet import without_warnings

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def optimizer_path(config: TrainConfig, device: torch.device) -> str:
    """Which optimizer steps the weights, where and when.

    Raises:
        ConfigError: its library or its device is missing.
    """
    moments = "moments as wide as the weights"
    if config.optim == "sgd":
        moments = "no moments"
    if config.optim in (*TORCHAO, *BITSANDBYTES):
        library = "torchao.optim" if config.optim in TORCHAO else "bitsandbytes"
        need(library, f"optim: {config.optim}")
        moments = f"moments in 8 bits ({library.split('.')[0]})"
    if config.optimizer_offload:
        if device.type != "cuda":
            raise ConfigError(f"optimizer_offload: needs a GPU, the device is {device.type}")
        need("torchao.optim", "optimizer_offload")
        moments += ", with the steps on the host"
    if config.optimizer_in_backward:
        moments += ", gradients freed one by one in the backward"
    if config.stochastic_rounding:
        moments += ", weights rounded stochastically"
    return f"{config.optim}: {moments}"


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that `optim` names over the trainable parameters; norms and biases are not
    decayed.
    """
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NO_DECAY))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trainable if (name in decayed) is decay],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim in TORCHAO:
        return _torchao(groups, config, adam)
    if config.optim in BITSANDBYTES:
        return _bitsandbytes(model, groups, config, adam)
    adam["fused"] = config.optim == "adamw_torch_fused"
    if not config.optimizer_offload:
        return torch.optim.AdamW(groups, **adam)
    offload = need("torchao.optim", "optimizer_offload").CPUOffloadOptimizer
    free = config.optimizer_in_backward
    return offload(groups, torch.optim.AdamW, offload_gradients=free, **adam)


def _torchao(groups: list[dict[str, Any]], config: TrainConfig, adam: dict[str, Any]) -> Optimizer:
    """torchao's AdamW in 8 bits, which compiles its arithmetic; on a CPU it runs uncompiled."""
    kind = need("torchao.optim", f"optim: {config.optim}").AdamW8bit
    adam["bf16_stochastic_round"] = config.stochastic_rounding
    if groups[0]["params"][0].device.type != "cpu":
        return kind(groups, **adam)

    class Uncompiled(kind):  # type: ignore[misc, valid-type]
        """For machines without a C++ compiler, and weights too small to be worth the wait."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Uncompiled(groups, **adam)


def _bitsandbytes(
    model: torch.nn.Module, groups: list[dict[str, Any]], config: TrainConfig, adam: dict[str, Any]
) -> Optimizer:
    """bitsandbytes' AdamW in 8 bits; as in `transformers.Trainer`, the moments of embeddings stay
    in 32.
    """
    optim = need("bitsandbytes", f"optim: {config.optim}").optim
    paged = config.optim.startswith("paged")
    optimizer = optim.AdamW(groups, optim_bits=8, is_paged=paged, **adam)
    # The library's manager is one for all optimizers of the process and keeps ids of the dead.
    manager = object.__new__(optim.GlobalOptimManager)
    manager.initialize()
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    manager.override_config([m.weight for m in embeddings], "optim_bits", 32)
    optimizer.mng = manager
    return optimizer


def restart(scheduler: LRScheduler, step: int) -> None:
    """Set the rates to those after `step` steps; every schedule follows the step alone."""
    scheduler.last_epoch = step - 1
    # It wants to see a step of the optimizer first.
    with without_warnings(UserWarning):
        scheduler.step()


def make_scheduler(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    """The schedule that `lr_scheduler_type` names."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup(total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
