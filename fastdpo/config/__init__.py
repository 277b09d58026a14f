"""The configuration: typed keys, read from YAML and flags, checked before anything is loaded.

The keys, their meanings and their defaults are those of TRL's `DPOConfig`, `ModelConfig` and
`ScriptArguments` wherever the meaning is the same, so a TRL user's YAML works. Nothing is ignored:
an unknown key, a key of TRL's that is not honoured and a value of the wrong type are errors that
name the file and the line. Importing this module imports neither torch nor transformers.
"""

from .train import TrainConfig

__all__ = ["TrainConfig"]
