"""Dask's kernels: every chunk by NumPy's own, one task a chunk and step, where the operations would be hundreds.

Owns: the table, and how arrays are cut so that no block of the contract crosses a chunk. Imports: ``affine``, packing,
BitRound, the registry; dask alone through the arrays that it is given. The adapter is in ``_generic``, with those of
the other libraries that need little more than the standard.

What is computed for a chunk is the contract on that part of the array, with scales chosen from all of it: statistics of
blocks that span chunks are left to the operations themselves, which reduce across them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from aqt_lite import _clipping, _given, affine, packing, significant
from aqt_lite._dispatch import run
from aqt_lite._kernels import Kernel, Kernels, anything
from aqt_lite._namespace import Array
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec
from aqt_lite.granularity import Block, grid_of

__all__ = ["KERNELS"]

_Chunks = tuple[tuple[int, ...], ...]


def _quantize(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    if not _is_cut(x):
        return NotImplemented
    if not _in_chunks(recipe) or _needs_all(spec, recipe):
        return affine.quantize(_without_empty(x), key, spec=spec, recipe=recipe, b=_adapter_of(x))
    x = _aligned(_whole_blocks(x, spec, recipe), spec.block)
    if recipe.dialect.together is not None:
        dtype = spec.element.storage
        work = partial(_codes_with_scales_of_chunk, spec=spec, recipe=recipe)
        codes = x.map_blocks(work, chunks=x.chunks, dtype=dtype, meta=np.empty((0,) * x.ndim, dtype))
        return _choose_qparams(x, spec=spec, recipe=recipe).beside(codes)
    return _with_codes(x, _choose_qparams(x, spec=spec, recipe=recipe), spec, recipe)


def _quantize_with(x: Array, given: QParams, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    if not _is_cut(x):
        return NotImplemented
    b = _adapter_of(x)
    if not _in_chunks(recipe):
        return _given.quantize_with(_without_empty(x), given, key, spec=spec, recipe=recipe, b=b)
    x = _aligned(x, spec.block)
    return _with_codes(x, _given.usable_qparams(x, given, spec=spec, recipe=recipe, b=b), spec, recipe)


def _fake_quantize(
    x: Array, given: QParams | None = None, key: Array | None = None, *, spec: Spec, recipe: Recipe
) -> Any:
    if given is None:
        w = _quantize(x, key, spec=spec, recipe=recipe)
    else:
        w = _quantize_with(x, QParams(*given), key, spec=spec, recipe=recipe)
    if w is NotImplemented:
        return w
    return _dequantize(w, spec=spec), affine.scales(w.scale, spec, _adapter_of(x))


def _clipped(x: Array, qparams: QParams | None, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """By the operations, which find no largest value in a chunk of length 0."""
    return _clipping.clipped(_without_empty(x), qparams, key, spec=spec, recipe=recipe, b=_adapter_of(x))


def _choose_qparams(x: Array, *, spec: Spec, recipe: Recipe) -> Any:
    if not _is_cut(x):
        return NotImplemented
    if not spec.format.scaled:
        return QParams(None)
    kept, x = spec.format.scale, _whole_blocks(_without_empty(x), spec, recipe)
    spans = any(size is None and len(chunks) > 1 for size, chunks in zip(spec.block, x.chunks, strict=True))
    if not _in_chunks(recipe) or spans or (kept is not None and kept.scaled):
        return affine.choose_qparams(x, spec=spec, recipe=recipe, b=_adapter_of(x))
    x = _aligned(x, spec.block)
    # What the arrays are is asked of a chunk with one element. Each is then computed by itself, from the same chunk.
    example = run(_numpy(), affine.choose_qparams, np.zeros((1,) * x.ndim, x.dtype), spec=spec, recipe=recipe)
    chunks = _grid_chunks(x.chunks, spec.block)
    found = (
        x.map_blocks(
            partial(_qparams_of_chunk, leaf=i, spec=spec, recipe=recipe),
            chunks=chunks,
            dtype=leaf.dtype,
            meta=np.empty((0,) * x.ndim, leaf.dtype),
        )
        for i, leaf in enumerate(_leaves(example))
    )
    return _rebuilt(example, found)


def _dequantize(w: Coded, *, spec: Spec, out: str | None = None) -> Any:
    codes = w.codes
    if not codes.ndim or 0 in codes.shape:
        return NotImplemented
    codes = _aligned(codes, spec.block)
    qparams = QParams(*w[1:])
    leaves = _leaves_beside(codes, qparams, spec.block)
    if leaves is None:
        return NotImplemented
    source = spec.source
    dtype = np.dtype(_numpy().dtype(out or source.name))
    work = partial(_values_of_chunk, form=_form(qparams), spec=spec, out=out)
    return codes.map_blocks(work, *leaves, chunks=codes.chunks, dtype=dtype, meta=np.empty((0,) * codes.ndim, dtype))


def _pack(codes: Array, *, bits: int) -> Any:
    if not codes.ndim:
        return NotImplemented
    if 0 in codes.shape:  # there is nothing to cut
        return _adapter_of(codes).xp.zeros((*codes.shape[:-1], packing.bytes_of(codes.shape[-1], bits)), dtype=np.uint8)
    codes = _aligned(codes, (*(1,) * (codes.ndim - 1), 8))  # eight codes end with a whole byte
    chunks = (*codes.chunks[:-1], tuple(packing.bytes_of(n, bits) for n in codes.chunks[-1]))
    meta = np.empty((0,) * codes.ndim, np.uint8)
    return codes.map_blocks(partial(_packed_chunk, bits=bits), chunks=chunks, dtype=np.uint8, meta=meta)


def _unpack(stream: Array, *, bits: int, length: int, signed: bool) -> Any:
    if not stream.ndim:
        return NotImplemented
    dtype = np.dtype(packing.type_of_codes(bits, signed))
    if 0 in stream.shape:
        return _adapter_of(stream).xp.zeros((*stream.shape[:-1], length), dtype=dtype)
    stream = _aligned(stream, (*(1,) * (stream.ndim - 1), bits))
    ends = np.minimum(np.cumsum(stream.chunks[-1]) * 8 // bits, length)
    chunks = (*stream.chunks[:-1], tuple(np.diff(ends, prepend=0).tolist()))
    work = partial(_unpacked_chunk, bits=bits, length=length, signed=signed)
    return stream.map_blocks(work, chunks=chunks, dtype=dtype, meta=np.empty((0,) * stream.ndim, dtype))


def _bitrounded(x: Array, *, keepbits: int) -> Any:
    return x.map_blocks(partial(_rounded_chunk, keepbits=keepbits), dtype=x.dtype, meta=x._meta)


KERNELS: Kernels = {
    affine.quantize: Kernel(_quantize, anything),
    _given.quantize_with: Kernel(_quantize_with, anything),
    _given.fake_quantize: Kernel(_fake_quantize, anything),
    _clipping.clipped: Kernel(_clipped, anything),
    affine.choose_qparams: Kernel(_choose_qparams, anything),
    affine.dequantize: Kernel(_dequantize, anything),
    packing.pack: Kernel(_pack, anything),
    packing.unpack: Kernel(_unpack, anything),
    significant.bitrounded: Kernel(_bitrounded, anything),
}


# ---- one chunk, on NumPy


def _numpy() -> Any:
    return get_backend("numpy")


def _qparams_of_chunk(x: Array, leaf: int, spec: Spec, recipe: Recipe) -> Array:
    found = run(_numpy(), affine.choose_qparams, x, spec=spec, recipe=recipe)
    return list(_leaves(found))[leaf]


def _codes_of_chunk(x: Array, *leaves: Array, form: Any, spec: Spec, recipe: Recipe) -> Array:
    return affine.encode(x, _rebuilt(form, iter(leaves)), spec=spec, recipe=recipe, b=_numpy())


def _codes_with_scales_of_chunk(x: Array, spec: Spec, recipe: Recipe) -> Array:
    return run(_numpy(), affine.quantize, x, spec=spec, recipe=recipe).codes


def _values_of_chunk(codes: Array, *leaves: Array, form: Any, spec: Spec, out: str | None) -> Array:
    return run(_numpy(), affine.dequantize, Coded(codes, *_rebuilt(form, iter(leaves))[:3]), spec=spec, out=out)


def _packed_chunk(codes: Array, bits: int) -> Array:
    return run(_numpy(), packing.pack, codes, bits=bits)


def _rounded_chunk(x: Array, keepbits: int) -> Array:
    return run(_numpy(), significant.bitrounded, x, keepbits=keepbits)


def _unpacked_chunk(stream: Array, bits: int, length: int, signed: bool, block_info: Any = None) -> Array:
    """The codes of a chunk; Dask fills in ``block_info`` by its name."""
    start = block_info[0]["array-location"][-1][0] * 8 // bits
    here = min(stream.shape[-1] * 8 // bits, length - start)
    return run(_numpy(), packing.unpack, stream, bits=bits, length=here, signed=signed)


# ---- chunks


def _is_cut(x: Array) -> bool:
    """Whether there are chunks with something in them."""
    return bool(x.ndim) and 0 not in x.shape


def _in_chunks(recipe: Recipe) -> bool:
    """Whether chunks can be rounded by themselves. Noise is drawn by the position in the whole array."""
    return recipe.rounding != "stochastic"


def _whole_blocks(x: Array, spec: Spec, recipe: Recipe) -> Array:
    """``x`` in chunks that hold whole blocks, where a dialect makes codes and scales together.

    Such a rule sees more of a block than its scale: blocks do not span chunks, however large they are.
    """
    if recipe.dialect.together is None:
        return x
    return x.rechunk({axis: -1 for axis, size in enumerate(spec.block) if size is None})


def _needs_all(spec: Spec, recipe: Recipe) -> bool:
    """Whether a dialect makes codes and scales together, by what it finds in the whole array."""
    kept = spec.format.scale
    return recipe.dialect.together is not None and kept is not None and kept.scaled


def _without_empty(x: Array) -> Array:
    """``x`` without chunks of length 0, of which the operations can find no largest value."""
    return _aligned(x, (1,) * x.ndim)


def _adapter_of(x: Array) -> Any:
    b = backend_of(x)
    assert b is not None
    return b


def _with_codes(x: Array, qparams: QParams, spec: Spec, recipe: Recipe) -> Any:
    leaves = _leaves_beside(x, qparams, spec.block)
    if leaves is None:
        return qparams.beside(affine.encode(x, qparams, spec=spec, recipe=recipe, b=_adapter_of(x)))
    dtype = affine.encode(
        np.zeros((1,) * x.ndim, x.dtype),
        _rebuilt(qparams, (np.ones((1,) * leaf.ndim, leaf.dtype) for leaf in _leaves(qparams))),
        spec=spec,
        recipe=recipe,
        b=_numpy(),
    ).dtype
    work = partial(_codes_of_chunk, form=_form(qparams), spec=spec, recipe=recipe)
    codes = x.map_blocks(work, *leaves, chunks=x.chunks, dtype=dtype, meta=np.empty((0,) * x.ndim, dtype))
    return qparams.beside(codes)


def _aligned(x: Array, block: Block) -> Array:
    """``x`` in chunks that end where blocks do, each as near to what it was as that allows."""
    wanted = []
    for length, size, chunks in zip(x.shape, block, x.chunks, strict=True):
        step = size or 1
        ends = np.minimum(-(-np.cumsum(chunks) // step) * step, length)
        wanted.append(tuple(n for n in np.diff(ends, prepend=0).tolist() if n))
    return x if tuple(wanted) == x.chunks else x.rechunk(tuple(wanted))


def _grid_chunks(chunks: _Chunks, block: Block) -> _Chunks:
    """Blocks in each chunk of an array. Along an axis that all of a block takes, one, for all chunks."""
    return tuple(
        (1,) if size is None else tuple(-(-n // size) for n in lengths)
        for size, lengths in zip(block, chunks, strict=True)
    )


def _leaves_beside(x: Array, qparams: QParams, block: Block) -> list[Array] | None:
    """The arrays of ``qparams``, each chunk beside that of ``x`` which it belongs to; None where that cannot be."""
    grid, chunks = grid_of(tuple(x.shape), block), _grid_chunks(x.chunks, block)
    found = []
    for leaf in _leaves(qparams):
        if tuple(leaf.shape) == grid:
            found.append(leaf.rechunk(chunks))
        elif set(leaf.shape) == {1}:
            found.append(leaf)
        else:  # groups of scales that are quantized themselves
            return None
    return found


# ---- trees of arrays


def _leaves(tree: Any) -> Iterator[Array]:
    if isinstance(tree, tuple):
        for part in tree:
            yield from _leaves(part)
    elif tree is not None:
        yield tree


def _rebuilt(form: Any, leaves: Iterator[Array]) -> Any:
    """A tree like ``form``, of these leaves."""
    if isinstance(form, tuple):
        return type(form)(*(_rebuilt(part, leaves) for part in form))
    return None if form is None else next(leaves)


def _form(tree: Any) -> Any:
    """The tree with True in place of arrays, which a task may hold."""
    if isinstance(tree, tuple):
        return type(tree)(*map(_form, tree))
    return None if tree is None else True
