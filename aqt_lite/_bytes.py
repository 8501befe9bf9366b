"""A quantized array as the bytes that other libraries store, and back.

Owns: ``ArrayBytes``, the part of ``QArray`` that is about them: which of its parts are a layout's leaves. Imports:
layouts, the registry, formats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import AnyArray, Array, Numbers
from aqt_lite._qparams import unusable_codes
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.elements import float_type
from aqt_lite.formats import element_type, format_of
from aqt_lite.granularity import Granularity, PerGroup
from aqt_lite.layouts import LAYOUTS, Family, Layout, Leaf, layout_of

if TYPE_CHECKING:
    from aqt_lite._protocol import Backend
    from aqt_lite.dialects import Dialect
    from aqt_lite.qarray import QArray

__all__ = ["ArrayBytes"]


class ArrayBytes:
    """The part of ``QArray`` that is about other libraries' bytes."""

    @naming_the_argument
    def to_bytes(self: QArray, layout: str | Layout | Family) -> np.ndarray[Any, Any]:  # type: ignore[misc]
        """The codes as another library stores them; block types of ggml with their scales and offsets.

        Parameters
        ----------
        layout : str, Layout or Family
            A name of :data:`aqt_lite.layouts.LAYOUTS` (docs/layouts.md lists them), or a record of your own. Of a
            family, such as "gguf" or "gptq", the layout for this array's format or number of bits is taken.

        Returns
        -------
        numpy.ndarray
            uint8, or int32 where the library stores words. The axes are the array's own, the one along which the layout
            runs as long as it is stored: (N, K) elements are (N, K / 32 * 18) bytes of q4_0. Files have words in
            little-endian order: ``astype("<i4").tobytes()``.

        Raises
        ------
        ValueError
            The layout has no place for this format, these groups or one of the codes, or the axis is no multiple of
            its block.
        TypeError
            Values are not known, because a compiler traces.

        Examples
        --------
        >>> import numpy as np, aqt_lite
        >>> q = aqt_lite.quantize(np.asarray([[1.0, -2.0, 3.0, 7.0]], "float32"), "uint4", scale=1.0, zero_point=8)
        >>> q.to_bytes("low_nibble_first"), q.to_bytes("high_nibble_first")
        (array([[105, 251]], dtype=uint8), array([[150, 191]], dtype=uint8))
        """
        q = self._checked()
        found = layout_of(layout, q.dtype, q.bits)
        if any(q._backend.is_traced(a) for a in q._arrays()):
            raise TypeError("to_bytes inside a traced function: bytes are made of values, outside of it")
        if len(found.leaves) == 1:
            return found.packed({"codes": _codes_of(q)})
        return found.packed(_leaves_of(q, found))

    @classmethod
    @naming_the_argument
    def from_bytes(  # type: ignore[misc]
        cls: type[QArray],
        data: bytes | bytearray | memoryview | AnyArray,
        layout: str | Layout | Family,
        shape: tuple[int, ...],
        *,
        scale: Numbers | QArray | None = None,
        zero_point: Numbers | None = None,
        offset: Numbers | QArray | None = None,
        dtype: Any = None,
        scale_dtype: Any = None,
        tensor_scale: Numbers | None = None,
        granularity: Granularity | None = None,
        dialect: str | Dialect | None = None,
        float_dtype: Any = "float32",
        backend: str | None = None,
    ) -> QArray:
        """What another library stored, as an array whose values are those that it reads itself.

        Parameters
        ----------
        data : bytes, or array
            As :meth:`to_bytes` returns it, or the same in one axis: of uint8, or of words of either sign.
        layout : str, Layout or Family
            As for :meth:`to_bytes`.
        shape : tuple of int
            Of the array of elements.
        scale, zero_point, offset, scale_dtype, tensor_scale, granularity, dialect : optional
            As for :meth:`from_codes`, where the layout is about codes alone; block types of ggml have them in ``data``.
        dtype : str, optional
            Format of the codes, where the layout does not say it.
        float_dtype : str
            Type of the values that the array stands for.
        backend : str, optional
            Which library is to hold the array: by default that of ``data``, or NumPy.

        Raises
        ------
        ValueError, TypeError
            ``data`` of another length or dtype than ``shape`` needs, an axis that blocks do not divide, bits that are
            set where the layout keeps nothing, codes that stand for no finite number, scales among them; all that
            :meth:`from_codes` raises.

        Examples
        --------
        >>> import aqt_lite
        >>> block = bytes.fromhex("003c") + bytes(range(16))  # a float16 scale of 1.0, then 32 codes of 4 bits
        >>> q = aqt_lite.QArray.from_bytes(block, "q4_0", (1, 32))
        >>> q.dequantize()[0, :4].tolist(), q.to_bytes("q4_0").tobytes() == block
        ([-8.0, -7.0, -6.0, -5.0], True)
        """
        b = backend_of(data)
        if b is not None:
            if b.is_traced(data):
                raise TypeError("data is being traced: bytes are read outside of traced functions")
            data = b.to_numpy(data)
        shape = _as_shape(shape)
        found = _stored_as(layout, dtype)
        form = format_of(found.dtype or dtype)
        signed = not form.element.storage.startswith("u")
        codes = found.unpacked(data, shape, signed=signed)
        target = get_backend(backend) if backend is not None else b or get_backend("numpy")
        given: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "offset": offset}
        given.update(scale_dtype=scale_dtype, tensor_scale=tensor_scale, granularity=granularity, dialect=dialect)
        given = {name: value for name, value in given.items() if value is not None}
        if len(found.leaves) == 1:
            stored = target.asarray(codes["codes"].astype(form.element.storage))
            return cls.from_codes(stored, given.pop("scale", None), dtype=form.name, float_dtype=float_dtype, **given)
        if given:
            raise ValueError(f"{next(iter(given))} is given, but the bytes of layout {found.name!r} say it themselves")
        for leaf in found.leaves:
            _check(leaf, codes[leaf.name], leaf.dtype or form.name, found)
        return _built(cls, "codes", found, codes, form.name, float_dtype, target)


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        found = tuple(int(n) for n in shape if int(n) == n)
    except (TypeError, ValueError):
        found = (-1,)
    if len(found) != len(tuple(shape) if isinstance(shape, tuple | list) else found) or any(n < 0 for n in found):
        raise ValueError(f"shape={shape!r}: give a tuple of lengths, 0 or more")
    return found


def _stored_as(layout: Any, dtype: Any) -> Layout:
    """The layout of given bytes, whose format the caller or the layout says."""
    known = LAYOUTS.get(layout) if isinstance(layout, str) else layout
    if isinstance(known, Layout) and known.dtype is not None and dtype is None:
        return known
    if dtype is None and isinstance(known, Layout | Family):
        raise ValueError(f"layout {known.name!r} does not say what its codes stand for: give dtype, a format's name")
    form = None if dtype is None else format_of(dtype)
    return layout_of(layout, "" if form is None else form.name, 0 if form is None else form.element.bits)


def _check(leaf: Leaf, codes: np.ndarray[Any, Any], dtype: str, layout: Layout) -> None:
    """ValueError where a code that was read stands for no finite number."""
    bad = unusable_codes(codes, element_type(dtype))
    if not bad.any():
        return
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    assert leaf.length is not None
    block = (*at[:-1], at[-1] // leaf.length)
    pattern = int(codes[at] + leaf.add) & ((1 << leaf.bits) - 1)
    raise ValueError(
        f"data has {int(bad.sum())} codes of {leaf.name} that stand for no finite number of {dtype}, the first in "
        f"block {block} of layout {layout.name!r}, stored as {pattern:#x}: it is damaged, or of another type"
    )


def _children(path: str, layout: Layout) -> dict[str, str]:
    """The leaves that are the scale and the offset of one, by what they are to it."""
    names = {leaf.name for leaf in layout.leaves}
    found = {}
    for name in ("scale", "offset"):
        child = name if path == "codes" else f"{path}.{name}"
        if child in names:
            found[name] = child
    return found


def _leaf(path: str, layout: Layout) -> Leaf:
    return next(leaf for leaf in layout.leaves if leaf.name == path)


def _built(
    cls: type[QArray], path: str, layout: Layout, codes: Any, dtype: str, float_dtype: Any, b: Backend
) -> QArray:
    """The array, or scales or offsets, of the codes of a leaf and of those that are its scale and offset."""
    storage = element_type(dtype).storage
    stored: Array = b.asarray(codes[path].astype(storage))
    mine, granularity = _leaf(path, layout), None
    parts: dict[str, Any] = {}
    for name, child in _children(path, layout).items():
        of_child = _leaf(child, layout)
        assert mine.length is not None
        assert of_child.length is not None
        assert of_child.dtype is not None
        parts[name] = _built(cls, child, layout, codes, of_child.dtype, float_type(float_dtype).compute, b)
        granularity = PerGroup(mine.length // of_child.length)
    scale = parts.pop("scale", None)
    return cls.from_codes(stored, scale, dtype=dtype, granularity=granularity, float_dtype=float_dtype, **parts)


def _codes_of(q: QArray) -> np.ndarray[Any, Any]:
    return np.asarray(q._backend.to_numpy(q.qvalue))


def _leaves_of(q: QArray, layout: Layout) -> dict[str, np.ndarray[Any, Any]]:
    """The codes of every leaf of an array whose parts are those of the layout; ValueError where they are not."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    if not q.shape:
        raise ValueError(f"layout {layout.name!r} runs along an axis: an array of shape () has none")
    layout.stored_shape(q.shape)
    _collect("codes", q, layout, found)
    return found


def _collect(path: str, q: QArray, layout: Layout, found: dict[str, np.ndarray[Any, Any]]) -> None:
    mine, children = _leaf(path, layout), _children(path, layout)
    what = "this array" if path == "codes" else f"its {path}"
    found[path] = _codes_of(q)
    for name in ("scale", "zero_point", "offset"):
        kept, child = getattr(q, name), children.get(name)
        if (kept is None) != (child is None):
            wanted, there = ("no", "has one") if child is None else ("a", "has none")
            raise ValueError(
                f"layout {layout.name!r} has {wanted} {name} there, and {what} {there}: quantize with the "
                "dialect of the library whose layout it is (dialect='gguf' for those of ggml)"
            )
        if child is None:
            continue
        of_child = _leaf(child, layout)
        assert mine.length is not None
        assert of_child.length is not None
        size = mine.length // of_child.length
        block = tuple(n if n is not None else length for n, length in zip(q.block, q.shape, strict=True))
        grid = (*q.shape[:-1], q.shape[-1] // size)
        kept_as = kept.dtype if hasattr(kept, "qvalue") else str(kept.dtype).rsplit(".", 1)[-1]
        if kept_as != of_child.dtype:
            how = f"with scale_dtype={of_child.dtype!r} or dtype={layout.dtype!r}, or " if name == "scale" else ""
            raise ValueError(
                f"layout {layout.name!r} keeps the {child} as {of_child.dtype}, and {what} has it as {kept_as}: "
                f"quantize {how}in the library's dialect"
            )
        if tuple(kept.shape) != grid or (grid[-1] > 1 and block[-1] != size):
            raise ValueError(
                f"layout {layout.name!r} has a {child} for every {size} along the last axis, and {what}, of shape "
                f"{q.shape}, has {q.granularity}: quantize with granularity=PerGroup({size})"
            )
        _collect(child, kept._checked(), layout, found)
