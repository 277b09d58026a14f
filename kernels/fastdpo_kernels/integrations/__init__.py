"""The head in other trainers: the only files that know TRL or Liger, and they import neither before
they are asked to patch it.
"""
