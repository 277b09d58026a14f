"""Products on a GPU, by a stand-in that refuses what CUDA refuses, and by the meta device."""

from typing import Any, ClassVar

import pytest
import torch
from fastdpo_kernels import products
from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]
FUNCTIONS = {torch.mm: 0, torch.addmm: 1, Tensor.addmm_: 1}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU and whose products follow the rules of CUDA."""

    is_cuda = True
    widens = True
    calls: ClassVar[list[torch.dtype]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in FUNCTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        total = args[0] if FUNCTIONS[func] else None
        a, b = args[FUNCTIONS[func] :]
        wanted, out = kwargs.get("out_dtype"), kwargs.get("out")
        if wanted is not None and not cls.widens:
            raise RuntimeError("out_dtype is not supported")
        if a.dtype != b.dtype:
            raise RuntimeError("factors of two dtypes")
        result = wanted or a.dtype
        if result != a.dtype and not (a.dtype in HALVES and result == torch.float32):
            raise RuntimeError("out_dtype must be that of the factors, or fp32 for halves")
        if out is not None and out.dtype != result:
            raise RuntimeError("out_dtype must be that of out")
        if total is not None and total.dtype != result:
            raise RuntimeError("self must have the dtype of the result")
        cls.calls.append(a.dtype)
        with torch._C.DisableTorchFunctionSubclass():
            product = a.double() @ b.double()
            product = product if total is None else product + total.double()
            target = total if func is Tensor.addmm_ else out
            product = product.to(result)
            return (product if target is None else target.copy_(product)).as_subclass(cls)


@pytest.fixture(params=[True, False], ids=["widens", "does not widen"])
def gpu(request, monkeypatch):
    monkeypatch.setattr(products, "_gives", {})
    monkeypatch.setattr(OnGpu, "widens", request.param)
    monkeypatch.setattr(OnGpu, "calls", [])
    return request.param


def factors(dtypes: tuple[torch.dtype, torch.dtype], transposed: bool) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(8, 48, generator=draw).to(dtypes[0])
    b = torch.randn(48, 24, generator=draw).to(dtypes[1])
    return [(t.T.contiguous().T if transposed else t).as_subclass(OnGpu) for t in (a, b)]


CASES = [
    ((torch.bfloat16, torch.bfloat16), torch.bfloat16, torch.bfloat16),
    ((torch.float32, torch.bfloat16), torch.bfloat16, torch.bfloat16),
    ((torch.float16, torch.float16), torch.float16, torch.float16),
    ((torch.float32, torch.float16), torch.float16, torch.float32),
    ((torch.float32, torch.float32), torch.float32, torch.float32),
    ((torch.float64, torch.float64), torch.float64, torch.float64),
]


@pytest.mark.parametrize(("dtypes", "operands", "multiplied"), CASES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_fp32_of_every_dtype(gpu, dtypes, operands, multiplied, transposed):
    """Half precision is multiplied as it is where fp32 comes of it, widened first elsewhere."""
    a, b = factors(dtypes, transposed)
    wide = torch.promote_types(dtypes[0], torch.float32)
    rounded = [t.as_subclass(Tensor).to(multiplied if gpu else wide).double() for t in (a, b)]
    exact = (rounded[0] @ rounded[1]).to(wide)
    total = torch.ones(8, 24, dtype=wide).as_subclass(OnGpu)
    out = torch.full((8, 24), torch.nan, dtype=wide).as_subclass(OnGpu)
    OnGpu.calls.clear()
    products.mm(a, b, wide, operands=operands, out=out)
    added = products.addmm_(total, a, b, operands=operands)
    assert added.data_ptr() == total.data_ptr()
    expected = multiplied if gpu or multiplied not in HALVES else wide
    assert OnGpu.calls[-2:] == [expected] * 2
    for found, right in ((out, exact), (total, exact + 1)):
        torch.testing.assert_close(found.as_subclass(Tensor), right, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_device_is_tried_once(gpu, dtype):
    a, b = factors((dtype, dtype), False)
    for _ in range(3):
        products.mm(a, b, torch.float32, operands=dtype)
    assert list(products._gives.values()) == [gpu]
    assert len(OnGpu.calls) == 3 + 2 * gpu


def test_want_of_memory_is_no_answer(monkeypatch):
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(products, "_gives", {})
    a, b = factors((torch.bfloat16, torch.bfloat16), False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", full)
        with pytest.raises(torch.OutOfMemoryError):
            products.mm(a, b, torch.float32, operands=torch.bfloat16)
    assert not products._gives


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_torch_gives_a_product_in_fp32_in_place(dtype):
    """The signature that the GPU's branch calls, on a device without numbers."""
    a, b = (torch.empty(16, 16, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(16, 16, device="meta")
    assert torch.mm(a, b, out_dtype=torch.float32, out=out) is out
