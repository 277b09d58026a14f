"""Which judge the configuration names."""

from pathlib import Path

from ..config.rounds import RoundsConfig
from .endpoint import Endpoint
from .judges import Implicit, Judge, NoScores, RewardModel, checked_number, exact, from_file


def load_judge(config: RoundsConfig, folder: Path) -> Judge:
    """The judge; what an endpoint says is kept in `folder`.

    Raises:
        FastDPOError: a file, a model or an endpoint that cannot be used.
    """
    name = str(config.judge)
    if name.startswith("model:"):
        return RewardModel(name.removeprefix("model:"), config)
    if name.startswith(("http://", "https://")):
        return Endpoint(config, folder)
    if name == "self":
        return Implicit(config)
    if name == "row":  # SPIN: the row's own answer is the better one, whatever the model says
        return NoScores()
    if name in ("exact", "math"):
        return {"exact": exact, "math": checked_number}[name](config.judge_answer)
    return from_file(name)
