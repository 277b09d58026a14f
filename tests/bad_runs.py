"""Bad models, checkpoints, disks and environments: what `fastdpo train` has to say of each."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import CHAT, PAIR, lines
from bad_inputs import Case
from safetensors.torch import load_file, save_file

from fastdpo import files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 123\n"


def model(what: str, change: Callable[[Path], object], expected: str, *flags: str) -> Case:
    """The model directory with a change."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        change(path / "model")

    return Case(f"model: {what}", expected, ("train", "config.yaml", *flags), prepare)


def settings(**values: Any) -> Callable[[Path], object]:
    """Changes keys of `config.json`; a value of ... removes the key."""

    def change(path: Path) -> None:
        known = json.loads((path / "config.json").read_text())
        known = {name: v for name, v in (known | values).items() if v is not ...}
        (path / "config.json").write_text(json.dumps(known))

    return change


def content(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Replaces the bytes of a file, or changes them."""

    def change(path: Path) -> None:
        old = (path / name).read_bytes() if (path / name).exists() else b""
        (path / name).write_bytes(data if isinstance(data, bytes) else data(old))

    return change


def without(*names: str) -> Callable[[Path], object]:
    """Removes files."""

    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Changes the tensors of the model."""

    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def _shards(missing: str | None, index: dict[str, Any] | None = None) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        for file, kept in parts.items():
            if file != missing:
                save_file({n: tensors[n] for n in kept}, path / file, metadata={"format": "pt"})
        places = {name: file for file, kept in parts.items() for name in kept}
        found = {"metadata": {}, "weight_map": places} if index is None else index
        (path / "model.safetensors.index.json").write_text(json.dumps(found))

    return change


def _tokenizer(**values: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        file = path / "tokenizer_config.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in (known | values).items() if v is not ...}))

    return change


def _no_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    (path.parent / "rows.jsonl").write_bytes(lines(CHAT))


def _bad_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{% for m in messages %}")
    (path.parent / "rows.jsonl").write_bytes(lines(CHAT))


def _pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] = torch.nan


def _small(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings(vocab_size=100, eos_token_id=3)(path)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
MODELS = [
    Case(
        "model: missing",
        "model_name_or_path: ./no does not exist",
        ("train", "config.yaml", "--model_name_or_path", "./no"),
    ),
    Case(
        "reference: missing",
        "ref_model_name_or_path: ./no does not exist",
        ("train", "config.yaml", "--ref_model_name_or_path", "./no"),
    ),
    Case(
        "model: a file",
        "model_name_or_path: pairs.jsonl is …directory",
        ("train", "config.yaml", "--model_name_or_path", "pairs.jsonl"),
    ),
    model("an empty directory", lambda p: [f.unlink() for f in p.iterdir()], "model: no …"),
    model("no config.json", without("config.json"), "model: no model could be loaded"),
    model("config.json empty", content("config.json", b""), "model/config.json…"),
    model("config.json cut off", content("config.json", _half), "model/config.json…JSON"),
    model("config.json a list", content("config.json", b"[]"), "model/config.json…"),
    model("config.json Latin-1", content("config.json", b'{"a": "\xe9"}'), "model/config.json…"),
    model("config.json a pointer", content("config.json", POINTER), "model/config.json…Git LFS"),
    model("no model_type", settings(model_type=..., architectures=...), "model: …model_type"),
    model("unknown model_type", settings(model_type="nothing"), "model: …nothing"),
    model("an encoder", settings(model_type="vit"), "model: …"),
    model("a translator", settings(model_type="t5"), "model: …"),
    model("odd heads", settings(num_attention_heads=3), "model: …"),
    model("no heads", settings(num_attention_heads=0), "model: …"),
    model("negative size", settings(hidden_size=-4), "model: …"),
    model("size as text", settings(hidden_size="big"), "model: …"),
    model("another size", settings(hidden_size=64, head_dim=8), "model: …"),
    model("more layers", settings(num_hidden_layers=4), "model: …"),
    model("unknown activation", settings(hidden_act="swoosh"), "model: …swoosh"),
    model("unknown rope", settings(rope_parameters={"rope_type": "x"}), "model: …"),
    model("quantised", settings(quantization_config=QUANTISED), "model: …"),
    model("no weights", without("model.safetensors"), "model: …safetensors"),
    model("pickle alone", _pickle, "model: …safetensors"),
    model("weights empty", content("model.safetensors", b""), "model/model.safetensors…"),
    model("weights cut off", content("model.safetensors", _half), "model/model.safetensors…"),
    model(
        "weights a pointer", content("model.safetensors", POINTER), "model/model.safetensors…LFS"
    ),
    model(
        "weights garbage", content("model.safetensors", b"\xff" * 999), "model/model.safetensors…"
    ),
    model("weights of JSON", content("model.safetensors", b"{}"), "model/model.safetensors…"),
    model("a tensor missing", weights(lambda t: t.pop("lm_head.weight")), "model: …lm_head.weight"),
    model(
        "other names",
        weights(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)]),
        "model: …",
    ),
    model("not a number", weights(_nan), "model: its logits are not finite"),
    model("a shard missing", _shards("model-2-of-2.safetensors"), "model…model-2-of-2.safetensors"),
    model("an empty index", _shards(None, {}), "model…index.json…"),
    model("an index of nothing", _shards(None, {"weight_map": {}}), "model…index.json…"),
    model("an index elsewhere", _shards(None, {"weight_map": {"a": "../x.safetensors"}}), "model…"),
    model(
        "no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "model: no tokenizer"
    ),
    model("tokenizer.json cut off", content("tokenizer.json", _half), "model/tokenizer.json…"),
    model("tokenizer.json empty", content("tokenizer.json", b""), "model/tokenizer.json…"),
    model(
        "tokenizer.json of another kind", content("tokenizer.json", b'{"a": 1}'), "model: no token"
    ),
    model(
        "tokenizer config cut off", content("tokenizer_config.json", _half), "model/tokenizer_con"
    ),
    model("no end of text", _tokenizer(eos_token=..., pad_token=...), "…eos_token"),
    model("no template", _no_template, "…chat template", "--dataset_name=rows.jsonl"),
    model(
        "a broken template",
        _bad_template,
        "rows.jsonl, line 1…template",
        "--dataset_name=rows.jsonl",
    ),
    model("small vocabulary", _small, "pairs.jsonl, line 1: …vocabulary"),
    model(
        "no such target",
        lambda p: None,
        "lora_target_modules: …no_proj",
        "--use_peft",
        "--lora_target_modules=no_proj",
    ),
    model(
        "a broken pattern",
        lambda p: None,
        "--lora_target_modules: …pattern",
        "--use_peft",
        "--lora_target_modules=(q_proj",
    ),
    model(
        "norms as targets",
        lambda p: None,
        "lora_target_modules: …",
        "--use_peft",
        "--lora_target_modules=norm",
    ),
    model(
        "nothing to save",
        lambda p: None,
        "--lora_modules_to_save: the model has no module no_head",
        "--use_peft",
        "--lora_target_modules=q_proj",
        "--lora_modules_to_save=no_head",
    ),
]


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
    import xxhash

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
CHECKPOINTS = [
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
        "cut off", _saved("optimizer.safetensors", _half), f"{ONE}: optimizer.safetensors has"
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
        "manifest cut off", _saved("manifest.json", _half), f"{ONE}: manifest.json is missing or no"
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
        "state cut off", _saved("trainer_state.json", _half, True), f"{ONE}: trainer_state.json…"
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
        "no random state", _state(python_rng=[3, [1, 2], None]), f"{ONE}: its random state is none"
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


CHECKPOINTS.append(
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


def place(
    what: str, prepare: Callable[[Path, pytest.MonkeyPatch], object], expected: str, *flags: str
) -> Case:
    """A disk, a directory or an environment."""
    return Case(what, expected, ("train", "config.yaml", *flags), prepare)


def refuse(name: str, code: int) -> Callable[[Path, pytest.MonkeyPatch], object]:
    """From now on a function of `os` fails so."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise OSError(code, os.strerror(code))

        patch.setattr(os, name, refused)

    return prepare


def _unwritable(path: Path, patch: pytest.MonkeyPatch) -> None:
    real = os.access
    patch.setattr(os, "access", lambda p, mode, **k: "out" not in str(p) and real(p, mode, **k))


def _no_memory(path: Path, patch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    patch.setattr("fastdpo.train.run.add_adapter", fails)


def _earlier(state: bytes) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "out" / "trainer_state.json").write_bytes(state)

    return prepare


def _somebodys(path: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.copytree(path / "model", path / "mine")


def _strange_checkpoint(path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / "out" / "checkpoint-9").mkdir()
    (path / "out" / "checkpoint-9" / "model.safetensors").write_bytes(b"mine")


def _holding(path: Path, patch: pytest.MonkeyPatch) -> None:
    held = files.locked(path / "out")
    held.__enter__()
    patch.setattr(Held, "now", held)


class Held:
    """A lock that outlives the preparation."""

    now: Any = None


def env(**values: str) -> Callable[[Path, pytest.MonkeyPatch], object]:
    """Sets variables of the environment."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        for name, value in values.items():
            patch.setenv(name, value)

    return prepare


def absent(*modules: str) -> Callable[[Path, pytest.MonkeyPatch], object]:
    """As if these were not installed."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        for name in modules:
            patch.setitem(sys.modules, name, None)

    return prepare


def offline(path: Path, patch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 makes it, which is read when the library is imported."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def no_network(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the hub's address."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    patch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")


def nothing(path: Path, patch: pytest.MonkeyPatch) -> None:
    """As it is."""


DISKS = [
    place(
        "output_dir is a file",
        nothing,
        "output_dir: pairs.jsonl cannot be made",
        "--output_dir=pairs.jsonl",
    ),
    place(
        "output_dir below a file",
        nothing,
        "output_dir: pairs.jsonl/out cannot be made",
        "--output_dir=pairs.jsonl/out",
    ),
    place(
        "output_dir in /proc",
        nothing,
        "output_dir: /proc/out cannot be made",
        "--output_dir=/proc/out",
    ),
    place("output_dir is unwritable", _unwritable, "output_dir: out cannot be written to"),
    place("output_dir is held", _holding, "output_dir: another run is writing to out"),
    place(
        "output_dir holds a run",
        nothing,
        "output_dir: out holds another run; choose another",
        "--no_overwrite_output_dir",
    ),
    place(
        "output_dir holds a model",
        _somebodys,
        "output_dir: mine holds chat_template.jinja, config.json…no run of fastdpo",
        "--output_dir=mine",
    ),
    place(
        "output_dir holds the model",
        nothing,
        "output_dir: model_name_or_path model lies in",
        "--output_dir=model",
    ),
    place(
        "the model lies in output_dir",
        nothing,
        "overwrite_output_dir: model_name_or_path out lies in",
        "--model_name_or_path=out",
    ),
    place(
        "the reference lies in output_dir",
        nothing,
        "overwrite_output_dir: ref_model_name_or_path out/check",
        "--ref_model_name_or_path=out/checkpoint-1",
    ),
    place(
        "the cache lies in output_dir",
        lambda path, patch: (path / "out/cache").mkdir(),
        "overwrite_output_dir: reference_cache_dir out/cache",
        "--reference_cache_dir=out/cache",
    ),
    place(
        "a strange checkpoint",
        _strange_checkpoint,
        "output_dir: out holds checkpoint-9, which no run",
    ),
    place("the cache is a file", nothing, "pairs.jsonl…", "--reference_cache_dir=pairs.jsonl"),
    place(
        "XDG_CACHE_HOME is a file",
        lambda path, patch: patch.setenv("XDG_CACHE_HOME", str(path / "pairs.jsonl")),
        "…pairs.jsonl/fastdpo/reference…",
    ),
    place("the disk is full", refuse("fsync", errno.ENOSPC), "…the disk is full"),
    place(
        "no memory for an adapter",
        _no_memory,
        "there is not enough memory for model, adapter",
        "--use_peft",
    ),
    place(
        "the state of a run of numbers",
        _earlier(b'{"files": 5, "step": 1}'),
        "output_dir: out holds …no run of fastdpo",
    ),
    place(
        "the state of a run elsewhere",
        _earlier(b'{"files": ["/etc/hosts"], "step": 1}'),
        "output_dir: out holds …no run of fastdpo",
    ),
    place("the quota is reached", refuse("replace", errno.EDQUOT), "…the disk is full"),
    place(
        "the disk is read-only",
        refuse("mkdir", errno.EROFS),
        "output_dir: new cannot be made (Read-only",
        "--output_dir=new",
    ),
    place(
        "the disk has errors", refuse("fsync", errno.EIO), "…cannot be written (Input/output error)"
    ),
]

ENVIRONMENT = [
    place("two processes", env(WORLD_SIZE="2", RANK="0"), "WORLD_SIZE: expected 1, …got 2"),
    place("WORLD_SIZE of text", env(WORLD_SIZE="two"), "WORLD_SIZE: expected 1, …got two"),
    place("a hub model offline", offline, "…someone/model…", "--model_name_or_path=someone/model"),
    place(
        "a hub reference offline",
        offline,
        "…someone/model…",
        "--ref_model_name_or_path=someone/model",
    ),
    place("hub data offline", offline, "someone/pairs: …", "--dataset_name=someone/pairs"),
    place(
        "a hub model without network",
        no_network,
        "…someone/model…",
        "--model_name_or_path=someone/model",
    ),
    place(
        "hub data without network", no_network, "someone/pairs: …", "--dataset_name=someone/pairs"
    ),
    place(
        "no such name on any hub",
        nothing,
        "a b (no directory here, so a model of the hub): no model could be loaded",
        "--model_name_or_path=a b",
    ),
    place("wandb is missing", absent("wandb"), "report_to: wandb …", "--report_to=wandb"),
    place("trackio is missing", absent("trackio"), "report_to: trackio …", "--report_to=trackio"),
    place(
        "tensorboard is missing",
        absent("tensorboard", "torch.utils.tensorboard"),
        "report_to: tensorboard …",
        "--report_to=tensorboard",
    ),
    place(
        "bitsandbytes is missing",
        absent("bitsandbytes"),
        "optim: adamw_bnb_8bit needs bitsandbytes: pip install",
        "--optim=adamw_bnb_8bit",
    ),
    place(
        "torchao is missing",
        absent("torchao", "torchao.optim"),
        "optim: adamw_torch_8bit needs torchao: pip install",
        "--optim=adamw_torch_8bit",
    ),
    place(
        "bitsandbytes is missing for a base",
        absent("bitsandbytes"),
        "load_in_4bit needs bitsandbytes: pip install",
        "--load_in_4bit",
        "--use_peft",
    ),
]

CASES = [*MODELS, *CHECKPOINTS, *DISKS, *ENVIRONMENT]
