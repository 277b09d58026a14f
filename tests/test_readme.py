"""What the README, CONTRIBUTING and the pages in docs show is there and works."""

import importlib.util
import inspect
import json
import math
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastdpo_kernels
import pytest
import torch
import yaml
from fastdpo_kernels import (
    LOSSES,
    Comparisons,
    Responses,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_logprob,
    linear_loss,
)
from fastdpo_kernels.losses import Tokens
from torch.distributed.run import get_args_parser
from training import metrics, run
from transformers import AutoModelForCausalLM

from bench.jsonl import read_rows, write_rows
from fastdpo import TrainConfig, train
from fastdpo.cli import COMMANDS
from fastdpo.config.datasets import ENTRY
from fastdpo.config.declare import GROUPS
from fastdpo.config.peers import PEER_KEYS
from fastdpo.config.rounds import RoundsConfig
from fastdpo.data.columns import FIELDS
from fastdpo.data.grouping import make_groups
from fastdpo.data.groups import count_units
from fastdpo.data.layouts.registry import LAYOUTS
from fastdpo.data.load import load_rows
from fastdpo.data.needs import Needs
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.devices import GPUS, LINKS, NETWORKS
from fastdpo.rounds.watch import Watched

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
MODEL = "Qwen/Qwen3-0.6B"  # what the pages train


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """A page without its blocks of code and without what is generated."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!-- (bench|keys):.*?<!-- /\1 -->", "", text, flags=re.DOTALL)


def spans(page: str) -> list[str]:
    """What stands in the code font in a page's sentences and tables."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def explained_metrics(page: str = "docs/runs.md") -> set[str]:
    table = text_of(page).split("| metric |")[1].split("\n\n")[0]
    return set(re.findall(r"`([\w/]+)`", table))


# Every page


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "kernels/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = text_of("README.md")
    assert len(text.encode()) <= 9000
    assert all(f"]({page})" in text for page in PAGES[1:])


def is_command(words: list[str], page: str) -> bool:
    """Whether a command line can be typed: what it runs exists, and takes these arguments."""
    first, *rest = words
    if first == "make":
        targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
        return {word for word in rest if "=" not in word} <= set(targets)
    if first == "pip":
        extras = re.findall(r"\.\[(\w+)\]", " ".join(rest))
        return all(f'"{name}": ' in text_of("setup.py") for name in extras)
    if first == "python":
        if rest[0] == "-m":
            return importlib.util.find_spec(rest[1]) is not None
        return (ROOT / rest[0]).is_file()
    if first == "torchrun":
        place = rest.index("-m")
        get_args_parser().parse_args([*rest[:place], "script"])
        return is_command(rest[place + 1 :], page)
    return first == "fastdpo" and is_our_command(rest)


def is_our_command(words: list[str]) -> bool:
    command, *rest = words
    if command not in COMMANDS:
        return False
    if command == "bench":
        from bench.cli import COMMANDS as BENCH

        return not rest or rest[0].startswith("--") or rest[0] in BENCH
    known = {"--gpu": GPUS, "--link": LINKS, "--network": NETWORKS, "--hosts": "1248"}
    for name in [word for word in rest if word in known and command == "plan"]:
        place = rest.index(name)
        assert rest[place + 1] in known[name]
        del rest[place : place + 2]
    if command in OF_THEIR_OWN:
        rest = without_own_flags(command, rest)
        rest = rest[rest[:1] != [] and not rest[0].endswith(".yaml") and rest[0][0] != "-" :]
    if "--help" not in rest and command not in WITHOUT_KEYS:
        kind = RoundsConfig if command == "rounds" and rest else TrainConfig
        kind.parse([word for word in rest if word != "--json"])
    return True


WITHOUT_KEYS = ("pairs", "report")
OF_THEIR_OWN = ("pairs", "report", "check", "score", "sample", "chat", "merge")


def without_own_flags(command: str, words: list[str]) -> list[str]:
    """A command line without the flags that its help lists; what is left are keys."""
    usage = COMMANDS[command][1]()
    options = re.findall(r"^  ((?:-\w, )?--\w+.*?)(?:  |$)", usage, re.MULTILINE)
    values = {}
    for option in options:
        for part in option.split(", "):
            name, _, value = part.partition(" ")
            values[name] = bool(value)
    values["-o"] = values["-n"] = True
    left, rest = [], iter(words)
    for word in rest:
        if word not in values:
            left.append(word)
        elif values[word]:
            next(rest)
    assert command not in WITHOUT_KEYS or not [word for word in left if word[0] == "-"], left
    return left


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_typed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = blocks("docs/rounds.md" if page == "docs/rounds.md" else "README.md", "yaml")
    (tmp_path / "config.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    write_judge(page)
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line]
    lines += [span for span in spans(page) if re.match(r"(fastdpo|make|python -m) [\w-]", span)]
    for line in lines:
        assert is_command(shlex.split(line, comments=True), page), line


@pytest.mark.parametrize("page", PAGES)
def test_configurations_shown_are_valid(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = RoundsConfig if page == "docs/rounds.md" else TrainConfig
    write_judge(page)
    for block in blocks(page, "yaml"):
        config = kind.from_dict(yaml.safe_load(block))
        assert config.model_name_or_path == MODEL


def write_judge(page: str) -> None:
    """The Python of the page of rounds in the file that its configuration names."""
    if page == "docs/rounds.md":
        Path("score.py").write_text(blocks(page, "python")[0])


def known_names() -> set[str]:
    """Every name with an underscore in it that a page may use."""
    keys = RoundsConfig.key_fields()
    choices = [choice for item in keys.values() for choice in item.metadata["choices"] or ()]
    calls = (linear_logprob, linear_dpo_loss, linear_loss, linear_cross_entropy, train)
    arguments = [name for call in calls for name in inspect.signature(call).parameters]
    fields_of_rounds = Watched.__dataclass_fields__
    known = {
        *keys,
        *PEER_KEYS,
        *FIELDS,
        *fields_of_rounds,
        *LOSSES,
        *choices,
        *arguments,
        *vars(fastdpo_kernels),
    }
    known |= {name for layout in LAYOUTS.values() for name in re.findall(r"\w+", layout.columns)}
    known |= {*LAYOUTS, *ENTRY}
    for folder in ("checks", "logs", "scoring", "generation"):  # columns and findings
        for file in [*(ROOT / "fastdpo" / folder).glob("*.py"), ROOT / "fastdpo/data/notes.py"]:
            known |= set(re.findall(r"\w*[a-z]+_\w+", file.read_text(encoding="utf-8")))
    known |= {f"{name}_{kind}" for name in ("chosen", "rejected")
              for kind in ("logp", "tokens", "ref_logp", "reward")}  # fmt: skip
    known |= {f"response_{kind}" for kind in ("logps", "tokens", "ref_logps", "rewards")}
    metrics = explained_metrics() | explained_metrics("docs/losses.md")
    return (
        known | metrics | {"fastdpo_kernels", "save_to_disk", "save_pretrained", "from_pretrained"}
    )


@pytest.mark.parametrize("page", sorted({"README.md", *DOCS} - {"docs/benchmarks.md"}))
def test_names_exist(page: str) -> None:
    """Where a page speaks of keys; the flags of `fastdpo bench` are others."""
    keys, known = set(RoundsConfig.key_fields()), known_names()
    for span in spans(page):
        flags = re.findall(r"(?<!\S)--(?:no_)?(\w+)", span)
        setting = re.match(r"(\w+): \S", span)
        if not span.startswith(("fastdpo ", "make ", "python ", "torchrun ")):
            assert set(flags) | ({setting[1]} if setting else set()) <= keys | {
                name for name in PEER_KEYS if PEER_KEYS[name].read
            }, span
        if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", span):
            assert span in known, span


# Python


def without_a_hub(code: str, model: Path) -> str:
    return code.replace(MODEL, str(model)).replace("TrainConfig(", "TrainConfig(use_cpu=True, ")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_python_runs(
    page: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: dict[str, Any] = {}
    if page == "docs/scoring.md":  # where a run has left its model
        (tmp_path / "out").symlink_to(tiny_model)
    for block in blocks(page, "python"):
        exec(compile(without_a_hub(block, tiny_model), page, "exec"), names)
    if "result" in names:
        assert math.isfinite(names["result"].metrics["rewards/margins"])
        assert (tmp_path / "out" / "model.safetensors").is_file()
    if "loss" in names:
        assert torch.isfinite(names["loss"])
        assert names["weight"].grad.abs().sum() > 0


def test_the_loop_is_the_same_after_the_change(tiny_model: Path) -> None:
    """What the README takes out of a loop and what it puts in its place give the same numbers."""
    (change,) = blocks("README.md", "diff")
    before, after = (
        "\n".join(re.findall(rf"^\{sign} (.*)$", change, re.MULTILINE)) for sign in "-+"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    names = {"model": model, "input_ids": ids, "mask": torch.ones_like(ids), "labels": ids}
    dense, ours = dict(names), dict(names)
    exec(before, dense)
    exec(after, ours)
    torch.testing.assert_close(ours["logps"], dense["logps"], rtol=1e-5, atol=1e-5)
    assert len(change.splitlines()) == 5


def test_the_imports_for_other_trainers_exist() -> None:
    added = re.findall(r"^\+ (from .*)$", "\n".join(blocks("docs/head.md", "diff")), re.MULTILINE)
    names: dict[str, Any] = {}
    exec("\n".join(added), names)
    assert {"patch_trl", "LigerFusedLinearDPOLoss"} <= set(names)


def test_the_examples_of_losses_are_losses() -> None:
    code, known = "\n".join(blocks("CONTRIBUTING.md", "python")), set(LOSSES)
    names: dict[str, Any] = {**vars(fastdpo_kernels), "Tensor": torch.Tensor, "torch": torch}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    zero, one = torch.zeros(2), torch.ones(2)
    pairs = Comparisons(zero, zero, zero, zero, one, one)
    good = Responses(zero, zero, one, {"label": torch.tensor([1.0, 0.0]), "advantage": one})
    each = replace(good, tokens=Tokens(one, zero, torch.tensor([0, 1])))
    members = torch.tensor([[True, True], [True, False]])
    table = torch.zeros(2, 2)
    groups = Responses(table, table, table, {"rank": torch.tensor([[1.0, 0.0]] * 2)}, members)
    seen = {
        "my_loss": (pairs, [1, 1]),
        "above_the_mean": (pairs, [1, 1]),
        "good_or_bad": (good, [math.log(2)] * 2),
        "best_of": (groups, [math.log(2), 0]),
        "by_token": (each, [-math.tanh(1)] * 2),
    }
    try:
        assert set(LOSSES) - known == set(seen)
        for name, (argument, values) in seen.items():
            loss = LOSSES[name](argument, beta=0.1, label_smoothing=0.0)
            assert loss.tolist() == pytest.approx(values), name
    finally:
        for name in seen:
            del LOSSES[name]


# Data, keys, metrics, commands


@pytest.mark.parametrize("rows", blocks("docs/data.md", "json"))
def test_layouts_shown_are_read(rows: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows, encoding="utf-8")
    stated = json.loads(rows)
    needs = Needs(("label",)) if "label" in stated else Needs()
    loaded = load_rows(str(path), "train")
    tokens, _ = tokenize_dataset(loaded, tokenizer, max_length=64, needs=needs)
    assert tokens["logps"][:] == [stated.get("logps", [])]
    if "label" in stated:
        assert tokens["labels"][:] == [[stated["label"]]]
        return
    ranked = "scores" in stated or "rankings" in stated
    many = len(stated.get("comparisons", [0, 0] if ranked else [0]))
    assert count_units(make_groups(tokens)) == many


def test_pages_say_what_the_configuration_declares() -> None:
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    assert generate["main"](["--check"]) == 0
    shown = re.findall(r"<!-- keys:(\w+) -->", "".join(map(text_of, DOCS)))
    assert sorted(shown) == sorted([*GROUPS, *generate["LISTS"], "loss_table", "layouts"])


def test_every_metric_is_explained(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    run(tiny_model, pairs_file, tmp_path / "out", max_steps=1)
    assert set(metrics(tmp_path / "out")[0]) == explained_metrics() - {"mfu"}


def test_every_metric_of_other_losses_is_explained(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    pairs = read_rows(pairs_file)
    labelled = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    scored = [
        {"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]], "scores": [1.0, 0.0]}
        for r in pairs
    ]
    explained, found = explained_metrics() | explained_metrics("docs/losses.md"), set()
    layouts = {"kto": labelled, "bco": labelled, "orpo": pairs, "grpo": scored, "listwise": scored}
    for loss, rows in layouts.items():
        out, path = tmp_path / loss, tmp_path / f"{loss}.jsonl"
        write_rows(path, rows)
        evaluates = {"do_eval": True, "eval_dataset_name": str(path)}
        run(tiny_model, path, out, loss_type=loss, max_steps=1, **evaluates)
        found |= set().union(*metrics(out))
    held_out = {name.removeprefix("eval_") for name in found if name.startswith("eval_")}
    assert explained_metrics("docs/losses.md") <= found
    assert held_out | {name for name in found if not name.startswith("eval_")} <= explained


def test_every_command_is_explained() -> None:
    assert re.findall(r"^\| `fastdpo (\w+)`", text_of("docs/runs.md"), re.MULTILINE) == [*COMMANDS]


def test_the_demo_has_as_many_pairs() -> None:
    pairs = text_of("fastdpo/demo/train.jsonl").splitlines()
    assert f"teaches it on {len(pairs)} pairs" in text_of("README.md")


def test_every_path_of_the_tree_exists() -> None:
    tree = text_of("CONTRIBUTING.md").split("## The repository\n\n```\n")[1].split("```")[0]
    parents: list[Path] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        names = re.match(r"((?:[\w.]+/?)+(?:  [\w.]+\.(?:py|md|yaml))*)", line.strip())
        assert names is not None, line
        for name in names[1].split():
            path = Path(*parents[:depth], name)
            assert (ROOT / path).exists(), path
        parents[depth:] = [Path(names[1].split()[0])]
