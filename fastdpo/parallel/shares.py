"""Named tensors in safetensors files, of which each rank writes its share and reads the share it
needs: torch's distributed checkpoint in its Hugging Face format, which holds no pickle.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, one_line

SUFFIX, INDEX = ".safetensors", "model.safetensors.index.json"
_FILE_BYTES = 4 << 30
"""How much goes into one file over all ranks: each holds its part of a file once more meanwhile."""


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, of a DTensor this rank's share of it, for training to go on."""
    writer = HuggingFaceStorageWriter(".")
    return writer.stage(dict(tensors))


def write_shares(
    folder: Path, tensors: Mapping[str, Tensor], names: Iterable[str], group: dist.ProcessGroup
) -> None:
    """Write this rank's share of every DTensor, and of the plain tensors those that no lower rank
    has; `names` are those of all ranks. Each of them has to call it.

    Raises:
        OSError: on every rank where one could not write.
    """
    _save(folder, tensors, group, fqn_to_index_mapping=_files_of(names, tensors))


def write_whole(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """The same, and then, tensor by tensor on the first rank, from all shares whole tensors in
    files as transformers names those of a model; it has to `tidy_whole` afterwards.
    """
    usual = {name: tensor for name, tensor in tensors.items() if not _is_odd(tensor)}
    files = _files_of(usual, usual)
    _save(folder, usual, group, fqn_to_index_mapping=files, enable_consolidation=True)


def tidy_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Remove the shares, write what torch cannot put together, leave out the index of one file."""
    shutil.rmtree(folder / "sharded")
    index, odd = folder / INDEX, {n: t for n, t in tensors.items() if _is_odd(t)}
    found = json.loads(index.read_text(encoding="utf-8"))
    if odd:
        save_file(odd, folder / "model-rest.safetensors", metadata={"format": "pt"})
        found["weight_map"] |= dict.fromkeys(odd, "model-rest.safetensors")
        index.write_text(json.dumps(found, indent=2), encoding="utf-8")
    elif len(set(found["weight_map"].values())) == 1:
        (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
        index.unlink()


def _is_odd(tensor: Tensor) -> bool:
    """Whether torch's consolidation fails for it: buffers of some models."""
    return tensor.ndim == 0 or not tensor.is_floating_point()


def _save(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup, **options: Any
) -> None:
    try:
        dcp.save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True, **options),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=group,
        )
    except CheckpointException as error:  # on every rank, whichever it was
        raise next(iter(error.failures.values()))[0] from None


def _files_of(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file of each tensor, from 1 on."""
    files, number, filled = {}, 1, 0
    for name in names:
        size = tensors[name].nbytes if name in tensors else 0
        if filled and filled + size > _FILE_BYTES:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


def writer_of(name: str) -> int:
    """The rank that wrote a file of `write_shares`; the first one for any other."""
    share = re.match(r"shard-(\d+)-", name.rpartition("/")[2])
    return int(share[1]) - 1 if share else 0


def start_of(tensor: DTensor) -> int:
    """Where the rank's share, which is not empty and a stretch of rows, begins among the elements
    of the whole tensor.
    """
    [chunk] = tensor.__create_chunk_list__()
    return int(chunk.offsets[0]) * math.prod(tensor.shape[1:])


@torch.no_grad()
def take_share(own: Tensor, whole: Tensor) -> None:
    """Copy what this rank holds of a tensor, all of it or a stretch of rows, from the whole one."""
    if not isinstance(own, DTensor):
        own.copy_(whole)
        return
    local = own.to_local()
    if local.numel():
        [chunk] = own.__create_chunk_list__()
        local.copy_(whole.narrow(0, chunk.offsets[0], chunk.sizes[0]))


class Stored:
    """Tensors in files, whole or in the shares of however many ranks.

    Attributes:
        sizes, dtypes: of the whole tensors, by name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """The files have to be there, and no two hold the same part of a tensor.

        Raises:
            CheckpointError: one of them is not whole.
        """
        self._reader: _Reader | None = None
        self.sizes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        if not (files := list(files)):
            return
        try:
            self._reader = _Reader(files)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            names = ", ".join(map(str, files[:1]))
            raise CheckpointError(
                f"{names}: is not whole safetensors ({one_line(error)})"
            ) from error
        for name, found in self._reader.known.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            self.sizes[name], self.dtypes[name] = found.size, found.properties.dtype

    @classmethod
    def at(cls, path: Path) -> "Stored":
        """Those of a file, given without its suffix, or in a directory of that name; none where
        there is neither.
        """
        file = path.with_name(path.name + SUFFIX)
        return cls([file] if file.exists() else sorted(path.glob("*" + SUFFIX)))

    @torch.no_grad()
    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors by their names; a DTensor gets this rank's share and reads nothing else.

        Raises:
            CheckpointError: a name is missing, or of another size.
        """
        if not targets:
            return
        for name, target in targets.items():
            if self.sizes.get(name) != target.size():
                raise CheckpointError(
                    f"{name} has {list(self.sizes.get(name, ())) or 'nothing'} there, "
                    f"{list(target.size())} here"
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            here = {name: target.detach() for name, target in targets.items()}
            dcp.load(here, storage_reader=self._reader, no_dist=True)

    def whole(self, name: str) -> Tensor:
        """One tensor, on the host."""
        tensor = torch.empty(self.sizes[name], dtype=self.dtypes[name])
        self.read({name: tensor})
        return tensor


class _Listed(FileSystem):
    """A directory as if it held certain files alone."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = [str(file) for file in files]

    def ls(self, path: Any) -> list[str]:
        return self.files


class _Reader(HuggingFaceStorageReader):
    """torch's reader of certain files, which looks at their headers once."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__(str(files[0].parent))
        self.fs = _Listed(files)
        self.known = super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.known
