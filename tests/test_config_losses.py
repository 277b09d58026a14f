"""The keys of the losses: which loss reads them, which cannot go together, and TRL's files."""

from typing import Any

import pytest
from fastdpo_kernels import LOSSES, register_loss

from fastdpo.config import TrainConfig
from fastdpo.config.losses import LOSS_TRAITS, OPTIONS, traits_of
from fastdpo.errors import ConfigError
from fastdpo.training.changes import deciding, describe_changes

ADDED_BY_THE_TRAINER = {"scale_rewards"}
GRPO = ("grpo", "bnpo", "dr_grpo", "dapo")


def fails(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values, place="here")
    return str(caught.value)


def test_the_table_is_that_of_the_kernels():
    assert set(LOSS_TRAITS) == set(LOSSES)
    for name, traits in LOSS_TRAITS.items():
        loss = LOSSES[name]
        assert (traits.kind, traits.unit) == (loss.kind, loss.unit), name
        assert (traits.reference, traits.mismatched) == (loss.reference, loss.mismatched), name
        options = set(loss.options) - {"beta"}
        if name in ("grpo", "bnpo", "dapo"):  # one signature for the four
            options -= {"max_completion_length"}
        assert set(traits.options) - ADDED_BY_THE_TRAINER == options, name
        assert set(traits.options) <= set(OPTIONS), name


def test_a_registered_loss_is_known():
    @register_loss("mine", reference=False)
    def mine(pairs: Any, *, alpha: float) -> Any:
        return pairs.margins * alpha

    try:
        assert not TrainConfig(loss_type=["mine"]).needs_reference
        assert TrainConfig(loss_type=["mine"], alpha=0.1).idle_settings() == []
        assert "mine takes no reference" in fails(loss_type="mine", ref_model_name_or_path="x")
    finally:
        del LOSSES["mine"]
    assert traits_of("mine") is None
    config = TrainConfig(loss_type=["mine"], alpha=0.1)  # an error once all are registered
    assert config.needs_reference
    assert config.idle_settings() == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"beta": 0}, "beta: expected a number greater than 0, got 0.0"),
        ({"beta": 0, "loss_type": "kto"}, "beta: expected a number greater than 0, got 0.0"),
        ({"beta": -1, "loss_type": "grpo"}, "beta: expected a number of at least 0, got -1.0"),
        (
            {"loss_type": ["kto", "sigmoid"]},
            "loss_type: expected kto alone: it is a loss of single responses and sigmoid one of "
            "comparisons, and only losses of comparisons are added up",
        ),
        ({"loss_type": ["sigmoid", "listwise"]}, "listwise alone: it is a loss of ranked groups"),
        ({"loss_type": ["kto", "bco"]}, "expected kto alone"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
            "f_divergence_type: nca_pair has reverse_kl only, got forward_kl; the losses with",
        ),
        ({"f_divergence_type": "kl"}, "expected one of reverse_kl, forward_kl, js_divergence"),
        ({"ld_alpha": 1.5}, "ld_alpha: expected a number from 0 to 1, got 1.5"),
        ({"ld_alpha": 0.5, "loss_type": "kto"}, "with a reference, such as sigmoid, and kto is"),
        ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "orpo"]}, "and orpo is not one"),
        ({"ld_alpha": 0.5, "loss_type": "sft"}, "and sft is not one"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, "cannot go with sft, which has"),
        ({"use_weighting": True, "loss_type": "aot"}, "cannot go with aot, which sorts"),
        ({"use_weighting": True, "loss_type": "aot_unpaired"}, "cannot go with aot_unpaired"),
        ({"use_weighting": True, "loss_type": "simpo"}, "use_weighting: is for losses of comp"),
        (
            {"loss_type": ["orpo", "sft"], "ref_model_name_or_path": "x"},
            "ref_model_name_or_path: orpo and sft takes no reference: remove the key",
        ),
        ({"loss_type": "cpo", "sync_ref_model": True}, "sync_ref_model: cpo takes no reference"),
        (
            {"sync_ref_model": True, "precompute_ref_log_probs": True},
            "precompute_ref_log_probs: cannot go with sync_ref_model",
        ),
        ({"sync_ref_model": True, "use_peft": True}, "sync_ref_model: is for training all weights"),
        ({"ref_model_mixup_alpha": 2}, "expected a number from 0 to 1, got 2.0"),
        ({"ref_model_sync_steps": 0}, "expected a whole number of at least 1, got 0"),
        ({"loss_type": "kto", "shuffle": True}, "shuffle: expected false, or nothing, with kto"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "expected at least 2 with kto"),
        (
            {"loss_type": "kto", "desirable_weight": 0, "undesirable_weight": 0},
            "undesirable_weight: expected one of it and desirable_weight above 0",
        ),
        ({"cpo_alpha": -1}, "cpo_alpha: expected a number of at least 0, got -1.0"),
        ({"epsilon": 0}, "epsilon: expected a number greater than 0, got 0.0"),
        ({"scale_rewards": "batch"}, "scale_rewards: expected one of group, none, got batch"),
        ({"importance_sampling_level": "word"}, "expected one of token, sequence, none, got word"),
        ({"convert": "both"}, "convert: expected one of unpair, pair, or nothing"),
    ],
)
def test_what_does_not_fit_the_loss_is_one_line(values, expected):
    message = fails(**values)
    assert message.startswith("here: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        *({"loss_type": name, "beta": 0} for name in GRPO),
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True},
        {"loss_type": ["sigmoid", "orpo"], "loss_weights": [1, 0.1], "sync_ref_model": True},
        {"loss_type": "kto", "shuffle": False, "ref_model_name_or_path": "x"},
        {"loss_type": "apo_zero_unpaired", "shuffle": True, "per_device_train_batch_size": 1},
    ],
)
def test_what_fits(values):
    config = TrainConfig.from_dict(values)
    assert config.notes() == []
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        *(
            (
                {"loss_type": "sigmoid", name: value},
                f"{name} has no effect: sigmoid does not read it",
            )
            for name, value in {
                "discopop_tau": 0.1,
                "desirable_weight": 2,
                "undesirable_weight": 2,
                "epsilon": 0.1,
                "epsilon_high": 0.3,
                "scale_rewards": "none",
                "importance_sampling_level": "sequence",
                "max_completion_length": 64,
            }.items()
        ),
        (
            {"loss_type": ["ipo", "hinge"], "label_smoothing": 0.1},
            "label_smoothing has no effect: ",
        ),
        ({"loss_type": ["sigmoid", "ipo"], "alpha": 0.1}, "alpha has no effect: sigmoid and ipo d"),
        ({"loss_type": "cpo", "simpo_gamma": 0.1}, "simpo_gamma has no effect: cpo does not"),
        ({"loss_type": "orpo", "cpo_alpha": 0.1}, "cpo_alpha has no effect: orpo does not"),
        ({"loss_type": "grpo", "max_completion_length": 9}, "max_completion_length has no effect"),
        (
            {"f_alpha_divergence_coef": 0.7},
            "f_alpha_divergence_coef has no effect: f_divergence_type is reverse_kl",
        ),
        ({"ref_model_mixup_alpha": 1}, "ref_model_mixup_alpha has no effect: sync_ref_model is f"),
        ({"ref_model_sync_steps": 1}, "ref_model_sync_steps has no effect: sync_ref_model is fal"),
        (
            {"loss_type": "orpo", "precompute_ref_log_probs": True},
            "precompute_ref_log_probs has no effect: orpo takes no reference",
        ),
        (
            {"sync_ref_model": True, "reference_cache_dir": "c"},
            "reference_cache_dir has no effect: sync_ref_model is true",
        ),
    ],
)
def test_what_no_loss_reads_is_noted(values, idle):
    (line,) = TrainConfig.from_dict(values).notes()
    assert line.startswith(idle)


def test_ktos_weights_without_a_loss_are_ktos():
    for values in ({"desirable_weight": 1.0}, {"undesirable_weight": 1.33}):
        config = TrainConfig.from_dict(values)
        assert config.loss_type == ["kto"] and not config.shuffles
        assert config.notes()[0].startswith("loss_type is [kto], as TRL's KTO trainer reads it")
    assert TrainConfig.from_dict({"loss_type": "bco", "desirable_weight": 2}).loss_type == ["bco"]


def test_batches_of_an_evaluation_matter_where_the_loss_has_terms_of_a_batch():
    for loss, idle in (("sigmoid", True), ("grpo", True), ("kto", False), ("sft", False)):
        config = TrainConfig(loss_type=[loss], per_device_eval_batch_size=2)
        said = [line for line in config.notes() if "per_device_eval_batch_size" in line]
        assert bool(said) is idle


def test_unset_means_what_the_run_needs():
    assert TrainConfig().shuffles and TrainConfig().precomputes
    assert not TrainConfig(loss_type=["kto"]).shuffles
    assert TrainConfig(loss_type=["bco"]).shuffles
    assert not TrainConfig(shuffle=False).shuffles
    assert not TrainConfig(sync_ref_model=True).precomputes
    assert not TrainConfig(precompute_ref_log_probs=False).precomputes
    assert not TrainConfig(loss_type=["simpo", "sft"]).needs_reference
    assert TrainConfig(loss_type=["sigmoid", "sft"]).needs_reference


def test_labelled_rows_are_for_kto_where_no_loss_was_given():
    unset = TrainConfig(beta=0.2, precompute_ref_log_probs=False)
    made = unset.for_layout(("label",))
    assert made.loss_type == ["kto"]
    assert made.origins["loss_type"] == "the data's layout"
    assert unset.for_layout(("pair",)) is unset
    assert unset.for_layout(("pair", "label")) is unset
    assert TrainConfig(convert="unpair").for_layout(("pair",)).loss_type == ["kto"]
    assert TrainConfig(convert="pair").for_layout(("label",)).loss_type == ["sigmoid"]
    given = TrainConfig.from_dict({"loss_type": "sigmoid"}), TrainConfig(loss_type=["sigmoid"])
    for config in given:
        assert config.for_layout(("label",)) is config
        chosen = config.choose("measured", bf16=True)
        assert chosen.for_layout(("label",)) is chosen
    with pytest.raises(ConfigError, match=r"^shuffle: expected false, or nothing, with kto"):
        TrainConfig(shuffle=True).for_layout(("label",))


@pytest.mark.parametrize(
    ("values", "loss", "cpo_alpha"),
    [
        ({"cpo_alpha": 1.0}, "cpo", 1.0),
        ({"loss_type": "sigmoid", "cpo_alpha": 0.5}, "cpo", 0.5),
        ({"loss_type": "hinge", "simpo_gamma": 0.5}, "cpo_hinge", None),
        ({"loss_type": ["ipo"], "alpha": 0.0}, "cpo_ipo", None),
        ({"loss_type": "alphapo", "alpha": 0.25}, "simpo", 0.0),
        ({"loss_type": "alphapo", "cpo_alpha": 1.0}, "simpo", 0.0),
        ({"loss_type": "simpo", "simpo_gamma": 1.0}, "simpo", None),
        ({"loss_type": "sigmoid"}, "sigmoid", None),
    ],
)
def test_trls_cpo_files_are_read_as_its_trainer_does(values, loss, cpo_alpha):
    for config in (TrainConfig.from_dict(values), TrainConfig(**values)):
        assert (config.loss_type, config.cpo_alpha) == ([loss], cpo_alpha)
        notes = [line for line in config.notes() if line.startswith("loss_type")]
        renamed = loss not in ("sigmoid", "simpo") or values["loss_type"] == "alphapo"
        expected = f"loss_type is [{loss}], as TRL's CPO trainer reads it"
        assert [line.split(":")[0] for line in notes] == [expected] * renamed
        again = TrainConfig.from_dict(config.to_dict())
        assert again == config
        assert again.notes() == []


KTO_FILE = """\
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: trl-lib/kto-mix-14k
learning_rate: 5.0e-7
train_sampling_strategy: sequential
desirable_weight: 1.0
undesirable_weight: 1.33
precompute_ref_batch_size: null
per_device_train_batch_size: 4
"""
ORPO_FILE = """\
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
beta: 0.1
max_length: 1024
max_completion_length: null
padding_value: null
is_encoder_decoder: false
generate_during_eval: false
"""
CPO_FILE = """\
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
loss_type: simpo
cpo_alpha: 0.0
simpo_gamma: 0.5
label_smoothing: 0.1
disable_dropout: true
"""


@pytest.mark.parametrize(
    ("text", "flags", "loss"),
    [
        (KTO_FILE, [], "kto"),
        (ORPO_FILE, ["--loss_type", "orpo"], "orpo"),
        (CPO_FILE, [], "simpo"),
    ],
)
def test_files_of_trls_trainers_run_as_they_are(tmp_path, text, flags, loss):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    config = TrainConfig.parse([str(path), *flags])
    kinds = ("label",) if loss == "kto" else ("pair",)
    run = config.for_layout(kinds)
    assert run.loss_type == [loss]
    read = [line for line in run.notes() if line.startswith("loss_type is [kto], as TRL's KTO")]
    assert run.notes() == read and bool(read) is (loss == "kto")
    assert run.shuffles == (loss != "kto")


def test_sequential_sampling_is_the_files_order():
    config = TrainConfig.parse(["--train_sampling_strategy", "sequential"])
    assert config.shuffle is False
    assert config.origins["shuffle"] == "--train_sampling_strategy"
    both = TrainConfig.from_dict({"train_sampling_strategy": "sequential", "shuffle": True})
    assert both.shuffle is True
    assert TrainConfig.from_dict({"train_sampling_strategy": "random"}) == TrainConfig()
    assert "Use shuffle" in fails(train_sampling_strategy="group_by_length")


def test_a_resumed_run_may_write_out_what_was_unset():
    def note(before: TrainConfig, now: TrainConfig) -> str | None:
        return describe_changes({"step": 1, "config": deciding(before)}, now)

    def made(**values: Any) -> TrainConfig:
        return TrainConfig(**{"loss_type": ["dr_grpo"], **values})

    written = {"epsilon_high": 0.2, "max_completion_length": 1024, "shuffle": True}
    assert note(made(), made(**written)) is None
    assert "epsilon_high None (now 0.3)" in str(note(made(), made(epsilon_high=0.3)))
    simpo = {"loss_type": ["simpo"]}
    assert note(TrainConfig(**simpo), TrainConfig(**simpo, cpo_alpha=1.0)) is None
    assert note(TrainConfig(), TrainConfig(discopop_tau=0.2, ref_model_sync_steps=2)) is None
    assert note(TrainConfig(), TrainConfig(ld_alpha=0.5)) is not None
    assert note(TrainConfig(), TrainConfig(sync_ref_model=True)) is not None
