"""Answers of the policy to held-out prompts, before the first step and after the last."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.groups import Group
from ..model.layout import ordinary
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


def answers(policy: Scorer, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The greedy answer to each prompt of tokens, "…" behind those that were cut off. Nothing of
    the run changes: neither modes nor random states nor gradients.
    """
    model, pad = policy.model, tokenizer.pad_token_id or 0
    ends = _ends(model, tokenizer)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with ordinary(model), torch.no_grad(), policy.precision():
        model.eval()
        output = model.generate(
            input_ids=ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            max_new_tokens=NEW_TOKENS,
            max_time=_SECONDS,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        )
    return [_text(row, ends, tokenizer) for row in output[:, longest:].tolist()]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    known = model.generation_config.eos_token_id, tokenizer.eos_token_id
    listed = [one if isinstance(one, list) else [one] for one in known]
    return {token for one in listed for token in one if token is not None}


def _text(ids: list[int], ends: set[int], tokenizer: Any) -> str:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
    return text if end is not None else f"{text} …"
