"""What each loss needs, as far as the configuration depends on it.

The table is static so that reading a configuration imports no torch; a test compares it with the
registry of `fastdpo_kernels`, whose fields these are. Losses that are registered before the
configuration is made are looked up there.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

UNITS = {"comparison": "comparisons", "response": "single responses", "group": "ranked groups"}


@dataclass(frozen=True)
class LossNeeds:
    """What a loss reads.

    Attributes:
        kind: comparison, response, tokens, group or step, as `fastdpo_kernels` registers it.
        reference: whether it compares with a reference.
        options: the keys that it reads besides `beta`.
        mismatched: whether it pairs prompts with completions of other rows, in the file's order.
    """

    kind: str = "comparison"
    reference: bool = True
    options: tuple[str, ...] = ()
    mismatched: bool = False

    @property
    def unit(self) -> str:
        """What the loss has one value for: a comparison, a response or a group."""
        return {"step": "comparison", "tokens": "response"}.get(self.kind, self.kind)


_SMOOTHED = ("label_smoothing",)
_CPO = ("cpo_alpha", "alpha")
_LABEL_WEIGHTS = ("desirable_weight", "undesirable_weight")
_GRPO = ("epsilon", "epsilon_high", "importance_sampling_level", "scale_rewards")

LOSS_NEEDS = MappingProxyType(
    {
        "sigmoid": LossNeeds(options=_SMOOTHED),
        "sigmoid_norm": LossNeeds(),
        "spin": LossNeeds(),
        "ipo": LossNeeds(),
        "hinge": LossNeeds(),
        "robust": LossNeeds(options=_SMOOTHED),
        "exo_pair": LossNeeds(options=_SMOOTHED),
        "nca_pair": LossNeeds(),
        "bco_pair": LossNeeds(),
        "sppo_hard": LossNeeds(),
        "apo_zero": LossNeeds(),
        "apo_down": LossNeeds(),
        "discopop": LossNeeds(options=("discopop_tau",)),
        "aot": LossNeeds("step", options=_SMOOTHED),
        "aot_unpaired": LossNeeds("step", options=_SMOOTHED),
        "sft": LossNeeds(reference=False),
        "orpo": LossNeeds(reference=False),
        "simpo": LossNeeds(reference=False, options=(*_SMOOTHED, "simpo_gamma", *_CPO)),
        "cpo": LossNeeds(reference=False, options=(*_SMOOTHED, *_CPO)),
        "cpo_hinge": LossNeeds(reference=False, options=_CPO),
        "cpo_ipo": LossNeeds(reference=False, options=_CPO),
        "kto": LossNeeds("response", options=_LABEL_WEIGHTS, mismatched=True),
        "apo_zero_unpaired": LossNeeds("response", options=_LABEL_WEIGHTS),
        "bco": LossNeeds("response", options=_LABEL_WEIGHTS),
        "sppo": LossNeeds("response"),
        "grpo": LossNeeds("tokens", options=_GRPO),
        "bnpo": LossNeeds("tokens", options=_GRPO),
        "dapo": LossNeeds("tokens", options=_GRPO),
        "dr_grpo": LossNeeds("tokens", options=(*_GRPO, "max_completion_length")),
        "listwise": LossNeeds("group"),
    }
)

WITHOUT_BETA = ("grpo", "bnpo", "dapo", "dr_grpo")
"""Losses of which beta 0 leaves something: their penalty is one term of two."""

WITH_DIVERGENCE = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
)
"""Losses of reward differences, in which the normaliser of any f-divergence cancels (as in TRL)."""

OPTIONS = (
    "label_smoothing",
    "discopop_tau",
    "desirable_weight",
    "undesirable_weight",
    "cpo_alpha",
    "simpo_gamma",
    "alpha",
    "epsilon",
    "epsilon_high",
    "scale_rewards",
    "importance_sampling_level",
    "max_completion_length",
)
"""Keys that some losses read and others do not."""


def loss_of(name: str) -> LossNeeds | None:
    """What the loss of this name needs; None where nobody knows it."""
    registry: Any = sys.modules.get("fastdpo_kernels.losses.registry")
    if name in LOSS_NEEDS or registry is None or name not in registry.LOSSES:
        return LOSS_NEEDS.get(name)
    loss = registry.get_loss(name)
    return LossNeeds(loss.kind, loss.reference, loss.options, loss.mismatched)


def unread(names: Sequence[str]) -> list[str]:
    """Those of `OPTIONS` that no loss of the mix reads; none where a loss is unknown."""
    losses = [loss_of(name) for name in names]
    read = {option for loss in losses if loss for option in loss.options}
    return [option for option in OPTIONS if option not in read] if all(losses) else []


CPO_KEYS = ("cpo_alpha", "simpo_gamma", "alpha")
"""Keys that only TRL's CPO trainer has."""

CPO_ORIGIN = "as TRL's CPO trainer reads it"

_CPO_NAMES = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo"}


def as_cpo(losses: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """The keys to change where a file is one of TRL's CPO trainer, which has names of DPO's losses
    for its own; empty where it is not.

    Args:
        losses: the entries of `loss_type`.
        given: those of `CPO_KEYS` that were given.
    """
    if list(losses) == ["alphapo"]:
        return {"loss_type": ["simpo"], "cpo_alpha": 0.0}
    if given and len(losses) == 1 and losses[0] in _CPO_NAMES:
        return {"loss_type": [_CPO_NAMES[losses[0]]]}
    return {}
