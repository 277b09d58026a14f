"""`push_to_hub` through huggingface_hub's own client, against a stand-in of the hub on this
machine: what is uploaded, when, and what becomes of a run where that fails.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_stand_in import READER, TOKEN, Hub, hub_stand_in
from training import assert_same_weights, heard, metrics, run, settings

from fastdpo import TrainConfig, train
from fastdpo.cli import main
from fastdpo.errors import ConfigError
from fastdpo.training.uploads import without_token

MODEL = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
RESUMING = {"manifest.json", "optimizer.safetensors", "rng.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Xet's store has a protocol of its own; without it large files are uploaded as LFS has it.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub_stand_in() as stand_in:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
        yield stand_in


@pytest.fixture
def keys() -> dict[str, Any]:
    return {
        "push_to_hub": True,
        "hub_token": TOKEN,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "hub_always_push": True,
    }


@pytest.fixture
def go(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Any:
    return partial(run, tiny_model, pairs_file, tmp_path / "out")


def test_at_the_end_the_model_is_there(
    hub: Hub, go: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    go(**keys, hub_strategy="end")
    assert hub.commits == [("End of training", "main")]
    assert hub.names() >= MODEL and "trainer_state.json" in hub.names()
    assert not [name for name in hub.names() if "checkpoint" in name or name in RESUMING]
    stored = hub.files["me/out", "main"]
    for name in MODEL | {"metrics.jsonl", "training_config.yaml"}:
        assert stored[name] == (tmp_path / "out" / name).read_bytes(), name
    assert any(path.startswith("/store/") for _, path in hub.requests), "no large file"


SAVED = {
    "every_save": [],
    "checkpoint": ["last-checkpoint"],
    "all_checkpoints": ["checkpoint-2", "checkpoint-4"],
}


@pytest.mark.parametrize("strategy", SAVED)
def test_checkpoints_are_uploaded_as_the_strategy_says(
    hub: Hub, go: Any, keys: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    go(**keys, hub_strategy=strategy)
    progress = [(f"Training in progress, step {step}", "main") for step in (2, 4)]
    assert hub.commits == [*progress, ("End of training", "main")]
    below = {name.split("/")[0] for name in hub.names() if "/" in name}
    assert below == set(SAVED[strategy])
    stored = hub.files["me/out", "main"]
    for folder in below:
        step = folder if folder != "last-checkpoint" else "checkpoint-4"
        names = {name.partition("/")[2] for name in hub.names() if name.startswith(f"{folder}/")}
        source = tmp_path / "out" / step
        assert RESUMING <= names == {file.name for file in source.iterdir()}
        for name in names:
            assert stored[f"{folder}/{name}"] == (source / name).read_bytes()
    assert not RESUMING & hub.names()


def test_a_run_goes_on_from_an_uploaded_checkpoint(
    hub: Hub, go: Any, keys: dict[str, Any], tmp_path: Path, tiny_model: Path, pairs_file: Path
) -> None:
    go(**keys, hub_strategy="all_checkpoints")
    source = tmp_path / "checkpoint-2"
    source.mkdir()
    for name, content in hub.files["me/out", "main"].items():
        if name.startswith("checkpoint-2/"):
            (tmp_path / name).write_bytes(content)
    plain = {"max_steps": 4, "resume_from_checkpoint": str(source)}
    run(tiny_model, pairs_file, tmp_path / "rest", **plain)
    assert_same_weights(tmp_path / "rest", tmp_path / "out")


def test_training_goes_on_while_a_checkpoint_is_uploaded(
    hub: Hub, tiny_model: Path, pairs_file: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Until the last step has been taken no upload ends; the second one is skipped, unless it must
    not be. What rotation removes meanwhile is uploaded all the same.
    """
    for always, steps in ((False, [1]), (True, [1, 2, 3])):
        out = tmp_path / f"out-{always}"
        hub.gate.clear()
        hub.commits.clear()

        def last_opens(step: int, _: Any) -> None:
            assert not hub.commits
            if step == 3:
                hub.gate.set()

        some = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "hub_always_push": always}
        found = settings(tiny_model, pairs_file, out, **keys | some)
        train(TrainConfig.from_dict(found), on_step=last_opens)
        said = [message for message, _ in hub.commits]
        assert said[:-1] == [f"Training in progress, step {step}" for step in steps]
        assert [path.name for path in out.iterdir() if "upload" in path.name] == []


def test_branch_owner_and_privacy_are_those_of_the_keys(
    hub: Hub, go: Any, keys: dict[str, Any]
) -> None:
    ours = {"hub_model_id": "team/tuned", "hub_private_repo": True, "hub_revision": "dpo"}
    _, said = go(**keys, **ours, hub_strategy="end")
    assert hub.private == {"team/tuned": True}
    assert hub.names("team/tuned", "main") == {".gitattributes"}
    assert hub.names("team/tuned", "dpo") >= MODEL
    assert hub.commits == [("End of training", "dpo")]
    assert "push_to_hub: team/tuned may be written to" in said


def test_a_repository_that_is_there_is_written_to(hub: Hub, go: Any, keys: dict[str, Any]) -> None:
    hub.files["me/out", "main"] = {"notes.md": b"mine"}
    go(**keys, hub_strategy="end")
    assert hub.files["me/out", "main"]["notes.md"] == b"mine" and hub.names() >= MODEL


@pytest.mark.parametrize(
    ("token", "there", "expected"),
    [
        (
            READER,
            True,
            "hub_token: the token may not write to me/out: give it write access at http",
        ),
        (
            READER,
            False,
            "hub_token: the token may not write to me/out: give it write access at http",
        ),
        (
            "hf_Unknown",
            False,
            "hub_token: the hub does not know the token: make one with write acc",
        ),
        (
            None,
            False,
            "push_to_hub: there is no token: hf auth login, HF_TOKEN or hub_token gives one",
        ),
    ],
)
def test_a_token_that_may_not_write_ends_the_run_before_it_begins(
    hub: Hub,
    go: Any,
    keys: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    there: bool,
    expected: str,
) -> None:
    monkeypatch.setattr("fastdpo.hub.get_token", lambda: None)
    if there:
        hub.files["me/out", "main"] = {}
    with pytest.raises(ConfigError) as caught:
        go(**keys | {"hub_token": token})
    assert str(caught.value).startswith(f"configuration: {expected}"), str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "reference").exists()


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-x"])
def test_a_name_that_no_repository_can_have(
    hub: Hub, go: Any, keys: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match="configuration: hub_model_id: Repo id must"):
        go(**keys, hub_model_id=name)


def test_a_hub_that_does_not_answer_ends_the_run_before_it_begins(
    hub: Hub, go: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY", 0, raising=False)
    with pytest.raises(ConfigError, match=r"push_to_hub: http://127\.0\.0\.1:9 cannot be reached"):
        go(**keys)


@pytest.mark.parametrize("what", ["commit", "preupload", "/store/"])
def test_what_fails_later_is_one_line_and_costs_no_file(
    hub: Hub, go: Any, keys: dict[str, Any], tmp_path: Path, what: str
) -> None:
    hub.broken = lambda method, path: 400 if what in path else None
    _, said = go(**keys)
    lines = [line for line in said if line.startswith("push_to_hub: ") and "kept in" in line]
    assert len(lines) == 3, said
    assert all(f"hf upload me/out {tmp_path / 'out'} ." in line for line in lines)
    assert not [line for line in said if "\n" in line]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert MODEL | {"checkpoint-2", "checkpoint-4", "metrics.jsonl"} <= written
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["finished"]
    assert len(metrics(tmp_path / "out")) == 4


def test_the_token_is_written_nowhere(
    hub: Hub,
    tiny_model: Path,
    pairs_file: Path,
    keys: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = settings(tiny_model, pairs_file, tmp_path / "out", **keys, report_to="tensorboard")
    words = [f"--{name}={value}" for name, value in found.items()]
    with heard() as said:
        assert main(["train", *words]) == 0
    printed = "".join(capfd.readouterr())
    assert "<HUB_TOKEN>" in printed and TOKEN not in printed + "\n".join(said)
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    for content in hub.files["me/out", "main"].values():
        assert TOKEN.encode() not in content
    config = TrainConfig.from_dict(found)
    assert TOKEN not in repr(config) + config.describe() + config.to_yaml()
    assert config.to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert TrainConfig.load(tmp_path / "out" / "training_config.yaml").hub_token is None


def test_errors_do_not_show_a_token() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({"hub_token": ["hf_abc"]})
    assert "hf_abc" not in str(caught.value)
    config = TrainConfig(hub_token="hf_abc")
    assert without_token("Bearer hf_abc is wrong", config) == "Bearer <HUB_TOKEN> is wrong"


def test_hub_keys_without_an_upload_are_named() -> None:
    config = TrainConfig.from_dict({"hub_model_id": "me/out", "hub_strategy": "end"})
    assert config.idle_settings() == [
        "hub_model_id has no effect: push_to_hub is false",
        "hub_strategy has no effect: push_to_hub is false",
    ]
