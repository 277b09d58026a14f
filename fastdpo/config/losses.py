"""What each loss reads, as far as the configuration depends on it.

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
class LossTraits:
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

LOSS_TRAITS = MappingProxyType(
    {
        "sigmoid": LossTraits(options=_SMOOTHED),
        "sigmoid_norm": LossTraits(),
        "spin": LossTraits(),
        "ipo": LossTraits(),
        "hinge": LossTraits(),
        "robust": LossTraits(options=_SMOOTHED),
        "exo_pair": LossTraits(options=_SMOOTHED),
        "nca_pair": LossTraits(),
        "bco_pair": LossTraits(),
        "sppo_hard": LossTraits(),
        "apo_zero": LossTraits(),
        "apo_down": LossTraits(),
        "discopop": LossTraits(options=("discopop_tau",)),
        "aot": LossTraits("step", options=_SMOOTHED),
        "aot_unpaired": LossTraits("step", options=_SMOOTHED),
        "sft": LossTraits(reference=False),
        "orpo": LossTraits(reference=False),
        "simpo": LossTraits(reference=False, options=(*_SMOOTHED, "simpo_gamma", *_CPO)),
        "cpo": LossTraits(reference=False, options=(*_SMOOTHED, *_CPO)),
        "cpo_hinge": LossTraits(reference=False, options=_CPO),
        "cpo_ipo": LossTraits(reference=False, options=_CPO),
        "kto": LossTraits("response", options=_LABEL_WEIGHTS, mismatched=True),
        "apo_zero_unpaired": LossTraits("response", options=_LABEL_WEIGHTS),
        "bco": LossTraits("response", options=_LABEL_WEIGHTS),
        "sppo": LossTraits("response"),
        "grpo": LossTraits("tokens", options=_GRPO),
        "bnpo": LossTraits("tokens", options=_GRPO),
        "dapo": LossTraits("tokens", options=_GRPO),
        "dr_grpo": LossTraits("tokens", options=(*_GRPO, "max_completion_length")),
        "listwise": LossTraits("group"),
    }
)

WITHOUT_BETA = ("grpo", "bnpo", "dapo", "dr_grpo")
"""Losses of which beta 0 leaves something: their penalty is one term of two."""

WITH_BATCH_TERMS = (
    *("kto", "aot", "aot_unpaired", "sft", "orpo", "bnpo"),
    *("cpo", "cpo_hinge", "cpo_ipo", "simpo"),
)
"""Losses that take something from the batch that a unit stands in."""

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


def traits_of(name: str) -> LossTraits | None:
    """What the loss of this name reads; None where nobody knows it."""
    registry: Any = sys.modules.get("fastdpo_kernels.losses.registry")
    if name in LOSS_TRAITS or registry is None or name not in registry.LOSSES:
        return LOSS_TRAITS.get(name)
    loss = registry.get_loss(name)
    return LossTraits(loss.kind, loss.reference, loss.options, loss.mismatched)


def unread(names: Sequence[str]) -> list[str]:
    """Those of `OPTIONS` that no loss of the mix reads; none where a loss is unknown."""
    losses = [traits_of(name) for name in names]
    read = {option for loss in losses if loss for option in loss.options}
    return [option for option in OPTIONS if option not in read] if all(losses) else []


KTO_KEYS = ("desirable_weight", "undesirable_weight")
"""Keys that only TRL's KTO trainer has."""

KTO_ORIGIN = "as TRL's KTO trainer reads it"

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
