"""Pictures are tested by what they show: texts, image data, colour limits, bars."""

from __future__ import annotations

import builtins
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import aqt_lite
import aqt_lite.plots
from aqt_lite.plots import plot_codes, plot_error, plot_matrix, plot_quantization, plot_report

X = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], "float32")


def panels(figure):
    """The axes that show something, without colour bars."""
    return [ax for ax in figure.axes if ax.images or ax.patches]


def shown(ax):
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def rendered(figure):
    """The figure as pixels: everything in it can be drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


# ---- what a program pays


@pytest.mark.parametrize("module", ["aqt_lite", "aqt_lite.plots"])
def test_import_does_not_import_matplotlib(module):
    code = f"import sys, {module}; assert not [m for m in sys.modules if m.split('.')[0] == 'matplotlib']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_does_not_import_pyplot():
    code = (
        "import sys, aqt_lite, aqt_lite.plots as p; x = [[1.0, 2.0]]; q = aqt_lite.quantize(x);"
        "p.plot_matrix(x), p.plot_quantization(x, q), p.plot_error(x, q), p.plot_codes(q);"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'aqt_lite\[plot\]'"):
        plot_matrix(X)


# ---- plot_matrix


def test_matrix_of_every_backend(backend):
    figure = plot_matrix(backend.asarray(X), "weights")
    (ax,) = panels(figure)
    assert ax.get_title() == "weights"
    assert texts(ax) == ["191.6", "-13.5", "728.6", "92.14", "295.5", "-184", "0", "684.6", "245.5"]
    np.testing.assert_array_equal(shown(ax), X.astype(float))
    assert ax.images[0].get_clim() == (-184, float(X.max()))
    assert rendered(figure).std() > 10


def test_qarray_of_every_backend_is_drawn_dequantized(backend):
    q = aqt_lite.quantize(backend.asarray(X))
    (ax,) = panels(plot_matrix(q))
    np.testing.assert_array_equal(shown(ax), np.asarray(q.dequantize()).astype(float))
    (ax,) = panels(plot_matrix(q.qvalue))
    assert texts(ax) == [str(code) for code in backend.to_numpy(q.qvalue).ravel()]


def test_bfloat16():
    import ml_dtypes

    assert texts(panels(plot_matrix(X.astype(ml_dtypes.bfloat16)[:1]))[0]) == ["192", "-13.5", "728"]


def test_texts_sit_on_their_cells_and_can_be_read():
    (ax,) = panels(plot_matrix([[0.0, 1.0], [2.0, 3.0]]))
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [
        ("0", (0, 0)),
        ("1", (1, 0)),
        ("2", (0, 1)),
        ("3", (1, 1)),
    ]
    assert ax.texts[0].get_color() == "white"  # on dark purple
    assert ax.texts[3].get_color() == "black"  # on yellow


@pytest.mark.exhaustive_unless(shape=[(6, 6), (1, 10)])
@pytest.mark.parametrize("shape", [(3, 3), (6, 6), (10, 10), (1, 10), (10, 1)])
def test_texts_fit_into_their_cells(shape):
    x = -1e-4 * np.random.default_rng(0).uniform(1, 9, shape)
    figure = plot_quantization(x, aqt_lite.quantize(x))
    rendered(figure)
    for ax in panels(figure):
        width = ax.get_window_extent().width / shape[1]
        assert max(text.get_window_extent().width for text in ax.texts) < width


def test_fmt():
    assert texts(panels(plot_matrix([[0.126, 2.0]], fmt=".2f"))[0]) == ["0.13", "2.00"]
    assert texts(panels(plot_matrix([[0.126, 2.0]], fmt=None))[0]) == []
    assert texts(panels(plot_matrix(np.asarray([[32767]], "int16")))[0]) == ["32767"]


@pytest.mark.parametrize(("x", "shape"), [(3.0, (1, 1)), ([1.0, 2.0], (1, 2)), ([[1.0], [2.0]], (2, 1))])
def test_fewer_dimensions(x, shape):
    assert shown(panels(plot_matrix(x))[0]).shape == shape


def test_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    _, sub = figure.subfigures(1, 2)
    ax = sub.add_subplot()
    assert plot_matrix(X, ax=ax) is figure
    assert len(ax.images) == 1


def test_the_whole_range_of_float64():
    rendered(plot_matrix([[0.0]]))
    figure = plot_matrix(np.asarray([[1.7e308, -1.7e308]]))
    assert texts(panels(figure)[0]) == ["1.7e+308", "-1.7e+308"]
    rendered(figure)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_abnormal_values_are_written_and_leave_the_scale_finite(value):
    figure = plot_matrix(np.asarray([[value, 1.0], [2.0, 3.0]], "float32"))
    (ax,) = panels(figure)
    assert texts(ax)[0] == format(float(np.float32(value)), ".4g")
    assert np.isfinite(ax.images[0].get_clim()).all()
    rendered(figure)


@pytest.mark.parametrize("x", [np.full((2, 2), np.nan), np.zeros((2, 2)), np.full((2, 2), 7.0), np.full((2, 2), -1e30)])
def test_constant_matrices(x):
    figure = plot_matrix(x)
    low, high = panels(figure)[0].images[0].get_clim()
    assert low < high
    rendered(figure)


def test_values_are_written_up_to_10_rows_and_columns():
    assert len(texts(panels(plot_matrix(np.ones((10, 10))))[0])) == 100
    (ax,) = panels(plot_matrix(np.ones((11, 2))))
    assert texts(ax) == []
    assert ax.get_xlabel() == ""


def test_large_matrices_show_means_of_blocks():
    x = np.arange(600 * 300, dtype="float64").reshape(600, 300)
    (ax,) = panels(plot_matrix(x))
    image = shown(ax)
    assert image.shape == (200, 150)
    np.testing.assert_allclose(image[7, 5], x[21:24, 10:12].mean())
    assert ax.get_xlabel() == "each cell: mean of 3 x 2 values"
    assert ax.get_xlim() == (-0.5, 299.5)
    assert ax.get_ylim() == (599.5, -0.5)


@pytest.mark.exhaustive_where(most=50, shape=(600, 300))  # one part a cell: seconds
@pytest.mark.exhaustive_where(order="F", shape=(600, 300))
@pytest.mark.exhaustive_where(most=50, order="F")
@pytest.mark.exhaustive_where(most=50, shape=(1, 100_001))
@pytest.mark.exhaustive_where(order="F", shape=(1, 100_001))
@pytest.mark.parametrize("most", [50, 3000])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("shape", "cell"), [((5, 700), (1, 3)), ((600, 300), (3, 2)), ((1, 100_001), (1, 391))])
def test_large_matrices_are_read_in_parts(monkeypatch, shape, cell, order, most):
    monkeypatch.setattr(aqt_lite.plots, "MOST_ELEMENTS", most)
    x = np.asarray(np.random.default_rng(1).standard_normal(shape), "float32", order=order)
    starts = [np.arange(0, length, step) for length, step in zip(shape, cell, strict=True)]
    blocks = [x[i : i + cell[0], j : j + cell[1]] for i, j in itertools.product(*starts)]
    for q in (aqt_lite.quantize(x, granularity=aqt_lite.PerGroup(7)), aqt_lite.quantize(x, granularity=BLOCKS)):
        values = np.asarray(q.dequantize())
        expected = {
            "original": [block.mean(dtype="float64") for block in blocks],
            "dequantized": [values[i : i + cell[0], j : j + cell[1]].mean() for i, j in itertools.product(*starts)],
        }
        for ax in panels(plot_quantization(x, q)):
            if ax.get_title() in expected:
                np.testing.assert_allclose(shown(ax).ravel(), expected[ax.get_title()], rtol=1e-4, atol=1e-6)
        error = x.astype("float64") - values
        worst = [error[i : i + cell[0], j : j + cell[1]].ravel() for i, j in itertools.product(*starts)]
        np.testing.assert_array_equal(
            np.abs(shown(panels(plot_error(x, q))[0])).ravel(), [np.abs(block).max() for block in worst]
        )
        codes, counts = np.unique(q.qvalue, return_counts=True)
        heights = {round(bar.get_x() + 0.5): bar.get_height() for bar in panels(plot_codes(q))[0].patches}
        assert {code: n for code, n in heights.items() if n} == dict(zip(codes.tolist(), counts.tolist(), strict=True))


BLOCKS = aqt_lite.PerBlock((4, 411))  # no multiple of a cell, and larger than a part


def test_memory_does_not_grow_with_the_array():
    x = np.resize(np.random.default_rng(4).standard_normal(99991).astype("float32"), (1 << 12, 1 << 12))
    q = aqt_lite.quantize(x, granularity=aqt_lite.PerGroup(64))
    calls = (lambda: plot_matrix(x), lambda: plot_matrix(q), lambda: plot_quantization(x, q), lambda: plot_codes(q))
    calls[2]()  # matplotlib is imported
    for call in (*calls, lambda: plot_error(x, q)):
        tracemalloc.start()
        try:
            call()
            assert tracemalloc.get_traced_memory()[1] < 16e6 < x.nbytes / 4
        finally:
            tracemalloc.stop()


def test_rows_are_counted_in_whole_numbers():
    figure = plot_matrix(np.zeros((1, 3000)))
    rendered(figure)
    (ax,) = panels(figure)
    assert [tick for tick in ax.get_yticks() if -0.5 <= tick <= 0.5] == [0]
    assert all(tick == int(tick) for tick in ax.get_xticks())


def test_an_infinite_error_can_be_read():
    x = np.asarray([[np.inf, np.nan, 1.0, -300.0]], "float32")
    (ax,) = panels(plot_error(x, aqt_lite.quantize(x, scale=1.0, nonfinite="ignore", on_clip="saturate")))
    assert texts(ax)[:2] == ["inf", "nan"]
    assert [text.get_color() for text in ax.texts[:2]] == ["white", "black"]  # on dark red, on an empty cell


@pytest.mark.parametrize("times", [1, 1_000_000])
def test_the_legend_stays_inside_and_off_the_bars(times):
    q = aqt_lite.quantize(np.arange(-40.0, 41.0), scale=1.0)
    figure = plot_codes(q if times == 1 else aqt_lite.quantize(np.zeros(20 * times, "float32"), scale=1.0))
    rendered(figure)
    (ax,) = panels(figure)
    legend, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert frame.x0 < legend.x0 < legend.x1 < frame.x1
    assert max(bar.get_window_extent().y1 for bar in ax.patches) < legend.y0


def test_large_matrices_have_a_shorter_last_block():
    x = np.zeros((257, 1))
    x[256] = 5.0
    image = shown(panels(plot_matrix(x))[0])
    assert image.shape == (129, 1)
    assert image[-1, 0] == 5.0


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 3, 4)), ValueError, r"x has shape \(2, 3, 4\).*x\[0\] of shape \(3, 4\).*reshape it to \(6, 4\)"),
        (np.zeros((0, 3)), ValueError, r"x has shape \(0, 3\)"),
        (np.zeros((2, 2), complex), TypeError, "x has dtype complex128: give real numbers"),
        ([["a"]], TypeError, "x has dtype str"),
        ([[1.0], [2.0, 3.0]], TypeError, "x is a list that is no array"),
        ("abc", TypeError, "x is a str"),
        (np.ma.masked_array([[1.0]]), TypeError, "x "),
    ],
)
def test_what_cannot_be_drawn(x, error, message):
    with pytest.raises(error, match=message):
        plot_matrix(x)


def test_traced_values_cannot_be_drawn():
    import jax

    with pytest.raises(TypeError, match="x is being traced"):
        jax.jit(plot_matrix)(X)
    with pytest.raises(TypeError, match="q is being traced"):
        jax.jit(plot_codes)(aqt_lite.quantize(X, backend="jax"))


# ---- plot_quantization and plot_error


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_four_panels_on_every_backend(backend, scheme):
    q = aqt_lite.quantize(backend.asarray(X), scheme=scheme)
    original, codes, dequantized, error = panels(plot_quantization(X, q))
    titles = [ax.get_title() for ax in (original, codes, dequantized, error)]
    assert titles == ["original", "codes (int8)", "dequantized", "error: original - dequantized"]
    np.testing.assert_array_equal(shown(original), X.astype(float))
    np.testing.assert_array_equal(shown(codes), backend.to_numpy(q.qvalue))
    np.testing.assert_array_equal(shown(dequantized), np.asarray(q.dequantize()).astype(float))
    np.testing.assert_array_equal(shown(error), X.astype(float) - np.asarray(q.dequantize()).astype(float))
    assert codes.images[0].get_clim() == (-128, 127)
    assert original.images[0].get_clim() == dequantized.images[0].get_clim()
    low, high = error.images[0].get_clim()
    assert -low == high == np.abs(shown(error)).max()


def test_heading_has_the_error_numbers():
    figure = plot_quantization(X, aqt_lite.quantize(X, granularity=aqt_lite.PerChannel(0)))
    assert figure.get_suptitle() == "int8, PerChannel(axis=0): SQNR 48.77 dB, largest error 2.465, 36 -> 21 bytes"
    assert rendered(figure).std() > 10


def test_heading_counts_what_was_clipped_or_is_not_finite():
    x = X.copy()
    q = aqt_lite.quantize(x, scale=2.0, on_clip="saturate")
    assert plot_quantization(x, q).get_suptitle().endswith(" bytes, 3 clipped")
    x[0, 0] = np.nan
    figure = plot_quantization(x, q)
    assert figure.get_suptitle().endswith(" bytes, 3 clipped, 1 not finite")
    rendered(figure)


def test_error_without_error():
    x = np.asarray([[1.0, -127.0]])
    (ax,) = panels(plot_error(x, aqt_lite.quantize(x)))
    assert texts(ax) == ["0", "0"]
    assert ax.images[0].get_clim() == (-1, 1)


def test_errors_of_a_large_matrix_keep_the_outlier():
    x = np.zeros((512, 4), "float32")
    x[100, 2] = -1000
    (ax,) = panels(plot_error(x, aqt_lite.quantize(x, scale=1.0, on_clip="saturate")))
    assert shown(ax)[50, 2] == -873
    assert np.count_nonzero(shown(ax)) == 1
    assert ax.get_xlabel() == "each cell: largest magnitude of 2 x 1 values"


def test_a_vector_and_a_number():
    for x in ([1.0, 2.0], 3.0):
        assert len(panels(plot_quantization(x, aqt_lite.quantize(x)))) == 4


@pytest.mark.parametrize("plot", [plot_quantization, plot_error])
def test_arguments_are_checked(plot):
    q = aqt_lite.quantize(X)
    with pytest.raises(TypeError, match="q is a ndarray, not a QArray: quantize it first"):
        plot(X, X)
    with pytest.raises(TypeError, match="x is a QArray: give the array that was quantized"):
        plot(q, q)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\) but q \(3, 3\)"):
        plot(X[:2], q)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 3\)"):
        plot(X[None], q)


# ---- plot_codes


def test_bars_count_the_codes(backend):
    q = aqt_lite.quantize(backend.asarray(X), scale=3.5, zero_point=-70, on_clip="saturate")
    figure = plot_codes(q)
    (ax,) = panels(figure)
    heights = [bar.get_height() for bar in ax.patches]
    expected = np.bincount(backend.to_numpy(q.qvalue).ravel().astype(int) + 128, minlength=256)
    np.testing.assert_array_equal(heights, expected)
    assert ax.get_xlim() == (-128.5, 127.5)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "codes in between: 8 (88.9 %)",
        "at the ends: 0 at -128, 1 at 127 (11.1 %)",
    ]
    assert rendered(figure).std() > 10


def ends(figure):
    (ax,) = panels(figure)
    red = [bar for bar in ax.patches if bar.get_facecolor()[0] > 0.5]
    return [bar.get_x() for bar in red]


def test_ends_are_marked():
    x = np.linspace(-1, 1, 11, dtype="float32")
    assert ends(plot_codes(aqt_lite.quantize(x))) == [-127.5, 126.5]  # symmetric: -127 to 127
    assert ends(plot_codes(aqt_lite.quantize(x, "uint8"))) == [0.5, 254.5]
    assert ends(plot_codes(aqt_lite.quantize(x, "uint8", scheme="affine"))) == [-0.5, 254.5]
    codes = aqt_lite.QArray.from_codes(np.asarray([-128, 3], "int8"), np.asarray([1.0], "float32"))
    assert ends(plot_codes(codes)) == [-128.5, 126.5]


def test_16_bit_codes_are_binned():
    (ax,) = panels(plot_codes(aqt_lite.quantize(np.linspace(-1, 1, 1000).reshape(10, 10, 10), "int16")))
    assert len(ax.patches) == 256
    assert sum(bar.get_height() for bar in ax.patches) == 1000
    assert ax.get_xlabel() == "code, in bins of 256"


def test_no_codes():
    with pytest.raises(ValueError, match=r"q has shape \(0, 3\)"):
        plot_codes(aqt_lite.quantize(np.zeros((0, 3), "float32")))
    with pytest.raises(TypeError, match="not a QArray"):
        plot_codes(X)


# ---- whole models


def test_a_report_of_a_model_is_drawn():
    tree = {f"layer{i}": {"weight": np.random.default_rng(i).standard_normal((8, 8 + i), "float32")} for i in range(70)}
    tree["exact"] = {"weight": np.zeros((4, 4), "float32")}
    report = aqt_lite.tree_report(tree, aqt_lite.quantize_tree(tree))
    figure = plot_report(report)
    quality, size = figure.axes
    assert len(quality.patches) == 64
    assert [t.get_text() for t in quality.get_yticklabels()] == [leaf.path for leaf in report.leaves[:64]]
    assert texts(quality) == [f"{leaf.error.sqnr_db:.1f}" for leaf in report.leaves[:64]]
    assert [bar.get_width() for bar in size.patches[:64]] == [leaf.error.source_nbytes for leaf in report.leaves[:64]]
    assert "64 worst of 71 leaves" in figure.get_suptitle()
    assert np.ptp(rendered(figure)) > 0
    exact = type(report)(report.leaves[-1:])
    assert texts(plot_report(exact).axes[0]) == ["inf"]
    assert np.ptp(rendered(plot_report(exact))) > 0


def test_what_is_no_report_is_refused():
    with pytest.raises(TypeError, match=r"report is a dict: give what aqt_lite.tree_report returns"):
        plot_report({})
    with pytest.raises(ValueError, match="no QArray"):
        plot_report(aqt_lite.tree_report({"a": X}, {"a": X}))
