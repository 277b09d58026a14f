"""Counts the variants of each kernel that Triton would compile, without a GPU and without Triton's
compiler: its own binder says what it specialises a launch on.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastdpo_kernels.triton import configs, exponential, score
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

Variants = dict[str, set[str]]
"""Keys of Triton's cache of compiled kernels, by the name of the kernel."""


@contextmanager
def counted_variants(card: str = "sm_90", *, launch: bool = False) -> Iterator[Variants]:
    """What a GPU of the table's entry `card` would have compiled; kernels run only with `launch`.

    The configurations are those of the card, its multiprocessors 132.
    """
    found: Variants = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, Callable[..., Any]] = {}
    run = InterpretedFunction.run

    def count(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self not in binders:
            kernel = JITFunction(self.fn, **self.kwargs)
            binders[self] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binders[self](*args, **kwargs)
        found[self.fn.__name__].add(compute_cache_key({}, specialization, options))
        if launch:
            run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", count)
        if not launch:
            patch.setattr(configs, "card", lambda device: card)
            for module in (exponential, score):
                patch.setattr(module, "multiprocessors", lambda device: 132)
        yield found
