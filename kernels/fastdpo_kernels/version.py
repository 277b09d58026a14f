__version__ = "0.1.0"
"""Of the kernels, and of fastdpo, which asks for the same; `kernels/setup.py` reads it here."""
