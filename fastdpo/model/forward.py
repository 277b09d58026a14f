"""A packed batch through a model, without its head."""

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from .context import ContextGroup
from .head import hidden_states


def batch_states(
    model: nn.Module,
    batch: Batch,
    *,
    one_by_one: bool = False,
    context: ContextGroup | None = None,
) -> Tensor:
    """Hidden states (lines, length, H) of all tokens of a batch on the model's device.

    Padded lines go through the model together or, with `one_by_one`, each without its padding.
    With a `context` they are those of this rank's stretch of the row.
    """
    if context is not None:
        stretch = context.stretch(batch)
        return hidden_states(
            model,
            input_ids=stretch.input_ids,
            position_ids=stretch.position_ids,
            fastdpo_segments=stretch.segments,
            fastdpo_context=context,
        )
    if batch.layout != "padded":
        return hidden_states(
            model,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            fastdpo_segments=batch.segments,
        )
    ids, mask = batch.input_ids, batch.attention_mask
    assert mask is not None
    if not one_by_one:
        return hidden_states(model, input_ids=ids, attention_mask=mask)
    lines = []
    for line, length in enumerate(batch.lengths()):
        one = slice(line, line + 1), slice(0, length)
        states = hidden_states(model, input_ids=ids[one], attention_mask=mask[one])
        lines.append(nn.functional.pad(states, (0, 0, 0, ids.shape[1] - length)))
    return torch.cat(lines)
