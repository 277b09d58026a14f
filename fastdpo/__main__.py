"""`python -m fastdpo`, and what torchrun starts: `torchrun --nproc_per_node 8 -m fastdpo train`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
