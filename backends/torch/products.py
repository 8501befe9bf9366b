"""Products for torch, with derivatives.

Owns: which form of the product torch runs fast on a CPU, how autograd is told of its derivative, and the table of
torch's kernels. Imports: the CPU library, the operations. docs/performance-tried.md says what was tried and what each
gave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from aqt_lite import affine
from aqt_lite._blocks import spread
from aqt_lite._dispatch import run
from aqt_lite._kernels import Kernel, Kernels, anything
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import fixed_point, floats, quantize, rows, runtime, serve, stored
from aqt_lite.backends.torch.onnx import (
    makes_onnx_of_codes,
    values_in_onnx,
    with_codes_in_onnx,
    with_streams_in_onnx,
)
from aqt_lite.backends.torch.tensors import (
    has_its_memory,
    has_no_values,
    is_functorch,
    is_inside_grad,
    outside_transformations,
    without_memory,
    wraps_tensors,
)
from aqt_lite.elements import float_type
from aqt_lite.formats import FORMATS, Format, element_type
from aqt_lite.ops import derivative, reference
from aqt_lite.packing import unpack

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
    # computed now, even where a trace or a transformation surrounds this call
    with _disable_current_modes(), outside_transformations(), torch.device("cpu"):
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


def _fast(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    """The form that is fastest here, at no more than twice the error of a float32 product."""
    b = get_backend("torch")
    wide = serve.is_of_wide_codes(x, b.dtype_name(x), w, spec)
    if not torch.compiler.is_compiling() and (wide or serve.sums_single_codes(w, spec, contract)):
        y = _on_numpy_memory(floats.matmul, x, w, bias, spec, contract)
        if y is not NotImplemented:
            return y
    if not _may_write_in_place(x, w, bias) or not serve.bytes_and_float32(x, b.dtype_name(x), w, spec):
        return reference.matmul(x, w, bias, spec=spec, contract=contract, b=b)
    digits_serve = _is_worth_digits(w, contract)
    if not digits_serve and not torch.compiler.is_compiling() and serve.is_worth_floats(x.shape[0], w.codes.numel()):
        y = _by_decoding(x, w, bias, spec=spec, contract=contract, packed_length=None)
        if y is not NotImplemented:
            return y
    y = _by_loops(fixed_point.matmul_by_dots, x, w, bias, spec, contract) if digits_serve else NotImplemented
    if y is not NotImplemented:
        return y
    tracing, rows = torch.compiler.is_compiling(), x.shape[0]  # to compare a size is to compile for it
    if w.codes.numel() >= runtime.LARGE or (not tracing and serve.is_worth_decoding(rows, w, contract)):
        y = _by_decoding(x, w, bias, spec=spec, contract=contract, packed_length=None)
        if y is not NotImplemented:
            return y
    if (
        _have_numpy_memory((x, *w, bias))
        and rows <= (1 if digits_serve else serve.MOST_ROWS_FOR_LOOPS)
        and serve.row_loops(rows, w, contract)
    ):
        return _shared(floats.matmul, x, w, bias, spec=spec, contract=contract)
    if digits_serve and _has_at_most(MOST_ROWS_AS_DIGITS, x) and (b.is_traced(x) or reference.fits_fixed_point(x, b)):
        return _reproducible(x, w, bias, spec, contract)
    return _blockwise(x, w, bias, spec, contract)


def _has_at_most(rows: int, x: Array) -> bool:
    """Whether x has no more rows; not where a compiler does not know, which would compile for the answer."""
    if torch.compiler.is_compiling():
        # an import that takes a while; a compiler has done it already
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return bool(statically_known_true(x.shape[0] <= rows))
    return bool(x.shape[0] <= rows)


def _may_write_in_place(x: Array, w: Coded, bias: Array | None) -> bool:
    """On a CPU, and neither mapped over (vmap) nor recorded (jit.trace), which cannot follow what happens in place."""
    if x.device.type != "cpu" or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return torch.compiler.is_compiling() or not any(is_functorch(a) for a in (x, *w, bias) if a is not None)


def _blockwise(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    """``x @ dequantize(w)``, a block of rows of the weight at a time, so that the float block stays in cache."""
    b = get_backend("torch")
    xp, largest = b.xp, torch.finfo(torch.float32).max
    may_overflow = b.is_traced(w.scale) or not bool((w.scale.abs() < serve.LARGEST_UNSCALED).all())
    height = floats.in_whole_groups(ROWS_OF_A_BLOCK, spec.block)
    length, width = w.codes.shape
    rows, x_dtype, x = x.shape[0], x.dtype, x.to(torch.float32)
    like = {"dtype": torch.float32, "device": x.device}  # whatever the user's defaults are
    scratch = torch.empty((min(height, length), width), **like)
    in_one = contract == 1 and length <= height  # its product is the result: copying one of many rows takes as long
    y = torch.zeros((rows, width), **like) if contract == 0 else torch.empty((0 if in_one else rows, length), **like)

    def of_rows(blocks: Array, start: int, stop: int) -> Array:
        blocks = floats.rows_of_blocks(blocks, start, stop, spec.block)
        return spread(blocks, (stop - start, width), spec.block, xp)

    for start in range(0, length, height):
        stop = min(start + height, length)
        weight = scratch[: stop - start]
        weight.copy_(w.codes[start:stop])
        if w.zero_point is not None:
            weight.sub_(of_rows(w.zero_point, start, stop))
        weight.mul_(of_rows(w.scale, start, stop))
        if may_overflow:
            weight.clamp_(-largest, largest)
        if contract == 0:
            y.addmm_(x[:, start:stop], weight)
        elif in_one:
            y = x @ weight.T
        else:
            y[:, start:stop] = x @ weight.T  # x on the left: the other way round errs several times more
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x_dtype)


def _reproducible(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    b = get_backend("torch")
    if torch.compiler.is_compiling():  # the compiler cannot trace calls of NumPy
        return reference.matmul_reproducible(x, w, bias, spec=spec, contract=contract, b=b)
    y = _by_loops(fixed_point.matmul_reproducible, x, w, bias, spec, contract)
    if y is NotImplemented and w.scale.shape[contract] > 1:  # of short pieces torch's batched products are slow
        numpys = functools.partial(reference.matmul_reproducible, b=get_backend("numpy"))
        y = _on_numpy_memory(np.errstate(all="ignore")(numpys), x, w, bias, spec, contract)
    if y is not NotImplemented:
        return y
    return reference.matmul_reproducible(x, w, bias, spec=spec, contract=contract, b=b)


def _by_loops(form: Callable[..., Any], x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Any:
    """NumPy's form with exact sums of integers, where it serves."""
    if torch.compiler.is_compiling() or runtime.compiled_loops() is None:
        return NotImplemented
    return _on_numpy_memory(form, x, w, bias, spec, contract)


def _by_decoding(
    x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, packed_length: int | None
) -> Any:
    """NumPy's form whose codes become numbers in registers, or in a cache, where it serves."""
    if torch.compiler.is_compiling() or not x.shape[0]:
        return NotImplemented
    loops = stored.ByLoops(w, spec, contract, packed_length)
    if x.dtype is torch.float64 or not (loops.serve(len(x)) or serve.sums_single_codes(w, spec, contract)):
        return NotImplemented
    rows, form = x.shape[0], functools.partial(stored.matmul_stored, packed_length=packed_length, loops=loops)
    if loops.cut_in_panels(rows) is not None:
        y = _on_numpy_memory(form, x, w, bias, spec, contract)
        if y is not NotImplemented:
            return y
    if loops.are_worth_floats(rows):
        if not _have_numpy_memory(runtime.arrays_in(w)):
            return NotImplemented
        with outside_transformations():
            return _of_floats(loops, x, Coded(*runtime.admitted(_as_numpy(w))), bias)
    return _on_numpy_memory(form, x, w, bias, spec, contract)


def _of_floats(loops: stored.ByLoops, x: Array, w: Coded, bias: Array | None) -> Any:
    """The product of torch itself with values of a weight in NumPy's memory, as many at a time as a cache holds."""
    x_dtype, parts = x.dtype, []
    x, bias = (t if t is None or t.dtype is torch.float32 else t.to(torch.float32) for t in (x, bias))
    for columns, values in loops.blocks_of_values(w):
        if values is None:
            return NotImplemented
        some = None if bias is None else bias[columns]
        parts.append(torch.nn.functional.linear(x, torch.from_numpy(values), some))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y if y.dtype is x_dtype else y.to(x_dtype)


def _on_numpy_memory(
    form: Callable[..., Any], x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int
) -> Any:
    """A form of the product for NumPy arrays; bfloat16 goes there as float32."""
    x_dtype = x.dtype
    x, bias = (t.to(torch.float32) if t is not None and t.dtype == torch.bfloat16 else t for t in (x, bias))
    if not _have_numpy_memory(runtime.arrays_in((x, *w, bias))):
        return NotImplemented
    y = _shared(form, x, w, bias, spec=spec, contract=contract)
    return y if y is NotImplemented else y.to(x_dtype)


def _is_worth_digits(w: Coded, contract: int) -> bool:
    """Whether integer products serve, and the weight is large enough for making digits of x to pay."""
    return serve.one_scale_a_column(w, contract) and bool(w.codes.numel() > SMALL)


# ---- torch.autocast


def _autocasts(x: Array) -> bool:
    """Whether torch would do products on the device of x in a narrower type."""
    device = "cpu" if x.is_cpu else x.device.type  # in this order: a device's name takes half a microsecond
    return device != "meta" and torch.is_autocast_enabled(device)


def _without_autocast(product: Callable[..., Array]) -> Callable[..., Array]:
    """A product that is what it says it is under ``torch.autocast``, too: exact to float32, and of the dtype of x."""

    def call(x: Any, *others: Any, **static: Any) -> Array:
        first = x.codes if isinstance(x, Coded) else x
        if not _autocasts(first):
            return product(x, *others, **static)
        with torch.autocast(first.device.type, enabled=False):
            return product(x, *others, **static)

    return call


def _without_autocast_of_weight(of_weight: Callable[..., Any]) -> Callable[..., Any]:
    """The same of what a kernel gives for one weight."""
    return lambda w, **static: _without_autocast(of_weight(w, **static))


def _may_autocast_backward(dy: Array) -> bool:
    """Dynamo traces a derivative where the product stands, and what runs it later is under the autocast of the call."""
    return torch.compiler.is_compiling() or _autocasts(dy)


class _Matmul(torch.autograd.Function):
    """``x @ w`` of two matrices, whose derivatives autocast leaves alone, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Array, w: Array) -> Array:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Array) -> Any:
        x, w = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dx = _Matmul.apply(dy, w.T) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
            dw = _Matmul.apply(x.T, dy) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
            return dx, dw


# ---- derivatives


class _Product(torch.autograd.Function):
    """``ops.derivative`` as autograd wants it; tensors are passed one by one, which autograd and vmap ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(reproducible: bool, spec: Spec, contract: int, x: Array, bias: Array | None, *weight: Any) -> Array:
        return _without_derivatives(reproducible, spec, contract, x, Coded(*weight), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reproducible, ctx.spec, ctx.contract, x, bias, *weight = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[6] else None, *weight)

    @staticmethod
    def backward(ctx: Any, dy: Array) -> Any:
        if _may_autocast_backward(dy):
            with torch.autocast(dy.device.type, enabled=False):
                return _derivatives(ctx, dy)
        return _derivatives(ctx, dy)


def _derivatives(ctx: Any, dy: Array) -> Any:
    x, *weight = ctx.saved_tensors
    w, spec, contract, b = Coded(*weight), ctx.spec, ctx.contract, get_backend("torch")
    dx = dbias = dscale = None
    if ctx.needs_input_grad[3]:
        dx = derivative.of_x(_product, dy, w, reproducible=ctx.reproducible, spec=spec, contract=contract)
    if ctx.needs_input_grad[4]:
        dbias = derivative.of_bias(dy, weight[1].dtype, ctx.bias_dtype, b)
    if ctx.needs_input_grad[6]:
        dscale = derivative.of_scale(x, dy, w, spec=spec, contract=contract, vjp=torch.func.vjp, b=b)
    return None, None, None, dx, dbias, *Coded(None, dscale)


def _product(reproducible: bool, spec: Spec, contract: int, x: Array, w: Coded, bias: Array | None) -> Array:
    if not torch.compiler.is_compiling():
        _check_memory((x, *w, bias))
    if get_backend("torch").differentiates(x, w.scale, bias):
        if is_inside_grad() if torch.compiler.is_compiling() else _is_in_a_trace():
            return _by_plain_operations(reproducible, spec, contract, x, w, bias)
        return _Product.apply(reproducible, spec, contract, x, bias, *w)  # type: ignore[no-untyped-call]
    return _without_derivatives(reproducible, spec, contract, x, w, bias)


def _is_in_a_trace() -> bool:
    """Whether ``torch.jit.trace`` records; NotImplementedError where it does so for ONNX."""
    return bool(torch.jit.is_tracing()) and not makes_onnx_of_codes()  # type: ignore[attr-defined, no-untyped-call]


def _by_plain_operations(
    reproducible: bool, spec: Spec, contract: int, x: Array, w: Coded, bias: Array | None
) -> Array:
    """A product that autograd follows by itself.

    Dynamo leaves out the derivatives of ours inside ``torch.func.grad``, and ``torch.jit.trace`` records a call of
    Python where it stands, which is another one each time, and which no file holds.

    What is reproducible has the derivative of the values' product, a sum of floats.
    """
    b = get_backend("torch")
    values = reference.matmul(x, w, bias, spec=spec, contract=contract, b=b)
    if not reproducible:
        return values
    y = reference.matmul_reproducible(x, w, bias, spec=spec, contract=contract, b=b)
    return b.straight_through(values, y, torch.isfinite(values))


def _without_derivatives(
    reproducible: bool, spec: Spec, contract: int, x: Array, w: Coded, bias: Array | None
) -> Array:
    if not reproducible and makes_onnx_of_codes():
        values = values_in_onnx(w, reference.unrounded(spec))
        return reference.matmul_of_values(x, values, bias, contract=contract, b=get_backend("torch"))
    if _is_one_call(reproducible, x, w, spec, contract):
        return _eager_product(*_told_of_product(reproducible, spec, contract), x, w.codes, w.scale, w.zero_point, bias)
    return (_reproducible if reproducible else _fast)(x, w, bias, spec, contract)


# ---- inside what torch.compile makes, where compiled loops serve: one operator, which runs as an eager call does

HAS_EXPORTING = hasattr(torch.compiler, "is_exporting")  # of torch 2.7
HAS_DOTS = runtime.integer_dots() is not None and HAS_EXPORTING
HAS_GROUPS = runtime.group_loops() is not None and HAS_EXPORTING
"""Found out once, on import: a compiler that traces cannot."""


def _is_one_call(reproducible: bool, x: Array, w: Coded, spec: Spec, contract: int) -> bool:
    """Not in an exported program, which has to run where there is no such operator."""
    if not torch.compiler.is_compiling() or not (HAS_DOTS or HAS_GROUPS) or torch.compiler.is_exporting():
        return False
    if x.device.type != "cpu" or spec.element.bits != 8:
        return False
    if _is_one_product(w, spec, contract):
        return True
    x_dtype = get_backend("torch").dtype_name(x)
    if contract == 0:
        large = w.codes.numel() >= runtime.LARGE
        if reproducible:
            return DECODES and serve.become_rows_by_loops(x_dtype, w, spec, False)
        return DECODES and large and serve.decodes_by_loops(x_dtype, w, spec, contract, False)
    if not (reproducible and HAS_GROUPS) or w.codes.numel() < runtime.LARGE:
        return False
    return serve.in_short_groups(x_dtype, w, spec, contract)


def _is_one_product(w: Coded, spec: Spec, contract: int) -> bool:
    return HAS_DOTS and spec.element.bits == 8 and _is_worth_digits(w, contract)


def _told_of_product(reproducible: bool, spec: Spec, contract: int) -> tuple[bool, str, str, int, int, int]:
    outer, inner = (-1 if size is None else size for size in spec.block)
    return reproducible, spec.element.name, spec.source.name, outer, inner, contract


@torch.library.custom_op("aqt_lite::product", mutates_args=())
def _eager_product(
    reproducible: bool,
    dtype: str,
    float_dtype: str,
    outer: int,
    inner: int,
    contract: int,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    block = (None if outer < 0 else outer, None if inner < 0 else inner)
    spec = Spec(FORMATS[dtype], float_type(float_dtype), block)
    form, w = _reproducible if reproducible else _fast, Coded(codes, scale, zero_point)
    y: torch.Tensor = _without_autocast(form)(x, w, bias, spec, contract)
    return y.contiguous()  # the strides that the operator's fake kernel below tells the compiler


@_eager_product.register_fake
def _(*arguments: Any) -> Any:
    contract, x, codes = arguments[5:8]
    return x.new_empty((x.shape[0], codes.shape[1 - contract]))


@_eager_product.register_vmap
def _(info: Any, axes: Any, *arguments: Any) -> Any:
    static, tensors = arguments[:6], arguments[6:]

    def one(i: int) -> Any:
        return (t if axis is None else t.select(axis, i) for t, axis in zip(tensors, axes[6:], strict=True))

    return torch.stack([_eager_product(*static, *one(i)) for i in range(info.batch_size)]), 0


# ---- weights as they are stored


class _Stored(torch.autograd.Function):
    """``reference.matmul_stored`` for plain tensors, with derivatives of x and of the bias."""

    @staticmethod
    def forward(ctx: Any, w: Coded, static: dict[str, Any], x: Array, bias: Array | None) -> Array:
        ctx.w, ctx.static, ctx.bias_dtype = w, static, None if bias is None else bias.dtype
        y = _by_decoding(x, w, bias, **static)
        return reference.matmul_stored(x, w, bias, **static, b=get_backend("torch")) if y is NotImplemented else y

    @staticmethod
    def backward(ctx: Any, dy: Array) -> Any:
        w, static, b = ctx.w, ctx.static, get_backend("torch")
        dx = dbias = None
        if ctx.needs_input_grad[2]:
            turned = reference.values_stored(w, spec=static["spec"], packed_length=static["packed_length"], b=b)
            turned = turned if static["contract"] == 1 else turned.T
            dx = _Matmul.apply(dy.to(turned.dtype), turned).to(dy.dtype)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[3]:
            dbias = derivative.of_bias(dy, torch.float32, ctx.bias_dtype, b)
        return None, None, dx, dbias


def _stored(x: Array, w: Coded, bias: Array | None, *, swapped: bool = False, **static: Any) -> Any:
    """``reference.matmul_stored`` where NumPy's form serves; what is traced, and trained scales, go other ways."""
    w = reference.in_order(w, swapped, get_backend("torch"))
    if torch.compiler.is_compiling():
        if makes_onnx_of_codes():
            return reference.matmul_stored(x, w, bias, **static, b=get_backend("torch"))
        return _as_one_call(x, w, bias, **static)
    tensors = runtime.arrays_in((x, *w, bias))
    if _have_numpy_memory(tensors):
        return _by_decoding(x, w, bias, **static)
    serves = any(_serves(rule, x, w, static) for rule in (serve.decodes, serve.decodes_in_out))
    if not _may_be_read(tensors) or not serves:
        return NotImplemented
    if not get_backend("torch").differentiates(*tensors):
        return _by_decoding(x, w, bias, **static)
    if any(t.requires_grad for t in runtime.arrays_in(w)):
        return NotImplemented
    return _Stored.apply(w, static, x, bias)  # type: ignore[no-untyped-call]


def _reproducible_stored(x: Array, w: Coded, bias: Array | None, *, swapped: bool = False, **static: Any) -> Any:
    """``reference.matmul_reproducible_stored`` where NumPy's form serves and there is no derivative to carry."""
    w = reference.in_order(w, swapped, get_backend("torch"))
    tensors = runtime.arrays_in((x, *w, bias))
    if not _may_be_read(tensors):
        return NotImplemented
    if not any(_serves(rule, x, w, static) for rule in (serve.sums_of_groups, serve.become_rows)):
        return NotImplemented
    if get_backend("torch").differentiates(*tensors):
        return NotImplemented
    form = functools.partial(fixed_point.matmul_reproducible_stored, packed_length=static["packed_length"])
    return _on_numpy_memory(form, x, w, bias, static["spec"], static["contract"])


def _may_be_read(tensors: list[Array]) -> bool:
    """Whether tensors are plain ones on the CPU: what is traced goes other ways."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return not any(has_no_values(t) or wraps_tensors(t) or is_functorch(t) or not t.is_cpu for t in tensors)


def _serves(rule: Callable[..., bool], x: Array, w: Coded, static: dict[str, Any]) -> bool:
    packed, x_dtype = static["packed_length"] is not None, get_backend("torch").dtype_name(x)
    return len(x) > 0 and rule(x_dtype, w, static["spec"], static["contract"], packed)


DECODES = runtime.decoding_loops() is not None and HAS_EXPORTING
"""Whether there are loops that decode; found out on import: a compiler that traces cannot."""


def _as_one_call(
    x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, packed_length: int | None
) -> Any:
    """The same inside what torch.compile makes: one operator, which runs as an eager call does, where that serves.

    Not in an exported program, and not where derivatives are recorded.
    """
    b = get_backend("torch")
    found = _stored_in_one_call(b.dtype_name(x), w, spec, contract, packed_length)
    if found is None or torch.compiler.is_exporting() or x.device.type != "cpu":
        return NotImplemented
    told, tensors = found
    if b.differentiates(x, *tensors, bias):
        return NotImplemented
    return _eager_stored(*told, x, *tensors, bias)


def _stored_in_one_call(
    x_dtype: str, w: Coded, spec: Spec, contract: int, packed_length: int | None
) -> tuple[tuple[str, str, str, tuple[int, ...]], tuple[Array | None, ...]] | None:
    """What the operator below is told of a weight, and its tensors; None where it does not serve."""
    kept = w.scale
    numbers, of_scales = (kept.codes, kept.scale) if isinstance(kept, Coded) else (kept, None)
    plain = isinstance(numbers, torch.Tensor) and (of_scales is None or isinstance(of_scales, torch.Tensor))
    others = (kept.zero_point, kept.offset) if isinstance(kept, Coded) else ()
    if not DECODES or not plain or any(a is not None for a in others):
        return None
    if not serve.decodes_by_loops(x_dtype, w, spec, contract, packed_length is not None):
        return None
    names = (spec.format.name, "" if spec.format.scale is None else spec.format.scale.name, spec.source.name)
    lengths = tuple(-1 if n is None else n for n in (*spec.block, packed_length, contract))
    return (*names, lengths), (w.codes, numbers, of_scales, w.zero_point)


@torch.library.custom_op("aqt_lite::stored_product", mutates_args=())
def _eager_stored(
    dtype: str,
    scale_dtype: str,
    float_dtype: str,
    lengths: list[int],
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    of_scales: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    kept = Format(scale_dtype, element_type(scale_dtype), scaled=of_scales is not None) if scale_dtype else None
    *block, packed_length, contract = (None if n < 0 else n for n in lengths)
    spec = Spec(Format(dtype, element_type(dtype), scale=kept), float_type(float_dtype), tuple(block))
    w = Coded(codes, scale if kept is None else Coded(scale, of_scales), zero_point)
    static: dict[str, Any] = {"spec": spec, "contract": contract, "packed_length": packed_length}
    y = _without_autocast(_by_decoding)(x, w, bias, **static)
    if y is NotImplemented:
        y = _without_autocast(reference.matmul_stored)(x, w, bias, **static, b=get_backend("torch"))
    return y.contiguous()  # type: ignore[no-any-return]


@_eager_stored.register_fake
def _(*arguments: Any) -> Any:
    (*_, packed_length, contract), x, codes = arguments[3:6]
    columns = packed_length if contract == 0 and packed_length >= 0 else codes.shape[1 - contract]
    return x.new_empty((x.shape[0], columns))


@_eager_stored.register_vmap
def _(info: Any, axes: Any, *arguments: Any) -> Any:
    static, tensors = arguments[:4], arguments[4:]

    def one(i: int) -> Any:
        return (t if axis is None else t.select(axis, i) for t, axis in zip(tensors, axes[4:], strict=True))

    return torch.stack([_eager_stored(*static, *one(i)) for i in range(info.batch_size)]), 0


# ---- layers, whose weights are known before a compiler sees them


def in_one_call(
    stored: tuple[Coded, Spec] | None, integers: tuple[Coded, Spec] | None, packed_length: int | None
) -> Any:
    """Which of the two operators takes a weight (N, K) of layers on a CPU, what it is told, and the tensors it gets.

    None where a compiler has to trace the product. Else it traces one call, and so guards hardly anything: of a few
    large layers its guards took a good part of a tenth of the time. ``stored``: the weight as it is kept, where it may
    be read so; ``integers``: else, with plain scales, if it has any.
    """
    if stored is not None:
        found = _stored_in_one_call("float32", *stored, 1, packed_length)
        return None if found is None else ("stored", *found)
    if integers is None or not _is_one_product(*integers, 1):
        return None
    w, spec = integers
    return "product", _told_of_product(False, spec, 1), (w.codes, w.scale, None, w.zero_point)


def multiply_in_one_call(operator: str, told: Any, x: Array, tensors: Any, bias: Array | None) -> Array:
    """``x @ w.T + bias`` by that operator, in a program that is compiled; NotImplemented where it is traced instead.

    That is so where derivatives are recorded, and for anything but float32.
    """
    of_float32 = x.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32)
    if not of_float32 or x.device.type != "cpu" or torch.compiler.is_exporting():
        return NotImplemented
    if get_backend("torch").differentiates(x, bias):
        return NotImplemented
    codes, scale, of_scales, zero_point = tensors
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if operator == "product":
        y = _eager_product(*told, rows, codes, scale, zero_point, bias)
    else:
        y = _eager_stored(*told, rows, codes, scale, of_scales, zero_point, bias)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


# ---- the CPU library's forms


def _shared(form: Callable[..., Any], x: Array, w: Coded, bias: Array | None, **static: Any) -> Any:
    """A product of the CPU library on the memory of plain tensors: without the time that each step of torch takes."""
    with outside_transformations():
        x, *weight, bias = runtime.admitted(_as_numpy((x, *w, bias)))
        y = form(x, Coded(*weight), bias, **static)
        return y if y is NotImplemented else torch.from_numpy(y)


def _as_numpy(tensors: Any) -> list[Any]:
    return [  # forced: also where negation is still to be done
        t if t is None else Coded(*_as_numpy(t)) if isinstance(t, tuple) else t.numpy(force=True) for t in tensors
    ]


def _numpy_of(t: Array) -> Any:
    """The same memory; of bfloat16, which torch turns into no NumPy type, as the adapter has it."""
    return get_backend("torch").to_numpy(t) if t.dtype is torch.bfloat16 else t.numpy(force=True)


def _from_numpy(a: Any) -> Array:
    a = np.asarray(a)
    if not a.flags.writeable:  # one number for many places, of which torch warns
        a = a.copy()
    if a.dtype.name == "bfloat16":  # of which torch knows no NumPy type
        return torch.from_numpy(a.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(a)


def _check_memory(tensors: Any) -> None:
    """The gate of torch: ValueError where a tensor has lost its storage, on which torch's own operators crash, too."""
    for t in tensors:
        if isinstance(t, tuple):
            _check_memory(t)
        elif t is not None and not (is_functorch(t) or has_its_memory(t) or has_no_values(t) or wraps_tensors(t)):
            raise ValueError(f"a tensor {without_memory(t)}")


def _in_memory(
    operation: Callable[..., Any], form: Callable[..., Any] | None = None, *, of_few_steps: bool = False
) -> Callable[..., Any]:
    """``operation`` on memory that NumPy can read: of small tensors as NumPy does it, of large ones by the CPU's form.

    A step of torch's own takes a few microseconds before it does anything, and an operation has dozens of them; small
    tensors are left to torch where it is ``of_few_steps``, which take less time than going to NumPy and back.
    """
    form = runtime.gated(form or quantize.FORMS[operation])

    def kernel(*arrays: Any, **static: Any) -> Any:
        if torch.compiler.is_compiling():  # first of all: to compare a size is to compile for it
            return NotImplemented
        first = arrays[0].codes if isinstance(arrays[0], Coded) else arrays[0]
        small = first.numel() < runtime.LARGE
        if (small and of_few_steps) or not _have_numpy_memory(runtime.arrays_in(arrays), bfloat16=not small):
            return NotImplemented
        with outside_transformations():
            given = runtime.on_each(_numpy_of, arrays)
            way = functools.partial(run, get_backend("numpy"), operation) if small else form
            result = way(*given, **static)
            return result if result is NotImplemented else runtime.on_each(_from_numpy, result)

    return kernel


def _have_numpy_memory(tensors: Any, bfloat16: bool = False) -> bool:
    """Whether all have memory that NumPy can read, no derivative to carry, and nobody who listens to torch's steps.

    ``make_fx`` does, who would hear of none, and take the result for a constant. ``bfloat16``: whether it is read.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    tracking = torch.is_grad_enabled()
    for t in tensors:  # a loop, because a generator takes a good part of the time of a small product
        if t is None:
            continue
        plain = type(t) is torch.Tensor or not (has_no_values(t) or wraps_tensors(t))
        unread = t.dtype is torch.bfloat16 and not bfloat16
        if not plain or not t.is_cpu or unread or (tracking and t.requires_grad) or is_functorch(t):
            return False
        if not has_its_memory(t):
            raise ValueError(f"a tensor {without_memory(t)}")
    return True


# ---- the table


def _kernel(reproducible: bool) -> Callable[..., Array]:
    def kernel(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int) -> Array:
        return _product(reproducible, spec, contract, x, w, bias)

    return kernel


def _of_weight(w: Coded, *, spec: Spec, contract: int) -> Callable[..., Any]:
    """``_kernel(reproducible=False)`` for a weight of these types and shapes."""
    loops = stored.ByLoops(w, spec, contract, None)
    short = floats.shortly(w, spec=spec, contract=contract, loops=loops)
    return _in_memory_of_numpy(
        loops, short, functools.partial(_kernel(reproducible=False), spec=spec, contract=contract)
    )


def _stored_of_weight(w: Coded, *, spec: Spec, contract: int, packed_length: int | None, swapped: bool) -> Any:
    """``_stored`` for a weight of these types and shapes."""
    static: dict[str, Any] = {"spec": spec, "contract": contract, "packed_length": packed_length, "swapped": swapped}
    form = functools.partial(_stored, **static)
    if swapped:  # scales are turned at each call
        return form
    loops = stored.ByLoops(w, spec, contract, packed_length)
    return _in_memory_of_numpy(loops, loops, form)


def _reproducible_of_weight(w: Coded, *, spec: Spec, contract: int) -> Callable[..., Any]:
    """``_kernel(reproducible=True)`` for a weight of these types and shapes."""
    short = fixed_point.reproducible_of_weight(w, spec=spec, contract=contract)
    form = functools.partial(_kernel(reproducible=True), spec=spec, contract=contract)
    return _in_memory_of_numpy(None, short, form)


def _reproducible_stored_of_weight(w: Coded, **static: Any) -> Callable[..., Any]:
    """``_reproducible_stored`` for a weight of these types and shapes."""
    short = fixed_point.reproducible_stored_of_weight(w, **static)
    return _in_memory_of_numpy(None, short, functools.partial(_reproducible_stored, **static))


def _in_memory_of_numpy(
    loops: stored.ByLoops | None, short: Callable[..., Any], form: Callable[..., Any]
) -> Callable[..., Any]:
    """What does of a form whatever ``short`` does for float32, before anything is asked that takes as long as it does.

    Each question to torch takes a good part of the time of a small product. ``loops``: those that say for which rows of
    x torch's own product of the weight's floats is faster, where any may be.
    """

    def call(x: Array, w: Coded, bias: Array | None) -> Any:
        y: Any = NotImplemented
        codes, scale, zero, offset = w
        plain = (x, codes, scale, zero, offset, bias)
        tensors = runtime.arrays_in(plain) if isinstance(scale, tuple) else plain
        of_float32 = x.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32)
        if of_float32 and _have_numpy_memory(tensors) and (loops is None or loops.are_there()):
            with outside_transformations():
                rows = x.shape[0]
                if loops is not None and loops.cut_in_panels(rows) is None and loops.are_worth_floats(rows):
                    y = _of_floats(loops, x, Coded(*runtime.admitted(_as_numpy(w))), bias)
                else:
                    y = short(*runtime.admitted(_as_numpy((x, w, bias))))
                    y = y if y is NotImplemented else torch.from_numpy(y)
        return form(x, w, bias) if y is NotImplemented else y

    return call


def _of_values(x: Array, values: Array, bias: Array | None, *, contract: int) -> Any:
    """Where torch would do the product in a narrower type, forward or backward; else it is torch's own."""
    if not _autocasts(x):
        return NotImplemented
    with torch.autocast(x.device.type, enabled=False):
        compute = torch.float64 if torch.float64 in (x.dtype, values.dtype) else torch.float32
        weight = values.to(compute)
        y = _Matmul.apply(x.to(compute), weight if contract == 0 else weight.T)  # type: ignore[no-untyped-call]
        if bias is not None:
            y = y + bias.to(compute)
        return y.to(x.dtype)


def _of_integers(x: Coded, w: Coded, bias: Array | None, *, contract: int, out: str) -> Array:
    return reference.matmul_integer(x, w, bias, contract=contract, out=out, b=get_backend("torch"))


KERNELS: Kernels = {
    **{operation: Kernel(_in_memory(operation), anything) for operation in quantize.FORMS},
    affine.dequantize: Kernel(with_codes_in_onnx(_in_memory(affine.dequantize, of_few_steps=True)), anything),
    unpack: Kernel(with_streams_in_onnx(_in_memory(unpack)), anything),
    reference.matmul: Kernel(
        _without_autocast(_kernel(reproducible=False)), of_weight=_without_autocast_of_weight(_of_weight)
    ),
    reference.matmul_stored: Kernel(
        _without_autocast(_stored), anything, _without_autocast_of_weight(_stored_of_weight)
    ),
    reference.matmul_reproducible_stored: Kernel(
        _without_autocast(_reproducible_stored), anything, _without_autocast_of_weight(_reproducible_stored_of_weight)
    ),
    reference.matmul_reproducible: Kernel(
        _without_autocast(_kernel(reproducible=True)), of_weight=_without_autocast_of_weight(_reproducible_of_weight)
    ),
    reference.matmul_of_values: Kernel(_of_values, anything),
    reference.matmul_integer: Kernel(_without_autocast(_of_integers), anything),
    reference.in_integers: Kernel(_in_memory(reference.in_integers, rows.in_integers), anything),
    reference.integer_matmul: Kernel(integer_matmul, anything),
}
