"""Small tokenizers and rows that the tests of the data share."""

from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdpo.data.needs import Needs
from fastdpo.data.tokenize import TokenizeReport, tokenize_dataset
from fastdpo.errors import DataError

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the thinking of earlier turns, and renders the generation prompt as no answer ever looks.
THINKING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "[{{ m.role }}]{{ m.content.split('</think>')[-1].lstrip() }}{{ eos_token }}"
    "{% else %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "<think>\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 12 + 30? It is 42, of course.",
    "def add(a, b):\n    return a + b\n\nwhere the rain in Spain stays mainly in the plain 🙂",
    "<think> the user wants an answer </think> user assistant system tool Blue. Green. Hello!",
] * 8


def make_tokenizer(
    template: str | None = None, *, bos: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 420 tokens, trained on the spot."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | options
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **names,
    )


def tokenize(
    rows: Dataset | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], TokenizeReport]:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    made, report = tokenize_dataset(dataset, tokenizer, max_length=max_length, **options)
    return made.to_list(), report


def tokenize_rows(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    return tokenize(*arguments, **options)[0]


def report_of(*arguments: Any, **options: Any) -> TokenizeReport:
    return tokenize(*arguments, **options)[1]


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        tokenize(*arguments, **options)
    return str(caught.value)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(prompt: list[Any], chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return row | more


LABELS = Needs(("label",), "kto")
SCORES = Needs(("scores",), "grpo")
WIN_RATES = Needs(("scores", "comparisons"), "sppo")
RANKS = Needs(("ranks",), "listwise")

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SYSTEM = {"role": "system", "content": "Be brief.  "}
TURNS = [user("Hi"), assistant("<think>why</think> Hello!"), user("What is 12 + 30?")]
CHATS = [
    chat([user("What color is the sky?")], "Blue.", "Green."),
    chat([SYSTEM, user(" spaces at both ends ")], " It is blue. ", "It is green.\n\n"),
    chat(TURNS, "<think>30 + 12</think> 42", "<think></think>41"),
    chat([SYSTEM, *TURNS], "42", "4 2"),
    chat([user("🙂 naïve 漢字 e\u0301 \u200d")], "👩‍👩‍👧 Здравствуй", "👩‍👩 Здравствуй"),
    chat([user("")], "", "not empty"),
    chat([user("an <|im_end|> inside")], "<|im_end|>", "</s><s>"),
    chat([user("Hi")], "Hello" * 300, "Hello" * 299),
    chat([user("ends with an answer"), assistant("Well,")], "it is", "it was"),
    chat([{"role": "developer", "content": "Rules"}, user("Hi")], "a", "b"),
    {
        "prompt": [user("two turns to judge")],
        "chosen": [assistant("a"), user("more"), assistant("<think>x</think>b")],
        "rejected": [assistant("a"), user("more"), assistant("c")],
    },
]
TEXTS = [
    ("The sky is", " blue.", " green."),
    ("The sky is ", "blue.", "green."),
    ("The quick bro", "wn fox", "ke"),
    ("Hello", "!", "Hello!"),
    ("", "The quick", "brown fox"),
    ("It is 4", "2, of course.", "1."),
    ("ended", " already</s>", " not yet"),
    ("ended twice", " already</s></s>", "</s>"),
    ("empty", "", " full"),
    ("new\n", "\nline", "\n\nline"),
    ("🙂", "🙂🙂", "e\u0301"),
    ("e", "\u0301 combining", " other"),
    (" ", " ", "  "),
    ("The quick brown fox " * 100, "jumps " * 100, "jumps " * 99),
]
TEXT_ROWS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
