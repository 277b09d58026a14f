"""`fastdpo chat`: talk to a model, or to two of them side by side."""

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from transformers import TextStreamer, set_seed

from .. import terminal
from ..arguments import own_flags
from ..errors import DataError
from ..hub import reached
from ..model.sampler import Answer, Sampler, Sampling
from .command import SAMPLING, model_config, sampling

USAGE = """\
fastdpo chat: talk to a model

  fastdpo chat out
  fastdpo chat out --base Qwen/Qwen3-0.6B
  echo "Why is the sky blue?" | fastdpo chat out --temperature 0

MODEL is a directory or hub name of a model, or of an adapter, which brings its base. /reset forgets
the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. Without a chat template each line
is continued as text. Keys of fastdpo train that load a model are taken too, such as --dtype.

  --base MODEL          answers of this model before each answer, to compare
  --system TEXT         a system message
  --temperature T       0 takes the likeliest token each time; 0.7 unless it is given
  --top_p P, --top_k K  draw from the likeliest tokens only
  --max_new_tokens N    tokens of an answer at most, 512 unless it is given
  --seed N              of what is drawn
"""


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: a model that cannot be loaded, or a flag that is wrong.
    """
    values = SAMPLING | {"base": "a model", "system": "a text"}
    words, given, _ = own_flags(arguments, values, (), "fastdpo chat --help")
    config, how = (
        model_config(words, "chat", values),
        sampling(given, temperature=0.7, max_new_tokens=512),
    )
    with reached(config), terminal.withheld(), terminal.progress_bars(True):
        samplers = {"": Sampler.load(config)}
        if "base" in given:
            other = config.choose("--base", model_name_or_path=given["base"])
            with reached(other):
                base = Sampler.load(other)
            samplers = {"before": base, "after": samplers[""]}
        set_seed(config.seed)
        Chat(samplers, how, given.get("system")).talk()


class Chat:
    """A conversation with one model, or with several that are asked the same."""

    def __init__(self, samplers: dict[str, Sampler], how: Sampling, system: str | None) -> None:
        self.samplers, self.how = samplers, how
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.histories: dict[str, list[dict[str, str]]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.histories = {name: list(self.system) for name in self.samplers}

    def talk(self) -> None:
        """Answer every line of standard input."""
        mark = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(mark).strip()
            except EOFError:
                print(end="\n" if mark else "")
                return
            except KeyboardInterrupt:  # at the mark, as in a shell
                print()
                continue
            if line == "/exit":
                return
            if line == "/reset":
                self.reset()
            elif line:
                self.ask(line)

    def ask(self, line: str) -> None:
        """Print each model's answer as it comes."""
        for name, sampler in self.samplers.items():
            if name:
                print(f"[{name}]")
            history = self.histories[name]
            history.append({"role": "user", "content": line})
            try:
                history.append({"role": "assistant", "content": self._answer(sampler, history)})
            except DataError as error:  # of this line alone
                history.pop()
                print(f"error: {error}", file=sys.stderr)

    def _answer(self, sampler: Sampler, history: list[dict[str, str]]) -> str:
        template = sampler.tokenizer.chat_template is not None
        streamer = _Shown(sampler.tokenizer)
        tokens = sampler.encode(history if template else history[-1]["content"])
        try:
            [[answer]] = sampler.generate([tokens], self.how, streamer=streamer)
        except KeyboardInterrupt:
            answer = Answer(streamer.text, complete=False, ids=())
        print(end="" if answer.complete or streamer.ended else " ...\n", flush=True)
        return answer.text


class _Shown(TextStreamer):
    """Prints text as it comes, without what a terminal would obey."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.ended = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.ended = stream_end
        print(_harmless(text), end="\n" if stream_end else "", flush=True)


def _harmless(text: str) -> str:
    """Text without control characters but line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
