"""Known patterns in a run's curves, each with what to try next."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..config.losses import traits_of
from .runs import Run

_FEW = 5
_LENGTH_RULE = 0.65


@dataclass(frozen=True)
class Advice:
    """A pattern that was seen: `text` says what, with its figures; `tries` what to change."""

    name: str
    level: Literal["good", "note", "warning"]
    title: str
    text: str
    tries: str = ""


Rule = Callable[[Run], Advice | None]


def over_fit(run: Run) -> Advice | None:
    """Held-out loss rises again while training loss goes on falling."""
    held_out, train = run.curve("eval_loss"), run.curve("loss")
    if len(held_out) < 3 or len(train) < _FEW:
        return None
    best = min(range(len(held_out)), key=held_out.values.__getitem__)
    step, low, last = held_out.steps[best], held_out.values[best], held_out.values[-1]
    if last < low + max(0.01, 0.02 * abs(low)) or train.end() >= train.around(step):
        return None
    return Advice(
        "over_fit",
        "warning",
        "Over-fitting",
        f"Held-out loss was lowest at step {step:.0f} ({low:.4f}) and is {last:.4f} now, while "
        f"training loss fell from {train.around(step):.4f} to {train.end():.4f}.",
        f"Stop near step {step:.0f} (max_steps, or keep the checkpoint of that step), take fewer "
        "num_train_epochs, a lower learning_rate, a larger beta, or more data.",
    )


def chosen_change(run: Run) -> tuple[float, float, str] | None:
    """How far the log-probabilities of chosen and rejected responses have moved since the first
    step, in nats a response, and what it is measured on; None where that is not known.
    """
    chosen, rejected = run.curve("eval_logps/chosen"), run.curve("eval_logps/rejected")
    if len(chosen) > 1 and len(rejected) > 1 and chosen.steps[0] == 0:
        moved = chosen.values[-1] - chosen.values[0], rejected.values[-1] - rejected.values[0]
        return *moved, "held-out pairs"
    rewards = run.curve("rewards/chosen"), run.curve("rewards/rejected")
    beta = run.config.get("beta")
    if min(map(len, rewards)) < _FEW or not isinstance(beta, int | float) or beta <= 0:
        return None
    names = run.config.get("loss_type")
    losses = [traits_of(str(name)) for name in names] if isinstance(names, list) else [None]
    if any(loss is None or not loss.reference for loss in losses):
        return None
    return rewards[0].end() / beta, rewards[1].end() / beta, "training pairs"


def chosen_falling(run: Run) -> Advice | None:
    """Chosen responses become less likely than they were before training."""
    change = chosen_change(run)
    if change is None or change[0] > -1.0:
        return None
    chosen, rejected, where = change
    why = "the rejected ones rose" if rejected > 0 else f"the rejected ones fell by {-rejected:.1f}"
    if chosen - rejected > 0:
        why += ", so the margin still grows"
    return Advice(
        "chosen_falling",
        "warning" if chosen < -10 else "note",
        "Chosen responses become less likely",
        f"On {where}, the log-probability of a chosen response fell by {-chosen:.1f} nats; {why}. "
        "DPO rewards the difference alone, so this is common; far below the start it costs quality "
        "of the text.",
        "Hold chosen responses up: loss_type [sigmoid, sft] with loss_weights [1.0, 0.2]; or a "
        "lower learning_rate, a larger beta, loss_type apo_zero.",
    )


def length_only(run: Run) -> Advice | None:
    """Accuracy is no better than that of a rule which looks at lengths alone."""
    lengths = run.facts.get("lengths")
    share = lengths.get("longer_chosen") if isinstance(lengths, dict) else None
    held_out = run.last("eval_rewards/accuracies")
    train = run.curve("rewards/accuracies")
    accuracy = held_out if held_out is not None else train.end() if len(train) >= _FEW else None
    if accuracy is None or not isinstance(share, int | float):
        return None
    rule = max(share, 1 - share)
    if rule < _LENGTH_RULE or accuracy > rule + 0.03 or accuracy < 0.55:
        return None
    which = "longer" if share > 0.5 else "shorter"
    return Advice(
        "length_only",
        "warning",
        "Length alone explains the accuracy",
        f"In {rule:.0%} of the pairs the {which} response is the chosen one. A rule that takes "
        f"the {which} one is right as often; reward accuracy is {accuracy:.0%}.",
        "Balance lengths in the data, or take length out of the loss: ld_alpha 0.5, loss_type "
        "simpo or ipo.",
    )


def perfect_from_start(run: Run) -> Advice | None:
    """Pairs are told apart from the first steps on."""
    curve = run.curve("rewards/accuracies")
    early = [v for s, v in zip(curve.steps, curve.values, strict=True) if s > 1][: max(3, _FEW)]
    if len(early) < _FEW or min(early) < 0.99:
        return None
    return Advice(
        "perfect_from_start",
        "warning",
        "Right from the start",
        f"Reward accuracy is {min(early):.2f} or more from the first steps on: the pairs can be "
        "told apart by something simple.",
        "Look at the data for what gives the rejected ones away (format, length, refusals, "
        "another language): fastdpo check. Harder pairs teach more.",
    )


def margins_exploding(run: Run) -> Advice | None:
    """Margins far beyond where the loss is flat, and still growing."""
    curve = run.curve("rewards/margins")
    if len(curve) < 2 * _FEW:
        return None
    half, end = curve.around(curve.steps[len(curve) // 2]), curve.end()
    if end < 10 or end < 1.3 * half:
        return None
    return Advice(
        "margins_exploding",
        "warning",
        "Margins explode",
        f"The mean reward margin went from {half:.1f} halfway to {end:.1f}. Beyond some 5 the loss "
        "is flat, so the policy only moves further from its reference.",
        "A lower learning_rate, a larger beta, label_smoothing 0.1, loss_type ipo, or fewer steps.",
    )


def no_number(run: Run) -> Advice | None:
    """A loss or the gradients are NaN or infinite, and were so to the end."""
    lost = [name for name in ("loss", "eval_loss", "grad_norm") if name in run.lost]
    if not lost:
        return None
    step = min(run.lost[name] for name in lost)
    return Advice(
        "no_number",
        "warning",
        "Not a number",
        f"{' and '.join(lost)}: NaN or infinite from step {step:.0f} on.",
        f"Go on from a checkpoint before step {step:.0f} (resume_from_checkpoint), with a lower "
        "learning_rate, more warmup_steps, a max_grad_norm, bf16 or dtype float32.",
    )


def loss_flat(run: Run) -> Advice | None:
    """Nothing is learned."""
    loss, accuracy = run.curve("loss"), run.curve("rewards/accuracies")
    total = run.total_steps
    early = total is not None and run.step < 0.3 * total
    if len(loss) < 2 * _FEW or early or not accuracy:
        return None
    change = abs(loss.end(0.2) - loss.start(0.2))
    if change > 0.01 * abs(loss.start(0.2)) or not 0.4 <= accuracy.end(0.2) <= 0.6:
        return None
    rate = run.config.get("learning_rate")
    now = f" (now {rate:g})" if isinstance(rate, int | float) else ""
    return Advice(
        "loss_flat",
        "warning",
        "The loss is flat",
        f"Loss went from {loss.start(0.2):.4f} to {loss.end(0.2):.4f} and reward accuracy is "
        f"{accuracy.end(0.2):.2f}, as good as a coin.",
        f"Raise learning_rate five- to tenfold{now}, look whether chosen and rejected are swapped "
        "or nearly the same in the data (fastdpo check), or train longer.",
    )


def improved(run: Run) -> Advice | None:
    """Held-out accuracy rose."""
    curve = run.curve("eval_rewards/accuracies")
    if len(curve) < 2 or curve.values[-1] < curve.values[0] + 0.05:
        return None
    return Advice(
        "improved",
        "good",
        "Held-out accuracy rose",
        f"On pairs that were not trained on, the chosen response gained more than the rejected one "
        f"in {curve.values[-1]:.0%} of them; at step {curve.steps[0]:.0f} it was "
        f"{curve.values[0]:.0%}.",
    )


RULES: tuple[Rule, ...] = (
    no_number,
    loss_flat,
    over_fit,
    perfect_from_start,
    length_only,
    margins_exploding,
    chosen_falling,
    improved,
)


def advise(run: Run) -> list[Advice]:
    """What is seen in a run, the gravest first."""
    found = [advice for rule in RULES if (advice := rule(run)) is not None]
    return sorted(found, key=lambda advice: ("warning", "note", "good").index(advice.level))
