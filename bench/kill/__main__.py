"""The command of this package."""

import argparse
import sys

from . import devices, trials

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill training runs at any moment.")
    parser.add_argument("--times", type=int, default=100, help="trials, as many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, nargs="+", help="processes to choose from")
    options = parser.parse_args()
    sys.exit(devices.run(options) if options.devices else trials.run(options))
