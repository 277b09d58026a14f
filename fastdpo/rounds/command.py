"""`fastdpo rounds`."""

from collections.abc import Sequence

from .. import terminal
from ..config.rounds import RoundKeys, RoundsConfig
from ..config.text import key_help

USAGE = """\
fastdpo rounds: sample from the model, judge, train on the pairs, again

  fastdpo rounds config.yaml
  fastdpo rounds --model_name_or_path MODEL --dataset_name prompts.jsonl --judge score.py:score

Each round samples num_generations answers to each prompt, scores them, and trains with the keys of
fastdpo train on what the loss needs: the best answer against the worst, or all of them with their
scores. What was done stays in output_dir, and the same command goes on where the last one ended.
"""


_OWN = {n: f for n, f in RoundsConfig.key_fields().items() if n in RoundKeys.__dataclass_fields__}
USAGE += f"\n{key_help(_OWN)}\n\nAll keys of fastdpo train are taken too (fastdpo train --help).\n"


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: see `fastdpo.rounds.loop.rounds`.
    """
    config = RoundsConfig.parse(arguments)
    from .loop import rounds

    with terminal.heard():
        result = rounds(config)
    print(f"model: {result.model}")
