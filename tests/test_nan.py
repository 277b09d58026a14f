"""What is not a number in the kernels, with the minimum and maximum of a GPU, which drop NaN where
the interpreter's keep it.
"""

import numpy
import pytest
import torch
from fastdpo_kernels.head import OUTPUTS, Head
from head_problems import make

pytest.importorskip("triton")
from fastdpo_kernels.triton import coefficients
from fastdpo_kernels.triton.tiles import TritonTiles
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def dropped(monkeypatch):
    """PTX's min and max of two numbers; the interpreter's reductions drop NaN by themselves."""
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "create_minnumf"):
        pytest.skip("this Triton's interpreter has one minimum for both kinds")
    for name, function in (("minnumf", numpy.fmin), ("maxnumf", numpy.fmax)):
        monkeypatch.setattr(
            builder,
            f"create_{name}",
            lambda self, a, b, function=function: self.binary_op(a, b, function),
        )


def columns(tile, row_scale):
    return (tile * row_scale.unsqueeze(1)).isnan().any(1)


@pytest.mark.parametrize("where", ["hidden", "one class", "target", "all"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_logit_that_is_no_number_reaches_every_result(where, softcap):
    """Of the tokens that meet it: their log-probability, statistics and gradient; no other's."""
    x, w, _, y = (None if t is None else t.to(DEVICE) for t in make(20, dtype=torch.float32))
    y = y.masked_fill(y == -100, -1)
    if where == "hidden":
        x[3] = torch.nan
    elif where == "one class":
        w[7] = torch.nan
    elif where == "target":
        w[y[4]] = torch.nan
    else:
        w[:] = torch.nan
    x[5] = 9 * w[y[5]].nan_to_num(0)  # the first choice, where all are numbers
    tiles = TritonTiles(Head(w, softcap=softcap), 1)
    scored = tiles.score(x, y, OUTPUTS)
    tile, row_scale, stats = tiles.exponentials(x, y, OUTPUTS)
    bad = [columns(tile, row_scale), columns(*tiles.probabilities(x, y, scored))]
    expected = y >= 0
    if where == "hidden":
        expected = expected & (torch.arange(20, device=DEVICE) == 3)
    for found in (scored, stats):
        for name, numbers in found.items():
            if name == "is_top1":
                assert not (numbers & expected).any()
            else:
                assert torch.equal(numbers.isnan(), expected), name
    for rows in bad:
        assert torch.equal(rows & (y >= 0), expected)


@pytest.mark.parametrize("name", coefficients.DERIVATIVES)
def test_a_log_probability_that_is_no_number_reaches_the_loss(name):
    doubles = {"dtype": torch.float64, "device": DEVICE}
    logps = torch.tensor([-3.0, torch.nan], **doubles)
    zeros, pairs = torch.zeros(2, **doubles), torch.tensor([[0, 1]], device=DEVICE)
    options = {"loss_type": name, "beta": 0.1, "label_smoothing": 0.1}
    loss, _ = coefficients.loss_and_coefficients(
        logps, zeros, zeros + 4, pairs, torch.ones(1, **doubles), **options
    )
    assert loss.isnan()
