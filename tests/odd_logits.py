"""Causal language models whose logits no scale and no soft cap describes, or are used early."""

import torch
from families import VOCABULARY
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class Shifted(LlamaForCausalLM):
    """Its logits are no scale and no cap of what the head gives."""

    def more(self, logits):
        return logits + 0.25

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.more(self.lm_head(hidden))
        loss = None if labels is None else self.loss_function(logits, labels, VOCABULARY)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Slanted(Shifted):
    """One entry differs."""

    def more(self, logits):
        return logits * torch.linspace(1, 1.001, VOCABULARY, dtype=logits.dtype)


class Sliced(Shifted):
    """Its logits are used before its loss."""

    def more(self, logits):
        return logits * torch.ones(2, 9, VOCABULARY, dtype=logits.dtype)


class Early(Shifted):
    """They are read by position."""

    def more(self, logits):
        assert logits[:, 8].shape[1] == VOCABULARY
        return logits


class Twice(Shifted):
    """Its head is used twice."""

    def more(self, logits):
        return logits + 0 * self.lm_head(self.model.embed_tokens.weight[None, :9])
