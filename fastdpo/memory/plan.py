"""`fastdpo plan`: what a run would need, as a report."""

from dataclasses import replace

from ..config import TrainConfig
from ..devices import NETWORKS, at_hand, link_rate, named, network_rate
from ..hub import reached
from ..model.paths import run_device
from ..terminal import progress_bars, withheld
from .exchange import Links
from .parallel import choose_spread
from .planner import make_planner
from .report import as_json, as_text

NETWORK = "400g"
"""Of `NETWORKS`, what joins hosts unless something else is named."""
assert NETWORK in NETWORKS


def plan(
    config: TrainConfig,
    gpu: str | None = None,
    json: bool = False,
    *,
    hosts: int = 1,
    link: str | None = None,
    network: str = NETWORK,
) -> str:
    """The report of `fastdpo plan` for a GPU of the table or the device at hand.

    Args:
        config: the run; `devices` is how many there would be on each host.
        gpu: of `GPUS`.
        json: as JSON instead of text.
        hosts: how many there would be.
        link: of `LINKS`, what joins the devices of a host; the GPU's own by default.
        network: of `NETWORKS`, what joins hosts.

    Raises:
        FastDPOError: an unknown GPU, link or network, and whatever is wrong with configuration,
            model or data.
    """
    device = named(gpu) if gpu is not None else at_hand(run_device(config))
    if link is not None:
        link_rate(link)
    network_rate(network)
    local = config.devices or 1
    with progress_bars(config.disable_tqdm), reached(config), withheld():
        planner = make_planner(config, device)
        if local * hosts > 1:
            named_link = link or device.link
            links = None if named_link is None else Links.of(named_link, network)
            planner = replace(planner, links=links)
            planner = planner.over(choose_spread(planner, local * hosts, local))
    return as_json(planner) if json else as_text(planner)
