"""`fastdpo plan`: what a run would need, as a report."""

from ..config import TrainConfig
from ..devices import at_hand, named
from ..hub import reached
from ..model.paths import run_device
from ..terminal import progress_bars, withheld
from .planner import make_planner
from .report import as_json, as_text


def plan(config: TrainConfig, gpu: str | None = None, json: bool = False) -> str:
    """The report of `fastdpo plan` for a GPU of the table or the device at hand.

    Raises:
        FastDPOError: an unknown GPU, and whatever is wrong with configuration, model or data.
    """
    device = named(gpu) if gpu is not None else at_hand(run_device(config))
    with progress_bars(config.disable_tqdm), reached(config), withheld():
        planner = make_planner(config, device)
    return as_json(planner) if json else as_text(planner)
