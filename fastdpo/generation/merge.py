"""`fastdpo merge`: an adapter added to its base's weights, as a model of its own."""

from collections.abc import Sequence
from pathlib import Path

import torch

from .. import terminal
from ..arguments import own_flags
from ..config import TrainConfig
from ..errors import ConfigError
from ..files import atomic_directory
from ..hub import reached
from ..model.load import check_model_files, load_model, load_model_config, load_tokenizer
from ..model.place import find_model
from ..model.save import save_weights
from .command import model_config, new_directory

USAGE = """\
fastdpo merge: an adapter added to its base's weights, as a model of its own

  fastdpo merge out -o merged
  fastdpo merge out -o merged --dtype bfloat16 --max_shard_size 5GB

ADAPTER is a directory or hub name of an adapter, which says what its base is. The sum is made in
float32, and checked: its logits have to be those of base and adapter.

  -o, --output DIR       a new directory for the model and its tokenizer
  --dtype TYPE           of the weights that are written: float32, float16 or bfloat16; the base's
                         own unless it is given
  --max_shard_size SIZE  of a file of weights, 5GB unless it is given
"""


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: no adapter, one that cannot be merged, or no place for the result.
    """
    values = {"output": "a directory", "max_shard_size": "a size such as 5GB"}
    words, given, _ = own_flags(arguments, values, (), "fastdpo merge --help")
    config = model_config(words, "merge", values)
    if "output" not in given:
        raise ConfigError("--output: expected a directory (fastdpo merge --help)")
    with reached(config):
        _merge(config, new_directory(given["output"]), given.get("max_shard_size", "5GB"))


def _merge(config: TrainConfig, path: Path, size: str) -> None:
    place = find_model(config)
    if place.adapter is None:
        raise ConfigError(f"{place.given}: is no adapter, there is nothing to merge")
    check_model_files(config)
    own = load_model_config(config).dtype or torch.float32
    dtype = getattr(torch, config.dtype) if "dtype" in config.origins else own
    with terminal.withheld(), terminal.progress_bars(True):
        whole = config.choose("fastdpo merge", dtype="float32", use_peft=False)
        model = load_model(whole, torch.device("cpu")).to(dtype)
        with atomic_directory(path) as folder:
            try:
                save_weights(model, folder, max_shard_size=size)
            except ValueError as error:
                raise ConfigError(f"--max_shard_size: {error}") from None
            load_tokenizer(config).save_pretrained(folder)
    name = str(dtype).removeprefix("torch.")
    print(f"{place.adapter} merged into {place.name}, {name}: {path}")
