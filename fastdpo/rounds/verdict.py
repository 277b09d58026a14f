"""Which judge the configuration names."""

from collections.abc import Sequence
from pathlib import Path

from ..config.rounds import RoundsConfig
from ..errors import DataError
from ..model.load import load_model_config
from .endpoint import Endpoint
from .judges import Implicit, Judge, NoScores, RewardModel, exact, from_file, same_value
from .prompts import Prompts

_MODEL = "model:"


def load_judge(config: RoundsConfig, folder: Path) -> Judge:
    """The judge; what an endpoint says is kept in `folder`.

    Raises:
        FastDPOError: a file, a model or an endpoint that cannot be used.
    """
    name = str(config.judge)
    if name.startswith(_MODEL):
        return RewardModel(name.removeprefix(_MODEL), config)
    if name.startswith(("http://", "https://")):
        return Endpoint(config, folder)
    if name == "self":
        return Implicit(config)
    if name == "row":  # SPIN: the row's own answer is the better one, whatever the model says
        return NoScores()
    if name in ("exact", "math"):
        return {"exact": exact, "math": same_value}[name](config.judge_answer)
    return from_file(name)


def check_judge(config: RoundsConfig, folder: Path, prompts: Sequence[Prompts]) -> None:
    """Look at all that a judge needs, without the weights of a model.

    Raises:
        FastDPOError: something that it needs is not there.
    """
    name = str(config.judge)
    if name.startswith(_MODEL):
        RewardModel.check(name.removeprefix(_MODEL))
    elif name == "self":
        load_model_config(config, config.judge_model)
    else:
        load_judge(config, folder)
    column = config.judge_answer
    for some in prompts if name in ("exact", "math") else ():
        for index, prompt in enumerate(some.all):
            if prompt.row.get(column) is None:
                raise DataError(
                    f"{some.where(index)}: no column {column} to compare with (judge_answer)"
                )
