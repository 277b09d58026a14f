"""The head in other trainers: the only files that know TRL, Liger or transformers, and they import
none of them before they are asked to patch it.
"""
