"""Conditions between the loss and other keys, and options that no loss of a run reads."""

from collections.abc import Iterator

from .declare import NOT_NEGATIVE, POSITIVE
from .keys import Keys
from .losses import (
    CPO_KEYS,
    CPO_ORIGIN,
    KTO_KEYS,
    KTO_ORIGIN,
    UNITS,
    WITH_DIVERGENCE,
    WITHOUT_BETA,
    LossTraits,
    traits_of,
    unread,
)
from .values import show, show_short

Problems = Iterator[tuple[str, str]]


def of_loss(keys: Keys) -> Problems:
    """Problems of the losses with each other, their weights and `beta`."""
    losses, weights = keys.loss_type, keys.loss_weights
    if not losses:
        yield "loss_type", "expected at least one loss"
    if weights is not None and len(weights) != len(losses):
        yield (
            "loss_weights",
            f"expected one weight for each entry of loss_type, {len(losses)}, got {len(weights)}",
        )
    if weights is not None and not any(weights):
        yield "loss_weights", "expected at least one weight above 0"
    rule = NOT_NEGATIVE if set(losses) <= set(WITHOUT_BETA) else POSITIVE
    if not rule.holds(keys.beta):
        yield "beta", f"expected {rule.expected}, got {show_short(keys.beta)}"
    if "exo_pair" in losses and keys.label_smoothing == 0:
        yield "loss_type", "exo_pair needs a label_smoothing above 0; its paper recommends 1e-3"
    yield from _mixed(_known(keys))
    if keys.desirable_weight == keys.undesirable_weight == 0:
        yield "undesirable_weight", "expected one of it and desirable_weight above 0"


def _known(keys: Keys) -> dict[str, LossTraits]:
    """The losses of a run that are known: an unknown one is an error once all are registered."""
    losses = {name: traits_of(name) for name in keys.loss_type}
    return {name: loss for name, loss in losses.items() if loss is not None}


def _mixed(losses: dict[str, LossTraits]) -> Problems:
    single = [name for name, loss in losses.items() if loss.unit != "comparison"]
    if single and len(losses) > 1:
        name = single[0]
        other = next(found for found in losses if found != name)
        units = [UNITS[losses[found].unit] for found in (name, other)]
        yield (
            "loss_type",
            f"expected {name} alone: it is a loss of {units[0]} and {other} one of {units[1]}, and "
            f"only losses of {UNITS['comparison']} are added up",
        )


def of_options(keys: Keys) -> Problems:
    """Problems of the options that change what a loss of comparisons sees."""
    losses = _known(keys)
    without = [name for name in losses if name not in WITH_DIVERGENCE]
    if keys.f_divergence_type != "reverse_kl" and without:
        yield (
            "f_divergence_type",
            f"{without[0]} has reverse_kl only, got {keys.f_divergence_type}; the losses with "
            f"others are {', '.join(WITH_DIVERGENCE)}",
        )
    foreign = [name for name, loss in losses.items() if not _of_dpo(name, loss)]
    if keys.ld_alpha is not None and (foreign or not keys.needs_reference):
        yield "ld_alpha", _only_with_reference([*foreign, *losses][0])
    if keys.use_weighting and foreign:
        yield "use_weighting", _only_with_reference(foreign[0])
    for name, loss in losses.items():
        if keys.use_weighting and (name == "sft" or loss.kind == "step"):
            why = "has no weights of comparisons" if name == "sft" else "sorts the responses"
            yield "use_weighting", f"cannot go with {name}, which {why}"


def _of_dpo(name: str, loss: LossTraits) -> bool:
    return loss.unit == "comparison" and (loss.reference or name == "sft")


def _only_with_reference(name: str) -> str:
    return f"is for losses of comparisons with a reference, such as sigmoid, and {name} is not one"


def of_reference(keys: Keys) -> Problems:
    """Problems of the reference with the loss and with training."""
    if not keys.needs_reference:
        losses = " and ".join(keys.loss_type)
        if keys.ref_model_name_or_path is not None:
            yield "ref_model_name_or_path", f"{losses} takes no reference: remove the key"
        if keys.sync_ref_model:
            yield "sync_ref_model", f"{losses} takes no reference that could move: remove the key"
    if keys.sync_ref_model and keys.precompute_ref_log_probs:
        yield (
            "precompute_ref_log_probs",
            "cannot go with sync_ref_model: what was computed before is not the reference's once "
            "it moves",
        )
    if keys.sync_ref_model and keys.use_peft:
        yield (
            "sync_ref_model",
            "is for training all weights: with use_peft the reference is the policy without its "
            "adapter",
        )


def of_order(keys: Keys) -> Problems:
    """Problems of losses that pair each prompt with the completion of another row."""
    for name in keys.mismatched_losses:
        if keys.shuffle:
            yield (
                "shuffle",
                f"expected false, or nothing, with {name}: it pairs each prompt with the "
                "completion of the row before in the file",
            )
        if keys.per_device_train_batch_size == 1:
            yield (
                "per_device_train_batch_size",
                f"expected at least 2 with {name}: it pairs each prompt with the completion of "
                "another row of its batch, got 1",
            )


def idle_options(keys: Keys) -> dict[str, str]:
    """Keys that do nothing with the losses of this run, each with the reason."""
    losses = " and ".join(keys.loss_type)
    idle = dict.fromkeys(unread(keys.loss_type), f"{losses} does not read it")
    if keys.f_divergence_type != "alpha_divergence":
        why = f"f_divergence_type is {show(keys.f_divergence_type)}"
        idle["f_alpha_divergence_coef"] = why
    if any(loss.unit != "comparison" for loss in _known(keys).values()):
        idle["max_comparisons_per_group"] = f"{losses} is no loss of comparisons"
    if not keys.needs_reference:
        why = f"{losses} takes no reference"
        idle |= dict.fromkeys(("precompute_ref_log_probs", "reference_cache_dir"), why)
    elif not keys.precomputes:
        explicit = keys.precompute_ref_log_probs is not None
        why = "precompute_ref_log_probs is false" if explicit else "sync_ref_model is true"
        idle["reference_cache_dir"] = why
    return idle


def how_loss_was_read(keys: Keys) -> list[str]:
    """A line where `loss_type` has become another one than the file names."""
    origin = keys.origins.get("loss_type")
    own = {CPO_ORIGIN: CPO_KEYS, KTO_ORIGIN: KTO_KEYS}.get(origin or "")
    if own is None:
        return []
    named = " and ".join(name for name in own if name in keys.origins)
    return [f"loss_type is {show(keys.loss_type)}, {origin}: {named} was given"]
