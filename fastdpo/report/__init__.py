"""`report.html`: what a run did, for people, in one file that needs no network.

`metrics.jsonl` is what it is made from, with the configuration beside it; `report.json` holds what
only the run itself knew: lengths, samples, time, device.
"""
