"""fastdpo: Direct Preference Optimization without padding, repeated prompts or full logits.

    from fastdpo import TrainConfig, train

    config = TrainConfig(model_name_or_path="Qwen/Qwen3-0.6B", output_dir="out")
    result = train(config, rows=[{"prompt": "1+1?", "chosen": "2", "rejected": "3"}])

Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import TrainConfig
    from .scoring.reward import RewardModel
    from .scoring.score import ScoreResult, score
    from .training.run import TrainResult, train

__all__ = [
    "RewardModel",
    "ScoreResult",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "score",
    "train",
]

_PLACES = {
    "RewardModel": ".scoring.reward",
    "ScoreResult": ".scoring.score",
    "TrainConfig": ".config",
    "TrainResult": ".training.run",
    "score": ".scoring.score",
    "train": ".training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
