"""What the trainer benchmark trains: models with random weights by name, rows by name or from a
file.

Random weights are honest for time, since no provider's depends on values. Synthetic rows consist of
words that are one token each, so their lengths are exact: log-normal, with medians from the
literature and a spread of 0.86, that of the responses in `dpo_en_demo` (a quarter of the range
between its quartiles apart; its prompts spread more, at 1.2, which would pad more):

| name | prompt | response | source of the medians |
|---|---|---|---|
| hh-rlhf | 111 | 52 | HH-RLHF: medians 186 tokens together, ratio 2.15 |
| ultrafeedback | 106 | 253 | UltraFeedback: 409 tokens, ratio 0.42 |
| long-prompt | 8192 | 512 | fixed lengths: a long document and two short answers |
| n-best | 60 | 122 | the GSM8K groups of the tests: five responses, four or six comparisons |
| pair-N | N - 2048 | 1024 | one pair of N tokens in all: how long a pair trains, in what memory |

Losses of labelled responses get those in place of pairs: `gsm8k-groups` has either, every
comparison of a group or every response with its label, those of one prompt one after the other.

The first two are in the table of https://github.com/frankxwang/dpo-prefix-sharing (paper:
https://arxiv.org/abs/2410.20305); `n-best` has the spreads that were measured there, 0.33 and 0.41.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from fastdpo.demo.model import demo_model_path
from fastdpo.files import atomic_directory, cache_root

from . import data
from .jsonl import read_rows

Pair = dict[str, Any]
"""A row of data: prompt, chosen and rejected."""

Labelled = dict[str, Any]
"""A row of data: prompt, completion and label."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens: medians, standard deviations of the logarithm."""

    prompt: int
    response: int
    prompt_spread: float = 0.86
    response_spread: float = 0.86
    responses: int = 2
    longest: int = 2048
    """Of a prompt and of a response."""


LENGTHS = {
    "hh-rlhf": Lengths(111, 52),
    "ultrafeedback": Lengths(106, 253),
    "long-prompt": Lengths(8192, 512, 0.0, 0.0, longest=8192),
    "n-best": Lengths(60, 122, 0.33, 0.41, responses=5),
}


def lengths_named(name: str) -> Lengths | None:
    """The lengths of this name; None where it names something else."""
    if name.startswith("pair-") and name[5:].isdigit() and int(name[5:]) >= 8:
        tokens = int(name[5:])
        response = min(1024, tokens // 4)
        return Lengths(tokens - 2 * response, response, 0.0, 0.0, longest=tokens)
    return LENGTHS.get(name)


TEXTS: dict[str, Callable[[], list[Pair] | None]] = {
    "dpo_en_demo": data.dpo_en_demo,
    "gsm8k": data.gsm8k_pairs,
    "gsm8k-groups": data.gsm8k_comparisons,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(kind: str, sizes: str, **more: Any) -> dict[str, Any]:
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads"
    values = zip(names.split(), map(int, sizes.split()), strict=True)
    return {"model_type": kind, **dict(values), "max_position_embeddings": 32768, **more}


MODEL_CONFIGS = {
    "nano": _config("llama", "1000 32 64 2 2 2", tie_word_embeddings=True),
    "small-llama": _config("llama", "4096 256 1024 4 8 4", tie_word_embeddings=False),
    "tiny-llama": _config("llama", "49152 256 1024 4 4 2", tie_word_embeddings=False),
    "smollm2-135m": _config("llama", "49152 576 1536 30 9 3", tie_word_embeddings=True),
    "qwen2.5-0.5b": _config("qwen2", "151936 896 4864 24 14 2", tie_word_embeddings=True),
    "qwen2.5-1.5b": _config("qwen2", "151936 1536 8960 28 12 2", tie_word_embeddings=True),
    "llama-3.1-8b": _config(
        "llama",
        "128256 4096 14336 32 32 8",
        tie_word_embeddings=False,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "gemma-3-1b": _config(
        "gemma3_text",
        "262144 1152 6912 26 4 1",
        tie_word_embeddings=True,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
    ),
}


def pairs_of(name: str, count: int) -> list[Pair]:
    """`count` preference pairs of a named data set or a JSONL file, in its own order.

    Of texts, prompts of 3000 characters or more are left out, since trainers drop those that fill
    `max_length`.
    """
    if lengths := lengths_named(name):
        return list(itertools.islice(_synthetic(lengths), count))
    if name in TEXTS:
        rows = TEXTS[name]()
        if rows is None:
            raise SystemExit(f"{name}: the data is not here")
    else:
        rows = read_rows(Path(name))
    names = ("prompt", "chosen", "rejected")
    return [{name: row[name] for name in names} for row in itertools.islice(_short(rows), count)]


def labelled_of(name: str, count: int) -> list[Labelled]:
    """`count` labelled responses of a named data set or a JSONL file of pairs, in its own order."""
    if name != "gsm8k-groups":
        return list(itertools.islice(_unpaired(pairs_of(name, count)), count))
    rows = data.gsm8k_labels()
    if rows is None:
        raise SystemExit(f"{name}: the data is not here")
    return list(itertools.islice(_short(rows), count))


def _short(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if len(json.dumps(row["prompt"])) < 3000)


def _unpaired(rows: Iterable[Pair]) -> Iterator[Labelled]:
    for row in rows:
        for name, label in (("chosen", True), ("rejected", False)):
            yield {"prompt": row["prompt"], "completion": row[name], "label": label}


def written_out(rows: Iterable[Pair], tokenizer: Any) -> list[Pair]:
    """Pairs as text, of which TRL's ORPO and CPO trainers make the same tokens as everyone else.

    Those two begin every prompt with BOS and end every response with EOS, where the others begin as
    the tokenizer does and end text alone with EOS. So messages become text here, and BOS is written
    before the prompt. Where tokens merge across the end of a prompt they cut elsewhere, each
    response for itself: spaces that end a prompt begin its responses instead (words that run on
    from one to the other stay apart in the two).
    """
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        bos = ""
    written = []
    for row in rows:
        prompt, *responses = _as_text(row, tokenizer)
        stem = prompt.rstrip(" ")
        chosen, rejected = (prompt[len(stem) :] + response for response in responses)
        start = "" if stem.startswith(bos) else bos
        written.append({"prompt": start + stem, "chosen": chosen, "rejected": rejected})
    return written


def _as_text(row: Pair, tokenizer: Any) -> list[str]:
    """Prompt, chosen and rejected; messages as the chat template renders them."""
    texts = [row[name] for name in ("prompt", "chosen", "rejected")]
    if isinstance(texts[0], str):
        return texts
    prompt = tokenizer.apply_chat_template(texts[0], tokenize=False, add_generation_prompt=True)
    both = [tokenizer.apply_chat_template(texts[0] + text, tokenize=False) for text in texts[1:]]
    return [prompt, *(text.removeprefix(prompt) for text in both)]


def _synthetic(lengths: Lengths) -> Iterator[Pair]:
    """Pairs without end, those of one prompt one after the other: every better response before
    every worse one.
    """
    rng = random.Random(0)

    def words(median: int, spread: float) -> str:
        drawn = median * math.exp(spread * rng.gauss(0.0, 1.0))
        count = max(1, min(lengths.longest, round(drawn)))
        return " ".join(f"w{rng.randrange(900)}" for _ in range(count))

    for number in itertools.count():
        prompt = words(lengths.prompt, lengths.prompt_spread)
        responses = [
            words(lengths.response, lengths.response_spread) for _ in range(lengths.responses)
        ]
        better = 1 + number % (lengths.responses // 2)
        for chosen, rejected in itertools.product(responses[:better], responses[better:]):
            yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def model_path(name: str, data_name: str, dtype: torch.dtype, device: torch.device) -> Path:
    """A directory with random weights and the tokenizer of the data, made once in the user's cache;
    `name` may be a directory already.

    Raises:
        KeyError: neither a name of `MODEL_CONFIGS` nor a directory.
    """
    if name not in MODEL_CONFIGS:
        if Path(name).is_dir():
            return Path(name)
        raise KeyError(f"{name}: expected a directory or one of {', '.join(MODEL_CONFIGS)}")
    words = lengths_named(data_name) is not None
    settings = dict(MODEL_CONFIGS[name])
    kind = f"{'words' if words else 'text'}-{str(dtype).removeprefix('torch.')}"
    path = cache_root() / "models" / f"random-{name}-{kind}"
    if path.exists():
        return path
    tokenizer = word_tokenizer() if words else AutoTokenizer.from_pretrained(demo_model_path())
    if len(tokenizer) > settings["vocab_size"]:
        raise KeyError(f"{name}: its vocabulary is smaller than the tokenizer of texts")
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    settings |= {token: getattr(tokenizer, token) for token in special}
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**settings), dtype=dtype
        )
    with atomic_directory(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return path


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, w0 to w899, and what a trainer needs besides."""
    known = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": 3 + i for i in range(900)}}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
