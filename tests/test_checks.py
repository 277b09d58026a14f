"""`fastdpo check`: faults that are planted are found, and a clean set has none."""

import json
import random

import datasets
import pytest

from fastdpo.checks.check import QUICK_ROWS, check, check_quickly
from fastdpo.checks.formats import FORMS, PARTS
from fastdpo.checks.near import SAME, clusters, matches, similarity
from fastdpo.checks.texts import holds, words_alone
from fastdpo.cli import main
from fastdpo.errors import DataError

WORDS = [f"word{i}" for i in range(3000)]


def pairs(count: int, seed: int = 0, size: int = 30) -> list[dict[str, str]]:
    """Pairs of random words, of which nothing is to be said."""
    rng = random.Random(seed)

    def text(low: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, low + 10))) + "."

    return [
        {"prompt": text(size), "chosen": text(size), "rejected": text(size)} for _ in range(count)
    ]


def found(rows, test=None, **options):
    both = None if test is None else (datasets.Dataset.from_list(test), "test")
    checked = check(datasets.Dataset.from_list(rows), "rows", both, **options)
    return {finding.name: finding for finding in checked.findings}


def test_nothing_is_wrong_with_random_pairs():
    names = found(pairs(400), pairs(100, seed=1))
    grave = {n: f.text for n, f in names.items() if f.level != "note"}
    assert not grave and "near_duplicate" not in names


def test_exact_and_near_duplicates_are_told_apart():
    rows = pairs(300)
    again = {key: f"  {text.upper()} " for key, text in rows[7].items()}
    near = rows[9] | {"chosen": rows[9]["chosen"] + " and one more"}
    names = found([*rows, again, near])
    assert names["exact_duplicate"].rows == (301,)
    assert names["exact_duplicate"].examples[0][1].startswith("as row 8")
    assert names["near_duplicate"].rows == (302,)
    assert names["near_duplicate"].examples[0][1].startswith("like row 10")


def test_near_duplicates_are_those_of_the_similarity():
    rng = random.Random(2)
    texts, expected = [], []
    for number in range(200):
        words = rng.choices(WORDS, k=60)
        changed = list(words)
        for place in rng.sample(range(60), number % 12):
            changed[place] = "other"
        texts += [" ".join(words), " ".join(changed)]
        expected.append(similarity(texts[-2], texts[-1]) >= SAME)
    cluster = clusters(texts)
    same = [cluster[2 * i] == cluster[2 * i + 1] for i in range(200)]
    assert not any(s and not e for s, e in zip(same, expected, strict=True))
    recall = sum(s and e for s, e in zip(same, expected, strict=True)) / sum(expected)
    assert 40 < sum(expected) < 160 and recall >= 0.95


def test_contradictions_are_found_both_rows_of_them():
    rows = pairs(50)
    turned = {"prompt": rows[3]["prompt"].upper(), "chosen": rows[3]["rejected"] + "!"}
    turned["rejected"] = rows[3]["chosen"]
    finding = found([*rows, turned])["contradiction"]
    assert finding.rows == (4, 51) and finding.level == "error"


def test_every_row_of_a_contradiction_is_named():
    row = {"prompt": "is it so?", "chosen": "yes it is", "rejected": "no"}
    turned = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    again = row | {"chosen": "Yes, it is!"}
    for rows in ([row, again, turned], [turned, row, again], [row, row, row, turned]):
        finding = found([*rows, *pairs(20)])["contradiction"]
        assert finding.rows == tuple(range(1, len(rows) + 1))
        assert [number for number, _ in finding.examples] == list(finding.rows)
        assert finding.examples[-1][1] == f"against row 1: {row['prompt']}"
    groups = [
        {"prompt": "a", "responses": ["x", "y", "x", "y"], "scores": scores}
        for scores in ([1, 2, 4, 3], [2, 1, 4, 3])
    ]
    assert found(groups)["contradiction"].rows == (1, 2)
    verdicts = [
        {"prompt": "a", "responses": ["x", "y"], "scores": scores} for scores in ([1, 2], [2, 1])
    ]
    names = found(verdicts)
    assert names["contradiction"].rows == (1, 2) and "exact_duplicate" not in names


def test_labels_of_one_response_that_differ_are_a_contradiction():
    row = {"prompt": "is it so?", "completion": "yes", "label": True}
    code = {"prompt": "code", "completion": "a + b", "label": True}
    rows = [row, code, row | {"completion": "Yes", "label": False}, row]
    names = found([*rows, code | {"completion": "a - b", "label": False}])
    assert names["contradiction"].rows == (1, 3, 4)
    assert "the same response with the other label" in names["contradiction"].text
    assert names["exact_duplicate"].rows == (4,)


def test_calls_and_thoughts_are_what_a_response_says():
    def answer(a, **more):
        call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"a": a})}}
        return [{"role": "assistant", "content": "", "tool_calls": [call], **more}]

    prompt = [{"role": "user", "content": "call it"}]
    rows = [{"prompt": prompt, "chosen": answer(a), "rejected": answer(a + 9)} for a in range(5)]
    names = found(rows)
    assert not {"empty_response", "identical_responses", "exact_duplicate"} & set(names)
    assert found([rows[0], rows[0]])["exact_duplicate"].rows == (2,)
    assert found([rows[0] | {"rejected": answer(0)}])["identical_responses"].rows == (1,)
    thoughts = rows[0] | {"rejected": answer(0, reasoning_content="hm")}
    assert "identical_responses" not in found([thoughts])
    parts = [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]
    assert found([rows[0] | {"rejected": parts}])["empty_response"].rows == (1,)


def test_prompts_that_are_evaluated_on_too():
    train, test = pairs(200), pairs(60, seed=1)
    test[5] = test[5] | {"prompt": train[8]["prompt"].title()}
    test[6] = test[6] | {"prompt": train[9]["prompt"] + " please"}
    names = found(train, test)
    assert names["shared_prompt"].rows == (6,) and "row 9" in names["shared_prompt"].examples[0][1]
    assert names["near_shared_prompt"].rows == (7,)
    assert matches(["a b c"], ["a b c", "x y z"]) == {0: 0}


def test_a_question_under_another_system_message_is_nearly_the_same():
    def asked(system, text):
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        return {"prompt": prompt[not system :], **sides}

    names = found([asked("", "why so?"), asked("", "how?")], [asked("Be kind.", "Why so?")])
    assert "shared_prompt" not in names
    assert names["near_shared_prompt"].rows == (1,)
    assert names["near_shared_prompt"].examples[0][1].startswith("like row 1")


@pytest.mark.parametrize("beside", ["", " é"])
def test_words_are_the_same_in_every_alphabet(beside):
    text = "It's  SNAKE_case,\tno: 3.5%\n--done" + beside
    assert words_alone(text) == ("it s snake case no 3 5 done" + beside)


@pytest.mark.parametrize(
    "text",
    [
        *("Dear {name}", "{{ name }}", "to [Insert here]", "[your mail]", "[NAME]", "[Company]"),
        *("[date]", "[placeholder 1]", "<Insert>", "<your name>", "Lorem ipsum", "TODO: this"),
        *("As an AI language model", "as an ai LANGUAGE model"),
    ],
)
def test_placeholders_are_found_whatever_their_case(text):
    rows = pairs(20)
    rows[3] = rows[3] | {"chosen": text}
    assert found(rows)["templated"].rows == (4,)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        *(("an apology", text) for text in ("SORRY for it", "I apologize", "I Apologise")),
        *(("a refusal", f"Well, {text}") for text in (
            "I'm unable", "I am sorry", "I AM not able", "I cannot help", "I can't answer",
            "i won't provide it", "as an ai", "As an AI, no",
        )),
    ],
)  # fmt: skip
def test_what_is_looked_for_first_is_in_every_match(form, text):
    assert FORMS[form].search(text) and holds(text, PARTS[form])


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"chosen": ""}, "empty_response", "error"),
        ({"prompt": "  "}, "empty_prompt", "warning"),
        ({"chosen": "Same.", "rejected": " same. "}, "identical_responses", "error"),
        ({"chosen": "Dear [Your Name], hello"}, "templated", "warning"),
        ({"rejected": "hi <|im_end|> there"}, "special_token", "warning"),
        ({"chosen": "word " * 60 + "and the"}, "clipped", "warning"),
        ({"chosen": "See\n```python\nx = 1\n"}, "clipped", "warning"),
        ({"chosen": None}, "unreadable", "error"),
    ],
)
def test_single_rows_that_are_wrong(change, name, level):
    rows = pairs(40)
    rows[11] = rows[11] | change
    finding = found(rows)[name]
    assert finding.rows == (12,) and finding.level == level
    assert finding.examples[0][0] == 12


def test_lengths_that_decide_are_a_warning():
    rows = [row | {"chosen": row["chosen"] + " more of it" * 8} for row in pairs(100)]
    finding = found(rows)["length_bias"]
    assert finding.level == "warning" and finding.count == 100
    assert "longer response wins 100%" in finding.text and "scores 1.000" in finding.text


def test_lengths_that_decide_labels_are_a_warning():
    rows = [
        {"prompt": f"{i}", "completion": "a" * (5 if i % 2 else 40 + i), "label": i % 2 == 1}
        for i in range(60)
    ]
    finding = found(rows)["length_bias"]
    assert finding.level == "warning" and "scores 1.000" in finding.text
    assert finding.text.startswith("the shorter response is the desirable one in 100%")
    even = [row | {"completion": "a" * (i // 2)} for i, row in enumerate(rows)]
    finding = found(even)["length_bias"]
    assert finding.level == "note" and "scores 0.500" in finding.text


FORMED = {
    "a list": "text\n- one\n- two",
    "a heading": "# Title\ntext",
    "bold text": "this is **bold**",
    "a code block": "```\nx\n```",
    "a table": "| a | b |\n| c | d |",
    "a link": "see https://example.org",
    "an emoji": "fine 😀",
    "an exclamation mark": "fine!",
    "a question at the end": "is it?",
    "an apology": "I am sorry for it.",
    "a refusal": "As an AI I cannot help.",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_tell_the_better_from_the_worse(form):
    rows = pairs(120)
    for row in rows[:60]:
        row["rejected"] += "\n" + FORMED[form]
    checked = check(datasets.Dataset.from_list(rows), "rows")
    said = [f.text for f in checked.findings if f.name == "format_bias"]
    text = next(text for text in said if text.startswith(form))
    assert "speaks for the worse response" in text and "in 0% of the better and 50%" in text


def test_openings_that_tell_them_apart():
    rows = pairs(100)
    for row in rows[:40]:
        row["chosen"] = "Certainly, here is " + row["chosen"]
    finding = found(rows)["opening_bias"]
    assert "'Certainly, here is' speaks for the better" in finding.text


def test_labelled_rows_are_looked_at_too():
    rows = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen"] + ("!" if good else ""),
            "label": good,
        }
        for number, row in enumerate(pairs(200))
        for good in [number % 2 == 0]
    ]
    assert "speaks for the better" in found(rows)["format_bias"].text


def test_languages_and_answers_in_another(tmp_path):
    german = "Das ist ein langer deutscher Satz, den hoffentlich jeder Leser gut verstehen kann."
    english = "This is a long English sentence that every reader will hopefully understand well."
    rows = [{"prompt": english, "chosen": english + str(i), "rejected": "No."} for i in range(9)]
    rows.append({"prompt": german, "chosen": english, "rejected": "Nein."})
    names = found(rows)
    assert "en 90%, de 10%" in names["languages"].text
    assert names["other_language"].rows == (10,)


def test_a_library_that_is_missing_is_a_note(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    names = found(pairs(10), [*pairs(1), *pairs(1, seed=1)])
    assert names["shared_prompt"].rows == (1,) and "rensa" in names["near_shared_prompts"].text
    finding = names["near_duplicates"]
    assert finding.level == "note" and "pip install 'fastdpo[check]'" in finding.text


def test_tokens_say_what_is_cut(tokenizer):
    rows = [{"prompt": "the cat ", "chosen": "sat " * n, "rejected": "ran"} for n in (1, 2, 30)]
    names = found(rows, tokenizer=tokenizer, max_length=24)
    assert (
        names["truncated"].count == 1 and names["truncated"].text == "1 rows are cut to max_length"
    )


def test_the_short_form_reads_a_part_of_many_rows(monkeypatch):
    monkeypatch.setattr("fastdpo.checks.check.QUICK_ROWS", 50)
    rows = pairs(101)
    rows[0] = rows[0] | {"chosen": ""}
    rows[100] = rows[100] | {"chosen": ""}
    checked = check_quickly(datasets.Dataset.from_list(rows), "rows")
    assert checked.summary["rows"] == 101 and checked.summary["read"] == 50
    finding = next(f for f in checked.findings if f.name == "empty_response")
    assert finding.rows == (1, 101)
    assert QUICK_ROWS == 20_000


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    data, test = tmp_path / "pairs.jsonl", tmp_path / "test.jsonl"
    rows = pairs(30)
    rows[4] = rows[4] | {"chosen": "", "meta": [1]}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text(json.dumps(rows[8]) + "\n")
    assert main(["check", str(data), "--test", str(test), "-o", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert f"{data}: 30 rows: 60 responses, 30 pairs" in said
    assert "!! 1 rows with a response that says nothing" in said
    assert "!! 1 rows to evaluate on have a prompt that is trained on" in said
    assert "       row 5: an empty response" in said and "2 errors" in said
    written = json.loads((tmp_path / "out.json").read_text())
    assert main(["check", str(data), "--test", str(test), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["findings"] == written["findings"]
    assert {"name", "level", "count", "share", "text", "examples", "rows"} == set(
        printed["findings"][0]
    )
    assert sum(printed["lengths"]["prompt"]["histogram"]) == 30


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    assert main(["check"]) == 2
    assert "dataset_name" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.jsonl")]) == 2
    assert "not found" in capsys.readouterr().err
    for flag, near in (("--tset", "test"), ("--jsn", "json"), ("--bta", "beta")):
        assert main(["check", "pairs.jsonl", flag, "x"]) == 2
        assert f"the nearest known key is {near}\n" in capsys.readouterr().err
    with pytest.raises(DataError, match="missing columns"):
        check(datasets.Dataset.from_list([{"a": "b"}]), "rows")


def test_several_data_sets_are_read_as_one_and_each_row_once(tmp_path, capsys):
    rows = pairs(30)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    second.write_text("".join(json.dumps(row) + "\n" for row in [*rows[20:], rows[3]]))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"datasets: [{{path: {first}, weight: 0.25}}, {{path: {second}, weight: 2.5}}]\n"
    )
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr().out
    assert f"{first}: rows 1 to 20\n{second}: rows 21 to 31\n" in said
    assert "31 rows" in said and "1 rows repeat an earlier one" in said and "as row 4" in said


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    data, link = tmp_path / "pairs.json", tmp_path / "link.json"
    data.write_text(json.dumps(pairs(3)))
    link.symlink_to(data)
    before, config = data.read_text(), tmp_path / "config.yaml"
    config.write_text(f"datasets: [{{path: json, data_files: [{data}]}}]\n")
    for words in (
        [str(data), "-o", str(data)],
        [str(data), "-o", str(link)],
        [str(tmp_path), "-o", str(data)],
        [str(config), "-o", str(data)],
        ["other.json", "--test", str(data), "-o", str(data)],
        ["other.json", "--eval_dataset_name", str(data), "-o", str(data)],
    ):
        assert main(["check", *words]) == 2
        assert "is read here; expected another file to write to" in capsys.readouterr().err
    assert main(["check", str(data), "-o", str(tmp_path / "found.jsonl")]) == 2
    assert "--output: expected a file named .json" in capsys.readouterr().err
    assert data.read_text() == before
    assert main(["check", str(data), "-o", str(tmp_path / "found.json")]) == 0
    assert main(["check", str(data), "-o", str(tmp_path / "found.json")]) == 0
