"""What the keys that compare evaluations need of each other, as transformers checks it."""

from collections.abc import Iterator

from .keys import Keys

_COMPARING = ("load_best_model_at_end", "save_strategy", "early_stopping_patience")


def of_best(keys: Keys) -> Iterator[tuple[str, str]]:
    """Each key that cannot be honoured beside the others, and why."""
    if keys.finds_best and keys.eval_strategy == "no":
        [name, *_] = [name for name in _COMPARING if _asks(keys, name)]
        yield name, "compares evaluations while training: set eval_strategy to steps or epoch"
    if not keys.load_best_model_at_end or keys.save_strategy == "best":
        return
    if keys.eval_strategy != keys.save_strategy:
        yield (
            "load_best_model_at_end",
            "every checkpoint has to be evaluated: expected save_strategy "
            f"{keys.eval_strategy}, that of evaluation, or best, got {keys.save_strategy}",
        )
    elif keys.eval_strategy == "steps" and (problem := _intervals(keys)):
        yield "load_best_model_at_end", f"every checkpoint has to be evaluated: {problem}"


def _asks(keys: Keys, name: str) -> bool:
    value = getattr(keys, name)
    return value == "best" if name == "save_strategy" else bool(value)


def _intervals(keys: Keys) -> str | None:
    """What is wrong with the steps between checkpoints; None where each of them is evaluated."""
    save = keys.save_steps
    evaluate = keys.logging_steps if keys.eval_steps is None else keys.eval_steps
    if (save < 1) != (evaluate < 1):
        kinds = "both as steps or both as shares of the run"
        return f"expected save_steps and eval_steps {kinds}, got {save} and {evaluate}"
    # In millionths, as transformers does: shares are not whole multiples in floating point.
    scale = 1_000_000 if save < 1 else 1
    if round(save * scale) % round(evaluate * scale):
        return f"expected save_steps to be a multiple of eval_steps {evaluate}, got {save}"
    return None


def idle_best(keys: Keys) -> dict[str, str]:
    """The keys that do nothing beside the others, and why."""
    idle = {}
    if not keys.finds_best:
        why = "no evaluations are compared (load_best_model_at_end is false)"
        idle = dict.fromkeys(("metric_for_best_model", "greater_is_better"), why)
    if keys.early_stopping_patience is None:
        idle["early_stopping_threshold"] = "early_stopping_patience is null"
    return idle
