"""`fastdpo` whose second rank is killed after step 3 of torchrun's first attempt."""

import os
import signal
import sys

from fastdpo.cli import main
from fastdpo.training.loop import Trainer

take = Trainer._after_step


def taken(trainer: Trainer) -> dict[str, float]:
    found = take(trainer)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and trainer.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


if __name__ == "__main__":
    Trainer._after_step = taken  # type: ignore[method-assign]
    sys.exit(main())
