"""Triton's interpreter at about twice its speed: what it finds out again at every operation is kept.

No operation computes anything else. Half the time of a small block goes into looking through `triton.language` for what
has to be replaced, at every call of a function by a kernel (`tl.sum`, `tl.zeros`, those of the project), although it is
replaced by then, and into NumPy's dtypes and the types of blocks, of which a kernel has few.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace
from typing import Any


def install() -> None:
    """Changes the interpreter of this process for good; nothing without TRITON_INTERPRET=1."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    patch, nothing_to_put_back = interpreter._patch_lang, interpreter._LangPatchScope()

    @functools.cache
    def patch_once() -> Any:
        """For good, as the interpreter itself does where a kernel calls a function."""
        patch(SimpleNamespace(__globals__={"tl": language, "core": core}))
        return nothing_to_put_back

    interpreter._patch_lang = lambda function: patch_once()
    find_dtype, dtypes = interpreter._get_np_dtype, {}

    def np_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(of)
        return dtypes[name]

    interpreter._get_np_dtype = np_dtype
    make_block_type, made = core.block_type.__init__, {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [core._unwrap_if_constexpr(size) for size in shape]
        key = (element_ty.name, *sizes)
        if key not in made:
            make_block_type(self, element_ty, sizes)
            made[key] = vars(self).copy()
        vars(self).update(made[key])

    core.block_type.__init__ = block_type
