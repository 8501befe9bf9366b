"""Products for torch, with derivatives.

Owns: which form of the product torch runs fast on a CPU, and the derivative that all forms share. docs/performance.md
says what was tried and what each gave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Spec
from aqt_lite.backends import _numpy_kernels
from aqt_lite.backends.torch import has_no_values, is_functorch
from aqt_lite.elements import FLOAT_TYPES, element_type
from aqt_lite.ops import reference

MOST_ROWS_AS_DIGITS = 64
"""Up to this many rows of x, four int8 products are faster than one float32 product."""

SMALL = 1 << 20
"""Up to this many elements, dequantizing the weight takes less time than making digits of x."""

ROWS_OF_A_BLOCK = 512
"""Rows of the weight that are dequantized at a time."""


def _sums_pairs_in_16_bits() -> bool:
    """Whether this processor adds pairs of int8 products in 16 bits, which saturate where both are extreme."""
    ends = np.asarray([-128, 127], np.int8)
    w, x = np.broadcast_to(ends.repeat(16)[:, None], (32, 64)).copy(), np.tile(ends, (64, 16))
    with _disable_current_modes(), torch.device("cpu"):  # a real product, whatever is being traced around this call
        product = torch._int_mm(torch.from_numpy(w), torch.from_numpy(x)).numpy()
    return not np.array_equal(product, w.astype(np.int32) @ x.astype(np.int32))


SUMS_PAIRS_IN_16_BITS = _sums_pairs_in_16_bits()
"""Found out once, on import: a compiler that traces cannot."""


def integer_matmul(x: Array, w: Array) -> Array:
    """``x @ w.T`` over the last axes, in int32.

    On a CPU through torch's int8 product, the weight on the left: read once, in the order it lies. Processors without
    dot-product instructions saturate unless the right operand has no more than 7 bits, so there ``x = 2 h + l``.
    """
    if x.ndim == 3 and x.shape[0] == 1:
        return integer_matmul(x[0], w[0])[None]
    # torch 2.13's int8 product misreads an operand of one row or column whose strides are (1, 1), a transpose's
    single = 1 in (*x.shape, *w.shape)
    if x.ndim == 2 and not single and x.dtype == w.dtype == torch.int8 and x.device.type == "cpu":
        if not SUMS_PAIRS_IN_16_BITS:
            return torch._int_mm(w, x.T.contiguous()).T
        halves = torch.cat([x >> 1, x & 1])
        high, low = torch._int_mm(w, halves.T.contiguous()).T.chunk(2)
        return 2 * high + low
    product = x.to(torch.float64) @ w.to(torch.float64).transpose(-1, -2)
    return product.to(torch.int32)


def _fast(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, bias: Array | None, spec: Spec, contract: int
) -> Array:
    """The form that is fastest here, at no more than twice the error of a float32 product."""
    arguments = (x, codes, scale, zero_point, bias)
    single = codes.dtype.itemsize == 1 and torch.float64 not in (x.dtype, scale.dtype)
    mapped = not torch.compiler.is_compiling() and any(is_functorch(a) for a in arguments if a is not None)
    recorded = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    in_place = x.device.type == "cpu" and not mapped and not recorded  # neither can follow what happens in place
    if not in_place or not single or 0 in (*x.shape, *codes.shape):
        return reference.matmul(*arguments, spec=spec, contract=contract, b=get_backend("torch"))
    digits_serve = _has_one_large_piece(codes, scale, contract)
    y = _by_dots("matmul_by_dots", arguments, spec, contract) if digits_serve else NotImplemented
    if y is not NotImplemented:
        return y
    if (
        x.shape[0] <= (1 if digits_serve else _numpy_kernels.MOST_ROWS_FOR_LOOPS)
        and _are_plain(arguments)
        and _numpy_kernels.loops_serve(x.shape[0], codes, scale, zero_point, contract)
    ):
        return _shared("matmul", *arguments, spec=spec, contract=contract)
    b = get_backend("torch")
    if digits_serve and x.shape[0] <= MOST_ROWS_AS_DIGITS and (b.is_traced(x) or reference.fits_fixed_point(x, b)):
        return _reproducible(*arguments, spec, contract)
    return _blockwise(*arguments, spec, contract)


def _blockwise(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, bias: Array | None, spec: Spec, contract: int
) -> Array:
    """``x @ dequantize(w)``, a block of rows of the weight at a time, so that the float block stays in cache."""
    xp = get_backend("torch").xp
    grain = spec.block[0] or 1  # blocks begin where a group begins
    height = -(-ROWS_OF_A_BLOCK // grain) * grain
    length, width = codes.shape
    rows, wide = x.shape[0], x.to(torch.float32)
    like = {"dtype": torch.float32, "device": x.device}  # whatever the user's defaults are
    scratch = torch.empty((min(height, length), width), **like)
    y = torch.zeros((rows, width), **like) if contract == 0 else torch.empty((rows, length), **like)
    for start in range(0, length, height):
        stop = min(start + height, length)

        def part(a: Array, start: int = start, stop: int = stop) -> Array:
            own = a if a.shape[0] == 1 else a[start // grain : -(-stop // grain)]
            return affine.spread(own, (stop - start, width), spec.block, xp)

        weight = scratch[: stop - start]
        weight.copy_(codes[start:stop])
        if zero_point is not None:
            weight.sub_(part(zero_point))
        weight.mul_(part(scale))
        if contract == 0:
            y.addmm_(wide[:, start:stop], weight)
        else:
            y[:, start:stop] = wide @ weight.T  # x on the left: the other way round errs several times more
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def _reproducible(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, bias: Array | None, spec: Spec, contract: int
) -> Array:
    arguments = (x, codes, scale, zero_point, bias)
    y = _by_dots("matmul_reproducible", arguments, spec, contract)
    if y is not NotImplemented:
        return y
    return reference.matmul_reproducible(*arguments, spec=spec, contract=contract, b=get_backend("torch"))


def _by_dots(op: str, arrays: tuple[Array | None, ...], spec: Spec, contract: int) -> Any:
    """NumPy's form with the processor's int8 dot products, where it serves; bfloat16 goes there as float32."""
    x, codes, scale, zero_point, bias = arrays
    assert x is not None
    wide, shift = (t.to(torch.float32) if t is not None and t.dtype == torch.bfloat16 else t for t in (x, bias))
    if not _are_plain((wide, codes, scale, zero_point, shift)) or _numpy_kernels.integer_dots() is None:
        return NotImplemented
    y = _shared(op, wide, codes, scale, zero_point, shift, spec=spec, contract=contract)
    return y if y is NotImplemented else y.to(x.dtype)


def _has_one_large_piece(codes: Array, scale: Array, contract: int) -> bool:
    """Whether integer products serve, and the weight is large enough for making digits of x to pay."""
    return bool(contract == 1 and scale.shape[1] == 1 and codes.numel() > SMALL)


_FORMS: dict[str, Callable[..., Array]] = {"matmul": _fast, "matmul_reproducible": _reproducible}


class _Product(torch.autograd.Function):
    """With respect to x: the same product with the other axis contracted, so it, too, reads int8 codes alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, spec: Spec, contract: int, *arrays: Any) -> Array:
        return _without_derivatives(op, spec, contract, *arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op, ctx.spec, ctx.contract, x, codes, scale, zero_point, bias = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[5] else None, codes, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, dy: Array) -> Any:
        x, codes, scale, zero_point = ctx.saved_tensors
        spec, contract, op = ctx.spec, 1 - ctx.contract, ctx.op
        dx = dscale = dbias = None
        if ctx.needs_input_grad[3]:
            if not reference.has_integer_sums(scale, contract, spec.block[contract]):
                op = "matmul"
            dx = _product(op, spec, contract, dy, codes, scale, zero_point, None)
        if ctx.needs_input_grad[5]:
            left, right = (x, dy) if contract == 1 else (dy, x)
            dw = left.to(scale.dtype).T @ right.to(scale.dtype)
            weight = functools.partial(affine.dequantize, spec=spec, out=spec.source.compute, b=get_backend("torch"))
            pullback = torch.func.vjp(lambda s: weight(codes, s, zero_point), scale)[1]
            (dscale,) = pullback(dw)
        if ctx.needs_input_grad[7]:
            dbias = dy.to(scale.dtype).sum(0).to(ctx.bias_dtype)
        return None, None, None, dx, None, dscale, None, dbias


def _product(op: str, spec: Spec, contract: int, *arrays: Any) -> Array:
    x, codes, scale, zero_point, bias = arrays
    # first of all, before anything else is asked: each question takes a good part of the time of a small product
    if op == "matmul" and zero_point is None and _are_plain(arrays) and codes.numel() < _numpy_kernels.LARGE:
        y = _shared("small_matmul", x, codes, scale, bias, contract=contract)
        if y is not NotImplemented:
            return y
    if get_backend("torch").differentiates(x, scale, bias):
        return _Product.apply(op, spec, contract, *arrays)  # type: ignore[no-untyped-call]
    return _without_derivatives(op, spec, contract, *arrays)


def _without_derivatives(op: str, spec: Spec, contract: int, *arrays: Any) -> Array:
    x, codes, scale, zero_point, bias = arrays
    if _is_one_call(x, codes, scale, contract):
        block = -1 if spec.block[0] is None else spec.block[0]
        return _eager_product(op, spec.element.name, spec.source.name, block, x, codes, scale, zero_point, bias)
    return _FORMS[op](*arrays, spec, contract)


# ---- inside what torch.compile makes, where compiled loops serve: one operator, which runs as an eager call does

HAS_DOTS = _numpy_kernels.integer_dots() is not None and hasattr(torch.compiler, "is_exporting")  # of torch 2.7
"""Found out once, on import: a compiler that traces cannot."""


def _is_one_call(x: Array, codes: Array, scale: Array, contract: int) -> bool:
    """Not in an exported program, which has to run where there is no such operator."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and HAS_DOTS
        and x.device.type == "cpu"
        and codes.element_size() == 1
        and _has_one_large_piece(codes, scale, contract)
    )


@torch.library.custom_op("aqt_lite::product", mutates_args=())
def _eager_product(
    op: str,
    dtype: str,
    float_dtype: str,
    block: int,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    spec = Spec(
        element_type(dtype), FLOAT_TYPES[float_dtype], symmetric=False, block=(None if block < 0 else block, None)
    )
    y: torch.Tensor = _FORMS[op](x, codes, scale, zero_point, bias, spec, 1)
    return y.contiguous()  # as the compiler is told below


@_eager_product.register_fake
def _(op: Any, dtype: Any, float_dtype: Any, block: Any, x: Any, codes: Any, *others: Any) -> Any:
    return x.new_empty((x.shape[0], codes.shape[0]))


@_eager_product.register_vmap
def _(info: Any, axes: Any, op: Any, dtype: Any, float_dtype: Any, block: Any, *tensors: Any) -> Any:
    def one(i: int) -> Any:
        return (t if axis is None else t.select(axis, i) for t, axis in zip(tensors, axes[4:], strict=True))

    return torch.stack([_eager_product(op, dtype, float_dtype, block, *one(i)) for i in range(info.batch_size)]), 0


def _kernel(op: str) -> Callable[..., Array]:
    def kernel(*arrays: Any, spec: Spec, contract: int) -> Array:
        return _product(op, spec, contract, *arrays)

    return kernel


def _shared(op: str, *tensors: Any, **static: Any) -> Any:
    """NumPy's kernel on the memory of plain tensors: the same bits, without the overhead of a call for each step."""
    arrays = [None if t is None else t.numpy(force=True) for t in tensors]  # also where negation is still to be done
    result = _numpy_kernels.KERNELS[op](*arrays, **static)
    if isinstance(result, tuple):
        return tuple(None if a is None else torch.from_numpy(a) for a in result)
    return result if result is NotImplemented else torch.from_numpy(result)


def _of_large(op: str) -> Callable[..., Any]:
    """NumPy's kernel for large tensors; small ones are left to torch itself."""

    def kernel(x: Array, *rest: Any, **static: Any) -> Any:
        if x.numel() < _numpy_kernels.LARGE or not _are_plain((x, *rest)):
            return NotImplemented
        return _shared(op, x, *rest, **static)

    return kernel


def _are_plain(tensors: Any) -> bool:
    """Whether all have memory that NumPy can read, and no derivative to carry."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    tracking = torch.is_grad_enabled()
    for t in tensors:  # a loop, because a generator takes a good part of the time of a small product
        if t is not None and (
            not t.is_cpu or t.dtype is torch.bfloat16 or (tracking and t.requires_grad) or has_no_values(t)
        ):
            return False
    return True


KERNELS = {
    "quantize": _of_large("quantize"),
    "dequantize": _of_large("dequantize"),
    **{op: _kernel(op) for op in _FORMS},
}
