"""The same run by fastdpo and by TRL, on held-out pairs: `python -m bench.convergence`."""
