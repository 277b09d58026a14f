"""transformers' causal language models and its trainer with `patch_transformers` and without it."""

import sys
import warnings

import pytest
import torch
from families import OTHER_HEADS, OTHERS, SHARED, VOCABULARY, build, relative_error
from fastdpo_kernels import patch_transformers
from fastdpo_kernels.integrations import causal_lm
from odd_logits import Early, Shifted, Slanted, Sliced, Twice
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

ROUNDING = 2e-6
"""transformers makes its loss in fp32 whatever the model's dtype is."""


@pytest.fixture(autouse=True)
def restored():
    forward = LlamaForCausalLM.forward
    yield
    patch_transformers(undo=True)
    assert LlamaForCausalLM.forward is forward


@pytest.fixture
def losses(monkeypatch):
    """The rows of every loss that our head makes."""
    calls = []

    def counted(hidden, *args, **kwargs):
        calls.append(hidden.shape[:-1])
        return causal_lm_loss(hidden, *args, **kwargs)

    causal_lm_loss = causal_lm.linear_cross_entropy
    monkeypatch.setattr(causal_lm, "linear_cross_entropy", counted)
    return calls


def batch():
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :3] = labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def trained(model, **inputs):
    """A training step's output, and every gradient of its loss."""
    model.train().zero_grad()
    torch.manual_seed(0)
    output = model(**inputs)
    (output["loss"] if isinstance(output, dict) else output[0]).backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def both(model, losses, **inputs):
    """The outputs of a step unpatched and patched, which have the same loss and gradients."""
    expected, gradients = trained(model, **inputs)
    assert not losses
    patch_transformers()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found, ours = trained(model, **inputs)
    assert len(losses) == 1
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=ROUNDING, atol=0)
    assert relative_error(ours, gradients) < ROUNDING
    return expected, found


@pytest.mark.parametrize("family", SHARED | OTHERS | OTHER_HEADS)
def test_every_family_trains_without_logits(family, losses):
    expected, found = both(build(family), losses, **batch())
    assert found.logits is None and expected.logits.shape == (2, 9, VOCABULARY)
    assert losses == [(2, 9)]
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 37},
        {"num_items_in_batch": torch.tensor(37)},
        {"shift_labels": torch.arange(18).view(2, 9)},
        {"ignore_index": 5},
        {"output_hidden_states": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_trainer_passes_means_the_same(more, losses):
    inputs = batch()
    if "ignore_index" in more:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    expected, found = both(build("gemma2"), losses, **inputs, **more)
    assert expected.keys() - found.keys() == {"logits"}


def test_the_loss_of_the_routers_is_added(losses):
    model = build("mixtral", router_aux_loss_coef=0.5)
    plain = trained(model, **batch())[0].loss
    expected, found = both(model, losses, **batch(), output_router_logits=True)
    assert (expected.loss - plain).abs() > 0.1
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)


def test_tuples_and_labels_by_place(losses):
    model, inputs = build("llama"), batch()
    expected, found = both(model, losses, **inputs, return_dict=False)
    assert len(found) == len(expected) - 1 == 1
    by_place = model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    assert by_place.logits is None and len(losses) == 2
    torch.testing.assert_close(by_place.loss, found[0])


def test_nothing_changes_in_evaluation_and_without_labels(losses):
    model, inputs = build("llama"), batch()
    patch_transformers()
    evaluated = model.eval()(**inputs)
    assert evaluated.loss is not None and evaluated.logits is not None
    del inputs["labels"]
    assert model.train()(**inputs).logits is not None
    assert not losses


def test_nothing_changes_under_a_compiler(losses):
    model, inputs = build("llama").train(), batch()
    expected = model(**inputs).loss
    patch_transformers()
    found = torch.compile(model, backend="eager")(**inputs)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is not None and not losses


def test_under_autocast(losses):
    model = build("llama", torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch()).loss
        patch_transformers()
        found = model(**batch())
    assert len(losses) == 1 and found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected, rtol=1e-2, atol=0)


def test_adapters(losses):
    model = get_peft_model(
        build("llama"),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    both(model, losses, **batch())


def left_alone(model, losses, words, **inputs):
    """A patched step is the unpatched one, after one warning however many steps there are."""
    inputs = batch() | inputs
    expected, gradients = trained(model, **inputs)
    patch_transformers()
    with pytest.warns(UserWarning, match=f"^patch_transformers: .* keeps its own loss: {words}"):
        found, ours = trained(model, **inputs)
    for _ in range(2):
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.logits, expected.logits)
        assert relative_error(ours, gradients) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found, ours = trained(model, **inputs)
    assert not losses and "forward" not in vars(model.get_output_embeddings())


def test_an_adapter_on_the_head_is_left_alone(losses):
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    left_alone(get_peft_model(build("llama"), config), losses, "its head is a Linear")


def test_a_loss_of_its_own_is_left_alone(losses):
    model = build("llama")
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    left_alone(model, losses, "its loss is not ForCausalLMLoss")
    assert model.loss_function.__name__ == "<lambda>"


def test_hooks_of_the_head_are_left_alone(losses):
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    left_alone(model, losses, "its head has hooks")


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (Shifted, "its logits are neither scaled nor capped"),
        (Slanted, "its logits are neither scaled nor capped"),
        (Sliced, "its logits are not all that its head gives"),
        (Early, "its logits are used before its loss"),
        (Twice, "its head is used twice"),
    ],
)
def test_other_logits_are_left_alone(model_class, words, losses):
    """Also with dropout, whose masks are those of a step without the patch."""
    model = build("llama", attention_dropout=0.5)
    model.__class__ = model_class
    left_alone(model, losses, words)


def test_a_fault_of_the_caller_stays_his(losses):
    patch_transformers()
    model, inputs = build("llama").train(), batch()
    inputs["labels"] = inputs["labels"][:1]
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**inputs)
    assert "forward" not in vars(model.lm_head) and "_loss_function" not in vars(model)


def test_a_class_that_is_made_later_is_patched_and_restored(losses):
    patch_transformers()

    class Later(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            self.loss_function  # noqa: B018
            return super().forward(*args, **kwargs)

    own = Later.forward.fastdpo_original
    model = build("llama").train()
    model.__class__ = Later
    patch_transformers()
    assert model(**batch()).logits is None and len(losses) == model.calls == 1
    patch_transformers(undo=True)
    patch_transformers(undo=True)
    assert Later.forward is own and model(**batch()).logits is not None


def test_transformers_may_be_missing(monkeypatch):
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="patch_transformers needs transformers, which"):
            patch_transformers()


class Losses(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append([logs["loss"], logs["grad_norm"]])


def test_three_steps_of_the_trainer(tmp_path, losses):
    """Rows of unlike lengths, two batches a step: the mean is over the tokens of both."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 3, 8, 2, 7, 9, 4, 6, 5, 9, 3, 8):
        ids = torch.randint(1, VOCABULARY, (10,), generator=generator)
        labels = torch.where(torch.arange(10) < length, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})

    def run():
        recorder = Losses()
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
            gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, seed=1,
        )  # fmt: skip
        model = build("gemma2", torch.float32)
        Trainer(model, args, train_dataset=rows, callbacks=[recorder]).train()
        return torch.tensor(recorder.logs), dict(model.named_parameters())

    expected, theirs = run()
    assert not losses
    patch_transformers()
    found, ours = run()
    assert len(losses) == 6 and found.shape == (3, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-2, atol=1e-4)
