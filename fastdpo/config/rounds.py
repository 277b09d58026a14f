"""The keys of `fastdpo rounds`, beside those of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .declare import (
    AT_LEAST_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    default_of,
    key,
    one_of,
    section,
)
from .losses import WITHOUT_BETA, unread
from .train import TrainConfig

JUDGES = ("exact", "math", "row", "self")
"""Judges that need no file, model or endpoint."""

OF_SAMPLING_POLICY = ("sppo", "sppo_hard", "spin")
"""Losses that their papers define with the policy of the round before as their reference."""


@section("rounds")
class RoundKeys:
    """Sampling, judging and the order of rounds."""

    rounds: int = key(3, "Rounds: each samples, scores and trains.", AT_LEAST_ONE)
    prompts_per_round: int | None = key(
        None,
        "Prompts of a round, taken in turn from the data set; unset takes all of them.",
        AT_LEAST_ONE,
    )
    num_generations: int = key(8, "Answers to each prompt in a round.", AT_LEAST_ONE)
    temperature: float = key(1.0, "That logits are divided by; 0 is greedy.", NOT_NEGATIVE)
    top_p: float = key(
        1.0,
        "The share of probability that is drawn from.",
        Rule("above 0, at most 1", lambda v: 0 < v <= 1),
    )
    top_k: int = key(0, "The number of tokens that is drawn from; 0 for all.", NOT_NEGATIVE)
    generation_batch_size: int = key(8, "Prompts that are answered at a time.", AT_LEAST_ONE)
    engine: str = key(
        "transformers",
        "What samples: transformers' generate, its continuous batching, or vLLM or SGLang where "
        "they are installed.",
        one_of("transformers", "continuous", "vllm", "sglang"),
    )
    engine_url: str | None = key(
        None,
        "A server of the engine, vllm or sglang, that sees the same files: weights are handed to "
        "it by their path; unset loads the engine in this process.",
    )
    mask_truncated_completions: bool = key(
        True,
        "Answers that max_completion_length cut off are scored but not trained on; false trains on "
        "them as if they ended there.",
    )
    judge: str | None = key(
        None,
        "What scores answers: FILE.py:FUNCTION of prompt, response and row; exact or math, against "
        "the row's answer; row, the row's own answer is the better one (SPIN); self, the policy's "
        "implicit reward; model:PATH, a reward model; or the URL of an OpenAI-compatible endpoint.",
    )
    judge_answer: str = key("answer", "The column that exact and math compare with.")
    judge_model: str | None = key(
        None,
        "The model to ask for at the endpoint; of self, the model that rewards are measured from.",
    )
    judge_mode: str = key(
        "absolute",
        "Whether the endpoint scores each answer, or compares two, asked in both orders.",
        one_of("absolute", "pairwise"),
    )
    judge_rubric: str | None = key(
        None, "A text file: what the endpoint is to judge by.", path=True
    )
    judge_max_tokens: int | None = key(
        None,
        "Tokens that the endpoint may use in all rounds together, as it counts them; unset is no "
        "limit.",
        AT_LEAST_ONE,
    )
    reference: str | None = key(
        None,
        "The reference of a round: the model that the first round started from, or the one that "
        "this round starts from. Unset is start, but previous for sppo, sppo_hard and spin, as in "
        "their papers, and where grpo, bnpo, dapo or dr_grpo takes the ratio of tokens to it over "
        "several steps.",
        one_of("start", "previous", unset="for what the loss's paper has"),
    )
    eval_prompts: int = key(
        64,
        "Held-out prompts that are answered and judged before the first round and after each.",
        AT_LEAST_ONE,
    )
    take_worse_rounds: bool = key(
        True, "Whether a round counts whose model has a lower held-out score than the one before."
    )
    max_kl: float | None = key(
        None,
        "Nats a token from the start, on held-out answers; a round that goes farther is the last.",
        POSITIVE,
    )
    max_repetition: float = key(
        0.5,
        "Share of repeated 4-grams in held-out answers above which a round is named.",
        FRACTION,
    )


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(RoundKeys, TrainConfig):
    """The configuration of `fastdpo rounds`: the keys of a run, and those of the rounds.

    Raises:
        ConfigError: as `TrainConfig`; a key of a run that the rounds set themselves.
    """

    def __post_init__(self) -> None:
        for name, declared in self.key_fields().items():
            if name in SET_BY_ROUNDS and getattr(self, name) != default_of(declared):
                raise self.error(name, f"fastdpo rounds sets it in each round{SET_BY_ROUNDS[name]}")
        super().__post_init__()
        self.require("model_name_or_path", "dataset_name", "judge")
        self._choose_reference()
        judge = str(self.judge)
        file, _, function = judge.rpartition(":")
        known = judge in JUDGES or judge.startswith(("model:", "http://", "https://"))
        if not known and not (file.endswith(".py") and function.isidentifier()):
            raise self.error(
                "judge",
                f"expected FILE.py:FUNCTION, {', '.join(JUDGES)}, model:PATH or a URL, got {judge}",
            )
        if not known and not Path(file).expanduser().is_file():
            raise self.error("judge", f"no file {file}")
        if judge != "row" and self.num_generations < 2:
            raise self.error(
                "num_generations", "expected at least 2: answers are compared with each other"
            )
        if self.temperature == 0 and self.num_generations > 1:
            raise self.error(
                "temperature",
                f"0 gives the same answer {self.num_generations} times (num_generations); expected "
                "more",
            )
        if self.engine_url is not None:
            self._check_url("engine_url", self.engine_url, "http://host:8000")
            if self.engine not in ("vllm", "sglang"):
                raise self.error(
                    "engine_url",
                    f"{self.engine} samples in this process; expected engine: vllm or sglang",
                )
        if judge.startswith(("http://", "https://")):
            self._check_url("judge", judge, "http://host:8000/v1")
            if self.judge_model is None:
                raise self.error("judge_model", "expected the name of a model at the endpoint")
        if judge == "self" and self.judge_model is None:
            raise self.error(
                "judge_model",
                "expected the model that the policy was before it was trained on preferences: its "
                "implicit reward is measured from it (judge: self)",
            )

    def _choose_reference(self) -> None:
        """The reference that the loss's paper has. A ratio of tokens is to the reference, which has
        to be the policy that sampled, unless it is 1: in the single step of a round.
        """
        ratios = [name for name in self.loss_type if name in WITHOUT_BETA]
        of_tokens = self.importance_sampling_level == "token" and self.max_steps != 1
        if ratios and of_tokens and self.reference == "start":
            raise self.error(
                "reference",
                f"start, and {ratios[0]} takes the ratio of tokens to the reference; expected "
                "reference: previous, importance_sampling_level: sequence, or max_steps: 1",
            )
        if self.reference is None:
            sampled = not set(OF_SAMPLING_POLICY).isdisjoint(self.loss_type)
            self._set(reference="previous" if sampled or (ratios and of_tokens) else "start")

    def _check_url(self, name: str, url: str, example: str) -> None:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            known = False
        if not known:
            raise self.error(name, f"expected a URL such as {example}, got {url}")

    def of_round(self, **values: Any) -> TrainConfig:
        """The configuration of a round's training, with `values` for what the round sets."""
        names = TrainConfig.key_fields()
        if "max_completion_length" in unread(self.loss_type):  # it was for sampling alone
            values = {"max_completion_length": None, **values}
        given = {name: getattr(self, name) for name in names} | values
        origins = {name: place for name, place in self.origins.items() if name in names}
        return TrainConfig(**given, origins={**origins, **dict.fromkeys(values, "fastdpo rounds")})


SET_BY_ROUNDS = {
    "datasets": "; expected the prompts in dataset_name",
    "ref_model_name_or_path": " (reference: start or previous)",
    "resume_from_checkpoint": "; start the same command again to go on",
    "overwrite_output_dir": "; start the same command again to go on",
    "push_to_hub": "; upload the last round's model",
    "eval_strategy": " (eval_prompts)",
    "do_eval": " (eval_prompts)",
}
"""Keys of a run that a round has its own values for, with what there is in their place."""
