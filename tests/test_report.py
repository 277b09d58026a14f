"""Reports of runs that were made by hand: what is read, said, drawn, compared and escaped."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from report_rounds import write_rounds
from report_runs import CHECKS, FACTS, HOSTILE, write_run

from fastdpo.cli import main
from fastdpo.config import TrainConfig
from fastdpo.data.groups import Group
from fastdpo.errors import ConfigError
from fastdpo.report import advice, charts
from fastdpo.report.command import run as run_report
from fastdpo.report.curves import Curve
from fastdpo.report.lengths import length_facts, spread
from fastdpo.report.page import comparison_page, page, write_report
from fastdpo.report.rounds import rounds_page
from fastdpo.report.runs import differing, read_run, read_runs
from fastdpo.report.text import number, seconds, visible

VOID = {"meta", "link", "input", "br", "img"}


class Document(HTMLParser):
    """The elements of a page in order, each closed where it has to be."""

    def __init__(self, html):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def tags(self, *names):
        return [(tag, attributes) for tag, attributes in self.found if tag in names]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def made(tmp_path):
    return write_run(tmp_path / "first", checks=CHECKS, beta=0.2)


def found(path, rule):
    return rule(read_run(path))


# Reading


def test_a_run_is_read_as_it_was_written(made):
    run = read_run(made)
    assert (run.name, run.step, run.total_steps, run.finished) == ("first", 60, 60, True)
    assert run.curve("loss").steps == list(range(1, 61))
    assert run.curve("eval_loss").steps == [0, 10, 20, 30, 40, 50, 60]
    assert run.last("eval_rewards/accuracies") == pytest.approx(0.8)
    assert run.last("nothing") is None
    assert run.changed()["beta"] == ("0.2", "0.1")
    assert "learning_rate" not in run.changed()


def test_damaged_lines_and_numbers_that_are_none_are_left_out(made):
    with (made / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 61, "loss": NaN, "grad_norm": 1.5, "kl": Infinity}\n')
        file.write('[1]\n{"loss": 3}\n{"step": "x"}\n\x00\xff\n{"step": 62, "lo')
    run = read_run(made)
    assert run.step == 61 and run.last("grad_norm") == 1.5
    assert run.curve("loss").steps[-1] == 60 and not run.curve("kl")
    (made / "report.json").write_text("[", encoding="utf-8")
    (made / "data_checks.json").write_text('"no"', encoding="utf-8")
    (made / "training_config.yaml").write_text("a: [", encoding="utf-8")
    (made / "trainer_state.json").unlink()
    text = Document(page(read_run(made))).text
    unread = "training_config.yaml, report.json, data_checks.json"
    assert "not finished: step 61" in text and f"cannot be read: {unread}" in text
    assert (
        "Not known: training_config.yaml cannot be read" in text and "has its default" not in text
    )


def test_a_run_that_ended_in_no_number_looks_so(made, tmp_path):
    with (made / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 61, "loss": NaN}\n{"step": 62, "loss": Infinity, "grad_norm": 1.5}\n')
    run = read_run(made)
    text = Document(page(run)).text
    assert run.lost == {"loss": 61} and run.last("loss") is None
    assert "; loss is no number since step 61" in text and "Not a number" in text
    assert "Training loss no number" in text and re.search(r" loss [\d.]+ – num_tokens", text)
    assert advice.advise(run)[0].name == "no_number"
    other = read_run(write_run(tmp_path / "second"))
    assert "; loss is no number since step 61" in Document(comparison_page([run, other])).text
    with (made / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 63, "loss": 0.5}\n')
    assert not read_run(made).lost


def test_a_configuration_that_cannot_be_read_differs_in_no_key(made, tmp_path):
    broken = write_run(tmp_path / "second")
    (broken / "training_config.yaml").write_text("a: [", encoding="utf-8")
    third = write_run(tmp_path / "third", beta=0.5)
    assert differing([read_run(made), read_run(broken)]) == {}
    found = differing([read_run(path) for path in (made, broken, third)])
    assert found == {"beta": ["0.2", "not known", "0.5"]}


def test_a_finished_run_without_metrics_has_no_steps(made):
    (made / "metrics.jsonl").write_text("", encoding="utf-8")
    (made / "report.json").unlink()
    assert "finished; no step is logged" in Document(page(read_run(made))).text


@pytest.mark.parametrize(
    "spoil",
    [
        {"samples": 3, "lengths": {"edges": [1]}},
        {"samples": [{"prompt": "text", "after": 3}, 7], "lengths": []},
        {"total_steps": "many", "seconds": None, "device": 3},
    ],
)
def test_a_report_json_of_another_form_spoils_no_page(tmp_path, spoil):
    assert "Curves" in page(read_run(write_run(tmp_path / "run", facts=spoil)))


def test_a_run_that_has_not_logged_yet_has_a_page(made):
    (made / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "No step has been logged yet" in Document(page(read_run(made, live=True))).text


def test_secrets_stay_out(made):
    with (made / "training_config.yaml").open("a", encoding="utf-8") as file:
        file.write("hub_token: hf_secret\n")
    assert "hf_secret" not in page(read_run(made))


# Curves


def test_curves_are_thinned_by_means():
    curve = Curve([(i, float(i)) for i in range(1, 2501)])
    thin = curve.thinned(1000)
    assert thin.steps[:3] == [3, 6, 9] and thin.values[:3] == [2.0, 5.0, 8.0]
    assert (thin.steps[-1], thin.values[-1]) == (2500, 2500.0)
    assert curve.thinned(2500) is curve


def test_smoothing_keeps_lines_straight_and_takes_noise_away():
    line = Curve([(i, 2.0 * i) for i in range(100)])
    assert line.smoothed().values == pytest.approx(line.values)
    ragged = Curve([(i, float(i % 2)) for i in range(100)])
    assert np.std(ragged.smoothed().values[10:-10]) < 0.15
    assert Curve([(i, 1.0) for i in range(19)]).smoothed() is None


def test_start_end_and_middle():
    curve = Curve([(i, float(i)) for i in range(100)])
    assert (curve.start(), curve.end(), curve.around(50)) == (4.5, 94.5, pytest.approx(50, abs=1))


# Advice: each pattern is seen where it is, and not in a run that learns well


@pytest.mark.parametrize("rule", [r for r in advice.RULES if r is not advice.improved])
def test_a_good_run_shows_no_pattern(made, rule):
    assert found(made, rule) is None


def test_over_fit(tmp_path):
    rises = {"eval_loss": lambda s: 0.69 - 0.3 * s + 0.5 * s * s}
    seen = found(write_run(tmp_path / "run", held_out=rises), advice.over_fit)
    assert seen.level == "warning" and "lowest at step 20" in seen.text
    both = {"loss": lambda s: 0.5 + s}
    assert found(write_run(tmp_path / "b", held_out=rises, curves=both), advice.over_fit) is None


def test_chosen_falling_on_held_out_pairs(tmp_path):
    fall = {"eval_logps/chosen": lambda s: -120 - 25 * s, "eval_logps/rejected": lambda s: -90 * s}
    seen = found(write_run(tmp_path / "run", held_out=fall), advice.chosen_falling)
    assert seen.level == "warning" and "fell by 25.0 nats" in seen.text
    assert "the rejected ones fell by 90.0, so the margin still grows" in seen.text
    slight = {"eval_logps/chosen": lambda s: -120 - 4 * s}
    seen = found(write_run(tmp_path / "slight", held_out=slight), advice.chosen_falling)
    assert seen.level == "note"


def test_chosen_falling_on_training_pairs_is_told_from_rewards(tmp_path):
    curves = {"rewards/chosen": lambda s: -2.0 * s}
    path = write_run(tmp_path / "run", curves=curves, beta=0.1)
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if "eval_" not in line]
    (path / "metrics.jsonl").write_text("\n".join(kept), encoding="utf-8")
    chosen, _, where = advice.chosen_change(read_run(path))
    assert chosen == pytest.approx(-19, abs=1.5) and where == "training pairs"
    TrainConfig(loss_type=["simpo"], beta=0.1).save(path / "training_config.yaml")
    assert advice.chosen_change(read_run(path)) is None, "without a reference a reward is no change"


def test_length_only(tmp_path):
    longer = {"lengths": {**FACTS["lengths"], "longer_chosen": 0.82}}
    same = {"eval_rewards/accuracies": lambda s: 0.5 + 0.32 * s}
    seen = found(write_run(tmp_path / "run", facts=longer, held_out=same), advice.length_only)
    assert "82% of the pairs the longer" in seen.text and "ld_alpha" in seen.tries
    shorter = {"lengths": {**FACTS["lengths"], "longer_chosen": 0.18}}
    seen = found(write_run(tmp_path / "b", facts=shorter, held_out=same), advice.length_only)
    assert "the shorter response" in seen.text
    better = {"eval_rewards/accuracies": lambda s: 0.5 + 0.45 * s}
    path = write_run(tmp_path / "c", facts=longer, held_out=better)
    assert found(path, advice.length_only) is None


def test_perfect_from_start(tmp_path):
    curves = {"rewards/accuracies": lambda s: 1.2}
    assert found(write_run(tmp_path / "run", curves=curves), advice.perfect_from_start)
    late = {"rewards/accuracies": lambda s: 0.5 if s < 0.1 else 1.2}
    assert found(write_run(tmp_path / "b", curves=late), advice.perfect_from_start) is None


def test_margins_exploding(tmp_path):
    curves = {"rewards/margins": lambda s: 30 * s * s}
    seen = found(write_run(tmp_path / "run", curves=curves), advice.margins_exploding)
    assert "halfway" in seen.text
    level = {"rewards/margins": lambda s: 12.0 if s > 0.1 else 0.0}
    assert found(write_run(tmp_path / "b", curves=level), advice.margins_exploding) is None


def test_loss_flat(tmp_path):
    flat = {"loss": lambda s: 0.6931, "rewards/accuracies": lambda s: 0.5}
    path = write_run(tmp_path / "run", curves=flat, noise=0.003, learning_rate=1e-8)
    seen = found(path, advice.loss_flat)
    assert "as good as a coin" in seen.text and "now 1e-08" in seen.tries
    early = write_run(tmp_path / "early", curves=flat, noise=0.003, facts={"total_steps": 1000})
    assert found(early, advice.loss_flat) is None


def test_improved_comes_last(tmp_path):
    rises = {"eval_loss": lambda s: 0.69 - 0.3 * s + 0.5 * s * s}
    seen = advice.advise(read_run(write_run(tmp_path / "run", held_out=rises)))
    assert [one.name for one in seen] == ["over_fit", "improved"]


def test_advice_names_keys_that_there_are(tmp_path):
    text = json.dumps([one.tries for one in _every_advice(tmp_path)])
    named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)) - {"apo_zero"}
    assert named and named <= set(TrainConfig.key_fields())
    losses = TrainConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    assert losses.loss_weights == [1.0, 0.2]
    assert [TrainConfig(loss_type=[name]) for name in ("apo_zero", "ipo", "simpo")]


def _every_advice(folder):
    longer = {"lengths": {"longer_chosen": 0.82}}
    spoiled = {"rewards/accuracies": lambda s: 1.2, "rewards/margins": lambda s: 30 * s * s}
    held_out = {"eval_logps/chosen": lambda s: -99 * s, "eval_loss": lambda s: s}
    held_out |= {"eval_rewards/accuracies": lambda s: 0.5 + 0.32 * s}
    flat = {"loss": lambda s: 0.6931, "rewards/accuracies": lambda s: 0.5}
    paths = (
        write_run(folder / "z", curves={"loss": lambda s: math.nan}),
        write_run(folder / "x", facts=longer, curves=spoiled, held_out=held_out),
        write_run(folder / "y", curves=flat, noise=0.003),
    )
    seen = [one for path in paths for one in advice.advise(read_run(path))]
    assert {one.name for one in seen} == {rule.__name__ for rule in advice.RULES}
    return seen


# Charts and pages


def test_figures_are_plotlys(made):
    run = read_run(made)
    drawn = [*charts.curves(run), *charts.curves(run, charts.COSTS), *charts.comparison([run, run])]
    drawn.append(charts.lengths(run.facts["lengths"]))
    colour = re.compile(r'"(--[\w-]+)"')
    for chart in drawn:
        text = json.dumps(chart.figure)
        go.Figure(json.loads(colour.sub('"#123456"', text)))  # raises for what plotly does not know
        style = page(run)
        assert all(f"{name}:" in style for name in colour.findall(text))


def test_charts_name_what_they_show(made):
    drawn = {chart.name: chart for chart in charts.curves(read_run(made))}
    assert list(drawn)[:5] == ["loss", "accuracy", "margin", "rewards", "logps"]
    assert "grad_norm" in drawn and "learning_rate" in drawn and "kl" not in drawn
    names = {trace["name"] for trace in drawn["logps"].figure["data"]}
    assert names == {"chosen", "chosen, held out", "rejected", "rejected, held out"}
    assert drawn["logps"].words.startswith(
        "Since the first step, log-probability rose by 4.0 nats for chosen responses and fell by "
        "5.0 nats for rejected responses (held-out pairs)."
    )
    assert "Held out: 0.6931 at step 0, 0.4204 at step 60." in drawn["loss"].words


def test_the_page_holds_what_a_reader_asks_for(made):
    write_report(made)
    html = (made / "report.html").read_text(encoding="utf-8")
    text = Document(html).text
    for part in (
        "finished: 60 steps",
        "Held-out accuracy 80% from 50% at step 0",
        "Held-out accuracy rose",
        "Why do we yawn?",
        "Mostly because we are tired; it may cool the brain.",
        "The chosen response is the longer one in 42% of the pairs.",
        "3 rows stand in the data twice",
        "row 12: Why do we yawn?",
        "7 min 11 s",
    ):
        assert part in text, part
    assert "beta</code></th><td>0.2</td><td>0.1</td>" in html
    assert 'id="follow"' not in html
    assert 'id="follow"' in page(read_run(made, live=True))


def test_the_page_is_one_document_that_names_its_parts(made):
    other = write_run(made.parent / "second", beta=0.5)
    for html in (page(read_run(made)), comparison_page(read_runs([made, other]))):
        document = Document(html)
        assert not document.open and html.startswith("<!DOCTYPE html>")
        assert document.tags("html")[0][1]["lang"] == "en" and document.tags("title")
        levels = [int(tag[1]) for tag, _ in document.tags("h1", "h2", "h3", "h4")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert all(attributes.get("scope") for _, attributes in document.tags("th"))
        drawn = [a for _, a in document.tags("div") if a.get("role") == "img"]
        assert len(drawn) > 8 and all(a["aria-label"] for a in drawn)
        ids = [a["id"] for _, a in document.found if "id" in a]
        assert len(ids) == len(set(ids))
        assert not [
            a for _, a in document.found if "src" in a or a.get("href", "data:,") != "data:,"
        ]


def test_hostile_text_stays_text(tmp_path):
    sample = {"prompt": [[HOSTILE, HOSTILE]], "before": HOSTILE, "after": "", "chosen": HOSTILE}
    finding = {"name": HOSTILE, "level": HOSTILE, "text": HOSTILE, "examples": [{"text": HOSTILE}]}
    facts = {"samples": [sample], "device": HOSTILE}
    checks = {"summary": {HOSTILE: HOSTILE}, "findings": [finding]}
    path = write_run(tmp_path / "run <b>&", facts=facts, checks=checks, run_name="</script>")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 61, "</script><b>": 1.0}) + "\n")
    write_report(path)
    (path / "compared.html").write_text(comparison_page([read_run(path), read_run(path)]), "utf-8")
    plain = page(read_run(write_run(tmp_path / "plain", checks=CHECKS)))
    for name in ("report.html", "compared.html"):
        html = (path / name).read_text(encoding="utf-8")
        document = Document(html)
        assert not document.tags("img", "b") and not document.open
        assert "\x1b" not in html and "\ud800" not in html
    html = (path / "report.html").read_text(encoding="utf-8")
    assert len(Document(html).tags("script")) == len(Document(plain).tags("script"))
    assert "\u241b[31m" in html and "{{7*7}}" in html and "(nothing)" in html


def test_text_and_numbers():
    assert visible("a\x00\x1b\x7f\x9b\ud800\uffff\n\t☃") == "a␀␛␡␡\ufffd\ufffd\n\t☃"
    assert [number(v) for v in (0.69314, 12, 1234567.8, 1e-6, -3.0, 0, None, True)] == [
        "0.6931",
        "12",
        "1,234,568",
        "1.00e-06",
        "-3",
        "0",
        "–",
        "–",
    ]
    assert [seconds(v) for v in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]


# Lengths


def test_lengths_are_counted():
    tokens = [np.arange(n, dtype=np.int32) for n in range(12)]
    groups = [
        Group(tokens[3], [tokens[5], tokens[2]], [(0, 1, 1.0)]),
        Group(tokens[4], [tokens[6], tokens[6]], [(0, 1, 1.0)]),
        Group(tokens[4], [tokens[1], tokens[11]], [(0, 1, 1.0), (1, 0, 1.0)]),
    ]
    facts = length_facts(groups, 256)
    assert facts["longer_chosen"] == (1 + 0.5 + 0 + 1) / 4
    assert {name: sum(counts) for name, counts in facts["counts"].items()} == {
        "prompt": 3,
        "chosen": 4,
        "rejected": 4,
    }
    assert facts["counts"]["prompt"][3:5] == [1, 2] and facts["longest"]["rejected"] == 11
    assert facts["medians"]["chosen"] == 5.5 and facts["max_length"] == 256
    single = length_facts([Group(tokens[3], [tokens[5]], unit="response")], None)
    assert list(single["counts"]) == ["prompt", "response"] and "longer_chosen" not in single
    assert length_facts([], None) == {}


def test_the_longest_are_in_the_last_bar():
    groups = [Group(np.zeros(n, np.int32), [np.zeros(5, np.int32)]) for n in [*[9] * 999, 10_000]]
    facts = length_facts(groups, None)
    assert sum(facts["counts"]["prompt"]) == 1000 and facts["counts"]["prompt"][-1] == 1
    assert facts["edges"][-1] < 100 and facts["longest"]["prompt"] == 10_000


def test_spread_is_even():
    assert spread(10, 3) == [0, 3, 6] and spread(2, 5) == [0, 1] and spread(0, 3) == []


# The command


def test_the_command_writes_the_page_of_a_run(made, capsys):
    assert main(["report", str(made)]) == 0
    assert capsys.readouterr().out.strip() == str(made / "report.html")
    assert "first" in Document((made / "report.html").read_text(encoding="utf-8")).text
    state = json.loads((made / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["files"] == ["metrics.jsonl", "report.html"] and state["step"] == 60


def test_the_command_compares_runs(made, capsys, tmp_path, monkeypatch):
    other = write_run(tmp_path / "second", beta=0.5, output_dir="elsewhere")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(made), str(other)]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    html = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    text = Document(html).text
    assert "2 runs" in text and "output_dir" not in text
    assert "beta</code></th><td>0.2</td><td>0.5</td>" in html
    assert "Held-out reward accuracy 0.8 0.8" in text and "What to look at: second" in text
    assert main(["report", str(made), "-o", str(tmp_path / "sub" / "a.html")]) == 0
    assert (tmp_path / "sub" / "a.html").exists() and not (made / "report.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / name / "out", steps=3) for name in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
    assert differing(read_runs(paths)) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected a run's output_dir: fastdpo report RUN"),
        (["{tmp}/none"], "there is no such directory; expected a run's output_dir"),
        (["{tmp}"], "holds no metrics.jsonl, so no run of fastdpo"),
        (["{run}", "-o"], "-o: expected a file"),
        (["{run}", "--output={tmp}"], "is a directory; expected a file"),
        (["{run}", "--dark"], "--dark: unknown option (fastdpo report --help)"),
    ],
)
def test_mistakes_are_one_line(made, tmp_path, capsys, words, said):
    words = [word.format(tmp=tmp_path, run=made) for word in words]
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_help(capsys):
    assert main(["report", "--help"]) == 0
    assert "fastdpo report RUN RUN" in capsys.readouterr().out


# Rounds


def test_the_page_of_rounds_says_what_each_round_did(tmp_path, capsys):
    out = write_rounds(tmp_path / "rounds")
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    document = Document((out / "report.html").read_text(encoding="utf-8"))
    assert document.open == []
    for said in (
        "finished: 3 rounds",
        "Held-out score 0.75 from 0 at the start",
        "Wins against the start 80% from 50% at the start",
        "Held out: 0 at round 0, 0.75 at round 3.",
        "Of all rounds: sampling 67%, training 33%.",
        "Round 2 held-out score fell",
        "2, not taken 40 0.5",
        "Start: 0",
        "Round 3: 0.75 answer 3",
        "2 ties",
    ):
        assert said in document.text, said
    assert ("a", {"href": "round-1/model/report.html"}) in document.tags("a")
    assert not [one for one in document.tags("img") if "onerror" in one[1]]
    with pytest.raises(ConfigError, match="rounds have a page of their own"):
        run_report([str(out), str(out / "round-1")])


def test_the_page_of_rounds_that_go_on(tmp_path):
    out = write_rounds(tmp_path / "rounds", 1)
    assert "running: round 2 of 3" in Document(rounds_page(out, live=True)).text
    assert "not finished: 1 of 3 rounds" in Document(rounds_page(out)).text
    (out / "rounds.jsonl").write_text("")
    assert "No round has ended yet" in Document(rounds_page(out)).text
