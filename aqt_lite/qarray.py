"""The container of a quantized array.

Owns: ``QArray``, its invariants, and its moves between layouts and backends. Imports: formats, granularity, affine (to
dequantize), packing, the registry, and the checks of parameters. What it has in common with other arrays, indexing and
the like, is in ``_shapes``, and its bytes in other libraries' order in ``_bytes``.

Invariants, for ``q`` with ``n`` dimensions:

- ``q.qvalue`` has the array's shape and one code an item; ``q.storage`` is how the codes are kept: with the last two
  axes swapped where ``q.transposed``, or two runs of axes where that says their lengths, and with ``q.packed_length``
  codes of its last axis in a stream of bits where that is not None.
- ``q.block`` has n entries, each a block length or None for the whole axis.
- ``q.scale`` has shape ``ceil(shape / block)`` (1 for None): numbers of dtype float32, or float64 for float64 sources;
  or a QArray of that shape, where scales are kept in a format of fewer bits (and may be negative, as ggml's are); or
  None, where the numbers need no scale.
- ``q.zero_point`` is None (all zeros) or an int32 array of the same shape, ``q.offset`` None or numbers like
  ``q.scale``.
- the values are ``(number of the code - zero_point) * scale + offset``, each scale serving its block.
- all arrays are of one backend.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np

from aqt_lite import _mark, affine
from aqt_lite._asked import Asked
from aqt_lite._bytes import ArrayBytes
from aqt_lite._dispatch import offered, run
from aqt_lite._foreign import refusal
from aqt_lite._into import can_write, check_out, decode_into, dequantize_stored, is_packed
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import AnyArray, Array, Numbers
from aqt_lite._near import index_of
from aqt_lite._protocol import DOUBT, Backend, Doubt
from aqt_lite._qparams import (
    check_codes,
    check_offset,
    check_scale,
    check_without_scale,
    check_zero_point,
    every_pattern_is_a_code,
    number_of_type,
    on_grid,
    unusable_codes,
)
from aqt_lite._registry import backend_of, get_backend, register_container
from aqt_lite._shapes import ArrayShapes, Swapped, kind_in_words, lengths_swapped, swapped_back
from aqt_lite._ways import FormatName, way_to
from aqt_lite.dialects import Dialect, dialect_of
from aqt_lite.elements import INTEGER_TYPES, ElementType, dtype_name, float_type
from aqt_lite.formats import (
    DERIVED,
    FORMATS,
    SCALE_FORMATS,
    Format,
    element_type,
    format_of,
    known_format,
    register_format,
    scale_format_of,
)
from aqt_lite.granularity import Block, Granularity, PerTensor, block_of, granularity_of, grid_of
from aqt_lite.packing import bytes_of, pack, unpack

__all__ = ["CONTRACT_VERSION", "MOST_SWAPPED", "QArray", "checked_for_a_file", "described", "in_words", "rebuilt"]

_OF_NAMES = frozenset({"array_api_strict", "dask", "jax", "jaxlib", "mlx", "ndonnx", "numpy"})
"""Libraries beside whose arrays a dtype is a ``FormatName``. To torch's compiler it would be no constant."""

_ANSWER_FALSE_TO_ERRORS = frozenset({"array_equal", "array_equiv"})
"""Functions of NumPy's that take an error of their arguments for an answer, and so are given the values."""

_WORTH_LOOPS = 1 << 17
"""Elements from which on libraries are asked for values of codes that are packed: none has a form for fewer."""

_TOGETHER = 1 << 27
"""Elements up to which a byte for each, beside the result, does no harm."""

CONTRACT_VERSION = 2
"""Version of docs/numerics.md that this library follows. Version 2 decodes all that version 1 does, alike."""


@dataclass(frozen=True, eq=False, repr=False)
class QArray(ArrayShapes, ArrayBytes, Asked):
    """A quantized array: codes, a scale for each block of them, and perhaps a zero point or an offset.

    Made by :func:`aqt_lite.quantize`, or by :meth:`from_codes` from codes that exist already. Frozen. A pytree in
    JAX and in torch: it passes through ``jit``, ``vmap``, ``scan``, ``torch.compile`` and the like, where ``storage``,
    ``scale``, ``zero_point`` and ``offset`` are the leaves and the rest is static. In JAX one more leaf, ``mark``, says
    beside them what the codes mean: 16 to 23 bytes (times the axes that are mapped over), which ``nbytes`` does not
    count; so an array of which all leaves were computed with (``jax.tree.map(lambda leaf: 2 * leaf, q)``) is refused
    at first use, outside of traces.

    Parameters
    ----------
    storage : array
        The codes as they are kept.
    scale : array, QArray or None
        float32 or float64 numbers, shape of the grid of blocks; a QArray where they are kept in fewer bits.
    zero_point : array or None
        int32, same shape as ``scale``.
    dtype : str
        Name of the format, for instance "int8" or "mxfp4".
    block : tuple
        Block length along each axis, None for the whole axis. Counted from the last axis when leading axes have
        been mapped over (``vmap``, ``scan``) or added by mapping.
    float_dtype : str
        Type of the values that were quantized, and of what :meth:`dequantize` returns.
    transposed : bool or (int, int)
        Whether ``storage`` keeps the last two axes swapped (see :meth:`for_dense`); ``(inputs, outputs)`` where so many
        axes are swapped with so many behind them.
    packed_length : int or None
        Codes along the last axis of ``storage`` where it is a stream of bits (see :mod:`aqt_lite.packing`).
    offset : array, QArray or None
        Added to the values of a block; as ``scale``.
    ragged : tuple
        For each axis, its length where groups do not divide it, else None; empty where that is not known. Arrays that
        were joined or cut without a view to their groups are recognized by it.
    trainable : bool
        Whether derivatives reach the scales (see :meth:`with_trainable_scales`).
    version : int
        Version of the contract that says what the codes mean.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize(np.asarray([[1.0, -2.0], [0.5, 4.0]], "float32"), granularity=aqt_lite.PerChannel(0))
    >>> q
    QArray(int8, shape=(2, 2), PerChannel(axis=0), of float32, numpy)
    qvalue: [[  64 -127]
     [  16  127]]
    scale: [[0.01574803]
     [0.03149606]]
    >>> q[1:].shape, q[1:].scale.shape
    ((1, 2), (1, 1))
    """

    storage: Array
    scale: Array | QArray | None
    zero_point: Array | None = None
    dtype: str = "int8"
    block: Block = field(default=())
    float_dtype: str = "float32"
    transposed: Swapped = False
    packed_length: int | None = None
    offset: Array | QArray | None = None
    ragged: Block = field(default=())
    trainable: bool = False
    version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        is_axis = isinstance(self.storage, int)  # of vmap: torch.compile knows no module of numbers
        named = not is_axis and type(self.storage).__module__.partition(".")[0] in _OF_NAMES
        if named != (type(self.dtype) is FormatName):
            self.__dict__["dtype"] = FormatName(self.dtype) if named else str(self.dtype)

    @classmethod
    @naming_the_argument
    def from_codes(
        cls,
        qvalue: AnyArray,
        scale: Numbers | QArray | None,
        zero_point: Numbers | None = None,
        *,
        offset: Numbers | QArray | None = None,
        dtype: Any = None,
        scale_dtype: Any = None,
        tensor_scale: Numbers | None = None,
        packed_length: int | None = None,
        granularity: Granularity | None = None,
        dialect: str | Dialect = "aqt_lite",
        float_dtype: Any = "float32",
    ) -> QArray:
        """Wrap codes, scales and zero points made elsewhere, after checking every invariant.

        Parameters
        ----------
        qvalue : array
            Codes, one an item, of any shape: of the integer type that the format is stored in, or of the format's own
            type where a library has one (``ml_dtypes.float8_e4m3fn``, ``jnp.int4``).
        scale : number, list, array or QArray; None for formats without, bitround7 for instance, and those of scales
            With the shape that ``granularity`` gives for ``qvalue`` (one number will do for all blocks, a 1-dimensional
            array for ``PerChannel``). Arrays of another float type are converted where no bit is lost. Scales are
            finite, not 0, and their magnitudes within the range that :func:`aqt_lite.quantize` keeps; they may be
            negative, as those of some libraries are. A QArray stays one; its numbers only have to be finite.
        zero_point : integer, list or array, optional
            Codes of the value 0.0. Unsigned integers need them, or an ``offset``.
        offset : number, list, array or QArray, optional
            Added to the values of each block; like ``scale``.
        dtype : str, optional
            Name of the format. By default that of the integer type of ``qvalue``: say it where codes are of another
            format.
        scale_dtype : str, optional
            Format in which scales are kept, "float8_e8m0fnu" or "float16" for instance: ``scale`` is then an array of
            that type, its bit patterns as integers, or numbers that it holds exactly. By default as the format has
            it; float16 and bfloat16 numbers are widened where it says nothing.
        tensor_scale : number or array of one, optional
            The scale of all scales, for formats whose scales are kept with one: "nvfp4". ``scale`` then has the scales
            themselves, in float8_e4m3fn or as its bit patterns.
        packed_length : int, optional
            Codes along the last axis, where ``qvalue`` holds the bytes of a packed ``storage`` instead of codes.
        granularity : PerTensor, PerChannel, PerGroup or PerBlock, optional
            By default the format's own.
        dialect : str or Dialect, optional
            Whose ``scale`` and ``tensor_scale`` these are, where a library means something else by them: the row-wise
            scales of bitsandbytes' int8 are largest magnitudes, 127 times as large, and the global scale of
            compressed-tensors' NVFP4 is the reciprocal of the tensor scale. Others store what this library does.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be; codes that stand for no finite number of the format.
            Under a tracing compiler values are not known, and not checked.

        Examples
        --------
        >>> import numpy as np, aqt_lite
        >>> codes, scale = np.asarray([-127, 0, 64], "int8"), np.asarray([0.5], "float32")
        >>> aqt_lite.QArray.from_codes(codes, scale).dequantize()
        array([-63.5,   0. ,  32. ], dtype=float32)
        >>> aqt_lite.QArray.from_codes(np.asarray([0, 7, 15], "uint8"), 2.0, dtype="float4_e2m1fn").dequantize()
        array([  0.,  12., -12.], dtype=float32)
        >>> stream, exponents = np.asarray([[0x21, 0x43]], "uint8"), np.asarray([[128]], "uint8")  # MXFP4 of a file
        >>> aqt_lite.QArray.from_codes(
        ...     stream, exponents, dtype="mxfp4", packed_length=4, scale_dtype="float8_e8m0fnu"
        ... ).dequantize()
        array([[1., 2., 3., 4.]], dtype=float32)
        >>> rows = aqt_lite.QArray.from_codes(codes, 63.5, dialect="bitsandbytes")  # SCB of a row
        >>> rows.dequantize()
        array([-63.5,   0. ,  32. ], dtype=float32)
        """
        b = backend_of(qvalue)
        if b is None:
            what = f"qvalue is a {type(qvalue).__name__}: give an array of integer codes"
            raise TypeError(refusal(qvalue, "qvalue") or what)
        problem = b.why_unusable(qvalue)
        if problem:
            raise TypeError(f"qvalue {problem}")
        source = float_type(float_dtype, "float_dtype")
        if dtype is None and b.dtype_name(qvalue) in ("float32", "float64"):
            raise ValueError(
                f"qvalue has dtype {b.dtype_name(qvalue)}: give an array of integer codes; of floats aqt_lite.quantize "
                "makes them"
            )
        form = _stored_format(b.dtype_name(qvalue) if dtype is None else dtype)
        if packed_length is not None:
            packed_length = index_of("packed_length", packed_length)
            qvalue = _unpacked(qvalue, form, packed_length, b)
        qvalue = _as_codes(qvalue, form, b, said=dtype is not None)
        granularity = form.granularity if granularity is None else granularity
        shape = tuple(qvalue.shape)
        block = block_of(granularity, len(shape))
        scale = _as_meant(scale, tensor_scale, form, dialect_of(dialect).for_format(form), source.compute, b)
        if scale is None and _needs_scale(form):
            raise TypeError(f"scale is None: codes of {form.name} need one; give 1.0 where they have none")
        if form.element.own_range:
            said = {"scale": scale, "zero_point": zero_point, "offset": offset, "scale_dtype": scale_dtype}
            check_without_scale(form, source.name, said)
        if scale is not None and not isinstance(scale, QArray):
            kept = _format_of_scale(scale, form, scale_dtype)
            if kept is not None:
                plain = affine.Spec(replace(form, scale=None, scaled=True), source, block)
                place = partial(on_grid, "scale", x=qvalue, name_of_x="qvalue", shape=shape, granularity=granularity)
                scale = _in_few_bits(
                    scale, kept, grid_of(shape, block), partial(place, spec=plain, b=b), source.compute
                )
        form = replace(form, scaled=scale is not None, scale=scale._format if isinstance(scale, QArray) else None)
        spec = affine.Spec(form, source, block)
        if zero_point is None and offset is None and form.element.middle:
            raise ValueError(
                f"qvalue has dtype {form.name} but no zero_point (the code of 0.0): give 0 if that is 0, or dtype= "
                "where these are codes of another format"
            )
        if zero_point is not None and offset is not None:
            raise ValueError("zero_point and offset are both given: a block has one of them")

        def placed(argument: str, value: Any, kept_as: str, check: Callable[..., None]) -> Any:
            if value is None:
                return None
            if isinstance(value, QArray):
                return _nested(argument, value, grid_of(shape, block), b)
            return on_grid(argument, value, qvalue, "qvalue", shape, granularity, spec, b, kept_as, check, exact=True)

        of_scales = partial(check_scale, spec=spec, least=spec.least_to_keep(offset is not None), signed=True)
        scale = placed("scale", scale, source.compute, of_scales)
        offset = placed("offset", offset, source.compute, partial(check_offset, spec=spec))
        zero_point = placed("zero_point", zero_point, "int32", partial(check_zero_point, spec=spec))
        if b.has_values(qvalue):
            check_codes(b.to_numpy(qvalue), spec)
        elif b.is_deferred(qvalue):
            qvalue = b.check_when_computed(qvalue, lambda part, _: check_codes(part, spec))
        return cls._of(affine.Coded(qvalue, scale, zero_point, offset), spec)

    @classmethod
    def _of(cls, w: affine.Coded, spec: affine.Spec) -> QArray:
        """The container of what ``affine`` made: packed where codes have fewer than 8 bits."""
        scale = w.scale
        if isinstance(scale, tuple):
            scale = cls._of(affine.Coded(*scale), spec.of_scales)
        ragged = _ragged_axes(tuple(w.codes.shape), spec.block)
        return cls(w.codes, scale, w.zero_point, spec.format.name, spec.block, spec.source.name,
                   offset=w.offset, ragged=ragged).packed()  # fmt: skip

    @classmethod
    def _kept(cls, storage: Array, qparams: affine.QParams, spec: affine.Spec, shape: tuple[int, ...]) -> QArray:
        """The container of codes that are in ``storage`` as they are kept, and of what goes with them."""
        packed_length = shape[-1] if is_packed(spec, len(shape)) else None
        scale = qparams.scale
        if isinstance(scale, tuple):
            scale = cls._of(affine.Coded(*scale), spec.of_scales)
        ragged = _ragged_axes(shape, spec.block)
        return cls(storage, scale, qparams.zero_point, spec.format.name, spec.block, spec.source.name,
                   offset=qparams.offset, packed_length=packed_length, ragged=ragged)  # fmt: skip

    # ---- what it is

    @property
    def qvalue(self) -> Array:
        """The codes, one an element, as integers: of the format's numbers, or their bit patterns."""
        codes = self._stored_codes()
        if not self.transposed:
            return codes
        order = swapped_back(range(codes.ndim), self.transposed)
        return self._backend.xp.permute_dims(codes, order)

    @property
    def scales(self) -> Array:
        """The scales as numbers, however they are kept; None where there are none."""
        return self.scale.dequantize() if isinstance(self.scale, QArray) else self.scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        shape = tuple(self.storage.shape)
        if self.packed_length is not None:
            shape = (*shape[:-1], self.packed_length)
        return swapped_back(shape, self.transposed) if self.transposed else shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements; of torch's arrays ``q.size()`` and ``q.size(axis)`` are what they are of a tensor."""
        b = backend_of(self.storage)
        return math.prod(self.shape) if b is None else b.number_of_elements(self.shape)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self._element.bits

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale, in the plainest words."""
        return granularity_of(self._checked().block)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and offsets together."""
        b = self._backend
        return sum(a.nbytes if isinstance(a, QArray) else _nbytes(a, b) for a in self._leaves() if a is not None)

    @property
    def backend(self) -> str:
        """Name of the backend that holds it."""
        return self._backend.name

    @property
    def device(self) -> Any:
        """The device that holds it, in the library's own words."""
        return self._backend.device(self.storage)

    @property
    def mask(self) -> Array | None:
        """Where values are missing, an array of bools; None where the format has no code for that.

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([1.0, -9999.0, 3.0], fill_value=-9999).mask
        array([False,  True, False])
        """
        missing, b = self._element.missing, self._backend
        if missing is None:
            return None
        codes = self.qvalue
        return codes == b.constant(missing, b.dtype_name(codes), like=codes)

    @naming_the_argument
    def dequantize(self, dtype: Any = None, *, fill_value: float | None = None, out: AnyArray | None = None) -> Array:
        """The values, as :func:`aqt_lite.dequantize`: where a narrower type overflows, ``out`` has been written to.

        Those of ``q.T`` and of ``for_dense()`` lie as the codes do: on NumPy and torch a view whose axes are permuted.

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([0.0, 2.0, -127.0]).dequantize()
        array([   0.,    2., -127.], dtype=float32)
        """
        b, q = self._backend, self._checked()
        source = float_type(self.float_dtype)
        wanted = source if dtype is None else float_type(dtype)
        fill = None if fill_value is None else number_of_type("fill_value", fill_value, wanted.name)
        if out is not None:
            check_out(out, q.shape, wanted.name, "the values", b, *q._arrays())
        elif q.transposed and b.permutes_views:  # codes read as they lie take a tenth of the time
            values = q._as_stored().dequantize(dtype, fill_value=fill_value)
            return b.xp.permute_dims(values, swapped_back(range(q.ndim), q.transposed))
        most_at_once = _TOGETHER if fill is None else _TOGETHER >> 7  # a mask and what is chosen by it are large
        large = (fill is not None or q.packed_length is not None) and b.has_values(q.storage) and q.size > most_at_once
        if out is not None or (large and can_write(b)):
            values = b.xp.empty(q.shape, dtype=b.dtype(wanted.name)) if out is None else out
            packed = q.packed_length is not None and not q.transposed  # streams of rows in the order of the axes
            codes = q.storage if packed else q.qvalue
            run(b, decode_into, codes, q._qparams(), values, spec=q._spec, fill=fill, packed=packed)
        else:
            values, qparams = NotImplemented, q._qparams()
            length = q.packed_length
            if length is not None and not q.transposed and b.has_values(q.storage) and q.size >= _WORTH_LOOPS:
                q._check_usable("storage", q.storage)
                stored = qparams.beside(q.storage)
                values = offered(b, dequantize_stored, stored, spec=q._spec, length=length, out=wanted.name)
            if values is NotImplemented:
                values = run(b, affine.dequantize, qparams.beside(q.qvalue), spec=q._spec, out=wanted.name)
            if fill is not None and (mask := q.mask) is not None:
                values = b.xp.where(mask, b.constant(fill, wanted.name, like=values), values)
        if wanted.max < source.max and not b.is_traced(values):
            values = b.check_no_overflow(values, wanted.name)
        return values

    # ---- what can be done with it

    @naming_the_argument
    def to_backend(self, name: str) -> QArray:
        """The same bits as arrays of another backend.

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([1.0, 2.0]).to_backend("array_api_strict").backend
        'array_api_strict'
        """
        b, target = self._backend, get_backend(name)
        if b is target:
            return self
        if any(b.is_traced(a) for a in self._arrays()):
            raise TypeError(f"to_backend({name!r}) inside a traced function: move the QArray before or after it")
        known = iter(b.computed(*self._arrays()))  # all in one go
        return self._with_each(lambda a: target.asarray(b.to_numpy(next(known))))

    def to_device(self, device: Any) -> QArray:
        """The same bits on another device of the same library.

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([1.0, 2.0]).to_device("cpu").device
        'cpu'
        """
        b = self._backend
        return self._with_each(lambda a: b.to_device(a, device))

    def copy(self) -> QArray:
        """The same bits in arrays of their own."""
        b = self._backend
        return self._with_each(lambda a: b.xp.asarray(a, copy=True))

    def for_dense(self, inputs: int = 1, outputs: int = 1) -> QArray:
        """The same array, its codes stored as (..., out, in): :func:`aqt_lite.dense` reads most weights fastest so.

        Shapes, scales and everything else stay as they are: only ``storage`` is laid out anew, once, and on NumPy and
        torch the memory of a matrix's scales and zero points. A weight for :func:`aqt_lite.linear` is in that order
        already. What ``mode="reproducible"`` does not read as it lies is turned at each call, and not after this. With
        groups along the outputs, and a scale for each input, dense reads a matrix ten times faster as it is: quantize
        it along its inputs, ``PerGroup(32, 0)``. To be called once, outside of compiled functions, which would do so at
        each.

        Parameters
        ----------
        inputs, outputs : int
            How many axes a product sums over, and how many of its result are behind them, where a weight is more than a
            matrix: heads of attention, (in, heads, width) or (heads, width, out). From 1 to 4.

        Raises
        ------
        ValueError
            It has fewer axes.

        Examples
        --------
        >>> import aqt_lite
        >>> w = aqt_lite.quantize([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).for_dense()
        >>> w.shape, w.storage.shape, aqt_lite.dense([1.0, 1.0], w).shape
        ((2, 3), (3, 2), (3,))
        >>> heads = aqt_lite.quantize([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]] * 4).for_dense(1, 2)
        >>> heads.shape, heads.storage.shape
        ((4, 2, 3), (2, 3, 4))
        """
        for name, count in (("inputs", inputs), ("outputs", outputs)):
            if type(count) is not int or not 1 <= count <= MOST_SWAPPED:
                raise ValueError(f"for_dense: {name}={count!r}: give a number of axes from 1 to {MOST_SWAPPED}")
        if self.ndim < inputs + outputs:
            said = "(in, out)" if inputs == outputs == 1 else f"{inputs} of inputs and {outputs} of outputs"
            raise ValueError(
                f"for_dense() of shape {self.shape}: a weight has at least {inputs + outputs} dimensions, {said}"
            )
        swapped: Swapped = True if inputs == outputs == 1 else (inputs, outputs)
        if self.transposed == swapped:
            return self
        b = self._backend
        codes = b.contiguous(b.xp.permute_dims(self.qvalue, swapped_back(range(self.ndim), (outputs, inputs))))
        turned = replace(self, storage=codes, transposed=swapped, packed_length=None)
        if swapped is True and self.ndim == 2 and not (self.trainable or b.is_traced(codes)):
            turned = replace(turned, scale=_by_columns(self.scale, b), zero_point=_by_columns(self.zero_point, b))
        return turned if self.packed_length is None else turned.packed()

    def packed(self) -> QArray:
        """The same array, its codes a dense stream of bits, as ``quantize`` makes them.

        It is where codes have fewer than 8 bits, or, of "bitround3" and the like, fewer than the integers that hold
        them.

        Examples
        --------
        >>> import numpy as np, aqt_lite
        >>> q = aqt_lite.quantize(np.ones((4, 100), "float32"), "int3")
        >>> q.storage.shape, q.nbytes, q.unpacked().nbytes
        ((4, 38), 156, 404)
        """
        element = self._element
        if self.packed_length is not None or not element.packs or not self.storage.ndim:
            return self
        codes = self.storage
        stream = run(self._backend, pack, codes, bits=element.bits)
        return replace(self, storage=stream, packed_length=int(codes.shape[-1]))

    def unpacked(self) -> QArray:
        """The same array, one code an item: easier to look at, and larger."""
        return replace(self, storage=self._stored_codes(), packed_length=None)

    def with_trainable_scales(self, trainable: bool = True) -> QArray:
        """The same array, whose scales and offsets derivatives reach (or do not).

        By default they are constants: training that differentiates everything it finds would move them, and codes would
        no longer fit. Codes and zero points have no derivatives in any case.

        Raises
        ------
        ValueError
            Scales or offsets are codes themselves ("mxfp4"), or there are none ("bitround7").

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([1.0, 2.0]).with_trainable_scales().trainable
        True
        """
        self._check_doubts()
        if trainable:
            self._check_may_train()
        return replace(self, trainable=trainable)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        asks = sys._getframe(1)
        if asks.f_code.co_name in _ANSWER_FALSE_TO_ERRORS and asks.f_globals.get("__name__", "").startswith("numpy."):
            return self._backend.to_numpy(self.dequantize())
        raise TypeError(
            f"a QArray ({self.dtype}, shape {self.shape}) does not become an array by itself, since its floats take "
            f"{float_type(self.float_dtype).bits / max(self.bits, 1):.3g} times the memory: ask for them with "
            "q.dequantize(), or for the codes with q.qvalue; aqt_lite.concatenate, aqt_lite.stack, q.transpose(...) "
            "and q.reshape(shape) keep it quantized; to store it, take aqt_lite.save(path, q)"
        )

    def __dlpack__(self, **_: Any) -> NoReturn:
        """What torch's constructors ask for, and ``from_dlpack`` of any library: this, or the device first."""
        raise TypeError(
            f"a QArray becomes no tensor or list by itself ({self.dtype}, shape {self.shape}): q.dequantize() is the "
            "array of its values, q.qvalue has its codes, aqt_lite.torch.QuantizedWeight(q) keeps it in a torch module"
        )

    __dlpack_device__ = __dlpack__

    def __getattr__(self, name: str) -> NoReturn:
        """Only for what does not exist: what is no array says so."""
        known = {f.name for f in fields(self)}
        if name.startswith("_") or name in known:  # protocols ask; and what has no fields yet is being made
            raise AttributeError(f"'QArray' object has no attribute {name!r}")
        raise AttributeError(
            f"a QArray has no attribute {name!r}: it is a container of codes and scales, not an array; {way_to(name)}"
        )

    def __repr__(self) -> str:
        try:
            b, q = self._backend, self._checked()
            words = f"{self.dtype}, shape={self.shape}, {q.granularity}, of {self.float_dtype}, {b.name}"
            if not all(b.has_values(a) for a in self._arrays()):
                return f"QArray({words}, {'traced' if b.is_traced(self.storage) else 'deferred'})"
            lines = [f"QArray({words})"]
            for name, leaf in zip(_LEAVES, (self.qvalue, *self._leaves()[1:]), strict=True):
                name = "qvalue" if name == "storage" else name
                if isinstance(leaf, QArray):
                    lines.append(f"{name}: {leaf!r}")
                elif leaf is not None:
                    lines.append(f"{name}: {np.array2string(b.to_numpy(leaf), threshold=20, edgeitems=3)}")
            return "\n".join(lines)
        except Exception:  # leaves replaced by a tree utility (specs, shardings, ...), donated, or of other shapes
            return f"QArray({self.dtype}, " + ", ".join(f"{n}={_briefly(getattr(self, n))}" for n in _LEAVES) + ")"

    def __getstate__(self) -> dict[str, Any]:
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        state["dtype"] = str(self.dtype)
        known = known_format(self.dtype)
        if known is not None and known not in _BUILT_IN:  # so that another process knows it, too
            state["_format_record"] = known
        b = backend_of(self.storage)
        if b is not None:
            state["storage"] = b.to_pickle(self.storage)
        doubt: Doubt | None = self.__dict__.get(DOUBT)
        words = None if doubt is None else doubt.settled()
        if doubt is not None and words is not None:
            state[DOUBT] = Doubt(words, doubt.leaf)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        record = state.pop("_format_record", None)
        if record is not None:
            register_format(record)
        self.__dict__.update({"version": 1, **state})  # the first version did not say so
        known, b = known_format(self.dtype), backend_of(self.storage)
        if known is not None and b is not None and self.packed_length is None:
            self.__dict__["storage"] = b.from_pickle(self.storage, known.element.storage)
        self.__post_init__()

    # ---- inside

    def _leaves(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _LEAVES)

    def _arrays(self) -> list[Array]:
        """Every array that it holds, those of its scales' own container included."""
        found = []
        for leaf in self._leaves():
            if leaf is not None:
                found += leaf._arrays() if isinstance(leaf, QArray) else [leaf]
        return found

    def _with_each(self, function: Callable[[Array], Array]) -> QArray:
        """The same with ``function`` applied to every array, in the order of ``_arrays``."""
        self._check_doubts()
        new: dict[str, Any] = {}
        for name, leaf in zip(_LEAVES, self._leaves(), strict=True):
            new[name] = (
                leaf._with_each(function) if isinstance(leaf, QArray) else leaf if leaf is None else function(leaf)
            )
        return replace(self, **new)

    @property
    def _backend(self) -> Backend:
        b = backend_of(self.storage)
        if b is None:
            raise TypeError(f"this QArray holds a {type(self.storage).__name__}, not an array")
        return b

    @property
    def _element(self) -> ElementType:
        return element_type(self.dtype)

    @property
    def _format(self) -> Format:
        """What decoding needs to know of the format."""
        scale = self.scale
        kept = scale._format if isinstance(scale, QArray) and not scale._has_groups else None
        return Format(self.dtype, self._element, scale=kept, scaled=scale is not None)

    @property
    def _has_groups(self) -> bool:
        return any(size is not None and size > 1 for size in self.block)

    @property
    def _spec(self) -> affine.Spec:
        return affine.Spec(self._format, float_type(self.float_dtype), self.block)

    def _coded(self) -> affine.Coded:
        """Its arrays as ``affine`` takes them, codes in the order of the axes."""
        return self._qparams().beside(self.qvalue)

    def _qparams(self, *, masked: bool = True) -> affine.QParams:
        """Unless ``masked``, whoever takes traced scales sees to those that are 0."""
        b, scale, offset = self._backend, self.scale, self.offset
        if not isinstance(scale, QArray):
            scale = scale if scale is not None and not masked and not b.has_values(scale) else self._usable(scale, b)
        else:  # of scales in groups, a format knows only those along the last axis
            grouped = scale._has_groups
            scale = (
                affine.without_too_small(scale.dequantize(), self._spec, b) if grouped else scale._checked()._coded()
            )
        offset = offset.dequantize() if isinstance(offset, QArray) else offset
        if not self.trainable:
            scale, offset = (_constant(a, b) for a in (scale, offset))
        return affine.QParams(scale, self.zero_point, offset)

    def _usable(self, scale: Array | None, b: Backend) -> Array | None:
        """``scale``, after looking once whether one is 0, infinite, or negative and trained; NaN there in traces.

        Training and tree utilities may have moved scales since they were chosen. NaN speaks for itself.
        """
        if scale is None or "_has_usable_scales" in self.__dict__:
            return scale
        if not b.has_values(scale):
            return b.unusable_as_nan(scale, positive=self.trainable)
        values = b.to_numpy(scale)
        wrong = {"not positive" if self.trainable else "0": values <= 0 if self.trainable else values == 0}
        for words, bad in {**wrong, "infinite": np.isinf(values)}.items():
            if bad.any():
                raise ValueError(
                    f"this QArray has {int(bad.sum())} scales of {values.size} that are {words}: "
                    "they were changed since they were chosen; quantize the values again"
                )
        self.__dict__["_has_usable_scales"] = True
        return scale

    def _stored_codes(self) -> Array:
        """Codes as they are kept, but one an item."""
        if self.packed_length is None:
            return self.storage
        self._check_stream()
        self._check_usable("storage", self.storage)
        element = self._element
        signed = not element.storage.startswith("u")
        return run(self._backend, unpack, self.storage, bits=element.bits, length=self.packed_length, signed=signed)

    def _check_stream(self) -> None:
        """ValueError where there are not so many bytes as packed codes take."""
        if self.packed_length is not None and self.storage.shape[-1] != bytes_of(self.packed_length, self.bits):
            raise ValueError(
                f"this QArray has {self.packed_length} codes of {self.bits} bits along the last axis, so its storage "
                f"should have {bytes_of(self.packed_length, self.bits)} bytes there, not {self.storage.shape[-1]}: it "
                "was joined or cut without a view to the packing; use aqt_lite.concatenate, q[...] or q.unpacked()"
            )

    def _ragged_axes(self) -> Block:
        return _ragged_axes(self.shape, self.block)

    def _checked(self) -> QArray:
        """The same, after checking that the parts fit each other, with one block entry for each axis.

        Mapping drops or adds leading axes, each element of which has blocks of its own.
        """
        if self.version > CONTRACT_VERSION:
            raise ValueError(
                f"this QArray follows version {self.version} of the contract, and this library version "
                f"{CONTRACT_VERSION}: upgrade aqt_lite to read it"
            )
        shape, block, ragged = self.shape, self.block, self.ragged
        extra = len(shape) - len(block)
        if extra:
            block = (1,) * extra + block[max(0, -extra) :]
            if ragged:
                ragged = (None,) * extra + ragged[max(0, -extra) :]
        for axis, length in enumerate(ragged):
            if length is not None and length != shape[axis]:
                raise ValueError(
                    f"this QArray has groups of {block[axis]} along an axis of {length}, the last one shorter, but its "
                    f"codes have length {shape[axis]} there: they were joined or cut without a view to the groups; use "
                    "aqt_lite.concatenate or q[...]"
                )
        self._check_stream()
        grid = grid_of(shape, block)
        compute = float_type(self.float_dtype).compute
        for name in ("scale", "zero_point", "offset"):
            leaf = getattr(self, name)
            if leaf is None:
                continue
            if tuple(leaf.shape) != grid:
                raise ValueError(
                    f"this QArray has codes of shape {shape} in blocks {block}, so its {name} should have shape "
                    f"{grid}, not {tuple(leaf.shape)}: map over leading axes only, and over codes and scales alike"
                )
            if isinstance(leaf, QArray):
                continue
            self._check_usable(name, leaf)
            kind, wanted = self._backend.dtype_name(leaf), "int32" if name == "zero_point" else compute
            if kind != wanted:
                raise TypeError(
                    f"this QArray's {name} has dtype {kind}, but it is kept as {wanted}: it was converted together "
                    "with other arrays; to compute in another type, convert the result, or q.dequantize(dtype)"
                )
        self._check_usable("storage", self.storage)
        kind, element = self._backend.dtype_name(self.storage), self._element
        wanted = element.storage if self.packed_length is None else "uint8"
        if kind != wanted:
            raise TypeError(f"this QArray's storage has dtype {kind}, but codes of {self.dtype} are kept as {wanted}")
        self._check_doubts()
        return self if extra == 0 else replace(self, block=block, ragged=ragged)

    def _check_may_train(self) -> None:
        """ValueError where no derivative could reach the scales and offsets that there are."""
        if self.scale is None and not _needs_scale(_stored_format(self.dtype)):
            raise ValueError(f"with_trainable_scales: {self.dtype} has no scales, and its codes have no derivative")
        for name in ("scale", "offset"):
            kept = getattr(self, name)
            if isinstance(kept, QArray):
                raise ValueError(
                    f"with_trainable_scales: every {name} of this {self.dtype} is kept as {kept.dtype}, and codes have "
                    "no derivative: scales of float32 train, quantize(x, ..., scale_dtype='float32'), or "
                    "convert(q, scale_dtype='float32') of an array that exists"
                )

    def _check_doubts(self) -> None:
        """Raise where the backend whose tree this was made of has found that its leaves do not belong together."""
        doubt: Doubt | None = self.__dict__.get(DOUBT)
        if doubt is None:
            return
        words = doubt.settled()
        if words is not None:
            raise ValueError(words)
        self.__dict__.pop(DOUBT, None)

    def _check_values(self) -> None:
        """What ``from_codes`` asks of values, asked of NumPy's arrays that fit each other."""
        b, scale, offset, element = self._backend, self.scale, self.offset, self._element
        nested = scale._format if isinstance(scale, QArray) else None
        form = replace(_stored_format(self.dtype), scaled=scale is not None, scale=nested)
        spec = affine.Spec(form, float_type(self.float_dtype), self.block)
        grid = grid_of(self.shape, self.block)
        if isinstance(scale, QArray):
            _nested("scale", scale, grid, b)
        elif scale is not None:
            check_scale(scale, spec, spec.least_to_keep(offset is not None), signed=True)
        if isinstance(offset, QArray):
            _nested("offset", offset, grid, b)
        elif offset is not None:
            check_offset(offset, spec)
        if self.zero_point is not None:
            check_zero_point(self.zero_point, spec)
        if not every_pattern_is_a_code(element, packed=self.packed_length is not None):
            for part in self._codes_in_parts():
                if unusable_codes(part, element).any():
                    check_codes(self.qvalue, spec)  # which says where

    def _codes_in_parts(self) -> Iterator[Array]:
        """The codes of NumPy's arrays, some at a time, in the order of the storage."""
        storage = self.storage.reshape(-1, self.storage.shape[-1]) if self.storage.ndim else self.storage.reshape(1, 1)
        whole = storage.shape[-1] if self.packed_length is None else self.packed_length
        rows = max(1, _PART // max(whole, 1))
        for start in range(0, storage.shape[0], rows):
            for low in range(0, whole, _PART):
                high = min(low + _PART, whole)
                here = (low, high)
                if self.packed_length is not None:
                    here = (low * self.bits // 8, bytes_of(high, self.bits))
                window = storage[start : start + rows, slice(*here)]
                packed_length = None if self.packed_length is None else high - low
                yield QArray(window, None, dtype=self.dtype, packed_length=packed_length)._stored_codes()

    def _check_usable(self, name: str, leaf: Array) -> None:
        problem = self._backend.why_unusable(leaf)
        if problem:
            raise TypeError(f"this QArray's {name} {problem}")


_LEAVES = ("storage", "scale", "zero_point", "offset")
MOST_SWAPPED = 4  # axes of each run in for_dense(), of which the mark has room for so many
_PART = 1 << 20  # codes that are looked at in one go; whole bytes of a stream
_BUILT_IN = frozenset([*FORMATS.values(), *SCALE_FORMATS.values(), *DERIVED.values()])


def _needs_scale(form: Format) -> bool:
    """Whether codes of a format mean nothing without a scale; those of scales may have none."""
    return form.scaled and form.name not in SCALE_FORMATS


def _stored_format(dtype: Any) -> Format:
    """A format of codes that exist already: one that users name, or one of scales."""
    if not isinstance(dtype, Format | ElementType):
        found = SCALE_FORMATS.get(dtype if isinstance(dtype, str) else dtype_name(dtype))
        if found is not None and found.name not in FORMATS:
            return found
    return format_of(dtype)


def _as_codes(qvalue: Array, form: Format, b: Backend, *, said: bool) -> Array:
    """Codes in the integer type that the format is stored in."""
    name, element = b.dtype_name(qvalue), form.element
    if name == element.storage:
        return qvalue
    if name == element.name and name not in INTEGER_TYPES:  # the library has the type itself
        return (
            b.bits_of(qvalue)
            if not name.lstrip("u").startswith("int")
            else b.xp.astype(qvalue, b.dtype(element.storage))
        )
    if name not in INTEGER_TYPES or not said:
        raise TypeError(f"qvalue has dtype {name}: codes of {form.name} are kept as {element.storage}")
    if b.has_values(qvalue):
        check_codes(b.to_numpy(qvalue), affine.Spec(form, float_type("float32"), ()))
    return b.xp.astype(qvalue, b.dtype(element.storage))


def _unpacked(stream: Array, form: Format, length: int, b: Backend) -> Array:
    """The codes of a packed array's bytes."""
    element, wanted = form.element, bytes_of(length, form.element.bits)
    if b.dtype_name(stream) != "uint8" or not element.packs or not stream.ndim or stream.shape[-1] != wanted:
        raise ValueError(
            f"packed_length={length}: {length} codes of {form.name} take {wanted} bytes of uint8 along the last axis, "
            f"but qvalue is {b.dtype_name(stream)} of shape {tuple(stream.shape)}"
        )
    signed = not element.storage.startswith("u")
    codes: Array = run(b, unpack, stream, bits=element.bits, length=length, signed=signed)
    return codes


def _format_of_scale(scale: Any, form: Format, scale_dtype: Any) -> Format | None:
    """The format of few bits that given scales are to be kept in; None where they stay numbers."""
    b = backend_of(scale)
    name = None if b is None else b.dtype_name(scale)
    if scale_dtype is not None:
        if scale_dtype in ("float32", "float64"):
            return None
        kept = scale_format_of(scale_dtype)
        if kept.scaled:
            raise ValueError(
                f"scale_dtype={scale_dtype!r}: its numbers need a scale themselves; give scale as a QArray that has one"
            )
        return kept
    typed = SCALE_FORMATS.get(name or "")
    if typed is not None and typed.element.bits <= 8:
        return typed
    if form.scale is not None and name in INTEGER_TYPES:
        raise TypeError(
            f"scale has dtype {name}, but {form.name} keeps its scales as {form.scale.name}: if these are its bit "
            f"patterns, say scale_dtype={form.scale.name!r}; else give floats"
        )
    return None if form.scale is None or form.scale.scaled else form.scale


def _in_few_bits(scale: Any, kept: Format, grid: tuple[int, ...], place: Callable[..., Array], compute: str) -> QArray:
    """Scales in a format that needs no scale itself, from its own type, its bit patterns, or numbers that it has."""
    b = backend_of(scale)
    name = None if b is None else b.dtype_name(scale)
    if name in (kept.name, kept.element.storage) or (kept.element.storage == "int16" and name == "uint16"):
        codes = b.xp.astype(scale, b.dtype("int16")) if name == "uint16" else scale  # type: ignore[union-attr]
        found = QArray.from_codes(codes, None, dtype=kept.name)
        return found if found.shape == grid or found.size != np.prod(grid) else found.reshape(grid)
    numbers = place(scale, dtype=compute, check=lambda _: None)
    b = backend_of(numbers)
    assert b is not None
    spec = affine.Spec(kept, float_type(compute), (None,) * len(grid))
    codes = run(b, affine.encode, numbers, affine.QParams(None), spec=spec, recipe=affine.Recipe(rounding="up"))
    found = QArray.from_codes(codes, None, dtype=kept.name, float_dtype=compute)
    if b.has_values(numbers):
        here, there = b.to_numpy(numbers), b.to_numpy(found.dequantize())
        if not np.array_equal(here, there):
            first = here[here != there].flat[0]
            raise ValueError(
                f"scale={first:.9g} is no number of {kept.name}, in which scales are kept: round it first, as NumPy's "
                f"scale.astype({kept.name!r}).astype('float32') does"
            )
    return found


def _as_meant(scale: Any, tensor: Any, form: Format, rules: Dialect, compute: str, b: Backend) -> Any:
    """Scales in this library's meaning: the value of a step, the scale of all scales being a factor."""
    if rules.keeps_largest and scale is not None:
        if isinstance(scale, QArray):
            raise TypeError(f"scale is a QArray: dialect={rules.name!r} keeps largest magnitudes, as plain numbers")
        whole = scale if backend_of(scale) is b else np.asarray(scale, compute)
        if backend_of(scale) is b and b.dtype_name(scale) in ("float16", "bfloat16"):  # else the product is rounded
            whole = b.xp.astype(scale, b.dtype(compute))
        scale = whole * float(np.dtype(compute).type(1 / form.element.top))
    if tensor is None:
        return scale
    if form.scale is None or not form.scale.scaled:
        raise ValueError(f"tensor_scale is given, but scales of {form.name} have no scale of their own: leave it out")
    if isinstance(scale, QArray) or backend_of(scale) is not b:
        kind = "QArray, which has its scale" if isinstance(scale, QArray) else type(scale).__name__
        raise TypeError(f"scale is a {kind}: beside tensor_scale give an array of {form.scale.name} of {b.name}")
    tensor = b.xp.reshape(_tensor_scale(tensor, scale, compute, b), (1,) * scale.ndim)
    if rules.inverse_tensor_scale:
        tensor = b.reciprocal(b.xp.astype(tensor, b.dtype(compute)))
    return QArray.from_codes(scale, tensor, dtype=form.scale.name, granularity=PerTensor())


def _tensor_scale(tensor: Any, scale: Array, compute: str, b: Backend) -> Array:
    """One number, positive and finite, beside an array of scales."""
    other = backend_of(tensor)
    if other is not None and other is not b and other.name != "numpy":
        raise TypeError(f"tensor_scale is a {other.name} array but scale is {b.name}: give both from one backend")
    if other is not b:
        number = np.asarray(tensor)
        if number.dtype.kind not in "fiu":
            raise TypeError(f"tensor_scale is a {type(tensor).__name__}: give a number, or an array of one")
        tensor = b.asarray(number.astype(compute), like=scale)
    if math.prod(tensor.shape) != 1:
        raise ValueError(f"tensor_scale has shape {tuple(tensor.shape)}: give one number, the scale of all scales")
    if b.has_values(tensor):
        value = float(np.asarray(b.to_numpy(tensor), np.float64).reshape(()))
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"tensor_scale={value}: it must be positive and finite")
    return tensor


def _nested(argument: str, value: QArray, grid: tuple[int, ...], b: Backend) -> QArray:
    """A quantized scale or offset that fits."""
    if value._backend is not b:
        raise TypeError(f"{argument} is a {value.backend} QArray but qvalue is {b.name}: move one with .to_backend()")
    if value.shape != grid:
        raise ValueError(f"{argument} has shape {value.shape}: with this granularity it must be {grid}")
    if all(map(b.has_values, value._arrays())):  # scales of others may be smaller than any that is chosen here
        numbers = value.to_backend("numpy").dequantize()
        bad = ~np.isfinite(numbers)
        if bad.any():
            first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
            raise ValueError(f"{argument} is {numbers[first]} at index {first}: every one must be finite")
    return value


def _by_columns(blocks: Any, b: Backend) -> Any:
    """What blocks of a matrix have, in memory column after column; and coded scales, without blocks of their own."""
    if not isinstance(blocks, QArray):
        return None if blocks is None else b.by_columns(blocks)
    if blocks.packed_length is not None or blocks._has_groups or blocks.transposed:
        return blocks
    return replace(blocks, storage=b.by_columns(blocks.storage))


def _ragged_axes(shape: tuple[int, ...], block: Block) -> Block:
    """For each axis its length where groups do not divide it, else None."""
    return tuple(
        n if size is not None and 1 < size < n and n % size else None for n, size in zip(shape, block, strict=True)
    )


def _constant(kept: Any, b: Backend) -> Any:
    """Scales or offsets that no derivative reaches."""
    if isinstance(kept, tuple):
        return type(kept)(*(_constant(a, b) for a in kept))
    return b.stop_gradient(kept) if b.differentiates(kept) else kept


def _nbytes(leaf: Array, b: Backend) -> int:
    name = b.dtype_name(leaf)
    bits = float_type(name).bits if name in ("float32", "float64") else b.int_limits(name).bits
    return int(np.prod(tuple(leaf.shape), dtype=np.int64)) * bits // 8


def _briefly(leaf: Any) -> str:
    try:
        b = backend_of(leaf)
        problem = None if b is None else b.why_unusable(leaf)  # of which even the library's own repr may crash
        return repr(leaf) if problem is None else f"<{type(leaf).__name__} that {problem}>"
    except Exception as error:  # deleted or donated arrays
        return f"<{type(leaf).__name__}: {error}>"


# ---- files


def described(q: QArray) -> dict[str, Any]:
    """All of ``q`` that is no array, in JSON's types but for tuples, which JSON has as lists."""
    return {name: getattr(q, name) for name in _STATIC}


def in_words(q: QArray) -> str:
    """What a file or a template holds, for who has to tell it from another."""
    words = f"{kind_in_words(q)}, shape {q.shape}"
    if q.transposed:
        words += f", {_mark.layout_in_words(q.transposed)}"
    if q.packed_length is not None:
        words += f", {q.packed_length} codes packed"
    return words + (", trainable" if q.trainable else "")


def rebuilt(said: Any, parts: dict[str, Any], *, check_values: bool = True) -> QArray:
    """The inverse of ``described``, of what a file says, from arrays of NumPy and QArrays of such.

    ValueError or TypeError where they do not fit each other, as ``checked_for_a_file`` has it.
    """
    if not isinstance(said, dict) or set(said) != set(_STATIC):
        raise ValueError(f"a QArray is described by {', '.join(_STATIC)}: upgrade aqt_lite to read what says more")
    for name, value in said.items():
        if not _SAID_AS[name](value):
            raise ValueError(f"a QArray has {name}={value!r:.60}")
    element_type(said["dtype"])
    float_type(said["float_dtype"], "float_dtype")
    static: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    q = QArray(**{"scale": None, **parts}, **static)
    checked_for_a_file(q, check_values=check_values)
    return q


def checked_for_a_file(q: QArray, *, check_values: bool = True) -> None:
    """ValueError or TypeError where a QArray of NumPy's arrays is none that ``QArray.from_codes`` could have made.

    With ``check_values``, scales, zero points and offsets are looked at, and codes where there are bits of no number.
    """
    element, storage = q._element, q.storage
    if storage.ndim < (sum(lengths_swapped(q.transposed)) or (q.packed_length is not None)):
        raise ValueError(f"a QArray's storage has shape {tuple(storage.shape)}: too few axes for how it is laid out")
    if q.packed_length is not None and not element.packs:
        raise ValueError(f"a QArray has packed_length={q.packed_length}, but codes of {q.dtype} take whole bytes")
    full = q._checked()
    if full.ragged and full.ragged != full._ragged_axes():
        raise ValueError(f"a QArray of shape {q.shape} in blocks {q.block} has ragged={q.ragged}")
    if q.scale is None and _needs_scale(_stored_format(q.dtype)):
        raise ValueError(f"a QArray has no scale, but codes of {q.dtype} need one")
    if element.own_range:
        said = {"scale": q.scale, "zero_point": q.zero_point, "offset": q.offset}
        check_without_scale(_stored_format(q.dtype), q.float_dtype, said)
    if q.zero_point is not None and q.offset is not None:
        raise ValueError("a QArray has zero_point and offset: a block has one of them")
    if q.zero_point is None and q.offset is None and element.middle:
        raise ValueError(f"a QArray of {q.dtype} has neither zero_point nor offset")
    if isinstance(q.zero_point, QArray):
        raise ValueError("a QArray has a quantized zero_point: give an array of int32")
    for part in (q.scale, q.offset):
        if isinstance(part, QArray):
            checked_for_a_file(part, check_values=check_values)
    if check_values:
        full._check_values()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_lengths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(n is None or (_is_count(n) and n) for n in value)


def _are_runs(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(_is_count(n) and 1 <= n <= MOST_SWAPPED for n in value)
        and tuple(value) != (1, 1)  # which is True
    )


_SAID_AS: dict[str, Callable[[Any], bool]] = {  # for each field that is no array, whether a value is one of its own
    "dtype": lambda value: isinstance(value, str),
    "block": _are_lengths,
    "float_dtype": lambda value: isinstance(value, str),
    "transposed": lambda value: isinstance(value, bool) or _are_runs(value),
    "packed_length": lambda value: value is None or _is_count(value),
    "ragged": _are_lengths,
    "trainable": lambda value: isinstance(value, bool),
    "version": lambda value: _is_count(value) and value > 0,
}


# ---- trees


def _flatten(q: QArray) -> tuple[tuple[Any, ...], Any]:
    return q._leaves(), (str(q.dtype), *(getattr(q, name) for name in _STATIC[1:]))


def _unflatten(static: Any, leaves: Any) -> QArray:
    return QArray(**dict(zip(_LEAVES, leaves, strict=True)), **dict(zip(_STATIC, static, strict=True)))


_STATIC = tuple(f.name for f in fields(QArray) if f.name not in _LEAVES)
"""Names of what is no array, "dtype" first."""

register_container(QArray, _flatten, _unflatten, _LEAVES)
