"""Rounds of one step, beside TRL's GRPOTrainer on the same answers and rewards."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.config.rounds import RoundsConfig
from fastdpo.errors import ConfigError
from fastdpo.model.sampler import Answer
from fastdpo.rounds import engines
from fastdpo.rounds.loop import rounds

trl = pytest.importorskip("trl")

PROMPTS = ["yes no ", "the cat saw "]
ANSWERS = {
    1: [["yes", "no no", "small cat", "cat"], ["small", "no", "yes no", "see yes"]],
    2: [["see", "no yes no", "no small cat", "yes yes"], ["cat cat", "yes", "no cat", "see"]],
}
REWARDS = {
    1: [[1.0, 0.0, 0.5, 0.0], [0.0, 2.0, 1.0, 0.0]],
    2: [[0.3, 1.0, 0.0, 0.1], [1.0, 1.0, 1.0, 1.0]],
}
"""By round, prompt and answer, each of which stands in one round and shares no token with its
prompt; the last group's are equal, which count in the KL alone.
"""
RATE = 0.5


class Made:
    """An engine whose answers are those of `ANSWERS`; one to a held-out prompt."""

    def __init__(self, config: RoundsConfig, how: Any) -> None:
        self.round = 2 if str(config.model_name_or_path).endswith("round-1/model") else 1
        self.tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)

    def answer(self, prompts, number, seed):
        if number == 1:
            return [[self._made("yes")] for _ in prompts]
        found = []
        for ids in prompts:
            place = [self.tokenizer(text)["input_ids"] for text in PROMPTS].index(ids)
            found.append([self._made(text) for text in ANSWERS[self.round][place]])
        return found

    def _made(self, text: str) -> Answer:
        ids = self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id]
        return Answer(text, True, tuple(ids))


@pytest.fixture
def settings(still_model: Path, tmp_path: Path, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr(engines, "ENGINES", {"transformers": Made})
    rows = [{"prompt": text, "place": place} for place, text in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "no ", "place": 0}) + "\n")
    (tmp_path / "judge.py").write_text(
        f"ANSWERS, REWARDS = {ANSWERS!r}, {REWARDS!r}\n"
        "def score(prompt, response, row):\n"
        "    for number, answers in ANSWERS.items():\n"
        "        some = answers[row['place']]\n"
        "        if response in some:\n"
        "            return REWARDS[number][row['place']][some.index(response)]\n"
        "    return 0.0\n"
    )
    return {
        "model_name_or_path": str(still_model),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "eval_dataset_name": str(tmp_path / "held.jsonl"),
        "judge": f"{tmp_path}/judge.py:score",
        "output_dir": str(tmp_path / "out"),
        "reference_cache_dir": str(tmp_path / "reference"),
        "rounds": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report": False,
        "check_data": False,
        "disable_tqdm": True,
        "mask_truncated_completions": False,
    }


def of_trl(settings: dict[str, Any], folder: Path, **keys: Any) -> tuple[float, dict[str, Any]]:
    """The loss and the gradient of TRL's step on the answers of the second round."""
    model = AutoModelForCausalLM.from_pretrained(folder / "out/round-1/model")
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])

    def rollout(prompts, trainer):
        ids = [tokenizer(text)["input_ids"] for text in prompts]
        seen: dict[str, int] = {}
        answers = []
        for text in prompts:
            number = seen[text] = seen.get(text, -1) + 1
            answers.append(ANSWERS[2][PROMPTS.index(text)][number])
        made = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in answers]
        return {
            "prompt_ids": ids,
            "completion_ids": made,
            "logprobs": [[0.0] * len(m) for m in made],
        }

    def reward(prompts, completions, **_):
        return [
            REWARDS[2][place][ANSWERS[2][place].index(answer.strip())]
            for place, answer in zip(map(PROMPTS.index, prompts), completions, strict=True)
        ]

    arguments = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=1,
        max_grad_norm=0,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_completion_length=12,
        use_bias_correction_kl=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **keys,
    )
    trainer = trl.GRPOTrainer(
        model,
        reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    if trainer.ref_model is not None:
        start = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
        trainer.ref_model.load_state_dict(start.state_dict())
    losses = []
    compute = trainer.compute_loss

    def computed(*inputs, **more):
        losses.append(compute(*inputs, **more))
        return losses[-1]

    trainer.compute_loss = computed
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    return float(losses[0]), {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize(
    ("loss", "keys"),
    [
        ("grpo", {"beta": 0.2}),
        ("grpo", {"beta": 0.0, "scale_rewards": "none"}),
        ("grpo", {"beta": 0.2, "importance_sampling_level": "sequence"}),
        ("bnpo", {"beta": 0.2}),
        ("dapo", {"beta": 0.2}),
        ("dr_grpo", {"beta": 0.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_round_of_one_step_is_a_step_of_grpo_trainer(settings, tmp_path, loss, keys):
    """In the second round, where the reference is no more the policy: `reference: start` is the
    reference model of TRL, `max_steps: 1` its num_iterations of 1.
    """
    result = rounds(RoundsConfig(**settings | {"loss_type": [loss]} | keys))
    theirs, gradient = of_trl(settings, tmp_path, loss_type=loss, **keys)
    assert result.rounds[2]["loss"] == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    before = load_file(tmp_path / "out/round-1/model/model.safetensors")
    after = load_file(tmp_path / "out/round-2/model/model.safetensors")
    moved = 0.0
    for name, value in before.items():
        torch.testing.assert_close(
            value - after[name], gradient[name], rtol=1e-3, atol=2e-6, msg=lambda m, n=name: n + m
        )
        moved = max(moved, float(gradient[name].abs().max()))
    assert moved > 1e-3


def test_the_ratio_of_tokens_is_to_the_policy_that_sampled(settings):
    """More than one step, with the reference at the start, would take it to the start."""
    many = settings | {"loss_type": ["grpo"], "max_steps": 2}
    with pytest.raises(ConfigError, match="reference: start, and grpo takes the ratio of tokens"):
        rounds(RoundsConfig(**many))
    rounds(RoundsConfig(**many | {"reference": "previous", "rounds": 1}))
