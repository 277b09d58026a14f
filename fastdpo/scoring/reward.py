"""A policy as a reward function for other trainers."""

import logging
from collections.abc import Sequence
from typing import Any

from ..config import TrainConfig
from ..data.columns import TEMPLATE_FIELDS
from ..data.write import as_dataset
from ..errors import DataError
from .responses import load_response_scorer
from .rows import make_encoder, windows

logger = logging.getLogger(__name__)


class RewardModel:
    """The implicit reward β (log π(y|x) − log π_ref(y|x)) of a policy (Rafailov et al. 2023,
    arXiv:2305.18290, eq. 5, up to a constant of the prompt), as TRL's `GRPOTrainer` calls
    `reward_funcs`.

        trainer = GRPOTrainer(model, reward_funcs=RewardModel("out", "Qwen/Qwen3-0.6B"), ...)

    Args:
        policy: a directory or hub name of a model, or of an adapter.
        reference: another model; None takes an adapter's base.
        beta: the factor, in rewards a nat.
        keys: further keys of `fastdpo train`, such as `dtype`, `use_cpu` or `max_length`.

    Raises:
        FastDPOError: a model that cannot be loaded, or no reference.
    """

    def __init__(
        self, policy: str, reference: str | None = None, beta: float = 0.1, **keys: Any
    ) -> None:
        config = TrainConfig(
            model_name_or_path=policy, ref_model_name_or_path=reference, beta=beta, **keys
        )
        self.scorer = load_response_scorer(config)
        if self.scorer.reference is None:
            raise config.error(
                "ref_model_name_or_path",
                f"expected a model, since {policy} is no adapter whose base could be the reference",
            )
        self.__name__ = "implicit_reward"  # which TRL logs it under
        self._said: set[str] = set()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The reward of each completion to the prompt at the same place: texts, or lists of
        messages; None, which TRL leaves out, where the prompt alone reaches `max_length`. A
        completion beyond that is scored up to there. Of other columns `tools` and
        `chat_template_kwargs` go to the chat template.

        Raises:
            DataError: naming the first completion that cannot be scored; lists of other lengths.
        """
        if len(prompts) != len(completions):
            raise DataError(
                f"expected as many completions as prompts, got {len(completions)} for "
                f"{len(prompts)}"
            )
        if not prompts:
            return []
        beside = {name: columns[name] for name in TEMPLATE_FIELDS if any(columns.get(name, ()))}
        values = [prompts, [[one] for one in completions], *beside.values()]
        names = ("prompt", "responses", *beside)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
        dataset = as_dataset(rows)
        encoder = make_encoder(
            dataset,
            self.scorer.tokenizer,
            "completions",
            self.scorer.config.max_length,
            self.scorer.vocab_size,
        )
        rewards: list[float | None] = []
        for groups, scored in windows(dataset, encoder):
            scores = self.scorer(groups)
            self._say("prompts reach {}, and have no reward", [row.too_long for row in scored])
            self._say("completions are cut at {}", [row.cut for row in scored])
            for row in scored:
                if row.too_long:
                    rewards.append(None)
                    continue
                if row.reason is not None:
                    raise DataError(f"completions, row {len(rewards) + 1}: {row.reason}")
                found = scores[row.group]
                assert found.ref_logps is not None
                place = row.places[0]
                gain = found.logps[place] - found.ref_logps[place]
                rewards.append(float(self.scorer.config.beta * gain))
        return rewards

    def _say(self, what: str, holds: Sequence[bool]) -> None:
        """Say for how many of a batch this holds, the first time that it does."""
        if any(holds) and what not in self._said:
            self._said.add(what)
            limit = f"max_length, {self.scorer.config.max_length} tokens"
            logger.warning(f"{self.__name__}: {sum(holds)} {what.format(limit)}")
