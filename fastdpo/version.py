__version__ = "0.1.0"
"""Of fastdpo; `setup.py` reads it here."""
