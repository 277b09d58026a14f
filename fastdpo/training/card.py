"""The model card that a trained model is saved with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..version import __version__

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "eval_loss", "eval_rewards/accuracies")
_DPO = ("DPO", "Direct Preference Optimization", "2305.18290")
_GRPO = ("GRPO", "Group Relative Policy Optimization", "2402.03300")
_METHODS = {
    "kto": ("KTO", "Kahneman-Tversky Optimization", "2402.01306"),
    "bco": ("BCO", "Binary Classifier Optimization", "2404.04656"),
    "apo_zero_unpaired": ("APO", "Anchored Preference Optimization", "2408.06266"),
    "orpo": ("ORPO", "Odds Ratio Preference Optimization", "2403.07691"),
    "simpo": ("SimPO", "Simple Preference Optimization", "2405.14734"),
    "sppo": ("SPPO", "Self-Play Preference Optimization", "2405.00675"),
    "spin": ("SPIN", "Self-Play Fine-Tuning", "2401.01335"),
    **dict.fromkeys(
        ("cpo", "cpo_hinge", "cpo_ipo"),
        ("CPO", "Contrastive Preference Optimization", "2401.08417"),
    ),
    **dict.fromkeys(("grpo", "bnpo", "dapo", "dr_grpo"), _GRPO),
}
"""The method's short name, its name and its paper, of losses that are not variants of DPO's."""


def model_card(config: TrainConfig, base: str, metrics: Mapping[str, Any], units: str) -> str:
    """The text of `README.md`: the hub's metadata, what was trained on what, the last metrics.

    Args:
        config: of the run.
        base: the directory or hub name of the model that was trained, or its class where it has
            neither. peft writes a card of its own beside an adapter; this one replaces it.
        metrics: by TRL's names.
        units: what the data held, in words: "24 comparisons".
    """
    short, method, paper = _METHODS.get(config.loss_type[0], _DPO)
    local = "/" not in base or Path(base).exists()
    name = Path(base).name if local else base
    header = ["---", "library_name: peft" if config.use_peft else "library_name: transformers"]
    header += [] if local else [f"base_model: {base}"]
    header += ["tags:", f"- {short.lower()}", "- fastdpo", "---", ""]
    rows = [f"| {key} | {metrics[key]:.4f} |" for key in _SHOWN if key in metrics]
    adapter = ""
    if config.use_peft:
        kind = "DoRA" if config.use_dora else "LoRA"
        adapter = f" as a {kind} adapter (rank {config.lora_r})"
    sources = [config.dataset_name] if config.dataset_name else []
    sources += [str(entry["path"]) for entry in config.datasets]
    data = " and ".join(f"`{Path(source).name}`" for source in sources) or "rows in memory"
    lines = [
        f"# {name}, tuned with {short}",
        "",
        f"Trained from `{name}`{adapter} with [{method}](https://arxiv.org/abs/{paper}) "
        f"on {data} ({units}), by fastdpo {__version__}.",
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
