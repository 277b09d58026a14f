"""What became of raw rows, in the columns that are cached."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .ragged import ends_of

_IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features(
    {
        "prompt_ids": _IDS,
        "response_ids": datasets.List(_IDS),
        "winners": _IDS,
        "losers": _IDS,
        "weights": datasets.List(datasets.Value("float32")),
        "labels": datasets.List(datasets.Value("bool")),
        "scores": datasets.List(datasets.Value("float64")),
        "ranks": _IDS,
        "logps": datasets.List(datasets.Value("float64")),
        "digests": datasets.List(datasets.Value("int64")),
        "outcome": datasets.Value("int8"),
        "reason": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "line": datasets.Value("int64"),
        "notes": datasets.List(datasets.Value("string")),
    }
)
_NO_IDS = np.zeros(0, np.int32)
NOTHING: dict[str, Any] = {
    name: [] if isinstance(feature, datasets.List) else None for name, feature in FEATURES.items()
} | {"prompt_ids": _NO_IDS, "digests": b""}


def to_table(outputs: Sequence[Mapping[str, Any]]) -> pa.Table:
    """What became of rows as columns of `FEATURES`, the tokens without an object for each."""
    columns = {name: [output[name] for output in outputs] for name in FEATURES}
    digests = columns["digests"]
    arrays = {
        "prompt_ids": _lists(columns["prompt_ids"]),
        "response_ids": pa.ListArray.from_arrays(
            _ends(columns["response_ids"]),
            _lists([ids for responses in columns["response_ids"] for ids in responses]),
        ),
        "digests": pa.ListArray.from_arrays(
            _ends(digests) // 8, np.frombuffer(b"".join(digests), np.int64)
        ),
    }
    return pa.table(
        [
            arrays[field.name]
            if field.name in arrays
            else pa.array(columns[field.name], field.type)
            for field in FEATURES.arrow_schema
        ],
        schema=FEATURES.arrow_schema,
    )


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        _ends(arrays), np.concatenate([_NO_IDS, *arrays], dtype=np.int32)
    )


def _ends(lists: Sequence[Sized]) -> np.ndarray:
    return ends_of(np.array([len(each) for each in lists], np.int64)).astype(np.int32)
