"""What a user can get wrong, each a `ValueError` with a message that says where and what was
expected.
"""


class FastDPOError(ValueError):
    """Base class of every error that is the input's and not the program's."""


class ConfigError(FastDPOError):
    """A configuration key or value that cannot be honoured."""


class DataError(FastDPOError):
    """A file, row or field of the data that cannot be used."""


class ModelError(FastDPOError):
    """A model or tokenizer that cannot be trained."""


class CheckpointError(FastDPOError):
    """A checkpoint that is incomplete or belongs to another run."""
