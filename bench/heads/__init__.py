"""The output head alone, ours and its peers': `python -m bench.heads`."""
