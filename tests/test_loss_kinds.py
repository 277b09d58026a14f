"""What a loss costs by what it needs: no reference where it has none, every prompt once; and losses
of a user's own, of every kind.
"""

import random

import pytest
import torch
from beside_trl import labelled, with_fastdpo
from fastdpo_kernels.losses import LOSSES, register_loss
from training import metrics, run, settings

from bench.jsonl import read_rows, write_rows
from bench.trainers.providers import run_fastdpo
from bench.workloads import written_out
from fastdpo import TrainConfig
from fastdpo.data.dataset import load_data
from fastdpo.data.packing import part_tokens
from fastdpo.data.plan import epoch_plan
from fastdpo.model import load_scorer


@pytest.fixture(scope="module")
def pairs(pairs_file, tokenizer):
    """Three rows a prompt, token for token."""
    return written_out(read_rows(pairs_file), tokenizer)


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_target_modules": ["q_proj"]}])
@pytest.mark.parametrize("loss", ["orpo", "simpo", "cpo", "cpo_hinge", "cpo_ipo", "sft"])
def test_a_loss_without_reference_costs_none(
    still_model, pairs_file, tmp_path, monkeypatch, loss, keys
):
    loaded = []
    load = load_scorer.load_model
    monkeypatch.setattr(
        load_scorer, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k)
    )
    passes = []
    score = load_scorer.Scorer.token_logps
    monkeypatch.setattr(
        load_scorer.Scorer, "token_logps", lambda *a: passes.append(a) or score(*a), raising=True
    )
    evaluates = {"eval_dataset_name": str(pairs_file), "eval_strategy": "steps", "eval_steps": 2}
    _, said = run(
        still_model,
        pairs_file,
        tmp_path / "out",
        loss_type=[loss],
        max_steps=2,
        **evaluates,
        **keys,
    )
    assert "reference: none, the loss needs none" in said
    assert len(loaded) == 1 and not passes
    assert not (tmp_path / "reference").exists()


def ids_of(row, tokenizer):
    """Tokens of the prompt, and of each response."""
    prompt = tokenizer(row["prompt"]).input_ids
    texts = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    whole = [tokenizer(row["prompt"] + text + tokenizer.eos_token).input_ids for text in texts]
    assert all(ids[: len(prompt)] == prompt for ids in whole)
    return tuple(prompt), [tuple(ids[len(prompt) :]) for ids in whole]


def shared_tokens(rows):
    """Tokens of every prompt once and every response to it once."""
    found = {}
    for prompt, responses in rows:
        found.setdefault(prompt, set()).update(responses)
    return sum(len(p) + sum(map(len, responses)) for p, responses in found.items())


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_a_prompt_is_computed_once_a_group(still_model, pairs, tokenizer, loss):
    clock = run_fastdpo(pairs, still_model, 2, 6, 0, loss_type=[loss])
    rows = [ids_of(row, tokenizer) for row in pairs]
    assert clock.tokens == [shared_tokens(rows[:6]), shared_tokens(rows[6:12])]
    unshared = run_fastdpo(pairs, still_model, 2, 6, 0, loss_type=[loss], share_prefix=False)
    assert unshared.tokens[0] > 1.5 * clock.tokens[0]


def test_mismatched_completions_share_their_prompts(still_model, pairs, tokenizer, tmp_path):
    rows = labelled(pairs)[:24]
    keys = {"loss_type": ["kto"], "shuffle": False, "per_device_train_batch_size": 8}
    config = TrainConfig.from_dict(
        settings(still_model, tmp_path / "none", tmp_path / "out", **keys)
    )
    data = load_data(config, tokenizer, None, rows)
    plan = epoch_plan(config, data.train, layout="shared", max_tokens=4096)
    ids = [ids_of(row, tokenizer) for row in rows]
    for number, step in enumerate(plan):
        batch = ids[8 * number : 8 * number + 8]
        mixed = [(p, other) for (p, _), (_, other) in zip(batch, [batch[-1], *batch], strict=False)]
        parts = [part for row in step.first for part in row]
        counted = [part_tokens(data.train[p.group], p.responses, "shared") for p in parts]
        assert sum(counted) == shared_tokens(mixed)
        alone = sum(len(prompt) + len(other) for prompt, (other,) in mixed)
        assert sum(counted) < 0.7 * alone


@pytest.fixture
def own_loss():
    """Registers losses for one test."""
    known = set(LOSSES)
    yield register_loss
    for name in set(LOSSES) - known:
        del LOSSES[name]


def comparison(pairs, *, beta):
    return torch.relu(1 - beta * pairs.margins)


def step(pairs, *, beta):
    margins = pairs.margins
    return torch.nn.functional.softplus(-beta * (margins - 0.5 * margins.mean()))


def response(responses, *, beta):
    sign = 2 * responses.given["label"] - 1
    return (-beta * sign * responses.logratios).sigmoid()


def tokens(responses, *, beta):
    each = (responses.tokens.logps - responses.tokens.ref_logps).square()
    sums = responses.tokens.sums(each, len(responses.logps))
    return beta * sums - responses.given["advantage"] * responses.logps / responses.lengths


def group(groups, *, beta):
    assert groups.members is not None
    best = (groups.given["rank"] == 0) & groups.members
    scores = (beta * groups.logratios).masked_fill(~groups.members, -torch.inf)
    return scores.logsumexp(1) - scores.masked_fill(~best, -torch.inf).logsumexp(1)


def scored_groups(pairs):
    """Of two and three responses in turns."""
    rng = random.Random(0)
    return [
        {
            "prompt": row["prompt"],
            "responses": [row["chosen"], row["rejected"], "another one"][: 2 + number % 2],
            "scores": [1.0, 0.0, rng.random()][: 2 + number % 2],
        }
        for number, row in enumerate(pairs[:12])
    ]


KINDS = {
    "comparison": (comparison, (), lambda pairs: pairs),
    "step": (step, (), lambda pairs: pairs),
    "response": (response, ("label",), labelled),
    "tokens": (tokens, ("advantage",), scored_groups),
    "group": (group, ("rank",), scored_groups),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_the_users_own(still_model, pairs, tmp_path, own_loss, kind):
    """It goes down, and is the same however rows are packed."""
    function, columns, make_rows = KINDS[kind]
    own_loss(f"my_{kind}", kind=kind, columns=columns)(function)
    data = tmp_path / "rows.jsonl"
    write_rows(data, make_rows(pairs))
    losses = []
    for name, keys in {
        "shared": {},
        "unshared": {"share_prefix": False, "max_tokens_per_batch": 1},
    }.items():
        keys |= {"loss_type": [f"my_{kind}"], "shuffle": False, "per_device_train_batch_size": 12}
        keys |= {"max_steps": 6, "learning_rate": 3e-4}
        run(still_model, data, tmp_path / name, **keys)
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    assert min(losses[0][-2:]) < losses[0][0]


def test_a_mix_with_a_loss_of_the_users_own(still_model, pairs, own_loss):
    own_loss("my_step", kind="step")(step)
    mixed = with_fastdpo(["my_step", "sft"], pairs, still_model, loss_weights=[1.0, 0.5])
    alone = with_fastdpo(["my_step"], pairs, still_model)
    assert mixed[0]["loss"] > alone[0]["loss"]
