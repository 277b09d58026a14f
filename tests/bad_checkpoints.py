"""Bad checkpoints: what a run that is to go on from one has to say of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from bad_files import PAIR, lines
from bad_inputs import Case
from bad_models import content, half, settings
from safetensors.torch import load_file, save_file


def checkpoint(
    what: str,
    change: Callable[[Path], object],
    expected: str,
    *flags: str,
    start: str = "out/checkpoint-1",
) -> Case:
    """A finished run of two steps that goes on from a checkpoint, after a change of `out`."""
    words = ("--no_overwrite_output_dir", f"--resume_from_checkpoint={start}", "--output_dir=new")

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        change(path / "out")

    return Case(f"checkpoint: {what}", expected, ("train", "config.yaml", *words, *flags), prepare)


def _saved(name: str, data: bytes | Callable[[bytes], bytes], forge: bool = False):
    """Changes a file of checkpoint-1; `forge` makes the manifest agree with it."""

    def change(out: Path) -> None:
        folder = out / "checkpoint-1"
        content(name, data)(folder)
        if forge:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest[name] = fingerprint(folder / name)
            (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def fingerprint(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    data = file.read_bytes()
    return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def _state(**values: Any) -> Callable[[Path], object]:
    def edit(data: bytes) -> bytes:
        state = json.loads(data) | values
        return json.dumps({k: v for k, v in state.items() if v is not ...}).encode()

    return _saved("trainer_state.json", edit, forge=True)


def _all_broken(out: Path) -> None:
    for number in (1, 2):
        (out / f"checkpoint-{number}" / "rng.safetensors").unlink()


ONE = "out/checkpoint-1"
TRUE = ("--output_dir=out",)
CASES = [
    checkpoint(
        "missing", lambda out: None, "out/checkpoint-7: there is no such", start="out/checkpoint-7"
    ),
    checkpoint("a file", lambda out: None, "out/README.md: …", start="out/README.md"),
    checkpoint(
        "an empty directory",
        lambda out: (out / "x").mkdir(),
        "out/x: manifest.json is missing",
        start="out/x",
    ),
    checkpoint("the model", lambda out: None, "out: manifest.json is missing", start="out"),
    checkpoint("a number", lambda out: None, "5: there is no such checkpoint", start="5"),
    checkpoint(
        "no optimizer",
        lambda out: (out / "checkpoint-1/optimizer.safetensors").unlink(),
        f"{ONE}: optimizer.safetensors is missing",
    ),
    checkpoint(
        "no model",
        lambda out: (out / "checkpoint-1/model.safetensors").unlink(),
        f"{ONE}: model.safetensors is missing",
    ),
    checkpoint(
        "cut off", _saved("optimizer.safetensors", half), f"{ONE}: optimizer.safetensors has"
    ),
    checkpoint(
        "changed",
        _saved("model.safetensors", lambda d: d[:-1] + bytes([d[-1] ^ 1])),
        f"{ONE}: model.safetensors is not what was written",
    ),
    checkpoint(
        "no manifest",
        lambda out: (out / "checkpoint-1/manifest.json").unlink(),
        f"{ONE}: manifest.json is missing",
    ),
    checkpoint(
        "manifest cut off", _saved("manifest.json", half), f"{ONE}: manifest.json is missing or no"
    ),
    checkpoint(
        "manifest of a list", _saved("manifest.json", b"[]"), f"{ONE}: manifest.json is missing or"
    ),
    checkpoint(
        "manifest of texts",
        _saved("manifest.json", b'{"config.json": "x"}'),
        f"{ONE}: manifest.json…",
    ),
    checkpoint("manifest of nothing", _saved("manifest.json", b"{}"), f"{ONE}: …"),
    checkpoint(
        "manifest elsewhere",
        _saved("manifest.json", b'{"../../pairs.jsonl": {}}'),
        f"{ONE}: manifest.json",
    ),
    checkpoint(
        "state cut off", _saved("trainer_state.json", half, True), f"{ONE}: trainer_state.json…"
    ),
    checkpoint(
        "state of a list", _saved("trainer_state.json", b"[]", True), f"{ONE}: trainer_state.json…"
    ),
    checkpoint(
        "state of nothing", _saved("trainer_state.json", b"{}", True), f"{ONE}: trainer_state.json…"
    ),
    checkpoint("step of text", _state(step="one"), f"{ONE}: trainer_state.json…"),
    checkpoint("a negative step", _state(step=-3), f"{ONE}: trainer_state.json…"),
    checkpoint("no optimizer in the state", _state(optimizer=...), f"{ONE}: trainer_state.json…"),
    checkpoint("an empty optimizer", _state(optimizer=[]), f"{ONE}: …"),
    checkpoint(
        "no random state",
        _state(python_rng=[3, [1, 2], None]),
        f"{ONE}: its random state cannot be set",
    ),
    checkpoint(
        "optimizer garbage",
        _saved("optimizer.safetensors", b"\x00" * 99, True),
        f"{ONE}…optimizer.safetensors…",
    ),
    checkpoint(
        "random garbage", _saved("rng.safetensors", b"\x00" * 99, True), f"{ONE}…rng.safetensors…"
    ),
    checkpoint("weights garbage", _saved("model.safetensors", b"\xff" * 99, True), f"{ONE}…"),
    checkpoint(
        "adapters now",
        lambda out: None,
        f"resume_from_checkpoint: {ONE} was made with use_peft False",
        "--use_peft",
        "--lora_target_modules=q_proj",
    ),
    checkpoint(
        "adapters now, allowed",
        lambda out: None,
        f"{ONE}: holds no adapter, but use_peft is set",
        "--use_peft",
        "--lora_target_modules=q_proj",
        "--resume_with_changes",
    ),
    checkpoint(
        "another beta",
        lambda out: None,
        f"resume_from_checkpoint: {ONE} was made with beta 0.1 (now 0.2)",
        "--beta=0.2",
    ),
    checkpoint(
        "a reference that moves now",
        lambda out: None,
        f"resume_from_checkpoint: {ONE} was made with sync_ref_model False (now True)",
        "--sync_ref_model",
    ),
    checkpoint(
        "a reference that moves now, allowed",
        lambda out: None,
        f"{ONE}: holds no reference.safetensors, which a run with sync_ref_model goes on from",
        "--sync_ref_model",
        "--resume_with_changes",
    ),
    checkpoint(
        "another seed",
        lambda out: None,
        f"resume_from_checkpoint: {ONE} was made with seed 42 (now 1)",
        "--seed=1",
    ),
    checkpoint(
        "another optimizer",
        lambda out: None,
        f"resume_from_checkpoint: {ONE} was made with optim",
        "--optim=sgd",
    ),
    checkpoint(
        "another optimizer, allowed",
        lambda out: None,
        f"{ONE}: made with another optimizer",
        "--optim=sgd",
        "--resume_with_changes",
    ),
    checkpoint(
        "a directory for a file",
        lambda out: [f := out / "checkpoint-1/rng.safetensors", f.unlink(), f.mkdir()],
        f"{ONE}: rng.safetensors is missing",
    ),
    checkpoint(
        "other data",
        lambda out: (out.parent / "rows.jsonl").write_bytes(
            lines(*[PAIR | {"prompt": f"{i} "} for i in range(24)])
        ),
        f"resume_from_checkpoint: {ONE} was made with other data",
        "--dataset_name=rows.jsonl",
    ),
    checkpoint(
        "past the end",
        lambda out: None,
        "resume_from_checkpoint: out/checkpoint-2 was taken at step 2, after",
        "--max_steps=1",
        start="out/checkpoint-2",
    ),
    checkpoint(
        "an older one",
        lambda out: None,
        "resume_from_checkpoint: out holds checkpoint-2 after checkpoint-1",
        *TRUE,
    ),
    checkpoint(
        "broken ones alone",
        _all_broken,
        "resume_from_checkpoint: no checkpoint is whole: out/checkpoint-2: rng",
        "--max_steps=4",
        *TRUE,
        start="true",
    ),
    checkpoint(
        "another run's directory",
        lambda out: None,
        "output_dir: out holds another run than",
        *TRUE,
        start="elsewhere/checkpoint-1",
    ),
]


def _model_of_another_size(path: Path, patch: pytest.MonkeyPatch) -> None:
    out = path / "out" / "checkpoint-1"
    tensors = load_file(out / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings(num_hidden_layers=1)(out)
    manifest = json.loads((out / "manifest.json").read_text())
    for name in ("model.safetensors", "config.json"):
        manifest[name] = fingerprint(out / name)
    (out / "manifest.json").write_text(json.dumps(manifest))


CASES.append(
    Case(
        "checkpoint: of another model",
        f"{ONE}: holds another model",
        (
            "train",
            "config.yaml",
            "--no_overwrite_output_dir",
            f"--resume_from_checkpoint={ONE}",
            "--output_dir=new",
        ),
        _model_of_another_size,
    )
)
