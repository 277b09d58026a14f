"""Rounds of preference training: sample from the policy, judge, train on what was judged, again.

`engines` answer, `judges` score, `pairing` makes training rows of scored answers, `watch` measures
a model on held-out prompts, and `loop` goes through the stages, each of which leaves a file that a
later start finds.
"""
