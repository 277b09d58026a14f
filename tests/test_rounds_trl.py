"""Rounds with GRPO's losses beside TRL's GRPOTrainer on the same samples and scores: the same
losses and, by steps of SGD in fp64, the same gradients.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_trl import quick_collections
from datasets import Dataset
from training import metrics, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from fastdpo.config.rounds import RoundsConfig
from fastdpo.model.sampler import Answer, Sampler
from fastdpo.rounds import engines
from fastdpo.rounds.loop import rounds

SAMPLES = {
    "the old dog": [
        (" ran", 2.0),
        (" sat on a mat and saw far hills", 1.0),
        (" and one", 0.0),
        (" saw a", 0.5),
    ],
    "what is far": [(" hills", 1.0), (" over one small", 1.0), (" the cat", 1.0), (" a", 1.0)],
    "one": [(" and on and on and on", -3.0), (" no", 0.25), (" yes yes", 4.0), (" no", 0.25)],
}
"""Answers with their scores: of different lengths, one twice, and a group of equal scores."""
HELD_OUT = "held out"
COUNT = 4
SHARED = {
    "num_generations": COUNT,
    "per_device_train_batch_size": COUNT * len(SAMPLES),
    "max_completion_length": 40,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Keys that mean the same to both."""


class Injected:
    """An engine that has the answers already."""

    def __init__(self, config: RoundsConfig, how: Any) -> None:
        sampler = Sampler.load(config)
        found = {prompt: [text for text, _ in answers] for prompt, answers in SAMPLES.items()}
        self.known = {
            tuple(sampler.encode(prompt)): [
                Answer(text, True, tuple(sampler.encode(text + sampler.tokenizer.eos_token)))
                for text in texts
            ]
            for prompt, texts in (found | {HELD_OUT: [" yes"]}).items()
        }

    def answer(self, prompts: Sequence[list[int]], number: int, seed: int) -> list[list[Answer]]:
        return [self.known[tuple(prompt)] for prompt in prompts]


@pytest.fixture(autouse=True)
def injected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(engines, "ENGINES", {"transformers": Injected})
    with quick_collections():
        yield


@pytest.fixture(scope="module")
def model(still_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp64") / "model"
    AutoModelForCausalLM.from_pretrained(still_model, dtype=torch.float64).save_pretrained(path)
    AutoTokenizer.from_pretrained(still_model).save_pretrained(path)
    return path


def ours(model: Path, folder: Path, **keys: Any) -> tuple[list[float], Path]:
    """The losses of the steps of a round, and its model."""
    for name, prompts in (("prompts", list(SAMPLES)), ("held-out", [HELD_OUT])):
        rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / f"{name}.jsonl").write_text(rows)
    known = {(prompt, text): s for prompt, answers in SAMPLES.items() for text, s in answers}
    (folder / "judge.py").write_text(
        f"def score(prompt, response, row):\n    return {known!r}.get((prompt, response), 0)\n"
    )
    rounds(
        RoundsConfig(
            model_name_or_path=str(model),
            dataset_name=str(folder / "prompts.jsonl"),
            eval_dataset_name=str(folder / "held-out.jsonl"),
            judge=f"{folder}/judge.py:score",
            output_dir=str(folder / "out"),
            reference_cache_dir=str(folder / "reference"),
            dtype="auto",
            report=False,
            check_data=False,
            **SHARED | {"rounds": 1} | keys,
        )
    )
    path = folder / "out" / f"round-{keys.get('rounds', 1)}" / "model"
    return [line["loss"] for line in metrics(path)], path


def theirs(
    model: Path, folder: Path, reference: Path | None = None, **keys: Any
) -> tuple[list[float], Path]:
    """The same of TRL; its reference is the model itself unless one is given."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        asked = [tokenizer(prompt).input_ids for prompt in prompts]
        answers = [SAMPLES[prompt][i % COUNT] for i, prompt in enumerate(prompts)]
        whole = [
            tokenizer(prompt + text + tokenizer.eos_token).input_ids
            for prompt, (text, _) in zip(prompts, answers, strict=True)
        ]
        drawn = [ids[len(start) :] for ids, start in zip(whole, asked, strict=True)]
        scores = [score for _, score in answers]
        return {"prompt_ids": asked, "completion_ids": drawn, "logprobs": None, "given": scores}

    def reward(given: list[float], **_: Any) -> list[float]:
        return given

    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            model_init_kwargs={"dtype": "auto"},
            report_to="none",
            **SHARED | keys,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(SAMPLES)}),
        rollout_func=rollout,
    )
    if reference is not None:
        trainer.ref_model.load_state_dict(weights(reference))
    trainer.train()
    trainer.save_model(str(folder / "trl"))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], folder / "trl"


CASES = {
    "grpo": {"loss_type": "grpo"},
    "grpo, wide": {"loss_type": "grpo", "epsilon": 0.02, "epsilon_high": 0.1},
    "grpo of sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "grpo, unscaled": {"loss_type": "grpo", "scale_rewards": "none"},
    "grpo, accumulated": {
        "loss_type": "grpo",
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
    },
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dapo, accumulated": {
        "loss_type": "dapo",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 6,
    },
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
}


@pytest.mark.parametrize(("steps", "beta"), [(1, 0.0), (2, 0.3)])
@pytest.mark.parametrize("case", CASES)
def test_a_round_is_what_trl_trains(model, tmp_path, case, steps, beta):
    """The reference is TRL's policy at the time of sampling, and in the first iteration its
    reference; `max_steps` its `num_iterations`. TRL's `use_bias_correction_kl`, its default, which
    multiplies the penalty by the ratio, is off: ours is GRPO's eq. 4. TRL's `temperature` is 1, as
    it divides logits by it in training too. In a second step ratios are clipped and the penalty is
    not 0. TRL has scores in fp32.
    """
    keys = CASES[case] | {"beta": beta, "max_steps": steps}
    losses, path = ours(model, tmp_path, **keys)
    expected, of_trl = theirs(
        model, tmp_path, **keys, num_iterations=steps, use_bias_correction_kl=False
    )
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-7)
    before, after, wanted = weights(model), weights(path), weights(of_trl)
    for name, weight in before.items():
        moved = wanted[name] - weight
        assert (after[name] - wanted[name]).norm() < 2e-6 * moved.norm(), name
    last = metrics(path)[-1]
    assert (last["clip_ratio/region_mean"] > 0.1) == (last.get("kl", 0.0) > 0.1) == (steps == 2)


@pytest.mark.parametrize("case", ["grpo", "grpo of sequences", "dapo"])
def test_a_later_round_may_have_the_start_as_its_reference(model, tmp_path, case):
    """A single step on the policy's own answers, with the penalty to the model of the start: what
    TRL does from one step to the next.
    """
    keys = CASES[case] | {"beta": 0.3, "max_steps": 1}
    losses, path = ours(model, tmp_path, **keys, rounds=2, reference="start")
    first = tmp_path / "out" / "round-1" / "model"
    expected, of_trl = theirs(first, tmp_path, model, **keys, use_bias_correction_kl=False)
    assert losses == pytest.approx(expected, rel=1e-6) and losses[-1] > 0.01
    before, after, wanted = weights(first), weights(path), weights(of_trl)
    for name, weight in before.items():
        moved = wanted[name] - weight
        assert (after[name] - wanted[name]).norm() < 2e-6 * moved.norm(), name
