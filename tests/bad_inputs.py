"""What a bad input is, and those of configuration and command line.

Each case says how a scratch directory is prepared, which command is called there, and the line that
has to answer it. The directory holds `config.yaml`, `pairs.jsonl`, `model/` and a finished run in
`out/`, which the configuration is about to overwrite.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIG = """\
model_name_or_path: model
dataset_name: pairs.jsonl
output_dir: out
overwrite_output_dir: true
use_cpu: true
bf16: false
gradient_checkpointing: false
max_steps: 2
per_device_train_batch_size: 6
logging_steps: 1
save_steps: 1
learning_rate: 1e-3
"""

Prepare = Callable[[Path, pytest.MonkeyPatch], object]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: of the test.
        expected: the line after "error: "; "…" stands for anything.
        arguments: the command line.
        prepare: changes the scratch directory, which is the current one, and the environment.
    """

    name: str
    expected: str
    arguments: tuple[str, ...] = ("train", "config.yaml")
    prepare: Prepare = lambda path, patch: None


def flags(words: str | Sequence[str], expected: str, prepare: Prepare | None = None) -> Case:
    """`fastdpo train config.yaml` with these flags."""
    listed = shlex.split(words) if isinstance(words, str) else list(words)
    case = Case(" ".join(listed)[:90], expected, ("train", "config.yaml", *listed))
    return case if prepare is None else Case(case.name, expected, case.arguments, prepare)


def yaml(text: str, expected: str) -> Case:
    """The configuration with these lines at its end, where the fault is, in place of its own."""
    own = text.partition(":")[0]
    kept = [line for line in CONFIG.splitlines(keepends=True) if not line.startswith(f"{own}:")]

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "config.yaml").write_text("".join(kept) + text + "\n", encoding="utf-8")

    name = " ".join(text.split())[:60]
    return Case(name, f"config.yaml, line {len(kept) + 1}: {expected}", prepare=prepare)


def whole_config(name: str, content: bytes | str, expected: str) -> Case:
    """A configuration file of these bytes."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (path / "config.yaml").write_bytes(data)

    return Case(name, expected, prepare=prepare)


def called(words: str, expected: str, prepare: Prepare = lambda path, patch: None) -> Case:
    """`fastdpo` with these words."""
    return Case(f"fastdpo {words}"[:60], expected, tuple(shlex.split(words)), prepare)


def _no_home(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HOME", "")
    patch.delenv("HOME")
    patch.setattr("pwd.getpwuid", _raise_key_error)


def _raise_key_error(*_: object) -> None:
    raise KeyError


BOMB = "run_name: [&a [x, x], &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]" + "".join(
    f", &{new} [{', '.join([f'*{old}'] * 9)}]"
    for old, new in zip("bcdefghijk", "cdefghijkl", strict=True)
)

VALUES = [
    yaml("beta: 0", "beta: expected a number greater than 0, got 0.0"),
    yaml("beta: .nan", "beta: expected a number, got NaN"),
    yaml("beta: -.inf", "beta: expected a number, got -Infinity"),
    yaml("beta: 1e309", "beta: expected a number, got 1e309"),
    yaml(f"beta: {'9' * 400}", "beta: expected a number, got 9999…"),
    yaml("beta: [0.1, 0.2]", "beta: expected a number, got [0.1, 0.2]"),
    yaml("beta: {low: 0.1}", "beta: expected a number, got {"),
    yaml("beta: 0,1", "beta: expected a number, got 0,1"),
    yaml("beta: ٠.١", "beta: expected a number, got ٠.١"),
    yaml("beta:", "beta: expected a number, got null"),
    yaml("label_smoothing: 0.5", "label_smoothing: expected … less than 0.5, got 0.5"),
    yaml("learning_rate: -1e-6", "learning_rate: expected a number of at least 0, got -1e-06"),
    yaml("learning_rate: 2e-4%", "learning_rate: expected a number, got 2e-4%"),
    yaml("max_steps: 0", "max_steps: expected a whole number of at least 1, or -1"),
    yaml("max_steps: 1.5", "max_steps: expected a whole number, got 1.5"),
    yaml("max_steps: １２", "max_steps: expected a whole number, got １２"),
    yaml("max_steps: 1e400", "max_steps: expected a whole number, got 1e400"),
    yaml(f"max_steps: {10**30}", "max_steps: expected a whole number… of at most"),
    yaml(f"max_steps: {'7' * 5000}", "expected YAML (int that cannot be read: 7777"),
    yaml("max_steps: 2024-02-30", "expected YAML (…"),
    yaml(
        "num_train_epochs: 0",
        "num_train_epochs: expected a number greater than 0 and at most 1e9, got 0.0",
    ),
    yaml("num_train_epochs: 1e300", "num_train_epochs: expected a number greater than 0 and at"),
    yaml("num_train_epochs: inf", "num_train_epochs: expected a number, got inf"),
    yaml("seed: -1", "seed: expected a whole number from 0 to 4294967295, got -1"),
    yaml("seed: 4294967296", "seed: expected a whole number from 0 to 4294967295, got 42949"),
    yaml("data_seed: abc", "data_seed: expected a whole number or none, got abc"),
    yaml("max_length: 1", "max_length: expected a whole number of at least 2, got 1"),
    yaml("per_device_train_batch_size: 0", "per_device_train_batch_size: expected a whole num"),
    yaml("gradient_accumulation_steps: 2.5", "gradient_accumulation_steps: expected a whole"),
    yaml("warmup_steps: -3", "warmup_steps: expected a whole number of steps, or a share"),
    yaml("logging_steps: 0", "logging_steps: expected a whole number of steps of at least 1"),
    yaml("save_steps: 2.5", "save_steps: expected a whole number of steps of at least 1"),
    yaml("save_total_limit: 0", "save_total_limit: expected a whole number of at least 1"),
    yaml("eval_steps: soon", "eval_steps: expected a number or none, got soon"),
    yaml("adam_beta2: 1.0", "adam_beta2: expected a number of at least 0 and less than 1"),
    yaml("adam_epsilon: 0", "adam_epsilon: expected a number greater than 0, got 0.0"),
    yaml("weight_decay: -0.1", "weight_decay: expected a number of at least 0, got -0.1"),
    yaml("max_grad_norm: -1", "max_grad_norm: expected a number of at least 0, got -1.0"),
    yaml("lora_r: 0", "lora_r: expected a whole number of at least 1, got 0"),
    yaml("lora_dropout: 1", "lora_dropout: expected a number of at least 0 and less than 1"),
    yaml("lora_target_modules: ['']", "lora_target_modules: expected a text that is not empty"),
    yaml("lora_target_modules: [1]", "lora_target_modules: expected a list (a text each) or"),
    yaml("use_peft: 3", "use_peft: expected true or false, got 3"),
    yaml("use_peft: ja", "use_peft: expected true or false, got ja"),
    yaml("bf16: maybe", "bf16: expected true or false or none, got maybe"),
    yaml("dtype: fp8", "dtype: expected one of auto, bfloat16, float16, float32, got fp8"),
    yaml("optim: adamw", "optim: expected one of adamw_torch_fused, …, got adamw"),
    yaml("lr_scheduler_type: fast", "lr_scheduler_type: expected one of linear, …, got fast"),
    yaml("save_strategy: best", "save_strategy: compares evaluations while training: set eval"),
    yaml("eval_strategy: yes", "eval_strategy: expected a text, got true"),
    yaml("attn_implementation: flash", "attn_implementation: expected one of eager, sdpa"),
    yaml("memory: low", "memory: expected one of manual, auto, got low"),
    yaml("report_to: [wandb, comet]", "report_to: expected one of tensorboard, wandb, trac"),
    yaml("loss_type: dpo", "loss_type: unknown 'dpo' (is it sigmoid?); known: …sigmoid"),
    yaml("loss_type: []", "loss_type: expected at least one loss"),
    yaml("loss_type: {sigmoid: 1}", "loss_type: expected a list (a text each), got {"),
    yaml("loss_type: [[sigmoid]]", "loss_type: expected a list (a text each), got [[sigmoid]]"),
    yaml("loss_weights: [1, 2]", "loss_weights: expected one weight for each entry of loss_"),
    yaml("run_name: 2020-01-01", 'run_name: expected a text or none, got "2020-01-01"'),
    yaml("run_name: !!binary aGk=", "run_name: expected a text or none, got "),
    yaml("run_name: !!set {a, b}", "run_name: expected a text or none, got "),
    yaml('output_dir: ""', "output_dir: expected a text that is not empty"),
    yaml("output_dir: 5", "output_dir: expected a text, got 5"),
    yaml('output_dir: "a\\0b"', "output_dir: expected a text without NUL"),
    yaml('run_name: "\\ud800"', "run_name: expected a text …Unicode"),
    yaml(f"output_dir: {'o' * 300}", "output_dir: expected a path …255 between two slashes"),
    yaml(f"dataset_name: {'d/' * 2100}d", "dataset_name: expected a path …4095 bytes"),
    yaml("model_name_or_path: [a]", "model_name_or_path: expected a text or none, got [a]"),
    yaml("model_name_or_path: ''", "model_name_or_path: expected a text that is not empty"),
    yaml("model_name_or_path: ~", "model_name_or_path: expected a value (--model_name_or_path"),
    yaml("dataset_name: ~", "dataset_name: expected a value (--dataset_name"),
    yaml("dataset_name: ~nobody-here/pairs.jsonl", "dataset_name: …~nobody-here"),
    yaml("dataset_num_proc: 0", "dataset_num_proc: expected a whole number of at least 1"),
    yaml("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: expected a mapping (JSON on the"),
    yaml("lr_scheduler_kwargs: {power: 1}", "lr_scheduler_kwargs: the linear schedule takes"),
    yaml("lr_scheduler_kwargs: {a: {b: 1}}", "lr_scheduler_kwargs: expected a mapping"),
]

SCHEDULES = [
    flags(
        ["--lr_scheduler_type", name, "--lr_scheduler_kwargs", options],
        f"--lr_scheduler_kwargs: {expected}",
    )
    for name, options, expected in (
        ("cosine", '{"num_cycles": "many"}', "num_cycles: expected a number"),
        ("cosine_with_restarts", '{"num_cycles": 0}', "num_cycles: expected a"),
        ("polynomial", '{"power": -1}', "power: expected a number"),
        ("inverse_sqrt", '{"timescale": 0}', "timescale: expected a"),
        ("cosine_with_min_lr", '{"min_lr": true}', "min_lr: expected a number"),
        ("cosine_with_min_lr", '{"min_lr": 1e-4, "min_lr_rate": 0.1}', "the cosine_with_min_lr"),
        ("warmup_stable_decay", '{"num_decay_steps": 1.5}', "num_decay_steps: expected a whole"),
        (
            "warmup_stable_decay",
            '{"num_decay_steps": 1, "decay_type": "fast"}',
            "decay_type: expected one of",
        ),
        ("linear", "{a", "expected a mapping (JSON on the command line) or none, got {a"),
    )
]

TOGETHER = [
    flags(
        "--lr_scheduler_type warmup_stable_decay",
        "--lr_scheduler_type: the warmup_stable_decay schedule needs num_decay_steps",
    ),
    flags(
        ["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"lr_end": 1}'],
        "config.yaml, line 12: learning_rate: the polynomial schedule needs one above 1, got 0.001",
    ),
    flags("--lr_scheduler_type polynomial --learning_rate 1e-8", "--learning_rate: the polynomial"),
    flags(
        [
            "--lr_scheduler_type=cosine_with_min_lr",
            '--lr_scheduler_kwargs={"min_lr": 0.1}',
            "--learning_rate=0",
        ],
        "--learning_rate: the cosine_with_min_lr schedule needs one above 0, got 0.0",
    ),
    flags("--loss_type exo_pair", "--loss_type: exo_pair needs a label_smoothing above 0"),
    flags("--loss_type sigmoid ipo --loss_weights 0 0", "--loss_weights: expected at least one"),
    flags("--resume_from_checkpoint", "config.yaml, line 4: overwrite_output_dir: cannot go"),
    flags("--load_in_4bit", "--load_in_4bit: needs use_peft"),
    flags("--activation_offloading", "--activation_offloading: needs gradient_checkpointing"),
    flags("--torch_compile --layer_tile_tokens 64", "--torch_compile: cannot go with layer_tile"),
    flags("--optimizer_in_backward", "--optimizer_in_backward: needs max_grad_norm 0"),
    flags("--optimizer_offload --optim sgd", "--optimizer_offload: expected optim adamw_torch"),
    flags("--optimizer_offload", "optimizer_offload: needs a GPU, the device is cpu"),
    flags("--stochastic_rounding", "--stochastic_rounding: expected optim adamw_torch_8bit"),
    flags("--use_liger_kernel", "use_liger_kernel: Liger's kernels need a GPU"),
    flags("--attention_backend flash_attn", "attention_backend: flash_attn cannot be used: "),
    flags("--do_eval", "eval_dataset_name: expected the data to evaluate on"),
    flags(
        "--optimizer_in_backward --max_grad_norm 0 --use_peft",
        "--optimizer_in_backward: is for training all weights",
    ),
    flags(
        "--optimizer_in_backward --max_grad_norm 0 --max_tokens_per_batch 30",
        "optimizer_in_backward: …max_tokens_per_batch",
    ),
]

KEYS = [
    yaml("bta: 0.1", "unknown key bta; the nearest known key is beta"),
    yaml("5: 0.1", "expected the name of a key, got 5"),
    yaml("null: 0.1", "expected the name of a key, got null"),
    yaml("true: 0.1", "expected the name of a key, got true"),
    yaml("? [beta, seed]\n: 1", "expected the name of a key, got [beta, seed]"),
    yaml("'': 1", "unknown key ; the nearest"),
    yaml("<<: {beta: 0.1}", "expected YAML (could not determine"),
    yaml("fsdp: sharded", "fsdp: expected true, or one of full_shard, hybrid_shard and no_s"),
    yaml("fsdp: full_shard offload", "fsdp: full_shard offload is not honoured. Weights stay on"),
    yaml("fsdp: shard_grad_op", "fsdp: shard_grad_op is not honoured. Use full_shard (data_par"),
    yaml("fsdp_config: {version: 2}", "fsdp_config does nothing without fsdp, as in TRL: add"),
    yaml("deepspeed: ds.json", "deepspeed is a key of TRL's …Use data_parallel: fsdp, which"),
    yaml("parallelism_config: {tp_size: 2}", "parallelism_config: tp_size: 2 is not honoured."),
    yaml("parallelism_config: {dp_size: 2}", "parallelism_config: unknown option dp_size; the n"),
    yaml("parallelism_config: {cp_size: 0}", "parallelism_config: cp_size: expected a whole n"),
    yaml("parallelism_config: {cp_size: 2}", "parallelism_config: its sizes multiply to 2 proc"),
    yaml("parallelism_config: {sp_size: 2, cp_size: 2}", "parallelism_config: cp_size and sp_"),
    yaml("accelerator_config: {split_batches: true}", "accelerator_config: split_batches: true"),
    yaml("ddp_backend: gloo", "ddp_backend is a key of TRL's that fastdpo does not honour"),
    yaml("local_rank: 1", "local_rank: expected LOCAL_RANK of the environment, got 1"),
    yaml("accelerate_config: [1]", "accelerate_config: expected the path of a file, got [1]"),
    yaml("num_processes: 8", "unknown key num_processes; the nearest known key is devices"),
    flags("--fsdp --fsdp_config none.json", "--fsdp_config: none.json: cannot read"),
    flags("--fsdp --fsdp_config pairs.jsonl", "--fsdp_config: expected a mapping ("),
    flags("--fsdp --fsdp_config {cpu_offload:", "--fsdp_config: expected a mapping"),
    flags(
        ["--fsdp", "--fsdp_config", '{"cpu_offload": true}'],
        "--fsdp_config: cpu_offload: true is not honoured. Weights stay on the dev",
    ),
    flags("--accelerate_config zero3", "zero3: distributed_type: DEEPSPEED is not honoured. Use"),
    flags("--accelerate_config none.yaml", "--accelerate_config: expected a f"),
    flags("--accelerate_config config.yaml", "config.yaml, line 1: model_name_or_path is no key"),
    flags("--accelerate_config model", "model: cannot read the configuration file (Is a direct"),
    flags("--accelerate_config", "--accelerate_config: expected a value after it"),
    yaml("test_split_size: 0.1", "test_split_size is a key of TRL's that fastdpo does not honour"),
    yaml("precompute_ref_batch_size: 4", "precompute_ref_batch_size is a key of TRL's"),
    yaml("neftune_noise_alpha: 5", "neftune_noise_alpha is a key of TRL's"),
    yaml("hub_strategy: never", "hub_strategy: expected one of end, every_save, checkpoint"),
    yaml("f_divergence_type: js", "f_divergence_type: expected one of reverse_kl, forward_kl, js"),
    yaml("max_prompt_length: 128", "max_prompt_length does not exist any more. Use max_length"),
    yaml("warmup_ratio: 0.1", "warmup_ratio does not exist any more. Use warmup_steps"),
    yaml("torch_dtype: bfloat16", "torch_dtype does not exist any more. Use dtype"),
    yaml("lr: 1e-6", "unknown key lr; the nearest known key is learning_rate"),
    yaml("cutoff_len: 512", "unknown key cutoff_len; the nearest known key is max_length"),
]

FILES = [
    whole_config("a tab", "beta: 0.1\n\tseed: 1\n", "config.yaml, line 2: expected YAML ("),
    whole_config("an open list", "beta: [0.1\n", "config.yaml, line …: expected YAML ("),
    whole_config("an open quote", "run_name: 'a\n", "config.yaml, line …: expected YAML ("),
    whole_config("no colon", "beta 0.1\nseed: 1\n", "config.yaml, line 2: expected YAML ("),
    whole_config("two documents", "beta: 0.1\n---\nseed: 1\n", "config.yaml, line 2: expected Y"),
    whole_config("a list", "- beta: 0.1\n", "config.yaml: expected a mapping of keys to values"),
    whole_config("a text", "beta\n", "config.yaml: expected a mapping of keys to values"),
    whole_config("a number", "5\n", "config.yaml: expected a mapping of keys to values"),
    whole_config("JSON lines", '{"beta": 1}\n{"beta": 2}\n', "config.yaml, line 2: expected YAM"),
    whole_config("an empty file", "", "model_name_or_path: expected a value"),
    whole_config("comments alone", "# nothing\n", "model_name_or_path: expected a value"),
    whole_config("binary", bytes(range(256)), "config.yaml: expected UTF-8 text"),
    whole_config("UTF-16", CONFIG.encode("utf-16"), "config.yaml: expected UTF-8 text"),
    whole_config("Latin-1", b"run_name: caf\xe9\n", "config.yaml: expected UTF-8 text"),
    whole_config("NUL bytes", b"beta: 0.1\x00\n", "config.yaml…: expected YAML ("),
    whole_config("an unknown tag", "beta: !mine 1\n", "config.yaml, line 1: expected YAML ("),
    whole_config(
        "a Python tag", "seed: !!python/object/apply:os.getpid []\n", "config.yaml, line 1: expect"
    ),
    whole_config("a wrong int tag", "seed: !!int abc\n", "config.yaml, line 1: expected YAML ("),
    whole_config("a wrong bool tag", "bf16: !!bool 7\n", "config.yaml, line 1: expected YAML ("),
    whole_config("a wrong date tag", "bf16: !!timestamp x\n", "config.yaml, line 1: expected YA"),
    whole_config("a wrong date", "run_name: 2020-13-45\n", "config.yaml, line 1: expected YAML ("),
    whole_config("an unknown alias", "beta: *b\n", "config.yaml, line 1: expected YAML ("),
    whole_config("a list in itself", "loss_type: &a [*a]\n", "config.yaml, line 1: expected YAM"),
    whole_config("a bomb of aliases", BOMB + "]\n", "config.yaml, line 1: expected YAML ("),
    whole_config(
        "a deep list", "beta: " + "[" * 5000 + "]" * 5000, "config.yaml: expected YAML (…deep"
    ),
    whole_config(
        "keys with both dashes", "max_steps: 1\nmax-steps: 2\n", "config.yaml, line 2: max_steps w"
    ),
    whole_config("a key twice", "beta: 1\nbeta: 2\n", "config.yaml, line 2: beta was already giv"),
    whole_config("a list twice in a mapping", "a: {b: 1, b: 2}\n", "config.yaml, line 1: unknown"),
]

LINES = [
    flags("--bta 1", "--bta: unknown key bta; the nearest known key is beta"),
    flags("--beta", "--beta: expected a value after it"),
    flags("--beta 0.1 0.2", "--beta: expected one value, got 2: 0.1 0.2"),
    flags("--beta=", '--beta: expected a number, got ""'),
    flags("--no_beta", "--no_beta: unknown key no_beta; the nearest known key is beta"),
    flags("--no_use_peft true", "--no_use_peft: takes no value, got true"),
    flags("--use_peft other.yaml", "--use_peft: expected true or false, got other.yaml"),
    flags("--run_name --beta=1", "--run_name: expected a value after it"),
    flags("--", "--: unknown key "),
    flags("--=5", "--: unknown key "),
    flags("---beta 0.1", "--_beta: unknown key _beta; the nearest known key is beta"),
    flags("--Beta 0.1", "--Beta: unknown key Beta; the nearest known key is beta"),
    flags("--max_steps ٣", "--max_steps: expected a whole number, got ٣"),
    flags("-b 0.1", "expected one configuration file, got 3: config.yaml -b 0.1"),
    flags("other.yaml", "expected one configuration file, got 2: config.yaml other.yaml"),
    flags("--config other.yaml", "expected one configuration file, got 2: config.yaml other"),
    flags(["--run_name", "\udcff"], "--run_name: expected a text …Unicode"),
    flags(["--output_dir", ""], "--output_dir: expected a text that is not empty, got "),
    flags("--output_dir ~nobody-here/out", "--output_dir: …~nobody-here"),
    flags("--output_dir ~/out", "--output_dir: …home directory", _no_home),
    flags("--config", "--config: expected a value after it"),
    called("train", "model_name_or_path: expected a value (--model_name_or_path, or"),
    called("train none.yaml", "none.yaml: cannot read the configuration file (No such file"),
    called("train model", "model: cannot read the configuration file (Is a directory)"),
    called("train config.yaml/x", "config.yaml/x: cannot read the configuration file (Not a dir"),
    called("train pairs.jsonl", "pairs.jsonl, line 2: expected YAML ("),
    called(f"train {'c' * 300}.yaml", "ccc…: cannot read the configuration file (File name too"),
    called("train ~nobody-here/c.yaml", "~nobody-here/c.yaml: cannot read the configuration fil"),
    called("train --config ''", "…cannot read the configuration file ("),
    called("train out/model.safetensors", "out/model.safetensors: expected UTF-8 text ("),
    called("precompute --model_name_or_path model", "dataset_name: expected a value (--datase"),
    called("precompute config.yaml --beta x", "--beta: expected a number, got x"),
    called("precompute config.yaml --dataset_name no.jsonl", "no.jsonl: not found"),
    called("trian config.yaml", "unknown command trian; the nearest is train (fastdpo --help)"),
    called("config.yaml", "unknown command config.yaml; the nearest is"),
    called("--config config.yaml", "unknown command --config; the nearest is"),
    called("''", "unknown command "),
    called("doctor --beta x", "--beta: expected a number, got x"),
    called("doctor none.yaml", "none.yaml: cannot read the configuration file"),
    called("doctor config.yaml extra", "expected one configuration file, got 2"),
    called("plan", "model_name_or_path: expected a value"),
    called("plan config.yaml --gpu", "--gpu: expected the name of a GPU (fastdpo plan --help)"),
    called("plan config.yaml --gpu= ", "--gpu: expected one of a100-40gb"),
    called("plan config.yaml --gpu h100", "--gpu: expected one of …(near h100-80gb)"),
    called("plan config.yaml --json 1", "…"),
    called("plan config.yaml --hosts", "--hosts: expected a number (fastdpo plan --help)"),
    called("plan config.yaml --hosts two", "--hosts: expected a whole number of at least 1, got t"),
    called("plan config.yaml --hosts=0", "--hosts: expected a whole number of at least 1, got 0"),
    called("plan config.yaml --link nvlink", "--link: expected one of nvlink3, …, got nvlink ("),
    called("plan config.yaml --network 10g", "--network: expected one of 100g, …, got 10g (near"),
    called("plan config.yaml --devices 0", "--devices: expected a whole number of at least 1"),
    called(
        "plan config.yaml --devices 4 --cp_size 3",
        "--cp_size: 3 devices share each row, and the run has 4",
    ),
    called("plan --model_name_or_path ./no", "model_name_or_path: ./no does not exist"),
    called("plan config.yaml --dataset_name no.jsonl", "no.jsonl: not found"),
    called("bench nothing", "fastdpo bench: unrecognized arguments: nothing"),
    called("bench heads --nothing", "fastdpo bench heads: unrecognized arguments: --nothing"),
]

CASES = [*VALUES, *SCHEDULES, *TOGETHER, *KEYS, *FILES, *LINES]
