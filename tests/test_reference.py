"""The reference cache hits when nothing that matters changed, misses when it did, and survives
interruption.
"""

import json
import logging
import threading
from functools import partial

import numpy as np
import pytest
import torch
import training
from transformers import AutoModelForCausalLM

from fastdpo import reference
from fastdpo.data.batch import make_batch
from fastdpo.data.groups import Group
from fastdpo.data.packing import Part
from fastdpo.errors import FastDPOError
from fastdpo.model.head import find_head
from fastdpo.model.layout import choose_layout
from fastdpo.model.scorer import Scorer
from fastdpo.reference import LogpStore, fill_reference
from fastdpo.training.online import OnlineReference


@pytest.fixture
def fill(tiny_model, pairs_file, tmp_path):
    return partial(training.fill, tiny_model, pairs_file, tmp_path / "out")


def test_only_what_changes_the_numbers_misses(fill, tmp_path, tiny_model, pairs_file):
    assert fill() == (0, 48)
    for harmless in (
        {"output_dir": str(tmp_path / "elsewhere")},
        {"learning_rate": 0.5, "beta": 0.9, "seed": 7, "max_steps": 9},
        {"shuffle": False, "group_prompts": False, "share_prefix": False},
        {"max_tokens_per_batch": 64, "head_workspace_mib": 3},
        {"use_peft": True, "gradient_checkpointing": True},
    ):
        assert fill(**harmless) == (48, 0), harmless
    assert fill(bf16=True) == (0, 48)
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    model.save_pretrained(other)
    assert fill(ref_model_name_or_path=str(other)) == (0, 48)
    model.config.rms_norm_eps *= 2
    model.save_pretrained(other)
    assert fill(ref_model_name_or_path=str(other)) == (0, 48)
    rows = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    rows[0]["chosen"] += " indeed"
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert fill(dataset_name=str(changed)) == (47, 1)


def test_an_interrupted_pass_goes_on_where_it_stopped(fill, monkeypatch):
    monkeypatch.setattr(reference, "SECONDS_BETWEEN_WRITES", 0.0)
    original, calls = Scorer.token_logps, []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Scorer, "token_logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(max_tokens_per_batch=100)
    done = sum(len(batch.response_lengths) for batch in calls[:2])
    monkeypatch.setattr(Scorer, "token_logps", original)
    assert 0 < done < 48
    assert fill() == (done, 48 - done)
    assert fill() == (48, 0)


def test_two_processes_share_the_work(tiny_model, tmp_path, monkeypatch, caplog):
    """The one that comes second waits, takes over what the first has added, computes the rest."""
    scorer, groups = scorer_of(tiny_model), [random_group(seed) for seed in range(4)]
    first, second = LogpStore(tmp_path), LogpStore(tmp_path)
    waiting = threading.Event()
    monkeypatch.setattr(reference.logger, "warning", lambda *words: waiting.set())
    reports = []

    def fill():
        reports.append(fill_reference(groups, scorer, second, max_tokens=1000))

    with first.filling():
        thread = threading.Thread(target=fill)
        thread.start()
        assert waiting.wait(30)
        for group in groups[:3]:
            digests = [group.digest(r) for r in range(3)]
            first.add(digests, [np.array([-float(len(r))]) for r in group.responses])
    thread.join(30)
    assert reports[0].found == 9 and reports[0].computed == 3
    assert [g.ref_logps.tolist() for g in groups[:3]] == [
        [-float(len(r)) for r in g.responses] for g in groups[:3]
    ]
    assert fill_reference(groups, scorer, first, max_tokens=1000).computed == 0


def test_a_cache_that_cannot_be_written_is_named_before_the_work(fill, tmp_path):
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(FastDPOError, match=r"reference.*cannot be written \(Not a directory\)"):
        fill()


def test_a_damaged_shard_is_computed_again(fill, tmp_path, caplog):
    assert fill() == (0, 48)
    (shard,) = (tmp_path / "reference").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert fill() == (0, 48)
    assert "unreadable" in caplog.text and shard.name in caplog.text


def scorer_of(path, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attention_dropout=0.0)
    return Scorer(model, find_head(model), choose_layout(model))


def random_group(seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(5, 300, n).astype(np.int32) for n in (6, 4, 1, 5)]
    return Group(tokens[0], tokens[1:], [(0, 1, 1.0), (2, 1, 1.0)])


def test_values_are_those_of_separate_sequences(tiny_model, tmp_path):
    scorer = scorer_of(tiny_model)
    group = random_group()
    store = LogpStore(tmp_path)
    fill_reference([group], scorer, store, max_tokens=1000)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    for r, response in enumerate(group.responses):
        ids = torch.tensor(np.concatenate([group.prompt, response]), dtype=torch.int64)[None]
        logps = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = logps[len(group.prompt) - 1 :].sum().item()
        assert group.ref_logps[r] == pytest.approx(expected, rel=1e-6)
    again = LogpStore(tmp_path).logps
    assert [again.pop(group.digest(r)) for r in range(3)] == group.ref_logps.tolist()
    assert not again


def test_a_digest_tells_prompt_from_response():
    a = Group(np.array([1, 2], np.int32), [np.array([3], np.int32)])
    b = Group(np.array([1], np.int32), [np.array([2, 3], np.int32)])
    assert a.digest(0) != b.digest(0)
    assert a.digest(0) == Group(np.array([1, 2]), [np.array([3])]).digest(0)


def test_the_online_reference_equals_the_precomputed_one(tiny_model, tmp_path):
    scorer, group = scorer_of(tiny_model), random_group()
    fill_reference([group], scorer, LogpStore(tmp_path), max_tokens=1000)
    batch = make_batch([group], (Part(0, (0, 1, 2), (0, 1)),), "shared")
    scorer.model.train()
    online = OnlineReference(scorer).response_logps(batch)
    assert scorer.model.training and not online.requires_grad
    packed = make_batch([group], (Part(0, (0, 1, 2), (0, 1)),), "packed")
    with pytest.raises(ValueError, match="a packed batch for a model whose rows are shared"):
        scorer.response_logps(packed)
    np.testing.assert_allclose(online.numpy(), group.ref_logps, rtol=1e-6)
