"""Triton's interpreter, faster: importing this keeps it from looking up the same things at each call of a function.

It looks through all of triton.language for what it has to wrap, and builds tables of dtypes and shapes, thousands of
times in a test. What it finds is remembered here; what it does with it is left alone. It also computes whether each sum
of integers overflows, for an assertion that it makes in no kernel, since `InterpreterOptions.debug` is False.
"""

import dataclasses
import functools
import inspect
import math

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
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


@functools.cache
def langs_of(fn):
    return [lang for lang in fn.__globals__.values() if inspect.ismodule(lang) and lang in (tl, tl.core)]


patch_all = interpreter._patch_lang


def patch_lang(fn):
    """`_patch_lang`, which wraps again what it has wrapped for the kernel that calls this function."""
    if any(tl.core.is_builtin(lang.load) for lang in (tl, *langs_of(fn))):
        return patch_all(fn)
    return interpreter._LangPatchScope()


dtype_of_numbers = functools.cache(interpreter._get_np_dtype)


def np_dtype(dtype):
    """`_get_np_dtype`, by the type of the elements: only that of numbers can be a key."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else dtype_of_numbers(element)


make_block, sizes_of = tl.block_type.__init__, {}


def init_block(self, element_ty, shape):
    """`block_type.__init__`, which checks and names each shape once."""
    sizes = tuple(getattr(size, "value", size) for size in shape)
    if sizes not in sizes_of:
        make_block(self, element_ty, shape)
        sizes_of[sizes] = self.shape, self.numel, str(self.shape)
    self.shape, self.numel, name = sizes_of[sizes]
    self.element_ty, self.name = element_ty, f"<{name}, {element_ty}>"


@functools.cache
def sizes_as_constexprs(sizes):
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def init_tensor(self, handle, type):
    """`tensor.__init__`, which makes the same two constants for each shape."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = sizes_as_constexprs(tuple(type.shape) if type.is_block() else ())


broadcast = TritonSemantic.broadcast_impl_value


def broadcast_unlike(self, left, right):
    """`broadcast_impl_value`, which makes no new shape of two that are one, as `init_block` leaves them."""
    if left.type.is_block() and right.type.is_block() and left.type.shape is right.type.shape:
        return left, right
    return broadcast(self, left, right)


for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
    builtins_of(package)  # before any is wrapped
assert not interpreter.interpreter_builder.options.debug, "the assertion would be made"
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
TritonSemantic.broadcast_impl_value = broadcast_unlike
interpreter._patch_builtin = patch_builtin
interpreter._patch_lang = patch_lang
interpreter._get_np_dtype = np_dtype
