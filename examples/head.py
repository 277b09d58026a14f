"""DPO in a plain PyTorch loop with the head of `fastdpo_kernels`, in seconds on a CPU.

    python examples/head.py

The model is small, random and made on the spot, and texts are bytes. In a loop of your own, take
`AutoModelForCausalLM.from_pretrained(...)` and its tokenizer; the rest stays as it is.
"""

import torch
from fastdpo_kernels import linear_dpo_loss, linear_logprob
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

IGNORED = -100
PAIRS = [  # prompt, preferred response, the other one
    ("Is ice lighter than water? ", "Yes, so it floats.", "That depends on your point of view."),
    ("Where does the sun rise? ", "In the east.", "There are many opinions on this."),
    ("How many legs has a spider? ", "Eight.", "Legs come in all sorts of numbers."),
    ("What is two plus two? ", "Four.", "Let us first ask what a number is."),
]


def make_model() -> LlamaForCausalLM:
    """A Llama of two layers over bytes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def encode(pairs: list[tuple[str, str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels, (2·pairs, length): all preferred responses first."""
    rows = [(prompt.encode(), good.encode()) for prompt, good, _ in pairs]
    rows += [(prompt.encode(), bad.encode()) for prompt, _, bad in pairs]
    length = max(len(prompt + response) for prompt, response in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt + response)
        ids[i, :end], mask[i, :end] = torch.tensor(list(prompt + response)), 1
        labels[i, start:end] = ids[i, start:end]
    return ids, mask, labels


def scored(model: LlamaForCausalLM, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of the T tokens of all responses: the states that predict them (T, H), the tokens (T,), and
    the number of the response that each belongs to (T,).
    """
    ids, mask, labels = batch
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    is_response = labels[:, 1:] != IGNORED
    return hidden[is_response], labels[:, 1:][is_response], is_response.nonzero()[:, 0]


def response_logps(model: LlamaForCausalLM, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The log-probability of each response, (2·pairs,)."""
    hidden, targets, response_ids = scored(model, batch)
    logps = linear_logprob(hidden, model.lm_head.weight, targets)
    return logps.new_zeros(len(batch[0])).index_add(0, response_ids, logps)


def main(steps: int = 30) -> list[float]:
    """Train; the loss of every step."""
    model, batch = make_model(), encode(PAIRS)
    comparisons = torch.arange(2 * len(PAIRS)).view(2, -1).T  # (pairs, 2): winner, loser
    with torch.no_grad():
        ref_logps = response_logps(model, batch)  # the policy as it is now is the reference
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        hidden, targets, response_ids = scored(model, batch)
        loss, logps = linear_dpo_loss(
            hidden,
            model.lm_head.weight,
            targets,
            response_ids,
            comparisons,
            ref_logps,
            beta=0.1,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        win, lose = (logps - ref_logps)[comparisons].unbind(1)
        print(f"step {step + 1}: loss {losses[-1]:.4f}, margin {0.1 * (win - lose).mean():.3f}")
    return losses


if __name__ == "__main__":
    main()
