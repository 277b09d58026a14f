"""Triton's interpreter without what takes it two fifths of its time."""

import os
from importlib.util import find_spec
from typing import Any


def look_once() -> None:
    """Have the interpreter replace the functions of Triton's language once for each module of
    kernels, and not look through all of them again at each call of a function.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    look, left = getattr(interpreter, "_patch_lang", None), {}
    if look is None:
        return

    def once(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in left:
            found = look(function)  # whose `restore` nobody calls
            left[id(names)] = (names, None if found is None else type(found))
        _, scope = left[id(names)]
        return scope and scope()

    interpreter._patch_lang = once
