"""The units of one call and what they ask of the head: a coefficient for every token.

A loss sees a handful of log-probabilities, so its gradient is autograd's on those few numbers; the
head only has to know `∂loss/∂logp_t`, which for most losses is the same for all tokens of a
response. Sums over a response and the loss are fp64: a response of some thousand nats has no more
than four digits behind the point in fp32, and the loss is made of differences of such sums.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .arguments import indices
from .losses import Comparisons, Constants, Loss, Responses, Scored, Tokens
from .losses.registry import Kind

Selection = slice | Tensor
"""Some of the units: a range, or indices (n,) int64."""
NONE = -1


@dataclass(frozen=True)
class Problem:
    """Everything of `linear_preference_loss` that is not the head or the hidden states."""

    targets: Tensor  # (T,) int64, negative where ignored
    response_ids: Tensor  # (T,) int64 in [0, R)
    units: Tensor  # (U, k) int64, the responses of each unit, -1 where there is none
    ref_logps: Tensor  # (R,) fp64
    response_lengths: Tensor  # (R,) fp64
    weights: Tensor  # (U,) fp64
    loss: Loss
    ref_token_logps: Tensor | None = None  # (T,) fp64
    given: Mapping[str, Tensor] = field(default_factory=dict)  # (U,) or (U, k), fp64

    @staticmethod
    def build(
        targets: Tensor,
        response_ids: Tensor,
        units: Tensor,
        ref_logps: Tensor,
        weights: Tensor | None,
        response_lengths: Tensor | None,
        loss: Loss,
        ref_token_logps: Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> "Problem":
        """With the default weights, 1/U each, and lengths, counted from `targets`. Nothing here has
        a gradient.

        Raises:
            ValueError: `response_ids` or `units` on the host that name no response.
        """
        count = ref_logps.shape[0]
        response_ids = responses_of("response_ids", response_ids, count)
        none = units == NONE if loss.kind == "group" else torch.zeros_like(units, dtype=torch.bool)
        name = "comparisons" if loss.kind in ("comparison", "step") else "units"
        units = responses_of(name, units.masked_fill(none, 0), count).masked_fill(none, NONE)
        ref = ref_logps.detach().to(targets.device, torch.float64)
        if weights is None:
            weights = ref.new_full((units.shape[0],), 1.0 / max(1, units.shape[0]))
        if response_lengths is None:
            response_lengths = _sums((targets >= 0).double(), response_ids.to(ref.device), count)
        lengths = response_lengths.detach().to(ref)
        constants = _mean_tokens(loss.kind, lengths, units.to(ref.device))
        constants |= {name: value.detach().to(ref) for name, value in (given or {}).items()}
        return Problem(
            targets,
            response_ids,
            units,
            ref,
            lengths,
            weights.detach().to(ref),
            loss,
            None if ref_token_logps is None else ref_token_logps.detach().to(ref),
            constants,
        )

    def to(self, device: torch.device) -> "Problem":
        """The same with the two index tensors, which may lie on the host, on `device`."""
        return replace(
            self,
            response_ids=self.response_ids.to(device, non_blocking=True),
            units=self.units.to(device, non_blocking=True),
        )

    def scored(
        self, logps: Tensor, selected: Selection, tokens: slice, token_logps: Tensor
    ) -> Scored:
        """What the loss sees of the units `selected`, all of whose tokens are in the range `tokens`
        with `token_logps` (t,) fp64; `logps` (R,) fp64 are their sums.
        """
        units = self.units[selected]
        given = Constants({name: value[selected] for name, value in self.given.items()})
        ref, lengths = self.ref_logps, self.response_lengths
        if self.loss.kind in ("comparison", "step"):
            pairs = _comparisons(units, logps, ref, lengths, given)
            if self.loss.ld_alpha is None:
                return pairs
            return self._discounted(pairs, units, tokens, token_logps)
        members = None
        if self.loss.kind == "group":
            members = units != NONE
            units = units.clamp(min=0)
        else:
            units = units[:, 0]
        view = Responses(logps[units], ref[units], lengths[units], given, members)
        if self.loss.kind != "tokens":
            return view
        return replace(view, tokens=self._tokens(units, tokens, token_logps))

    def total(
        self, logps: Tensor, selected: Selection, tokens: slice, stats: Mapping[str, Tensor]
    ) -> Tensor:
        """Σ weight·loss over the units `selected`, as `scored`; `stats` of the range by name."""
        token_logps = stats["logprob"]
        loss = self.loss(self.scored(logps, selected, tokens, token_logps))
        weights = self.weights[selected]
        if self.loss.use_weighting:
            aligned = (token_logps - stats["log_sum_sq_prob"]).detach().double()
            ids, counted = self.response_ids[tokens], (self.targets[tokens] >= 0).double()
            sums, count = (_sums(v, ids, len(logps)) for v in (counted * aligned, counted))
            means = sums / count.clamp(min=1)
            weights = weights * means[self.units[selected][:, :2]].sum(1).exp()
        return (weights * loss).sum()

    def loss_and_coefficients(
        self,
        tokens: slice,
        stats: Mapping[str, Tensor],
        logps: Tensor,
        selected: Selection,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`Tiles.loss_and_coefficients` in plain PyTorch, on any device, deterministic."""
        ids, token_logps = self.response_ids[tokens], stats["logprob"]
        exact = dict(stats) | {"logprob": token_logps.double()}
        add_sums(logps, exact["logprob"], ids)
        if not differentiate:
            return self.total(logps, selected, tokens, exact), None
        with _autograd_inside_an_op():
            if self.loss.by_tokens:
                leaf = exact["logprob"].detach().requires_grad_()
                loss = self.total(
                    _sums(leaf, ids, len(logps)), selected, tokens, exact | {"logprob": leaf}
                )
            else:
                leaf = logps.detach().requires_grad_()
                loss = self.total(leaf, selected, tokens, exact)
            if not loss.requires_grad:
                raise ValueError("the loss has no gradient: it detached what it saw, or ignored it")
            (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient.to(token_logps.dtype)
        return loss.detach(), gradient if self.loss.by_tokens else gradient[ids]

    def _in_order(self, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of a range by response, ignored ones last, (t,); where each response's begin
        among them and how many they are, (R,) each.
        """
        count = len(self.ref_logps)
        owners = self.response_ids[tokens].masked_fill(self.targets[tokens] < 0, count)
        counts = owners.new_zeros(count + 1).index_add_(0, owners, torch.ones_like(owners))[:count]
        return owners.sort(stable=True).indices, counts.cumsum(0) - counts, counts

    def _discounted(
        self, pairs: Comparisons, units: Tensor, tokens: slice, token_logps: Tensor
    ) -> Comparisons:
        """Comparisons in which tokens beyond the shorter response's length count `ld_alpha`."""
        alpha, reference = self.loss.ld_alpha, self.ref_token_logps
        if alpha is None or reference is None:
            raise ValueError("ld_alpha: needs ref_token_logps, the reference's of every token")
        order, first, count = self._in_order(tokens)
        shared = count[units[:, :2]].amin(1)
        both = torch.stack([token_logps, reference[tokens]])[:, order]
        before = torch.nn.functional.pad(both.cumsum(1), (1, 0))

        def tails(responses: Tensor) -> Tensor:
            begin, end = first[responses] + shared, first[responses] + count[responses]
            return (1 - alpha) * (before[:, end] - before[:, begin])

        chosen, rejected = tails(units[:, 0]), tails(units[:, 1])
        return replace(
            pairs,
            chosen_logps=pairs.chosen_logps - chosen[0],
            rejected_logps=pairs.rejected_logps - rejected[0],
            ref_chosen_logps=pairs.ref_chosen_logps - chosen[1],
            ref_rejected_logps=pairs.ref_rejected_logps - rejected[1],
            chosen_sums=pairs.chosen_logps,
        )

    def _tokens(self, responses: Tensor, tokens: slice, token_logps: Tensor) -> Tokens:
        """The tokens of one response a unit, a unit's after the other's."""
        order, first, count = self._in_order(tokens)
        lengths = count[responses]
        units = torch.arange(len(responses), device=lengths.device).repeat_interleave(lengths)
        begin = first[responses] - (lengths.cumsum(0) - lengths)
        place = order[torch.arange(len(units), device=lengths.device) + begin[units]]
        reference = self.ref_token_logps
        if reference is not None:
            reference = reference[tokens][place]
        return Tokens(token_logps[place], reference, units)


def _comparisons(
    units: Tensor, logps: Tensor, ref: Tensor, lengths: Tensor, given: Mapping[str, Tensor]
) -> Comparisons:
    win, lose, *prompt = units.unbind(1)
    return Comparisons(
        logps[win],
        logps[lose],
        ref[win],
        ref[lose],
        lengths[win],
        lengths[lose],
        given,
        prompt_logps=logps[prompt[0]] if prompt else None,
    )


def _mean_tokens(kind: Kind, lengths: Tensor, units: Tensor) -> dict[str, Tensor]:
    """What losses divide by, (U,) each, where a call is a whole batch and a whole step."""
    counted = {}
    if kind in ("comparison", "step"):
        counted["batch_chosen_tokens"] = lengths[units[:, 0]]
        if units.shape[1] > 2:
            counted["batch_sequence_tokens"] = lengths[units[:, 0]] + lengths[units[:, 2]]
    elif kind == "tokens":
        counted = dict.fromkeys(("batch_tokens", "step_tokens"), lengths[units[:, 0]])
    count = max(1, units.shape[0])
    return {
        name: (values.sum() / count).clamp(min=1).expand(units.shape[0])
        for name, values in counted.items()
    }


def scored_units(problem: Problem, token_logps: Tensor) -> Scored:
    """What the loss of a problem sees of all its units, given the log-probabilities of all tokens
    (T,), nats.
    """
    exact = token_logps.double()
    logps = _sums(exact, problem.response_ids, len(problem.ref_logps))
    return problem.scored(logps, slice(None), slice(0, len(exact)), exact)


def add_sums(total: Tensor, values: Tensor, ids: Tensor) -> None:
    """total (R,) += Σ of values (t,) by response, in place and deterministic."""
    if total.is_cuda:  # sorts, where index_add_ would use atomics
        total.index_put_((ids,), values, accumulate=True)
    else:
        total.index_add_(0, ids, values)


def _sums(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Σ of values (t,) by response, (R,)."""
    total = values.new_zeros(count)
    if values.is_cuda:
        return total.index_put((ids,), values, accumulate=True)
    return total.index_add(0, ids, values)


def responses_of(name: str, values: Tensor, count: int) -> Tensor:
    """Indices of `count` responses, as `indices`."""
    return indices(name, values, count, f"the {count} responses of ref_logps")


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """Record operations although the body of a custom operator runs below autograd."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield
