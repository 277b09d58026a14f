"""The training objective: one registered loss, or a weighted mix, with its options.

The losses themselves live in `fastdpo_kernels.losses`, where a new one is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import torch
from fastdpo_kernels.losses import LOSSES, Comparisons, Loss, RegisteredLoss, Scored, get_loss
from torch import Tensor

from .config import TrainConfig
from .errors import ConfigError

_OPTIONS = (
    *("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"),
    *("use_weighting", "discopop_tau", "desirable_weight", "undesirable_weight", "cpo_alpha"),
    *("simpo_gamma", "alpha", "epsilon", "epsilon_high", "importance_sampling_level"),
)


_OTHER_NAMES = {"dpo": ["sigmoid"], "rpo": ["sft"], "gspo": ["grpo"]}
"""What people call a loss elsewhere."""


@dataclass(frozen=True)
class TrainingLoss:
    """Σ_k weight_k · loss_k of each unit.

    Raises:
        ConfigError: an unknown loss, or another number of weights than of losses.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """Of the losses, by their names."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in LOSSES]
        if unknown:
            meant = _OTHER_NAMES.get(unknown[0]) or get_close_matches(unknown[0], LOSSES, n=1)
            hint = f" (is it {meant[0]}?)" if meant else ""
            raise ConfigError(
                f"loss_type: unknown {unknown[0]!r}{hint}; known: {', '.join(sorted(LOSSES))}"
            )
        if len(self.weights) != len(self.names):
            raise ConfigError(
                f"loss_weights: expected {len(self.names)} numbers, one per loss, got "
                f"{len(self.weights)}"
            )
        first = [loss for loss in self.losses if loss.kind == "step" or loss.terms is not None]
        if len(first) > 1 and any(loss.terms is not None for loss in first):
            raise ConfigError(
                "loss_type: expected one loss with terms of its batch, which cannot be mixed with "
                "another that scores the step first"
            )

    @cached_property
    def losses(self) -> tuple[RegisteredLoss, ...]:
        """The losses that are added up."""
        return tuple(map(get_loss, self.names))

    @property
    def unit(self) -> Literal["comparison", "response", "group"]:
        """What it has one value for."""
        return self.losses[0].unit

    @property
    def whole_step(self) -> bool:
        """Whether a step has to be scored before anything is known of its gradient."""
        return any(loss.kind == "step" for loss in self.losses)

    @property
    def terms(self) -> RegisteredLoss | None:
        """The loss that is given constants of the scored batch, if one is."""
        return next((loss for loss in self.losses if loss.terms is not None), None)

    @property
    def scores_first(self) -> bool:
        """Whether a scoring pass comes before the rows that are trained on."""
        return self.whole_step or self.terms is not None

    @property
    def mismatched(self) -> bool:
        """Whether the scoring pass is over mismatched responses (KTO)."""
        return self.terms is not None and self.terms.mismatched

    @property
    def prompt(self) -> bool:
        """Whether the prompt's own tokens are scored."""
        return any(loss.prompt for loss in self.losses)

    @property
    def reference(self) -> bool:
        """Whether reference log-probabilities are read."""
        return any(loss.reference for loss in self.losses)

    @property
    def by_tokens(self) -> bool:
        """Whether the reference's log-probability of every token is read."""
        return self.loss.by_tokens

    @cached_property
    def loss(self) -> Loss:
        """The function of what the units are seen as."""
        options, name = dict(self.options), self.names[0]
        if self.weights == (1.0,):  # by its name, so that a kernel that knows it can be used
            return Loss.named(name, **options)
        kind = "step" if self.whole_step else self.losses[0].kind
        of_all = {key: options.pop(key, None) for key in ("ld_alpha", "use_weighting")}
        parts = [Loss.named(name, **options) for name in self.names]

        def mix(scored: Scored) -> Tensor:
            terms = [w * part(scored) for w, part in zip(self.weights, parts, strict=True)]
            return torch.stack(terms).sum(0)

        weighted = bool(of_all["use_weighting"])
        return Loss(mix, kind=kind, ld_alpha=of_all["ld_alpha"], use_weighting=weighted)

    def describe(self) -> str:
        """Its names, with the weights of a mix."""
        if self.weights == (1.0,):
            return self.names[0]
        terms = zip(self.weights, self.names, strict=True)
        return " + ".join(f"{weight:g} {name}" for weight, name in terms)

    def measure(self, scored: Scored) -> dict[str, Tensor]:
        """What is reported of every unit, by TRL's names."""
        found: dict[str, Tensor] = {}
        for loss in self.losses:
            found = loss.measure(scored, **self.options) | found
        return found

    def at_reference(self) -> float | None:
        """The loss of a comparison while the policy still equals the reference: log 2 for DPO; None
        where it depends on more.
        """
        known = self.unit == "comparison" and all(loss.reference for loss in self.losses)
        if not known or self.loss.use_weighting:
            return None
        zero = torch.zeros(1, dtype=torch.float64)
        try:
            return float(self.loss(Comparisons(zero, zero, zero, zero, zero + 1, zero + 1)))
        except KeyError:  # of a constant that the data or the batch gives
            return None


def make_loss(
    loss_types: Sequence[str], *, loss_weights: Sequence[float] | None = None, **options: Any
) -> TrainingLoss:
    """The mix of these losses; weights default to 1.

    Raises:
        ConfigError: see `TrainingLoss`.
    """
    weights = (1.0,) * len(loss_types) if loss_weights is None else tuple(loss_weights)
    return TrainingLoss(tuple(loss_types), weights, options)


def loss_of(config: TrainConfig) -> TrainingLoss:
    """The loss that a configuration asks for."""
    options = {name: getattr(config, name) for name in _OPTIONS}
    if config.cpo_alpha is None:
        del options["cpo_alpha"]
    options["max_completion_length"] = config.max_completion_length or config.max_length or 1024
    try:
        return make_loss(config.loss_type, loss_weights=config.loss_weights, **options)
    except ConfigError as error:  # which does not know where the key stood
        raise config.error("loss_type", str(error).removeprefix("loss_type: ")) from error
