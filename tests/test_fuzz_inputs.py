"""Inputs that nobody thought of: whatever the bytes, an answer or an error of one line."""

import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastdpo.config import TrainConfig
from fastdpo.config.peers import PEER_KEYS
from fastdpo.config.replaced import REPLACED_KEYS
from fastdpo.data.load import load_rows
from fastdpo.data.needs import Needs
from fastdpo.errors import ConfigError, DataError, FastDPOError
from fastdpo.model.load import load_model
from fastdpo.terminal import one_line
from fastdpo.training import checkpoint

MORE = int(os.environ.get("FASTDPO_FUZZ", "1"))
"""Multiplies the examples, for a search by hand."""

bounded = partial(
    settings,
    deadline=None,
    derandomize=MORE == 1,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

KEYS = sorted({*TrainConfig.key_fields(), *PEER_KEYS, *REPLACED_KEYS})
WORDS = (
    *("true", "no", "null", "~", "none", "1", "-1", "0.5", "1e-6", "1e309", ".nan", "-.inf"),
    *("0x10", "0o17", "1_000", "1:30", "2020-01-01", "2020-13-01", "auto", "sigmoid", "[", "{"),
    *("&a", "*a", "<<", "!!int x", "!!binary a", "!!set {a}", "|", ">", "'", '"', "%", "@", "#"),
    *("? ", ": ", "---", "...", "\t", "\x00", "\ud800", "\u2028", "é", "٣", "~root", "~nobody/x"),
    *("[a, b]", "{a: 1}", "{min_lr: 1}", '{"num_cycles": 0}', "1" * 400, "x" * 300, "linear"),
    *("sgd", "cosine", "epoch", "steps", "bfloat16", "pairs.jsonl", "train[:10%]", "all-linear"),
    *("}", "]", "-"),
)
numbers = st.integers().map(str) | st.floats().map(str)
values = st.sampled_from(WORDS) | st.text(max_size=12) | numbers


def answers(call: Any, error: type[FastDPOError]) -> Any:
    """What the call gives, or None after an error of this kind that is one short line."""
    try:
        return call()
    except error as raised:
        line = one_line(str(raised))
        assert line and "\n" not in line and len(line) < 2000
        line.encode()
        return None


@bounded(max_examples=700 * MORE)
@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS) | values, st.sampled_from([": ", ":", " "]), values),
        max_size=5,
    )
    | st.text(max_size=60)
)
def test_any_yaml_is_a_configuration_or_an_error(tmp_path, lines):
    file = tmp_path / "run.yaml"
    text = lines if isinstance(lines, str) else "".join(f"{k}{c}{v}\n" for k, c, v in lines)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    config = answers(lambda: TrainConfig.parse([str(file)]), ConfigError)
    if config is not None:
        config.describe().encode()
        assert yaml.safe_load(config.to_yaml())


@bounded(max_examples=300 * MORE)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_configuration_or_an_error(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    answers(lambda: TrainConfig.load(tmp_path / "run.yaml"), ConfigError)


flag = st.sampled_from(KEYS).map("--{}".format) | st.sampled_from(KEYS).map("--no-{}".format)


@bounded(max_examples=700 * MORE)
@given(st.lists(flag | flag.flatmap(lambda f: values.map(f"{f}={{}}".format)) | values, max_size=8))
def test_any_flags_are_a_configuration_or_an_error(arguments):
    config = answers(lambda: TrainConfig.parse(arguments), ConfigError)
    if config is not None:
        config.describe().encode()


# Files: a good one with something done to its bytes.

REPLACEMENTS = (
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
    ),
    *(b"\\", b"\\ud800", b"null", b"true", b"1e999", b"NaN", b"-0", b"9" * 30, b'{"role": "user"}'),
    *(b'"prompt"', b'"chosen"', b"[" * 50, b'[{"role": "user", "content": "a"}]', b"\xc3"),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content, cut off or with a few bytes replaced, removed or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        new = draw(st.sampled_from(REPLACEMENTS) | st.binary(max_size=8))
        content = content[:start] + new + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


ROWS = [
    {"prompt": "question é", "chosen": " a", "rejected": " b"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": None, "rejected": 3.5},
    {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0.5]},
    {"prompt": "q", "responses": ["a", "b"], "rankings": [1, 2], "logps": [-1, -2.5]},
    {"prompt": "q", "completion": " a", "label": True},
]
READINGS = [
    {},
    {"needs": Needs(("label",))},
    {"needs": Needs(("scores",))},
    {"needs": Needs(("ranks",))},
    {"needs": Needs(("label",)), "convert": "unpair"},
    {"convert": "pair"},
]


@bounded(max_examples=60 * MORE)
@given(st.data())
def test_any_json_lines_are_rows_or_an_error(tmp_path, datasets_cache, tokenizer, data):
    from fastdpo.data.tokenize import tokenize_dataset

    kept = data.draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3))
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode()
    file = tmp_path / data.draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.csv"]))
    file.write_bytes(data.draw(damaged(content)))
    skip = data.draw(st.booleans())
    rows = answers(lambda: load_rows(str(file), "train", skip_bad_rows=skip), DataError)
    if rows is not None:
        options = {"skip_bad_rows": skip} | data.draw(st.sampled_from(READINGS))
        tokenize = partial(tokenize_dataset, rows, tokenizer, max_length=64, **options)
        answers(lambda: tokenize(source=str(file)), DataError)


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """Safetensors with another length, another header, or bytes changed or missing."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 2))):
        entry = header.get(draw(st.sampled_from(names)), {})
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        entry[field] = draw(
            st.sampled_from(["F32", "I8", "BF16", "F8", "", None, 0, [], [0, 4], [4, 0], [1, 1]])
            | st.lists(st.integers(-1, 2**64), max_size=3)
        )
        if draw(st.booleans()):
            header.pop(draw(st.sampled_from(names)), None)
    text = json.dumps(header).encode()
    length = len(text) + draw(st.sampled_from([0, 0, 0, 1, -1, 8, 2**40, 2**62]))
    whole = length.to_bytes(8, "little") + text + content[8 + size :]
    return draw(damaged(whole)) if draw(st.booleans()) else whole


@pytest.fixture(scope="module")
def small_model(tiny_model, tmp_path_factory):
    """A directory whose weights may be written over."""
    path = tmp_path_factory.mktemp("fuzzed")
    for file in tiny_model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path, (path / "model.safetensors").read_bytes()


@bounded(max_examples=25 * MORE)
@given(st.data())
def test_any_weights_are_a_model_or_an_error(small_model, data):
    import torch

    path, content = small_model
    (path / "model.safetensors").write_bytes(data.draw(damaged_tensors(content)))
    config = TrainConfig(model_name_or_path=str(path), use_cpu=True)
    answers(lambda: load_model(config, torch.device("cpu")), FastDPOError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a small layer, its state, and the optimizer that goes on from it."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("saved") / "checkpoint-1"

    class Saves:
        def save_pretrained(self, folder: Path) -> None:
            save_file(layer.state_dict(), folder / "model.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint, "save_weights", lambda model, folder, _: model.save_pretrained(folder)
        )
        tokenizer = type("None_", (), {"save_pretrained": lambda self, folder: None})()
        checkpoint.save_checkpoint(
            path,
            model=Saves(),
            tokenizer=tokenizer,
            optimizer=optimizer,
            state={"step": 1, "num_tokens": 3, "pending": {}, "config": {}, "identity": {}},
        )
    assert set(load_file(path / "optimizer.safetensors"))
    return path, optimizer, checkpoint.read_state(path)


@bounded(max_examples=60 * MORE)
@given(st.data())
def test_any_tensors_of_a_checkpoint_are_restored_or_an_error(saved, data):
    path, optimizer, state = saved
    file = path / data.draw(st.sampled_from(["optimizer.safetensors", "rng.safetensors"]))
    content = file.read_bytes()
    before = random.getstate()
    try:
        file.write_bytes(data.draw(damaged_tensors(content)))
        answers(partial(checkpoint.restore, path, state, optimizer), FastDPOError)
    finally:
        file.write_bytes(content)
        random.setstate(before)


@bounded(max_examples=150 * MORE)
@given(st.data())
def test_any_files_beside_the_tensors_are_read_or_an_error(saved, data):
    path, optimizer, _ = saved
    file = path / data.draw(st.sampled_from(["trainer_state.json", "manifest.json"]))
    content = file.read_bytes()
    before = random.getstate()
    try:
        file.write_bytes(data.draw(damaged(content)))
        answers(lambda: checkpoint.read_state(path), FastDPOError)
        with pytest.MonkeyPatch.context() as patch:  # as if the manifest agreed
            patch.setattr(checkpoint, "damage", lambda path, *ranks: None)
            state = answers(lambda: checkpoint.read_state(path), FastDPOError)
        if state is not None:
            answers(partial(checkpoint.restore, path, state, optimizer), FastDPOError)
    finally:
        file.write_bytes(content)
        random.setstate(before)
