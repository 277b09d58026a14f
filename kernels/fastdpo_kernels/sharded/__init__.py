"""The head sharded over the vocabulary: every rank of a group holds some rows of its weight, and
scores the tokens of all ranks against them.
"""
