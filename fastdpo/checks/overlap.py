"""Prompts that stand in the training data and in what is evaluated on."""

from collections.abc import Iterator

from .findings import Finding, of_rows
from .near import matches
from .texts import Texts


def shared_prompts(train: Texts, test: Texts, near: bool = True) -> Iterator[Finding]:
    """Rows to evaluate on whose prompt is trained on, but for white space and case; with `near`,
    also those that share four fifths of their three-word phrases, system messages aside.
    """
    known: dict[str, int] = {}
    for row, prompt in zip(train.rows, train.plain_prompts, strict=True):
        known.setdefault(prompt, row)
    found, rest = [], []
    for place, (row, prompt) in enumerate(zip(test.rows, test.prompts, strict=True)):
        earlier = known.get(test.plain_prompts[place])
        if earlier is None:
            rest.append(place)
        else:
            found.append((row, f"as row {earlier} of the training data: {prompt}"))
    text = "rows to evaluate on have a prompt that is trained on"
    yield from of_rows("shared_prompt", "error", found, len(test.rows), text)
    if not near or not rest:
        return
    like = matches([test.questions[place] for place in rest], train.questions)
    found = [
        (
            test.rows[rest[mine]],
            f"like row {train.rows[other]} of the training data: {test.prompts[rest[mine]]}",
        )
        for mine, other in sorted(like.items())
    ]
    text = "rows to evaluate on have a prompt that is nearly one of those that are trained on"
    yield from of_rows("near_shared_prompt", "warning", found, len(test.rows), text)
