"""Whole trainers side by side: `python -m bench.trainers`.

The interpreters of other trainers import this package too, so nothing is imported here.
"""
