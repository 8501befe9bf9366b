"""Pictures of a quantization: matrices as heat maps, errors, and how the codes are used.

Owns: drawing. Imports: the container, the error report, and matplotlib, that one inside the calls only. Figures are
made without ``pyplot``: nothing global changes, no display is needed, and they are freed like any other object.
A notebook shows the figure that a call returns, after ``%matplotlib inline``; ``figure.savefig("name.png")`` writes it.
Arrays are read part by part and every value counts: one of 10^8 values takes seconds, and no more memory than a small
one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite._parts import Box, boxes, dequantized, memory_order, part_of_array, touched
from aqt_lite._registry import backend_of, get_backend
from aqt_lite._ways import not_a_qarray
from aqt_lite.elements import FLOAT_TYPES, INTEGER_TYPES, Integer
from aqt_lite.formats import element_type
from aqt_lite.granularity import grid_of
from aqt_lite.qarray import QArray
from aqt_lite.report import MOST_ELEMENTS, by_block, error_report
from aqt_lite.trees import TreeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_codes", "plot_error", "plot_matrix", "plot_quantization", "plot_report"]

_Numbers = np.ndarray[Any, Any]

_MOST_WRITTEN = 10
"""Matrices with at most this many rows and columns have their values written in the cells."""
_MOST_CELLS = 256
"""Longer axes are drawn in blocks: a screen has no more pixels to give, and would pick cells at random."""
_MOST_BARS = 256
"""Bars of a histogram of codes: one for each code of an 8-bit type."""
_MOST_LEAVES = 64
"""Leaves of a model that are drawn, the worst ones."""
_WIDEST = 1e307
"""Colour scales end here: matplotlib subtracts their ends, which must not overflow."""
_VALUES, _ERRORS = "viridis", "RdBu_r"
_MIDDLE, _END = "tab:blue", "tab:red"


@naming_the_argument
def plot_matrix(x: Any, title: str | None = None, *, ax: Axes | None = None, fmt: str | None = ".4g") -> Figure:
    """Draw a matrix as a heat map, with its values written in the cells where there is room.

    Parameters
    ----------
    x : array of any backend, nested list, or QArray
        Real numbers, at most 2-dimensional (a vector is drawn as one row). A QArray is drawn dequantized; pass
        ``q.qvalue`` to see its codes. Above 10 rows or columns the values are left out; above 256 each cell shows
        the mean of a block of values, and the axis labels say of how many.
    title : str, optional
    ax : matplotlib.axes.Axes, optional
        Draw here instead of in a new figure.
    fmt : str or None
        Format of floating-point values; None writes none. Integers are written whole.

    Returns
    -------
    matplotlib.figure.Figure
        The new figure, or the one that ``ax`` belongs to.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError
        ``x`` is no array of real numbers, or is being traced by a compiler and has no values yet.
    ValueError
        ``x`` is empty or has more than two dimensions.

    Examples
    --------
    >>> from aqt_lite.plots import plot_matrix
    >>> figure = plot_matrix([[191.6, -13.5], [92.14, 295.5]], "weights")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['191.6', '-13.5', '92.14', '295.5']
    """
    cells = _pooled(_matrix(x, "x"))
    if ax is not None:
        figure = ax.figure.figure  # of a subfigure, the whole
    else:
        figure, (ax,) = _panels(cells.shape, 1)
    _heat_map(ax, cells, title, fmt=fmt)
    return figure


@naming_the_argument
def plot_quantization(x: Any, q: QArray) -> Figure:
    """Draw original, codes, dequantized values and error side by side.

    Original and dequantized share one colour scale, the codes' spans every code of the type, and the error's is
    centred on zero. The heading has the error numbers of :func:`aqt_lite.error_report`, and how many values were
    clipped, not finite or missing where some were. What is missing in ``q`` is left white.

    Parameters
    ----------
    x : array of any backend, or nested list
        The array that was quantized, at most 2-dimensional.
    q : QArray
        Of the same shape; it may live on another backend.

    Returns
    -------
    matplotlib.figure.Figure
        With four heat maps.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        As :func:`plot_matrix` and :func:`aqt_lite.error_report`.

    Examples
    --------
    >>> import aqt_lite
    >>> from aqt_lite.plots import plot_quantization
    >>> x = [[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]]
    >>> figure = plot_quantization(x, aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0)))
    >>> [ax.get_title() for ax in figure.axes if ax.get_title()]
    ['original', 'codes (int8)', 'dequantized', 'error: original - dequantized']
    """
    original, values = _pair(x, q)
    report = error_report(x, q, worst=0)
    element = element_type(q.dtype)
    before, after = _pooled(original), _pooled(values)
    shared = _limits(np.stack([before.numbers, after.numbers]))
    figure, axes = _panels(before.shape, 4)
    _heat_map(axes[0], before, "original", limits=shared)
    _heat_map(axes[1], _pooled(_known(_matrix(q.qvalue, "q"), q)), f"codes ({q.dtype})", limits=element.codes)
    _heat_map(axes[2], after, "dequantized", limits=shared)
    _error_map(axes[3], original, values)
    counts = [("clipped", report.clipped), ("not finite", report.nonfinite), ("missing", report.missing)]
    figure.suptitle(
        f"{q.dtype}, {q.granularity}: SQNR {report.sqnr_db:.2f} dB, largest error {report.max_abs_error:.4g}, "
        f"{report.source_nbytes} -> {report.nbytes} bytes" + "".join(f", {n} {name}" for name, n in counts if n)
    )
    return figure


@naming_the_argument
def plot_error(x: Any, q: QArray) -> Figure:
    """Draw ``x`` minus its dequantized values, on a colour scale centred on zero.

    In an array of more than 256 rows or columns each cell shows the largest error of a block of values, so that
    outliers stay visible. Parameters and errors are those of :func:`plot_quantization`.

    Examples
    --------
    >>> import aqt_lite
    >>> from aqt_lite.plots import plot_error
    >>> figure = plot_error([[0.2, 1.0, -9.0]], aqt_lite.quantize([[0.2, 1.0, -9.0]], scale=0.5))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.2', '0', '0']
    """
    original, values = _pair(x, q)
    figure, (ax,) = _panels(original.shape, 1)
    _error_map(ax, original, values)
    return figure


@naming_the_argument
def plot_codes(q: QArray) -> Figure:
    """Draw how often each code occurs, over the type's whole range, with the two ends of the range marked.

    The ends hold the largest values and everything that was clipped to them. A range that is used in its middle only,
    or that piles up at the ends, shows a scale that is too large or too small. Missing values are left out, and
    counted in the title.

    Parameters
    ----------
    q : QArray
        Of any shape. 16-bit codes are counted in 256 bins of equal width.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError
        ``q`` is no QArray, or is being traced by a compiler and has no values yet.
    ValueError
        ``q`` is empty.

    Examples
    --------
    >>> import aqt_lite
    >>> from aqt_lite.plots import plot_codes
    >>> figure = plot_codes(aqt_lite.quantize([-90.0, -2.0, 0.0, 1.0, 90.0, 90.0], scale=0.5, on_clip="saturate"))
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['codes in between: 3 (50.0 %)', 'at the ends: 1 at -127, 2 at 127 (50.0 %)']
    """
    q = _quantized(q)
    if q.size == 0:
        raise ValueError(f"q has shape {q.shape} and so no codes to count: give one with at least one value")
    codes, counts = _counted(q)
    scale = _CodeScale(q, codes)
    at = scale.position(codes)
    low, high = scale.ends
    at_lowest, at_highest = int(counts[at <= low].sum()), int(counts[at >= high].sum())
    known = int(counts.sum())
    between = known - at_lowest - at_highest

    figure = _new_figure(8.0, 3.5)
    ax = figure.add_subplot()
    width = max(1, len(scale) // _MOST_BARS)
    edges = np.arange(0, len(scale) + 1, width) - 0.5
    heights, _ = np.histogram(at, bins=edges, weights=counts)
    bars = ax.bar(edges[:-1] + scale.first, heights, width=width, align="edge", color=_MIDDLE)
    for end in (low, high):
        bars[end // width].set_color(_END)
    shares = (between / max(known, 1), (at_lowest + at_highest) / max(known, 1))
    first, last = scale.name(low), scale.name(high)
    labels = [
        f"codes in between: {between} ({shares[0]:.1%})".replace("%", " %"),
        f"at the ends: {at_lowest} at {first}, {at_highest} at {last} ({shares[1]:.1%})".replace("%", " %"),
    ]
    ax.legend([bars[len(bars) // 2], bars[high // width]], labels, loc="upper center")
    ax.set_ylim(0, 1.35 * float(heights.max(initial=1)))  # room for the legend
    ax.set_xlim(float(edges[0]) + scale.first, float(edges[-1]) + scale.first)
    ax.set_xlabel(scale.label if width == 1 else f"{scale.label}, in bins of {width}")
    if not scale.is_even:
        ticks = np.unique(np.linspace(0, len(scale) - 1, min(len(scale), 17)).round().astype(int))
        ax.set_xticks(ticks, [scale.name(int(i)) for i in ticks], rotation=45 if len(ticks) > 9 else 0)
    ax.set_ylabel("how many")
    missing = f", {q.size - known} missing" if q.size > known else ""
    ax.set_title(f"codes of {q.shape} {q.dtype}, {q.granularity}{missing}")
    return figure


@naming_the_argument
def plot_report(report: TreeReport) -> Figure:
    """Draw the SQNR of each quantized leaf of a model, and its bytes before and after; the worst leaf is at the top.

    Of more than 64 leaves the worst 64 are drawn, and the title says so. A leaf without any error, whose SQNR is
    infinite, has the longest bar and its number; one of NaN has none.

    Parameters
    ----------
    report : TreeReport
        Of :func:`aqt_lite.tree_report`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError
        ``report`` is no TreeReport.
    ValueError
        It has no leaves.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> from aqt_lite.plots import plot_report
    >>> params = {"weight": np.linspace(-1, 1, 2048, dtype="float32").reshape(32, 64)}
    >>> figure = plot_report(aqt_lite.tree_report(params, aqt_lite.quantize_tree(params)))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['52.5']
    """
    if not isinstance(report, TreeReport):
        raise TypeError(f"report is a {type(report).__name__}: give what aqt_lite.tree_report returns")
    if not report.leaves:
        raise ValueError("report has no leaves: no QArray was in the tree")
    leaves, places = report.leaves[:_MOST_LEAVES], range(len(report.leaves[:_MOST_LEAVES]))
    figure = _new_figure(11.0, 1.4 + 0.22 * len(leaves))
    quality, size = figure.subplots(1, 2, sharey=True)
    found = np.asarray([leaf.error.sqnr_db for leaf in leaves])
    longest = float(np.abs(found[np.isfinite(found)]).max(initial=1.0))
    bars = quality.barh(places, np.nan_to_num(np.clip(found, -longest, longest)), color=_MIDDLE)
    quality.bar_label(bars, [f"{number:.1f}" for number in found], padding=3, fontsize=8)
    quality.margins(x=0.12)
    quality.set_yticks(places, [leaf.path for leaf in leaves], fontsize=8)
    quality.invert_yaxis()
    quality.set_xlabel("SQNR, dB")
    size.barh(places, [leaf.error.source_nbytes for leaf in leaves], color="lightgrey", label="before")
    size.barh(places, [leaf.error.nbytes for leaf in leaves], color=_MIDDLE, label="after")
    size.set_xlabel("bytes")
    size.legend(loc="lower right")
    ratio = f"{report.source_nbytes / max(report.nbytes, 1):.2f}x smaller"
    count = f"{len(leaves)} worst of {len(report.leaves)} leaves" if len(report.leaves) > len(leaves) else "leaves"
    figure.suptitle(f"quantized {count}: {report.source_nbytes} -> {report.nbytes} bytes ({ratio})")
    return figure


# ---- drawing


def _heat_map(
    ax: Axes,
    pooled: _Cells,
    title: str | None,
    *,
    limits: tuple[float, float] | None = None,
    fmt: str | None = ".4g",
    colours: str = _VALUES,
) -> None:
    cells, (high, wide) = pooled.numbers, pooled.size
    low, top = _limits(cells) if limits is None else limits
    low, top = max(low, -_WIDEST), min(top, _WIDEST)
    rows, columns = cells.shape
    edges = (-0.5, columns * wide - 0.5, rows * high - 0.5, -0.5)  # the axes count values, also where cells are blocks
    drawn = np.clip(cells, low, top)  # infinities take the colour of the end
    image = ax.imshow(drawn, cmap=colours, vmin=low, vmax=top, extent=edges)
    if not _is_squarish(pooled.shape):
        ax.set_aspect("auto")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    ax.set_title("" if title is None else title)
    if (high, wide) != (1, 1):
        ax.set_xlabel(f"each cell: {pooled.what} of {high} x {wide} values")
    if max(rows, columns) > _MOST_WRITTEN:
        ax.locator_params(integer=True, min_n_ticks=1)  # there is no row 0.5
        return
    ax.set_xticks(range(columns))
    ax.set_yticks(range(rows))
    if fmt is None:
        return
    whole = cells.dtype.kind in "iu"
    texts = [str(int(v)) if whole else format(float(v) + 0.0, fmt) for v in cells.ravel()]  # + 0.0: no negative zero
    inches = min(max(3.0 / columns, 0.5), 5.5 / rows)  # of a cell, in the figures made here
    size = min(9.0, 72 * inches / (0.65 * max(map(len, texts))))  # points, a letter being 0.65 of its size wide
    colour = image.to_rgba(drawn)
    for i, text in enumerate(texts):
        row, column = divmod(i, columns)
        luminance = float(colour[row, column, :3] @ (0.299, 0.587, 0.114))
        dark = luminance < 0.5 and not np.isnan(cells[row, column])  # a NaN leaves the cell white
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")


def _error_map(ax: Axes, original: _Matrix, values: _Matrix) -> None:
    def error(box: Box) -> _Numbers:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.subtract(original.read(box), values.read(box), dtype=np.float64)

    cells = _pooled(_Matrix(original.shape, error, original.order), keep_outliers=True)
    worst = float(np.abs(cells.numbers[np.isfinite(cells.numbers)]).max(initial=0.0)) or 1.0
    _heat_map(ax, cells, "error: original - dequantized", limits=(-worst, worst), fmt=".3g", colours=_ERRORS)


def _panels(shape: tuple[int, int], count: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels side by side, each shaped after the matrix."""
    rows, columns = shape
    width = max(4.2, 0.55 * columns + 1.0) if max(rows, columns) <= _MOST_WRITTEN else 4.2
    height = float(np.clip(width * rows / columns, 1.5, 6.0)) if _is_squarish(shape) else 3.4
    figure = _new_figure(width * count, height + 0.9)
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def _new_figure(width: float, height: float) -> Figure:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ImportError("aqt_lite.plots needs the package matplotlib: pip install 'aqt_lite[plot]'") from None
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def _is_squarish(shape: tuple[int, int]) -> bool:
    rows, columns = shape
    return bool(1 / 3 <= rows / columns <= 3) or max(rows, columns) <= _MOST_WRITTEN


# ---- numbers


@dataclass(frozen=True)
class _Matrix:
    """A matrix that is read in parts."""

    shape: tuple[int, int]
    read: Callable[[Box], _Numbers]
    """A part as float64 or, of a matrix of integers, as int64."""
    order: Sequence[int] = (0, 1)
    """Axes, the one with the longest steps in memory first."""


@dataclass(frozen=True)
class _Cells:
    """What a heat map shows: the values of a matrix, or a number for each block of them."""

    numbers: _Numbers
    shape: tuple[int, int]
    """Of the matrix."""
    size: tuple[int, int]
    """Rows and columns that a cell stands for."""
    what: str
    """What a cell is of the values that it stands for."""


def _matrix(x: Any, argument: str) -> _Matrix:
    """An array of at most two dimensions, a list or a QArray, whose values are read when they are needed."""
    if isinstance(x, QArray):
        q = _quantized(x, argument)
        shape, order = q.shape, memory_order(q.storage) if q.ndim == 2 and not q.transposed else (0, 1)

        def read(box: Box) -> _Numbers:
            return dequantized(q, box).astype(np.float64)
    else:
        array = _array(x, argument)
        b = backend_of(array) or get_backend("numpy")
        shape, order = tuple(array.shape), memory_order(array) if array.ndim == 2 else (0, 1)
        dtype = np.int64 if _is_whole_numbers(b.dtype_name(array)) else np.float64

        def read(box: Box) -> _Numbers:
            return np.asarray(b.to_numpy(part_of_array(array, box))).astype(dtype)

    if len(shape) > 2:
        flat = (math.prod(shape[:-1]), shape[-1])
        raise ValueError(
            f"{argument} has shape {shape}, but a heat map shows a matrix: choose one with an index, for instance "
            f"{argument}[{', '.join('0' * (len(shape) - 2))}] of shape {shape[-2:]}, or reshape it to {flat}"
        )
    if 0 in shape:
        raise ValueError(f"{argument} has shape {shape} and so nothing to draw: give at least one value")
    rows, columns = (1, 1, *shape)[-2:]
    return _Matrix((rows, columns), lambda box: np.atleast_2d(read(box[2 - len(shape) :])), order)


def _array(x: Any, argument: str) -> Array:
    """``x`` as an array of real numbers."""
    b = backend_of(x)
    if b is not None:
        if b.is_traced(x):
            raise TypeError(f"{argument} is being traced and has no values yet: draw it outside the compiled function")
        problem = b.why_unusable(x)
        if problem:
            raise TypeError(f"{argument} {problem}")
        name = b.dtype_name(x)
    elif not isinstance(x, int | float | list | tuple):
        raise TypeError(
            refusal(x, argument)
            or f"{argument} is a {type(x).__name__}: give an array of NumPy, JAX, torch or another library, or a list"
        )
    else:
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise TypeError(f"{argument} is a list that is no array: {error}") from None
        name = x.dtype.name
    is_real = isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "biuf"
    if not is_real and name not in FLOAT_TYPES and not _is_whole_numbers(name):
        raise TypeError(f"{argument} has dtype {name}: give real numbers")
    return x


def _is_whole_numbers(dtype: str) -> bool:
    return dtype in ("bool", *INTEGER_TYPES)


def _quantized(q: Any, argument: str = "q") -> QArray:
    if not isinstance(q, QArray):
        raise TypeError(not_a_qarray(argument, q))
    if q._backend.is_traced(q.storage):
        raise TypeError(f"{argument} is being traced and has no values yet: draw it outside the compiled function")
    return q


def _pair(x: Any, q: QArray) -> tuple[_Matrix, _Matrix]:
    """Original and dequantized values as matrices of one shape."""
    q = _quantized(q)
    if isinstance(x, QArray):
        raise TypeError("x is a QArray: give the array that was quantized")
    original = _matrix(x, "x")
    given = tuple(np.shape(x)) if backend_of(x) is None else tuple(x.shape)
    if given != q.shape:
        raise ValueError(f"x has shape {given} but q {q.shape}: give the array that was quantized")
    return _known(original, q), _matrix(q, "q")


def _known(matrix: _Matrix, q: QArray) -> _Matrix:
    """``matrix`` with NaN where ``q`` says that a value is missing."""
    if q.mask is None:
        return matrix
    mask = _matrix(q.mask, "q")

    def read(box: Box) -> _Numbers:
        return np.where(mask.read(box) != 0, np.nan, matrix.read(box))

    return _Matrix(matrix.shape, read, matrix.order)


def _limits(values: _Numbers) -> tuple[float, float]:
    """Smallest and largest finite value, a little apart where they are equal."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, top = float(finite.min()), float(finite.max())
    apart = 0.0 if low < top else max(abs(low), 1.0) / 2
    return low - apart, top + apart


def _pooled(matrix: _Matrix, keep_outliers: bool = False) -> _Cells:
    """At most 256 x 256 cells, each a block's mean or, to keep outliers, its value of largest magnitude."""
    shape = matrix.shape
    what = "largest magnitude" if keep_outliers else "mean"
    size = (-(-shape[0] // _MOST_CELLS), -(-shape[1] // _MOST_CELLS))
    if size == (1, 1):
        return _Cells(matrix.read(((0, shape[0]), (0, shape[1]))), shape, size, what)
    grid = grid_of(shape, size)
    most = math.prod(size)
    mean, low, top = np.zeros(grid), np.full(grid, math.inf), np.full(grid, -math.inf)
    with np.errstate(invalid="ignore"):
        for box in boxes(shape, MOST_ELEMENTS, matrix.order, size):
            part, at = matrix.read(box), touched(box, size)
            if keep_outliers:
                low[at] = np.minimum(low[at], by_block(np.minimum, part, size))
                top[at] = np.maximum(top[at], by_block(np.maximum, part, size))
            else:
                mean[at] += by_block(np.add, part / most, size)  # divided first: cannot overflow
    if keep_outliers:
        return _Cells(np.where(np.abs(low) > np.abs(top), low, top), shape, size, what)
    rows, columns = (
        np.minimum(length - np.arange(number) * step, step)
        for length, number, step in zip(shape, grid, size, strict=True)
    )
    return _Cells(mean * (most / (rows[:, None] * columns)), shape, size, what)  # the last ones may be smaller


def _counted(q: QArray) -> tuple[_Numbers, _Numbers]:
    """The codes that occur, in order, and how often each does."""
    codes, b = q.qvalue, q._backend
    first = element_type(q.dtype).codes[0]
    counts = np.zeros(0, np.int64)
    for box in boxes(q.shape, MOST_ELEMENTS, memory_order(codes)):
        part = np.asarray(b.to_numpy(part_of_array(codes, box))).astype(np.int64)
        more = np.bincount(part.ravel() - first, minlength=counts.size)
        more[: counts.size] += counts
        counts = more
    there, missing = np.flatnonzero(counts), element_type(q.dtype).missing
    if missing is not None:
        there = there[there != missing - first]
    return there + first, counts[there]


class _CodeScale:
    """Where codes stand on an axis: integers at their value, other codes in the order of the numbers they stand for."""

    def __init__(self, q: QArray, codes: _Numbers) -> None:
        element = element_type(q.dtype)
        self.is_even = isinstance(element, Integer)
        low, high = element.codes
        if self.is_even:
            self.first, self.numbers, self.label = low, np.arange(low, high + 1), "code"
            self.ends = self._ends(q, codes)
            return
        b = get_backend("numpy")
        table = np.asarray(element.decode(np.arange(low, high + 1).astype(element.storage), b), dtype=np.float64)
        self.first, self.numbers, self.label = 0, np.unique(table[np.isfinite(table)]), "number of the code, in order"
        self.of_code = np.searchsorted(self.numbers, table)
        self.ends = 0, len(self) - 1

    def __len__(self) -> int:
        return len(self.numbers)

    def position(self, codes: _Numbers) -> _Numbers:
        """Where each of these codes stands, counted from 0."""
        return codes - self.first if self.is_even else np.asarray(self.of_code[codes])

    def name(self, position: int) -> str:
        """What stands there, in digits."""
        return f"{self.numbers[position]:.4g}" if not self.is_even else str(self.numbers[position])

    def _ends(self, q: QArray, codes: _Numbers) -> tuple[int, int]:
        """Where clipping leads. A symmetric type's range leaves one code out, unless that code is there."""
        element = element_type(q.dtype)
        assert isinstance(element, Integer)
        lowest, highest = element.code_range(symmetric=True)
        zero = np.zeros(1) if q.zero_point is None else q._backend.to_numpy(q.zero_point)
        if q.offset is not None or not ((zero == element.middle).all() and (codes >= lowest).all()):
            lowest = element.zero_codes[0]
        return lowest - self.first, highest - self.first
