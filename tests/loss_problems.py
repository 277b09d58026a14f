"""Units of every kind over one set of packed responses, and their loss from full fp64 logits.

Written from the losses' own definitions: neither the naive backend nor `Problem` has a part in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastdpo_kernels import LOSSES, Comparisons, Responses, linear_loss
from fastdpo_kernels.losses import Tokens
from torch import Tensor

LENGTHS = (5, 3, 0, 11, 4, 4, 6, 3, 2)
"""Tokens of each response: one has none, one is longer than a tile; the last two are prompts."""
IGNORED = (1, 6, 10, 24, 33)
PAIRS = ((0, 1), (0, 3), (3, 1), (4, 5), (2, 6), (3, 4))
PROMPTS = ((0, 1, 7), (0, 3, 7), (3, 1, 7), (4, 5, 8), (6, 5, 8))
SINGLES = (0, 1, 2, 3, 5, 6, 3)
GROUPS = ((0, 1, 3, -1), (4, 5, -1, -1), (-1, -1, -1, -1), (2, 6, 1, 0))
UNITS = {
    "comparison": PAIRS,
    "step": PAIRS,
    "response": SINGLES,
    "tokens": SINGLES,
    "group": GROUPS,
}
OPTIONS = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "discopop_tau": 0.2,
    "simpo_gamma": 0.4,
    "cpo_alpha": 0.7,
    "alpha": 0.25,
    "desirable_weight": 0.8,
    "undesirable_weight": 1.3,
    "epsilon": 0.2,
    "epsilon_high": 0.3,
    "max_completion_length": 9,
}


@dataclass
class Task:
    """What `linear_loss` is given, on the CPU in fp64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    response_ids: Tensor
    units: Tensor
    ref_token_logps: Tensor
    unit_weights: Tensor
    given: dict[str, Tensor]
    kind: str
    head: dict[str, float] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        return self.targets != -100

    def sums(self, values: Tensor) -> Tensor:
        """Of values (T,), over the scored tokens of each response."""
        total = values.new_zeros(len(LENGTHS))
        return total.index_add(0, self.response_ids, values.where(self.valid, 0))

    @property
    def lengths(self) -> Tensor:
        return self.sums(torch.ones_like(self.ref_token_logps))


def make_task(kind: str = "comparison", *, prompt: bool = False, seed: int = 0, **head) -> Task:
    """Random numbers that bf16 can hold where they are hidden states, a weight or a bias."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().double()

    x, w, b = random(len(ids), 6), random(13, 6), random(13)
    y = torch.randint(0, 13, (len(ids),), generator=g)
    y[list(IGNORED)] = -100
    units = torch.tensor(PROMPTS if prompt else UNITS[kind])
    ref = -3 * torch.rand(len(ids), generator=g, dtype=torch.float64)
    weights = torch.linspace(0.2, 1, len(units), dtype=torch.float64)
    return Task(x, w, b, y, ids, units, ref, weights, given_of(kind, len(units)), kind, head)


def given_of(kind: str, count: int) -> dict[str, Tensor]:
    """Every constant that a registered loss of a kind reads."""
    if kind == "group":
        return {"rank": torch.tensor([[2, 0, 1, -1], [0, 0, -1, -1], [-1] * 4, [1, 3, 0, 2]])}
    ramp = torch.linspace(-1, 1, count, dtype=torch.float64)
    if kind in ("comparison", "step"):
        return {"batch_chosen_tokens": 5 + ramp, "batch_sequence_tokens": 7 + ramp}
    given = {
        "label": torch.arange(count) % 2 == 0,
        "win_rate": ramp.square(),
        "advantage": 2 * ramp,
    }
    return given | dict.fromkeys(("kl", "delta", "batch_tokens", "step_tokens"), 2 + ramp)


def options_of(name: str) -> dict[str, Any]:
    """Those of `OPTIONS` that a registered loss takes, and the two of every loss."""
    names = {"beta", "label_smoothing", *LOSSES[name].options}
    return {key: value for key, value in OPTIONS.items() if key in names}


def by_linear_loss(
    task: Task, train=(True, True), dtype=torch.float64, device="cpu", **options
) -> dict[str, Tensor]:
    """Everything that `linear_loss` gives, and the gradients of three times the loss."""
    names, needs = ("hidden", "weight", "bias"), (train[0], train[1], train[1])
    leaves = {
        name: getattr(task, name).to(device, dtype, copy=True).requires_grad_(need)
        for name, need in zip(names, needs, strict=True)
    }
    constants: dict[str, Any] = {
        "unit_weights": task.unit_weights.to(device),
        "ref_token_logps": task.ref_token_logps.to(device),
        "given": {name: value.to(device) for name, value in task.given.items()},
    }
    result = linear_loss(
        **leaves,
        targets=task.targets.to(device),
        response_ids=task.response_ids,
        units=task.units,
        **constants | task.head | options,
    )
    return _with_gradients(result._asdict(), leaves)


def by_full_logits(
    task: Task, function: Callable[[Any], Tensor], train=(True, True), **own
) -> dict[str, Tensor]:
    """The same by autograd through the whole logits; `own`: `ld_alpha` and `use_weighting`."""
    names, needs = ("hidden", "weight", "bias"), (train[0], train[1], train[1])
    leaves = {
        name: getattr(task, name).clone().requires_grad_(need)
        for name, need in zip(names, needs, strict=True)
    }
    logits = task.head.get("logit_scale", 1.0) * (leaves["hidden"] @ leaves["weight"].T)
    logits = logits + task.head.get("logit_scale", 1.0) * leaves["bias"]
    if "softcap" in task.head:
        logits = task.head["softcap"] * torch.tanh(logits / task.head["softcap"])
    everything = logits.log_softmax(-1)
    chosen = everything.gather(1, task.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    token_logps = chosen.where(task.valid, 0)
    weights = task.unit_weights
    if own.get("use_weighting"):
        aligned = token_logps - everything.exp().square().sum(1).log()
        means = task.sums(aligned.detach()) / task.lengths.clamp(min=1)
        weights = weights * (means[task.units[:, 0]] + means[task.units[:, 1]]).exp()
    loss = (weights * function(seen(task, token_logps, own.get("ld_alpha")))).sum()
    found = {"loss": loss, "response_logps": task.sums(token_logps), "token_logps": token_logps}
    return _with_gradients(found, leaves)


def _with_gradients(values: dict[str, Any], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(leaf.requires_grad for leaf in leaves.values()):
        (3 * values["loss"]).backward()
    stats = values.pop("stats", None)
    values |= {} if stats is None else stats._asdict()
    values |= {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return {name: value.detach() for name, value in values.items()}


def seen(task: Task, token_logps: Tensor, ld_alpha: float | None = None) -> Any:
    """What a loss of the task's kind sees."""
    reference = task.ref_token_logps
    sums, ref_sums, lengths = task.sums(token_logps), task.sums(reference), task.lengths
    given = {name: value.double() for name, value in task.given.items()}
    if task.kind in ("comparison", "step"):
        win, lose, *prompt = task.units.unbind(1)
        cut = [_discounted(task, values, ld_alpha) for values in (token_logps, reference)]
        prompts = sums[prompt[0]] if prompt else None
        return Comparisons(
            *(*cut[0], *cut[1], lengths[win], lengths[lose], given),
            chosen_sums=sums[win],
            prompt_logps=prompts,
        )
    if task.kind == "group":
        members = task.units >= 0
        rows = task.units.clamp(min=0)
        return Responses(sums[rows], ref_sums[rows], lengths[rows], given, members)
    each = [(task.response_ids == r) & task.valid for r in task.units]
    places = [int(i) for mask in each for i in mask.nonzero()]
    of = torch.tensor([u for u, mask in enumerate(each) for _ in range(int(mask.sum()))]).long()
    tokens = Tokens(token_logps[places], reference[places], of)
    rows = task.units
    return Responses(sums[rows], ref_sums[rows], lengths[rows], given, tokens=tokens)


def _discounted(task: Task, values: Tensor, alpha: float | None) -> tuple[Tensor, Tensor]:
    """Sums of both responses of each pair; a token beyond the shorter one's length counts α."""
    if alpha is None:
        sums = task.sums(values)
        return sums[task.units[:, 0]], sums[task.units[:, 1]]
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in task.units[:, :2].tolist():
        own = [values[(task.response_ids == r) & task.valid] for r in pair]
        shared = min(map(len, own))
        for column, tokens in zip(columns, own, strict=True):
            column.append(tokens[:shared].sum() + alpha * tokens[shared:].sum())
    return torch.stack(columns[0]), torch.stack(columns[1])
