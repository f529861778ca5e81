"""Triton's interpreter, faster: importing this keeps it from looking up the same things at each call of a function.

It looks through all of triton.language for what it has to wrap, and builds a table of dtypes, thousands of times in a
test. What it finds is remembered here; what it does with it is left alone.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

builtins_of = functools.cache(
    lambda package: [name for name in dir(package) if tl.core.is_builtin(getattr(package, name))]
)


def patch_builtin(package, builder, scope):
    """`_patch_builtin`, which finds none where they are wrapped already."""
    for name in builtins_of(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


dtype_of_numbers = functools.cache(interpreter._get_np_dtype)


def np_dtype(dtype):
    """`_get_np_dtype`, by the type of the elements: only that of numbers can be a key."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else dtype_of_numbers(element)


for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
    builtins_of(package)  # before any is wrapped
interpreter._patch_builtin = patch_builtin
interpreter._get_np_dtype = np_dtype
