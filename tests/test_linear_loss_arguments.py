"""What `linear_loss` takes and refuses: defaults, orders of tokens, compilers, one clear line for
whatever is wrong or missing.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from fastdpo_kernels import LOSSES, linear_loss, register_loss
from fastdpo_kernels.losses import Loss
from head_problems import assert_same, small_tiles
from loss_problems import by_full_logits, by_linear_loss, make_task, options_of

BACKENDS = ["torch", "triton", "naive"]
EXACT = 1e-10


@pytest.fixture(autouse=True)
def poisoned_workspace():
    """Tiles of four tokens, with NaN before they are written."""
    with small_tiles(4):
        yield


def without(task, *names):
    return replace(task, given={k: v for k, v in task.given.items() if k not in names})


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("name", ["sft", "cpo", "orpo", "bnpo", "dapo"])
def test_a_call_is_a_whole_batch_where_nothing_else_is_given(name, backend):
    task = make_task(LOSSES[name].kind, prompt=LOSSES[name].prompt)
    columns, lengths = task.units.view(len(task.units), -1).unbind(1), task.lengths
    means = {
        "batch_chosen_tokens": lengths[columns[0]].mean(),
        "batch_sequence_tokens": (lengths[columns[0]] + lengths[columns[-1]]).mean(),
        "batch_tokens": lengths[columns[0]].mean(),
        "step_tokens": lengths[columns[0]].mean(),
    }
    count = len(task.units)
    filled = {key: mean.expand(count) for key, mean in means.items()}
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    exact = replace(task, given=task.given | filled, unit_weights=weights)
    options = options_of(name)
    found = by_linear_loss(
        without(task, *means), loss=name, backend=backend, **options | {"unit_weights": None}
    )
    assert_same(found, by_full_logits(exact, lambda seen: LOSSES[name](seen, **options)), EXACT)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("name", ["sigmoid", "grpo", "listwise"])
def test_tokens_of_responses_may_stand_between_each_other(name, backend):
    """In their order within each response; the units are cut by where their tokens stand."""
    task = make_task(LOSSES[name].kind)
    g = torch.Generator().manual_seed(0)
    place = torch.rand(len(task.response_ids), generator=g).sort().values
    where = torch.cat([task.response_ids.eq(r).nonzero()[:, 0] for r in task.response_ids.unique()])
    mixed = place[torch.randperm(len(place), generator=g)]
    for r in task.response_ids.unique():
        own = task.response_ids == r
        mixed[own] = mixed[own].sort().values
    order = where[mixed.argsort()]
    changed = {
        field: getattr(task, field)[order]
        for field in ("hidden", "targets", "response_ids", "ref_token_logps")
    }
    own = {"ld_alpha": 0.3} if name == "sigmoid" else {}
    options = options_of(name) | own
    plain, shuffled = (
        by_linear_loss(each, loss=name, backend=backend, **options)
        for each in (task, replace(task, **changed))
    )
    for key in ("token_logps", "gradient of hidden"):
        plain[key] = plain[key][order]
    assert_same(shuffled, plain, EXACT)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(divergence, backend):
    task = make_task()
    options = options_of("sigmoid") | {"f_divergence_type": divergence}
    found = by_linear_loss(task, loss="sigmoid", backend=backend, **options)
    assert_same(found, by_full_logits(task, Loss.named("sigmoid", **options)), EXACT)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("name", ["sigmoid", "sft", "kto", "grpo", "bnpo", "listwise", "aot"])
def test_nothing_to_score_and_no_units(name, backend):
    task = make_task(LOSSES[name].kind)
    options = options_of(name) | {"loss": name, "backend": backend}
    ignored = replace(task, targets=torch.full_like(task.targets, -100))
    exact = by_full_logits(ignored, lambda seen: LOSSES[name](seen, **options_of(name)))
    assert_same(by_linear_loss(ignored, **options), exact, EXACT)
    none = replace(task, units=task.units[:0], given={k: v[:0] for k, v in task.given.items()})
    for weights in (task.unit_weights[:0], None):
        found = by_linear_loss(none, **options, unit_weights=weights)
        assert not found["loss"] and not found["gradient of hidden"].any()
        torch.testing.assert_close(
            found["token_logps"], by_linear_loss(task, **options)["token_logps"]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_for_the_prompt_changes_no_loss_that_does_not_read_it(backend):
    """The fused kernels read the comparisons of a loss that they know by its name."""
    task = make_task(prompt=True)
    plain = replace(task, units=task.units[:, :2].contiguous(), given={})
    dtype = torch.float32
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    options = {"loss": "sigmoid", "backend": backend, "dtype": dtype, "device": device}
    options |= {"ref_logps": task.sums(task.ref_token_logps).to(device), "ref_token_logps": None}
    with small_tiles(16):
        three, two = (by_linear_loss(each, **options) for each in (replace(task, given={}), plain))
    assert_same(three, two, 1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "kto", "grpo", "listwise", "aot"])
def test_compiled_around_it(name):
    task = make_task(LOSSES[name].kind)

    def step(hidden, weight):
        result = linear_loss(
            2 * hidden,
            weight,
            task.targets,
            task.response_ids,
            task.units,
            loss=name,
            given=task.given,
            ref_token_logps=task.ref_token_logps,
        )
        return 3 * result.loss, result.response_logps.sum()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (task.hidden, task.weight)]
        loss, total = function(*leaves)
        loss.backward()
        results.append([loss.detach(), total, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_statistics_of_tokens_and_constants_without_gradient(backend):
    task = make_task()
    wanted = ("entropy", "log_sum_sq_prob", "is_top1")
    found = by_linear_loss(task, loss="sigmoid", backend=backend, outputs=wanted)
    p = (task.hidden @ task.weight.T + task.bias).softmax(-1)
    top = p.argmax(1) == task.targets
    entropy = -(p * p.log()).sum(1).where(task.valid, 0)
    squares = p.square().sum(1).log().where(task.valid, 0)
    assert torch.equal(found["is_top1"].bool(), top)
    torch.testing.assert_close(found["entropy"], entropy)
    torch.testing.assert_close(found["log_sum_sq_prob"], squares)
    reference = task.ref_token_logps.clone().requires_grad_()
    by_linear_loss(task, loss="sigmoid", backend=backend, ref_token_logps=reference)
    assert reference.grad is None


def refused(task, message, **options):
    """Every backend raises the same `ValueError`, of one line."""
    dtype = {"triton": torch.float32}
    for backend in BACKENDS:
        kind = dtype.get(backend, torch.float64)
        with pytest.raises(ValueError, match=message) as error:
            by_linear_loss(task, dtype=kind, backend=backend, **options)
        assert "\n" not in str(error.value)


ONE = torch.ones(1)
TWO_COLUMNS = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kto", {"units": TWO_COLUMNS}, r"units: expected \(U,\), got \(2, 2\)"),
        ("grpo", {"units": TWO_COLUMNS}, r"units: expected \(U,\), got \(2, 2\)"),
        ("listwise", {"units": TWO_COLUMNS[0]}, r"units: expected \(U, G\), got \(2,\)"),
        ("sigmoid", {"units": TWO_COLUMNS[0]}, r"units: expected \(U, 2\), got \(2,\)"),
        ("aot", {"units": TWO_COLUMNS[:, :1]}, r"units: expected \(U, 2\), got \(2, 1\)"),
        ("orpo", {"units": TWO_COLUMNS}, r"units: expected \(U, 3\), winner, .* got \(2, 2\)"),
        ("kto", {"units": torch.zeros(7)}, "units: expected integers, got torch.float32"),
        ("kto", {"units": torch.full((7,), 9)}, "units: 9 is outside the 9 responses"),
        ("kto", {"units": torch.full((7,), -1)}, "units: -1 is outside the 9 responses"),
        ("listwise", {"units": torch.full((4, 4), -2)}, "units: -2 is outside the 9 responses"),
        ("kto", {"unit_weights": ONE}, r"unit_weights: expected shape \(7,\), got \(1,\)"),
        ("grpo", {"ref_token_logps": ONE}, r"ref_token_logps: expected shape \(38,\), got \(1,\)"),
        ("kto", {"response_ids": TWO_COLUMNS[0]}, r"response_ids: expected shape \(38,\)"),
    ],
)
def test_wrong_shapes_are_named(name, change, message):
    task = make_task(LOSSES[name].kind)
    options = {"ref_logps": torch.zeros(9)} if "units" in change else {}
    refused(replace(task, **change), message, loss=name, **options)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("kto", {"label": ONE}, r"given\['label'\]: expected shape \(7,\), got \(1,\)"),
        ("kto", {"label": [True] * 7}, r"given\['label'\]: expected a tensor, got list"),
        ("listwise", {"rank": torch.ones(4, 3)}, r"given\['rank'\]: expected shape \(4,\), got"),
        ("sigmoid", {"kl": torch.ones(6, 2)}, r"given\['kl'\]: expected shape \(6,\), got"),
    ],
)
def test_wrong_constants_are_named(name, given, message):
    task = make_task(LOSSES[name].kind)
    refused(task, message, loss=name, given=task.given | given)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        *((name, column) for name, loss in sorted(LOSSES.items()) for column in loss.columns),
        *(("kto", "kl"), ("bco", "delta")),
    ],
)
def test_missing_constants_are_named(name, column):
    task = without(make_task(LOSSES[name].kind), column)
    refused(task, rf"given.*'{column}'.*one number a unit", loss=name)


@pytest.mark.parametrize("name", sorted(n for n, loss in LOSSES.items() if loss.reference))
def test_a_missing_reference_is_named(name):
    task = make_task(LOSSES[name].kind)
    refused(task, f"{name}: needs ref_logps", loss=name, ref_token_logps=None)


def test_a_reference_of_tokens_is_asked_for_where_sums_are_not_enough():
    options = {"ref_logps": torch.zeros(9), "ref_token_logps": None}
    missing = "needs ref_token_logps, the reference's of every token"
    refused(make_task(), "ld_alpha: " + missing[:21], loss="sigmoid", ld_alpha=0.5, **options)
    task = make_task("tokens")
    refused(task, missing, loss="grpo", **options)
    options["importance_sampling_level"] = "sequence"
    refused(task, missing, loss="grpo", **options)
    sequence = by_linear_loss(task, loss="grpo", beta=0.0, **options)
    sampled = replace(task, given=task.given | {"logp": torch.zeros(7)})
    options["ref_logps"] = None
    alone = by_linear_loss(sampled, loss="grpo", beta=0.0, **options)
    assert_same(alone, sequence, EXACT)
    refused(
        make_task(),
        "sigmoid: needs ref_logps",
        loss="sigmoid",
        given={"logp": torch.zeros(6)},
        f_divergence_type="js_divergence",
        ref_token_logps=None,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "sigmoidal"}, r"unknown loss_type 'sigmoidal'; known: .*hinge"),
        ({"loss": "simpo", "simpo_gama": 1.0}, "simpo: no option 'simpo_gama'; .* simpo_gamma"),
        ({"loss": "sigmoid", "f_divergence_type": "kl"}, "f_divergence_type: expected one of"),
        ({"loss": abs, "simpo_gamma": 1.0}, "simpo_gamma: options of a registered loss, not of"),
        ({"loss": Loss(abs), "ld_alpha": 0.5}, "ld_alpha: options of a registered loss"),
        ({"loss": abs, "kind": "pair"}, "kind: expected one of comparison, .* got 'pair'"),
        ({"loss": 3}, "loss: expected the name of a loss or a function, got 3"),
        ({"loss": lambda pairs: pairs.margins.mean()}, r"returns \(\d,\), one loss a comparison"),
        ({"loss": lambda pairs: pairs.given["cost"]}, "given: the loss reads 'cost'.* got batch_"),
        ({"loss": "robust", "label_smoothing": 0.5}, "robust: expected 0 <= label_smoothing < 0.5"),
        ({"loss": "sigmoid", "outputs": ("entropie",)}, "unknown outputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_losses_and_options_are_named(options, message):
    refused(make_task(), message, **options)


@pytest.mark.parametrize(
    ("name", "option"),
    itertools.product(
        ["kto", "grpo", "listwise"],
        [{"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "forward_kl"}],
    ),
    ids=str,
)
def test_options_of_comparisons_are_refused_for_others(name, option):
    refused(
        make_task(LOSSES[name].kind),
        f"{name}: no option '{next(iter(option))}'",
        loss=name,
        **option,
    )


def test_a_registered_loss_may_take_any_option():
    try:
        register_loss("scaled")(lambda pairs, **options: options["by"] * pairs.margins)
        task = make_task()
        constants = {"given": None, "ref_logps": task.sums(task.ref_token_logps)}
        found = by_linear_loss(task, loss="scaled", by=2.0, ref_token_logps=None, **constants)
        assert_same(found, by_full_logits(task, lambda pairs: 2 * pairs.margins), EXACT)
    finally:
        LOSSES.pop("scaled", None)
