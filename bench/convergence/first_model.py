"""A small Llama that knows the texts it is to be tuned on, for runs whose curves should mean
something.

Preference tuning of random weights says little: every answer is equally unlikely. A few hundred
steps of next-token prediction give log-probabilities in which answers differ.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

_IGNORED = -100


@dataclass(frozen=True)
class FirstModel:
    """A Llama's size, and how it is taught its texts: AdamW, warm-up and cosine, random order.

    Attributes:
        layers: of the Llama.
        width: of its hidden states; a head is 64 wide, unless that would leave fewer than two.
        steps: optimizer steps.
        texts_per_step: texts of a step.
        learning_rate: the highest one.
        seed: of the weights before the first step, and of the order of the texts.
    """

    layers: int = 4
    width: int = 256
    steps: int = 150
    texts_per_step: int = 4
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def name(self) -> str:
        """llama-4x256"""
        return f"llama-{self.layers}x{self.width}"

    def make(self, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
        """Random weights in fp32, in the proportions of `tiny-llama`."""
        heads = max(2, self.width // 64)
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.width,
                intermediate_size=4 * self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                max_position_embeddings=4096,
                tie_word_embeddings=False,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    def save(
        self,
        folder: Path,
        texts: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        """Teach the model the texts; it and its tokenizer go to `folder`."""
        model, losses = self.teach(texts, tokenizer, device)
        print(f"first model: {len(texts)} texts, loss {losses[0]:.2f} to {losses[-1]:.2f}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def teach(
        self,
        texts: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> tuple[LlamaForCausalLM, list[float]]:
        """Next-token prediction on all tokens of the texts; the model, and the loss of each step
        in nats a token.
        """
        model, order = self.make(tokenizer).to(device), random.Random(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), self.learning_rate, weight_decay=0.0)
        schedule = transformers.get_cosine_schedule_with_warmup(
            optimizer, self.steps // 10, self.steps
        )
        losses: list[float] = []
        waiting: list[Sequence[int]] = []
        for _ in range(self.steps):
            while len(waiting) < self.texts_per_step:
                waiting += order.sample(texts, len(texts))
            batch, waiting = waiting[: self.texts_per_step], waiting[self.texts_per_step :]
            ids = [torch.tensor(text, device=device) for text in batch]
            labels = pad_sequence(ids, batch_first=True, padding_value=_IGNORED)
            mask = (labels != _IGNORED).long()
            loss = model(input_ids=labels * mask, attention_mask=mask, labels=labels).loss
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
        return model, losses
