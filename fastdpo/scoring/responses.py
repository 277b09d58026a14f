"""Log-probabilities and implicit rewards of responses, in the packed rows of training and without
a gradient.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..data.batch import make_batch
from ..data.groups import Group
from ..data.plan import part_tokens, reference_budget, reference_rows, row_budget
from ..model.adapter import adopt_adapter
from ..model.load import (
    check_model_files,
    load_model_config,
    load_tokenizer,
    with_pad_token,
)
from ..model.load_scorer import load_scorer
from ..model.paths import run_device
from ..model.place import find_model
from ..model.precision import choose_precision
from ..model.scorer import Scorer
from ..training.online import OnlineReference
from .measures import Values

logger = logging.getLogger(__name__)

_LARGER_ROWS = 4


@dataclass(frozen=True)
class GroupScores:
    """What is measured of the responses of a group, each (R,).

    Attributes:
        logps: log-probabilities summed over tokens, nats, fp64.
        tokens: scored tokens, int64.
        ref_logps: the reference's; None without one.
    """

    logps: np.ndarray
    tokens: np.ndarray
    ref_logps: np.ndarray | None = None

    def of(self, places: Sequence[int]) -> "GroupScores":
        """Those of the responses at these places."""
        kept = list(places)
        reference = None if self.ref_logps is None else self.ref_logps[kept]
        return GroupScores(self.logps[kept], self.tokens[kept], reference)

    def values(self, beta: float) -> Values:
        """What the responses are compared by: `reward` with a reference, `logp`, and
        `logp_per_token`.
        """
        values = {}
        if self.ref_logps is not None:
            values["reward"] = beta * (self.logps - self.ref_logps)
        values["logp"] = self.logps
        values["logp_per_token"] = self.logps / np.maximum(self.tokens, 1)
        return values


@dataclass
class ResponseScorer:
    """A policy, its tokenizer, and the reference that its implicit rewards are measured from:
    r(x, y) = β (log π(y|x) − log π_ref(y|x)) (Rafailov et al. 2023, arXiv:2305.18290, eq. 5, up to
    a constant of the prompt).
    """

    config: TrainConfig
    tokenizer: Any
    policy: Scorer
    reference: OnlineReference | None
    vocab_size: int | None

    @property
    def measured_from(self) -> str:
        """What the reference is, in words."""
        if self.reference is None:
            return "none: log-probabilities alone"
        if self.reference.adapter_off:
            return "the policy with its adapter off"
        return str(self.config.ref_model_name_or_path)

    def __call__(self, groups: Sequence[Group]) -> list[GroupScores]:
        """The scores of every response of every group."""
        logps, reference = self._logps(groups, self.policy), None
        if self.reference is not None:
            with self.reference.as_it_was():
                reference = self._logps(groups, self.reference.scorer)
        return [
            GroupScores(
                logps[i],
                np.array([group.scored_tokens(r) for r in range(len(group.responses))], np.int64),
                None if reference is None else reference[i],
            )
            for i, group in enumerate(groups)
        ]

    def _row_tokens(self, groups: Sequence[Group]) -> int:
        """Tokens of a row at most: as many as the largest group has, up to four times those of a
        row of training, as prompts of groups that are split are computed more than once.
        """
        layout, kind = self.policy.layout.name, self.policy.device.type
        budget = reference_budget(row_budget(self.config, kind), kind)
        if self.config.max_tokens_per_batch is not None:
            return budget
        whole = (part_tokens(g, range(len(g.responses)), layout) for g in groups)
        return max(budget, min(_LARGER_ROWS * budget, max(whole, default=0)))

    def _logps(self, groups: Sequence[Group], scorer: Scorer) -> list[np.ndarray]:
        found = [np.zeros(len(group.responses)) for group in groups]
        layout, device = scorer.layout.name, scorer.device
        budget = self._row_tokens(groups)
        wanted = [(i, r) for i, group in enumerate(groups) for r in range(len(group.responses))]
        for window in reference_rows(groups, wanted, max_tokens=budget, layout=layout):
            for row in window:
                batch = make_batch(groups, row, layout).to(device)
                values = scorer.response_logps(batch).cpu().numpy()
                places = [(part.group, r) for part in row for r in part.responses]
                for (index, response), value in zip(places, values, strict=True):
                    found[index][response] = value
        return found


def load_response_scorer(
    config: TrainConfig, model: Any = None, tokenizer: Any = None, *, referred: bool = True
) -> ResponseScorer:
    """Policy and, if `referred`, reference that a configuration names, on the device at hand; an
    adapter stays one, and its base is the reference where none is named.

    Raises:
        FastDPOError: a model that cannot be loaded or scored with.
    """
    if model is None:
        check_model_files(config)
        if find_model(config).adapter is not None and not config.use_peft:
            config = config.choose("the adapter", use_peft=True)
        config = adopt_adapter(config)
    model_config = load_model_config(config) if model is None else model.config
    tokenizer = with_pad_token(load_tokenizer(config) if tokenizer is None else tokenizer)
    device = run_device(config)
    autocast, reason = choose_precision(config.bf16, device)
    precision = "bf16 autocast" if autocast else config.dtype
    logger.info(f"precision: {precision} on {device.type} ({reason})")
    policy = load_scorer(config, device, autocast, model=model)
    policy.model.eval()
    reference = None
    if referred and config.ref_model_name_or_path:
        reference = OnlineReference(
            load_scorer(config, device, autocast, config.ref_model_name_or_path)
        )
    elif referred and hasattr(policy.model, "peft_config"):
        reference = OnlineReference(policy, adapter_off=True)
    vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
    scorer = ResponseScorer(config, tokenizer, policy, reference, vocab_size)
    logger.info(f"reference: {scorer.measured_from}")
    return scorer
