"""The registry of losses: `loss_type` by name.

To add a loss, write a function of what it sees that returns one value a unit, and register it:

    @register_loss("my_loss")
    def my_loss(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
        return torch.relu(1 - beta * pairs.margins)

It is then a valid `loss_type` of the trainer and of `linear_preference_loss`. The options that it
takes are found by their names. What it sees depends on its kind:

| kind | argument | one value a | gradients are formed |
|---|---|---|---|
| comparison | `Comparisons` | comparison | in one pass over the head |
| response | `Responses` | response | in one pass |
| tokens | `Responses` with `tokens` | response | in one pass |
| group | `Responses` of shape (U, G) | group | in one pass |
| step | `Comparisons` of a whole batch | comparison | after a pass that scores the step |
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

from torch import Tensor

from .divergences import score_of
from .scored import Comparisons, Responses, Scored

Kind = Literal["comparison", "response", "tokens", "group", "step"]
COLUMNS = ("label", "advantage", "win_rate", "rank")
"""What a loss may need in `given` of the data."""
LossFunction = Callable[..., Tensor]
Metrics = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss by its function and what has to be known to feed it.

    Attributes:
        function: of `Comparisons` or `Responses` and its options, to one value a unit.
        kind: what it sees and when its gradient is known.
        reference: whether it reads reference log-probabilities.
        columns: what it needs in `given` of the data, any of: "label", "advantage", "win_rate",
            "rank".
        terms: constants of a batch that are known once it has been scored: a function of the
            `Responses` of the batch and the options, to scalars that are put into `given`.
        running: those of them of which the loss is given the running mean over all batches.
        mismatched: whether those responses are each prompt's with the completion of the row
            before, in place of its own.
        prompt: whether the prompt's own tokens are scored too.
        divergences: whether it reads differences of scores, so that any f-divergence may give them
            (`f_divergence_type`).
        metrics: what is reported of every unit, by TRL's names.
    """

    function: LossFunction
    kind: Kind = "comparison"
    reference: bool = True
    columns: tuple[str, ...] = ()
    terms: Callable[..., dict[str, Tensor]] | None = None
    running: tuple[str, ...] = ()
    mismatched: bool = False
    prompt: bool = False
    divergences: bool = False
    metrics: Metrics | None = None

    @property
    def unit(self) -> Literal["comparison", "response", "group"]:
        """What the loss has one value for."""
        if self.kind == "step":
            return "comparison"
        return "response" if self.kind == "tokens" else self.kind

    @property
    def equation(self) -> str:
        """The equation of its docstring, the second paragraph up to the shape; "" without one."""
        paragraphs = inspect.cleandoc(self.function.__doc__ or "").split("\n\n")
        text = " ".join(paragraphs[1].split()) if len(paragraphs) > 1 else ""
        return re.split(r",(?: shape)? \([CU],\)", text)[0]

    @property
    def paper(self) -> str:
        """The number on arXiv that its docstring names first; "" without one."""
        found = re.search(r"arXiv:(\d+\.\d+)", self.function.__doc__ or "")
        return found[1] if found else ""

    @cached_property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the function takes."""
        return _options(self.function)

    def __call__(self, scored: Any, **options: Any) -> Tensor:
        return self.function(scored, **_taken(self.function, options))

    def batch_terms(self, scored: Any, **options: Any) -> dict[str, Tensor]:
        """The `terms` of a batch."""
        assert self.terms is not None
        return self.terms(scored, **_taken(self.terms, options))

    def measure(self, scored: Any, **options: Any) -> dict[str, Tensor]:
        """What is reported of every unit."""
        metrics = self.metrics
        if metrics is None:
            metrics = pair_metrics if self.unit == "comparison" else response_metrics
        return metrics(scored, **_taken(metrics, options))


LOSSES: dict[str, RegisteredLoss] = {}


def _options(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(list(inspect.signature(function).parameters)[1:])


def _taken(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a function takes: all of them where it has `**options`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    return {name: options[name] for name in _options(function) if name in options}


def register_loss(
    name: str, kind: Kind = "comparison", **about: Any
) -> Callable[[LossFunction], LossFunction]:
    """Make a function available as `loss_type=name`; `about` are fields of `RegisteredLoss`."""
    columns = about.get("columns", ())
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise ValueError(f"columns: expected any of {', '.join(COLUMNS)}, got {unknown[0]!r}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")

    def add(function: LossFunction) -> LossFunction:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already")
        LOSSES[name] = RegisteredLoss(function, kind, **about)
        return function

    return add


def get_loss(name: str) -> RegisteredLoss:
    """Look up a registered loss; an unknown name is a `ValueError` that lists the known ones."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; known: {', '.join(sorted(LOSSES))}")
    found = LOSSES[name]
    return found if isinstance(found, RegisteredLoss) else RegisteredLoss(found)


def pair_metrics(pairs: Comparisons, *, beta: float) -> dict[str, Tensor]:
    """Rewards β·log-ratio and log-probabilities, as TRL's DPO trainer reports them."""
    return {
        "rewards/chosen": beta * pairs.chosen_logratios,
        "rewards/rejected": beta * pairs.rejected_logratios,
        "logps/chosen": pairs.chosen_logps,
        "logps/rejected": pairs.rejected_logps,
    }


def response_metrics(responses: Responses, *, beta: float) -> dict[str, Tensor]:
    """Rewards β·log-ratio and log-probabilities."""
    return {"rewards": beta * responses.logratios, "logps": responses.logps}


_OF_COMPARISONS = ("ld_alpha", "use_weighting")
_OF_SCORES = ("f_divergence_type", "f_alpha_divergence_coef")


def check_options(name: str, options: Iterable[str]) -> None:
    """`ValueError` for an option that the registered loss of this name does not take."""
    registered = get_loss(name)
    known = {"beta", "label_smoothing", *registered.options}
    if registered.unit == "comparison":
        known |= {*_OF_COMPARISONS, *_OF_SCORES}
    taken = {name for name in options if name in known or _taken(registered.function, {name: 0})}
    unknown = [option for option in options if option not in taken]
    if unknown:
        raise ValueError(f"{name}: no option {unknown[0]!r}; it takes {', '.join(sorted(known))}")


def _refuse_foreign(
    name: str, registered: RegisteredLoss, own: Mapping[str, Any], diverges: bool
) -> None:
    """`ValueError` for options that are given and say nothing to this loss."""
    if own and registered.unit != "comparison":
        raise ValueError(f"{next(iter(own))}: of losses of comparisons alone, got {name}")
    if diverges and not registered.divergences:
        known = sorted(key for key in LOSSES if get_loss(key).divergences)
        raise ValueError(
            f"f_divergence_type: {name} has reverse_kl only; {', '.join(known)} have others"
        )


@dataclass(frozen=True)
class Loss:
    """A loss with its options: a function from what it sees to one value a unit.

    Attributes:
        function: of `Comparisons` or `Responses`.
        kind: as in `RegisteredLoss`.
        name: None for one that is not registered; a kernel that knows the name may compute it
            from `beta` and `label_smoothing`.
        ld_alpha: what a token of a response counts that stands beyond the length of the shorter
            one of its comparison; None for 1 (LD-DPO, Liu et al. 2024, arXiv:2409.06411).
        use_weighting: whether losses are weighted by how probable their responses are (WPO, Zhou
            et al. 2024, arXiv:2406.11827, eq. 2).
        plain: whether `name`, `beta` and `label_smoothing` say all there is to say.
    """

    function: Callable[[Any], Tensor]
    name: str | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    kind: Kind = "comparison"
    ld_alpha: float | None = None
    use_weighting: bool = False
    plain: bool = False

    def __call__(self, scored: Scored) -> Tensor:
        loss, units = self.function(scored), _units(scored)
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        if shape != (units,):  # which weights would be broadcast to
            subject = "loss_function" if self.name is None else f"loss {self.name!r}"
            unit = {"step": "comparison", "tokens": "response"}.get(self.kind, self.kind)
            raise ValueError(
                f"{subject}: expected a function that returns ({units},), one loss a {unit}, got "
                f"{shape}"
            )
        return loss

    @property
    def by_tokens(self) -> bool:
        """Whether sums over responses are not enough."""
        return self.kind == "tokens" or self.ld_alpha is not None

    @staticmethod
    def named(name: str, *, beta: float, label_smoothing: float = 0.0, **options: Any) -> "Loss":
        """A registered loss; `ValueError` as `get_loss`, and for an option of other losses."""
        own = {key: options.pop(key, None) for key in _OF_COMPARISONS}
        own = {key: value for key, value in own.items() if value is not None and value is not False}
        registered, score = get_loss(name), score_of(options)
        _refuse_foreign(name, registered, own, score is not None)
        plain = not (own or _taken(registered.function, options))
        options |= {"beta": beta, "label_smoothing": label_smoothing}
        function: Callable[[Any], Tensor] = partial(registered, **options)
        loss = Loss(function, name, beta, label_smoothing, registered.kind, plain=plain, **own)
        return loss if score is None else loss.with_score(score)

    def of_comparisons(self) -> "Loss":
        """This loss; `ValueError` unless it is one of comparisons, which needs two responses."""
        if self.kind not in ("comparison", "step"):
            raise ValueError(
                f"loss_type: expected a loss of comparisons, got {self.name!r}, a loss of kind "
                f"{self.kind}; linear_loss takes those"
            )
        return self

    def with_score(self, score: Callable[[Tensor], Tensor]) -> "Loss":
        """The same loss of a `score` of the log-ratios; no kernel knows it by its name."""

        def scored_otherwise(pairs: Comparisons) -> Tensor:
            return self.function(replace(pairs, score=score))

        return replace(self, function=scored_otherwise, name=None, plain=False)


def _units(scored: Scored) -> int:
    values = scored.chosen_logps if isinstance(scored, Comparisons) else scored.logps
    return values.shape[0]
