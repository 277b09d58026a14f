"""What a loss sees: log-probabilities of responses, the reference's, and what the data says.

A loss sees no model, no tokens and no packing. The constants that the data or the batch add are in
`given`, by name. Every tensor is fp64 (or fp32), one entry a unit: a comparison, a response, or a
group of responses, as the loss was registered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


class Constants(dict[str, Tensor]):
    """Constants of units by name; a loss that reads one which is not there is a `ValueError`."""

    def __missing__(self, name: str) -> Tensor:
        there = ", ".join(self) or "nothing"
        raise ValueError(f"given: the loss reads {name!r}, one number a unit, got {there}")


@dataclass(frozen=True)
class Comparisons:
    """Two responses each: every field has shape (C,).

    `*_logps` are summed over the response's tokens, in nats; `*_lengths` count the response's
    tokens. Without a reference its log-probabilities are 0.

    Attributes:
        given: further constants (C,), such as "batch_chosen_tokens", the tokens of a chosen
            response averaged over the batch that the comparison stands in.
        score: of a log-ratio, in the place of the log-ratio itself (`f_divergence_type`).
        chosen_sums: `chosen_logps` before `ld_alpha` discounted a part of it; None where nothing
            was.
        prompt_logps: of the prompt's own tokens; None where they are not scored.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)
    score: Callable[[Tensor], Tensor] | None = None
    chosen_sums: Tensor | None = None
    prompt_logps: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        """log π(y_w|x) − log π_ref(y_w|x), shape (C,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log π(y_l|x) − log π_ref(y_l|x), shape (C,)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_scores(self) -> Tensor:
        """The chosen log-ratios, or the `score` of them, shape (C,)."""
        ratios = self.chosen_logratios
        return ratios if self.score is None else self.score(ratios)

    @property
    def rejected_scores(self) -> Tensor:
        """The rejected log-ratios, or the `score` of them, shape (C,)."""
        ratios = self.rejected_logratios
        return ratios if self.score is None else self.score(ratios)

    @property
    def margins(self) -> Tensor:
        """Difference of the two scores, shape (C,); times β it is the reward margin."""
        return self.chosen_scores - self.rejected_scores

    @property
    def chosen_averages(self) -> Tensor:
        """log π(y_w|x) averaged over the response's tokens, shape (C,)."""
        return self.chosen_logps / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_averages(self) -> Tensor:
        """log π(y_l|x) averaged over the response's tokens, shape (C,)."""
        return self.rejected_logps / self.rejected_lengths.clamp(min=1)

    @property
    def chosen_nll(self) -> Tensor:
        """−log π(y_w|x) over the tokens of a chosen response as the batch has them on average,
        shape (C,): its mean over a batch is the mean over the batch's tokens.
        """
        sums = self.chosen_logps if self.chosen_sums is None else self.chosen_sums
        return -sums / self.given["batch_chosen_tokens"]

    @property
    def sequence_nll(self) -> Tensor:
        """As `chosen_nll`, of the prompt and the chosen response: −log π(x, y_w), shape (C,)."""
        assert self.prompt_logps is not None
        sums = self.chosen_logps if self.chosen_sums is None else self.chosen_sums
        return -(self.prompt_logps + sums) / self.given["batch_sequence_tokens"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of some units, one after the other: (n,) log-probabilities of policy and
    reference, nats, and the unit of each token, in [0, U); `reference` is None without one.
    """

    logps: Tensor
    reference: Tensor | None
    units: Tensor

    @property
    def ref_logps(self) -> Tensor:
        """The reference's log-probabilities (n,); a `ValueError` without them."""
        if self.reference is None:
            raise ValueError("the loss needs ref_token_logps, the reference's of every token")
        return self.reference

    def sums(self, values: Tensor, count: int) -> Tensor:
        """Σ of values (n,) over the tokens of each of `count` units, (U,)."""
        return values.new_zeros(count).index_add(0, self.units, values)


@dataclass(frozen=True)
class Responses:
    """One response each: every field has shape (U,). For a loss of groups, (U, G): a group a line.

    Attributes:
        logps: summed over the response's tokens, nats.
        ref_logps: the reference's; 0 without one.
        lengths: tokens of the response.
        given: further constants of that shape, such as "label", "score", "kl".
        members: (U, G) bool, where a line has a response; None where no unit is a group.
        tokens: the responses token by token, for a loss of tokens.
    """

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)
    members: Tensor | None = None
    tokens: Tokens | None = None

    @property
    def logratios(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x)."""
        return self.logps - self.ref_logps


Scored = Comparisons | Responses
