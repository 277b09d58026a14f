"""`fastdpo check`: a data set before anything is trained on it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from .. import terminal
from ..arguments import check_output, own_flags
from ..checks.check import Checked, check
from ..checks.findings import Finding
from ..checks.show import describe
from ..config import TrainConfig
from ..config.datasets import paths_read
from ..data.load import load_rows
from ..data.write import writer_of
from ..errors import ConfigError
from ..files import write_text
from ..hub import reached
from .rows import read_mixture

USAGE = """\
fastdpo check: what is wrong with a data set, and what a model may learn from it by mistake

  fastdpo check pairs.jsonl
  fastdpo check pairs.jsonl --test test.jsonl --model_name_or_path Qwen/Qwen3-0.6B --max_length 1024
  fastdpo check pairs.jsonl --model_name_or_path out --ref_model_name_or_path MODEL --label_errors
  fastdpo check config.yaml --json

Looks for rows that cannot be read, empty, identical, clipped, templated and special texts, exact
and near duplicates, contradictions, prompts that are also evaluated on, languages, and for forms
that tell the better response from the worse: length, lists, phrases. With a model, lengths are in
its tokens and truncation is looked at. Takes the keys of fastdpo train; a file may come first.

  --test FILE         rows to evaluate on; else eval_dataset_name, or the split dataset_test_split
                      where eval_strategy says that it is evaluated on
  --label_errors      score all pairs with the model and name those that it would turn round: by
                      implicit reward, where it is an adapter or ref_model_name_or_path is given,
                      else by log-probability a token
  --suspects FILE     the same, and write all pairs, the likeliest errors first: .jsonl, .jsonl.gz
                      or .parquet
  -o, --output FILE   write what was found, with every row's number: .json
  --json              print that instead of a table

Near duplicates and languages need pip install 'fastdpo[check]'.
"""


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: data that cannot be read, or keys that are wrong.
    """
    values = dict.fromkeys(("output", "test", "suspects"), "a file")
    usage = "fastdpo check --help"
    on = ("json", "label_errors")
    words, given, switches = own_flags(arguments, values, on, usage)
    if words and not words[0].startswith("-") and Path(words[0]).suffix not in (".yaml", ".yml"):
        words[:1] = ["--dataset_name", words[0]]
    config = TrainConfig.parse(words, (*values, *on))
    config.require("dataset_name")
    suspects = Path(given["suspects"]) if "suspects" in given else None
    judged = "label_errors" in switches or suspects is not None
    if judged:
        config.require("model_name_or_path")
    if suspects is not None:
        writer_of(suspects)  # a name of no kind is an error before anything is read
    _check_outputs(given, config)
    with (
        terminal.heard("json" not in switches),
        terminal.progress_bars(config.disable_tqdm),
        reached(config),
    ):
        found = check_config(config, given.get("test"), judged, suspects)
    text = json.dumps(found.as_dict(), indent=2, ensure_ascii=False)
    if "output" in given:
        write_text(Path(given["output"]), text + "\n")
    print(text if "json" in switches else describe(found))


def _check_outputs(given: Mapping[str, str], config: TrainConfig) -> None:
    """Refuse what would write over the data, or write two things to one file."""
    output = given.get("output")
    if output is not None and Path(output).suffix != ".json":
        raise ConfigError(f"--output: expected a file named .json, got {output}")
    for name in given.keys() & {"output", "suspects"}:
        names = (config.dataset_name, config.eval_dataset_name, given.get("test"))
        check_output(Path(given[name]), paths_read(config.datasets, *names))


def check_config(
    config: TrainConfig,
    test: str | None = None,
    judged: bool = False,
    suspects: Path | None = None,
) -> Checked:
    """The checks of the data that a configuration names.

    Args:
        config: keys of the data, and of the model where there is one.
        test: rows to evaluate on, in place of those that the configuration names.
        judged: whether its model scores every pair.
        suspects: where all pairs go, in the order of that.

    Raises:
        FastDPOError: data or a model that cannot be read.
    """
    source = (test, "train") if test is not None else None
    if source is None and config.evaluates:
        source = config.eval_source
    tokenizer = None
    if config.model_name_or_path is not None:
        from ..model.load import load_tokenizer

        tokenizer = load_tokenizer(config)
    if config.datasets:
        dataset, name = read_mixture(config)
    else:
        name = str(config.dataset_name)
        dataset = _load(config, name, config.dataset_train_split)
    also: list[Finding] = []
    if judged:
        from .suspects import judge

        verdicts = judge(config, dataset, name)
        also += verdicts.findings()
        if suspects is not None:
            verdicts.write(suspects)
    return check(
        dataset,
        name,
        None if source is None else (_load(config, *source), source[0]),
        tokenizer,
        config.max_length,
        config.dataset_num_proc,
        also,
    )


def _load(config: TrainConfig, name: str, split: str) -> datasets.Dataset:
    return load_rows(
        name,
        split,
        config_name=config.dataset_config,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=True,
        layout=config.layout,
        columns=config.columns,
    )
