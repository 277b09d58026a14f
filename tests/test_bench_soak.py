"""`bench.soak` calls a run flat that is, and sees what is kept at every step."""

from bench.soak import NOISE, soak
from fastdpo.training.pending import Pending

EVERY = 10


def test_a_run_keeps_nothing_of_its_steps(tmp_path):
    samples = soak(tmp_path / "run", 160, EVERY, {})
    assert samples.leaks() == []
    assert (samples.table > 0).all() and samples.rows()[-1]["step"] == 160


def test_a_leak_shows(tmp_path, monkeypatch):
    kept, files = [], []
    took = Pending.took

    def leaking(self, seconds):
        kept.append([self._unread[-1], *map(float, range(20))])
        files.append((tmp_path / "run" / "train.jsonl").open())
        took(self, seconds)

    monkeypatch.setattr(Pending, "took", leaking)
    samples = soak(tmp_path / "run", 80, EVERY, {})
    for file in files:
        file.close()
    assert len(kept) == 80
    assert {"blocks", "files"} <= set(samples.leaks()) <= set(NOISE)
