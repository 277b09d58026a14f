"""The model card that a trained model is saved with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..version import __version__

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "eval_loss", "eval_rewards/accuracies")


def model_card(config: TrainConfig, base: str, metrics: Mapping[str, Any]) -> str:
    """The text of `README.md`: the hub's metadata, what was trained on what, the last metrics.

    `base` is the directory or hub name of the model that was trained, or its class where it has
    neither. peft writes a card of its own beside an adapter; this one replaces it.
    """
    local = "/" not in base or Path(base).exists()
    name = Path(base).name if local else base
    header = ["---", "library_name: peft" if config.use_peft else "library_name: transformers"]
    header += [] if local else [f"base_model: {base}"]
    header += ["tags:", "- dpo", "- fastdpo", "---", ""]
    rows = [f"| {key} | {metrics[key]:.4f} |" for key in _SHOWN if key in metrics]
    adapter = ""
    if config.use_peft:
        kind = "DoRA" if config.use_dora else "LoRA"
        adapter = f" as a {kind} adapter (rank {config.lora_r})"
    data = f"`{Path(config.dataset_name).name}`" if config.dataset_name else "rows in memory"
    lines = [
        f"# {name}, tuned with DPO",
        "",
        f"Trained from `{name}`{adapter} with [Direct Preference Optimization]"
        "(https://arxiv.org/abs/2305.18290) "
        f"on {data}, by fastdpo {__version__}.",
        "",
        f"Loss `{', '.join(config.loss_type)}`, beta {config.beta}, learning rate "
        f"{config.learning_rate}. The complete configuration is in "
        "`training_config.yaml`, the metrics in `metrics.jsonl`.",
        "",
        "| metric | last value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join([*header, *lines])
