"""`bench.soak` calls a run flat that is, and sees what is kept at every step."""

from bench.soak import NOISE, Samples, soak

EVERY = 10


def test_a_run_keeps_nothing_of_its_steps(tmp_path):
    samples = soak(tmp_path, 160, EVERY, {})
    assert samples.leaks() == []
    assert (samples.table > 0).all() and samples.rows()[-1]["step"] == 160


def test_a_leak_shows(tmp_path, monkeypatch):
    kept, files, look = [], [], Samples.look

    def leaking(self, step, metrics):
        kept.append([step, *map(float, range(20))])
        files.append((tmp_path / "leak").open("w"))
        look(self, step, metrics)

    monkeypatch.setattr(Samples, "look", leaking)
    samples = soak(tmp_path, 80, EVERY, {})
    for file in files:
        file.close()
    assert len(kept) == 80
    assert {"blocks", "files"} <= set(samples.leaks()) <= set(NOISE)
