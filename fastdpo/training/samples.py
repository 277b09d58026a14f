"""Answers of the policy to held-out prompts, before the first step and after the last."""

from collections.abc import Sequence
from typing import Any

from ..data.groups import Group
from ..model.layout import ordinary
from ..model.sampler import Sampler, Sampling
from ..model.scorer import Scorer
from ..report.lengths import spread

NEW_TOKENS = 128
LONGEST_PROMPT = 1024
_SECONDS = 60.0
_ROLES = ("system", "developer", "user", "assistant", "tool", "model")


def choose_prompts(groups: Sequence[Group], count: int) -> list[Group]:
    """Evenly spaced groups whose prompts are short enough to be answered on the way."""
    near = [groups[i] for i in spread(len(groups), 16 * count)]
    short = [group for group in near if 0 < len(group.prompt) <= LONGEST_PROMPT]
    return [short[i] for i in spread(len(short), count)]


def best_response(group: Group) -> list[int] | None:
    """The tokens of the chosen response, or of the one with the best label or score; None where
    none is better than another.
    """
    if group.comparisons:
        return group.responses[group.comparisons[0][0]].tolist()
    for name in ("label", "advantage", "win_rate"):
        if (values := group.given.get(name)) and max(values) > min(0.5, *values):
            return group.responses[group.items[values.index(max(values))]].tolist()
    return None


def turns(ids: Sequence[int], tokenizer: Any) -> list[list[str]]:
    """The tokens of a prompt as [role, text]; the role is empty where the template names none."""
    special = set(tokenizer.all_special_ids)
    special |= {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            parts.append([])
        else:
            parts[-1].append(token)
    found: list[list[str]] = []
    role = ""
    for text in (str(tokenizer.decode(part)).strip() for part in parts):
        first, _, rest = text.partition("\n")
        if first.strip() in _ROLES:
            role, text = first.strip(), rest.strip()
        if text:
            found.append([role, text])
            role = ""
    return found


def answers(policy: Scorer, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
    """The greedy answer to each prompt of tokens, "…" behind those that were cut off. Nothing of
    the run changes: neither modes nor random states nor gradients.
    """
    with ordinary(policy.model), policy.precision():
        policy.model.eval()
        found = Sampler(policy.model, tokenizer).generate(
            prompts, Sampling(NEW_TOKENS, temperature=0), max_time=_SECONDS
        )
    texts = ((answer.text.strip(), answer.complete) for [answer] in found)
    return [text if complete else f"{text} …" for text, complete in texts]
