"""Dialects give the numbers of the libraries that they are named after: golden vectors that those made."""

from __future__ import annotations

import json

import numpy as np
import pytest
from forms import COMPILED, CONSTANT, FORMS, JAX, JIT, NUMPY, STRICT, TORCH, Bits, Call, Problem, bits_of, disagreements
from optional import jax, jnp, needs, torch
from oracles import arrays
from oracles import dialects as golden

import aqt_lite
from aqt_lite import (
    Dialect,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from aqt_lite.dialects import DIALECTS
from aqt_lite.testing import assert_same_bits

VECTORS = np.load(golden.FILE)
NAMES = sorted({key.split("/")[0] for key in VECTORS} - {"x", "made_by"})


def recorded(name, dtype, scheme):
    """x, and the original's codes, scales and zero points."""
    x = VECTORS[f"x/{aqt_lite.formats.FORMATS[dtype].element.bits}"]
    return x, tuple(VECTORS[f"{name}/{dtype}/{scheme}/{part}"] for part in ("codes", "scale", "zero_point"))


def held(name, forms, every=1):
    """What the forms give for the golden vectors of a dialect, against those."""
    problems, wanted = [], []
    for case in golden.cases(name)[::every]:
        x, found = recorded(name, *case)
        problems.append(golden.problem(name, *case, x))
        how = {"granularity": golden.granularity_of(case[0]), "dialect": name, **golden.asked(case[1])}
        q = quantize(problems[-1].x, case[0], **how)
        wanted.append(golden.as_bits(found, bits_of(q), case[0]))
    return disagreements(problems, wanted, forms)


def test_every_dialect_is_held_against_its_original():
    by_rules = {name for name, d in DIALECTS.items() if d.whole is None}  # others have tests of their own
    assert set(NAMES) == by_rules - {"aqt_lite"} == set(golden.ORIGINALS)
    versions = json.loads(str(VECTORS["made_by"]))
    for name in NAMES:
        assert golden.cases(name)
        package = golden.ORIGINALS[name].packages[0]
        assert f"{package} {versions[name][package]}" in DIALECTS[name].source


@pytest.mark.parametrize("name", NAMES)
def test_codes_scales_and_zero_points_are_the_originals(name):
    assert held(name, (NUMPY, TORCH)) == {}
    assert held(name, (JIT,), every=len(golden.cases(name))) == {}  # the others: exhaustive


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_compiled_forms_give_the_originals_numbers(name):
    every = len(golden.cases(name))  # NumPy and torch are held against all of them
    assert held(name, (STRICT, JAX, JIT), every=max(4, every // 4)) == {}
    assert held(name, (CONSTANT,), every=max(8, every // 2)) == {}
    assert held(name, (COMPILED,), every=every) == {}


@pytest.mark.exhaustive
def test_what_is_hardly_a_number_has_the_same_bits_everywhere():
    """Subnormal values and -0: compilers flush them, processors do not."""
    rows = [
        [1, -1e-40, 1e-39, -0.0],
        [1.2e-38, 1e-38, -1e-38, 2e-38],
        [1e-38, -1.1e-38, 5e-39, 0],
        [2e-38, -1.5e-38, 1e-39, 0],
    ]
    x = np.tile(np.asarray(rows, np.float32), 16)
    chosen = [(name, case) for name in NAMES for case in golden.cases(name)]
    chosen = [(name, case) for name, case in chosen if case == golden.cases(name)[-1] or case[0][0] in "mn"]
    chosen = [(name, case) for name, case in chosen if name != "qwix" or case[0][0] != "f"]  # as integers are
    problems = [golden.problem(n, *case, x) for n, case in chosen]
    wanted = [problem.call(x) for problem in problems]
    wanted = [w._replace(scale=w.scale._replace(values=None)) if type(w.scale) is Bits else w for w in wanted]
    assert disagreements(problems, wanted, (TORCH, JIT)) == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_knows_no_granularity(name):
    """Groups, tensors and channels along another axis are the same blocks."""
    cases = [case for case in golden.cases(name) if golden.granularity_of(case[0])]
    for dtype, scheme in cases[:: max(len(cases) // 3, 1)]:
        x, _ = recorded(name, dtype, scheme)
        how = {"dtype": dtype, "dialect": name, **golden.asked(scheme)}
        rows = quantize(x, granularity=PerChannel(0), **how)
        groups = quantize(x.reshape(-1), granularity=PerGroup(x.shape[1]), **how)
        columns = quantize(x.T, granularity=PerChannel(1), **how)
        np.testing.assert_array_equal(groups.qvalue.reshape(x.shape), rows.qvalue)
        np.testing.assert_array_equal(columns.qvalue.T, rows.qvalue)
        for i in (0, 6, len(x) - 1):
            alone = quantize(x[i], granularity=PerTensor(), **how)
            np.testing.assert_array_equal(alone.qvalue, rows.qvalue[i])
            np.testing.assert_array_equal(alone.scale, rows.scale[i])
            np.testing.assert_array_equal(groups.scale[i], rows.scale[i, 0])
        assert_same_bits(fake_quantize(x, granularity=PerChannel(0), **how), dequantize(rows))
        scale, zero_point = choose_qparams(x, granularity=PerChannel(0), **how)
        assert_same_bits(scale, rows.scale)
        if scheme == "offsets":
            assert_same_bits(zero_point, rows.offset)
            if DIALECTS[name].together is None:
                how |= {"offset": zero_point, "on_clip": "saturate"}
                given = quantize(x, granularity=PerChannel(0), **how, scale=scale)
                assert np.abs(given.qvalue.astype(int) - rows.qvalue).max() <= 1  # a code may be made of other factors
        elif zero_point is not None:
            assert_same_bits(zero_point, rows.zero_point)
            if dtype in (DIALECTS[name].formats("given") or ()):
                given = quantize(
                    x, granularity=PerChannel(0), **how, scale=scale, zero_point=zero_point, on_clip="saturate"
                )
                assert_same_bits(given.zero_point, rows.zero_point)


def test_whole_arrays_are_the_originals():
    """Tensor scales of NVFP4, and blocks of flattened arrays, the last of them short, of bitsandbytes."""
    recorded = np.load(arrays.FILE)
    versions = json.loads(str(recorded["made_by"]))
    assert versions == {name: json.loads(str(VECTORS["made_by"]))[name] for name in versions}
    cases = [case._replace(x=recorded[f"{case.key}/x"]) for case in arrays.cases(0)]
    parts = ("codes", "scale", "tensor_scale", "values")
    found = [tuple(recorded[f"{case.key}/{part}"] for part in parts) for case in cases]
    problems = [case.problem() for case in cases]
    wanted = [arrays.as_bits(f, problem.call(problem.x)) for f, problem in zip(found, problems, strict=True)]
    assert disagreements(problems, wanted, (NUMPY, TORCH)) == {}
    some = (0, 3, 13, 22)  # a tensor of each library, short blocks of both tables
    few, of_few = ([these[i] for i in some] for these in (problems, wanted))
    assert disagreements(few, of_few, (STRICT, JIT)) == {}


def test_codes_that_are_made_together_with_their_scales(backend):
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    there = backend.asarray(x)
    for name, dtype, how in [
        ("torchao", "nvfp4", {}), ("torchao_no_tensor_scale", "nvfp4", {}), ("compressed-tensors", "nvfp4", {}),
        ("modelopt", "nvfp4", {}), ("bitsandbytes", arrays.dynamic(), {}),
        ("qwix", "mxfp4", {}), ("qwix", "nf4", {}), ("bitsandbytes", "int8", {}), ("bitsandbytes", "bnb_fp4", {}),
        ("torchao_tinygemm", "int4", {"offset": "data"}),
    ]:  # fmt: skip
        q = quantize(there, dtype, dialect=name, **how)
        assert_same_bits(fake_quantize(there, dtype, dialect=name, **how), q.dequantize())
        for empty in ((0, 32), (3, 0)):
            assert quantize(backend.asarray(np.zeros(empty, np.float32)), dtype, dialect=name, **how).shape == empty
        bad = x.copy()
        bad[0, 3] = np.nan
        with pytest.raises(ValueError, match="x has 1 non-finite values of 64"):
            quantize(backend.asarray(bad), dtype, dialect=name, **how)
        ignored = quantize(backend.asarray(bad), dtype, dialect=name, nonfinite="ignore", **how)
        assert np.isfinite(backend.to_numpy(ignored.dequantize())).all()
        with pytest.raises(ValueError, match=r"rounds .* as its original does: leave rounding out"):
            quantize(there, dtype, dialect=name, rounding="half_away", **how)
        with pytest.raises(ValueError, match=r"leave scale out|has no scales for"):
            quantize(there, dtype, dialect=name, scale=0.5)
    assert quantize(there, "nvfp4", dialect="qwix").scale.scale is None
    zeros = quantize(there * 0, "nvfp4", dialect="compressed-tensors")
    assert not backend.to_numpy(zeros.dequantize()).any()
    with pytest.raises(ValueError, match="dialect='torchao_tinygemm' has no offsets for uint4: take one of int2, int3"):
        quantize(there, "uint4", offset="data", dialect="torchao_tinygemm")


def test_codes_that_mean_something_else_where_they_were_stored(backend):
    """What the originals stored, recorded, and read by from_codes in their own terms."""
    recorded = np.load(arrays.FILE)
    for case in (c for c in arrays.cases(0) if c.dtype == "nvfp4" and "e" not in c.key.rpartition("/")[2]):
        codes, scale, tensor, values = (
            recorded[f"{case.key}/{part}"] for part in ("codes", "scale", "tensor_scale", "values")
        )
        multiplies = case.dialect != "compressed-tensors"
        stored = tensor if multiplies else np.float32(1) / tensor  # the global scale, but for rounding
        parts = [backend.asarray(np.asarray(a)) for a in (codes, scale, stored)]
        q = QArray.from_codes(*parts[:2], tensor_scale=parts[2], dtype="nvfp4", dialect=case.dialect)
        np.testing.assert_allclose(backend.to_numpy(q.scale.scale).reshape(()), tensor, rtol=2**-23)
        if multiplies:
            np.testing.assert_array_equal(backend.to_numpy(q.dequantize()), values)
            assert_same_bits(q, quantize(backend.asarray(recorded[f"{case.key}/x"]), "nvfp4", dialect=case.dialect))
    x = golden.rows("int8", 4)[:4]
    made = quantize(backend.asarray(x), granularity=PerChannel(0), dialect="bitsandbytes")
    largest = backend.asarray(np.abs(x).max(1))
    again = QArray.from_codes(made.qvalue, largest, granularity=PerChannel(0), dialect="bitsandbytes")
    assert_same_bits(again, made)
    with pytest.raises(ValueError, match="tensor_scale is given, but scales of int8 have no scale of their own"):
        QArray.from_codes(made.qvalue, largest, granularity=PerChannel(0), tensor_scale=2.0)
    with pytest.raises(TypeError, match="scale is a float: beside tensor_scale give an array of float8_e4m3fn"):
        QArray.from_codes(q.qvalue, 1.0, dtype="nvfp4", tensor_scale=2.0)


def test_scales_that_bitsandbytes_quantized_too(backend):
    """Read as a codebook with an offset, they give the values that bitsandbytes reads."""
    recorded = np.load(arrays.FILE)
    parts = {key.partition("/")[2]: recorded[key] for key in recorded if key.startswith("double quantized/")}
    assert_same_bits(arrays.read_double_quantized(parts, backend).dequantize(), backend.asarray(parts["values"]))


def test_scales_are_quantized_as_bitsandbytes_does(backend):
    """Codes of absmax less a given mean, and their scales; codes of the array are those of the exact absmax."""
    recorded = np.load(arrays.FILE)
    parts = {key.partition("/")[2]: recorded[key] for key in recorded if key.startswith("double quantized/")}
    x = arrays.flat(np.random.default_rng(0), 64 * 300, 64)
    q = quantize(backend.asarray(x), "nf4", granularity=PerGroup(64), dialect="bitsandbytes")
    np.testing.assert_array_equal(backend.to_numpy(q.qvalue), parts["codes"])
    largest = np.abs(x).reshape(-1, 64).max(1)  # of which the scale is 1 where it is 0
    absmax = quantize(
        backend.asarray(largest - parts["mean"]), arrays.dynamic(), granularity=PerGroup(256), dialect="bitsandbytes"
    )
    np.testing.assert_array_equal(backend.to_numpy(absmax.qvalue), parts["absmax"])
    np.testing.assert_array_equal(backend.to_numpy(absmax.scale), parts["absmax2"])


def test_codebooks_of_a_dialect_are_of_eight_bits_in_order():
    x, table = np.linspace(-1, 1, 64, dtype="float32"), arrays.dynamic()
    for name, numbers in (("downwards", table.numbers[::-1]), ("twice", tuple(2 * n for n in table.numbers))):
        with pytest.raises(
            ValueError, match="codebooks of 8 bits of this dialect have increasing numbers from -1 to 1"
        ):
            quantize(x, aqt_lite.Codebook(name, numbers), dialect="bitsandbytes")
    with pytest.raises(ValueError, match="dialect='bitsandbytes' has no symmetric iq4_nl"):
        quantize(x, "iq4_nl", dialect="bitsandbytes")
    with pytest.raises(ValueError, match="dialect='torch' has no symmetric bnb_dynamic"):
        quantize(x, table, dialect="torch")


@pytest.mark.parametrize("form", [NUMPY, TORCH, JIT, STRICT])
def test_a_fused_sum_of_any_scale_is_rounded_once(form):
    """Given scales and zero points, values next to ties: what float64 computes of them, rounded to float32."""
    rng = np.random.default_rng(3)
    scale = np.ldexp(1 + rng.random((64, 1)), rng.integers(-60, 60, (64, 1))).astype(np.float32)
    zero = rng.integers(0, 256, (64, 1)).astype(np.int32)
    inverse = (np.float32(1) / scale).astype(np.float64)
    ties = ((rng.integers(-2, 258, (64, 40)) + 0.5 - zero) * scale.astype(np.float64)).astype(np.float32)
    x = ties + np.spacing(ties) * rng.integers(-3, 4, ties.shape).astype(np.float32)
    wanted = np.clip(np.rint((x * inverse + zero).astype(np.float32)), 0, 255).astype(np.uint8)
    twice = np.clip(np.rint(x * (np.float32(1) / scale) + zero.astype(np.float32)), 0, 255)
    assert (wanted != twice).any()
    call = Call("uint8", "affine", PerChannel(0), dialect="torch_per_tensor")
    (found,) = FORMS[form]([Problem(x, call, scale, zero)]) if form in FORMS else [None]
    assert found is None or (found.codes == wanted).all()


def test_ragged_groups_and_blocks_of_two_axes():
    x = np.random.default_rng(0).standard_normal((6, 70)).astype(np.float32)
    q = quantize(x, granularity=PerGroup(32), dialect="torchao")
    np.testing.assert_array_equal(
        q.qvalue[:, 64:], quantize(x[:, 64:], granularity=PerChannel(0), dialect="torchao").qvalue
    )
    b = quantize(x, "uint8", scheme="affine", granularity=aqt_lite.PerBlock((3, 35)), dialect="onnx")
    alone = quantize(x[3:, 35:], "uint8", scheme="affine", granularity=PerTensor(), dialect="onnx")
    np.testing.assert_array_equal(b.qvalue[3:, 35:], alone.qvalue)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint4", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_the_operator_of_onnx_with_given_scales(dtype):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: requirements-dev.txt has what needs it")
    from onnx.reference import ReferenceEvaluator

    x = golden.rows(dtype, 3)
    x = x[np.abs(x).max(1) < 1e6]
    scale = np.random.default_rng(1).uniform(0.01, 0.2, (len(x), 1)).astype(np.float32)
    given = zero_of(dtype, len(x))
    q = quantize(x, dtype, scale=scale, granularity=PerChannel(0), dialect="onnx", on_clip="saturate", **given)
    kind = getattr(onnx.TensorProto, dtype.upper().replace("_", ""))
    zero = given.get("zero_point", np.zeros((len(x), 1))).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    graph = onnx.parser.parse_graph(
        f"g (float[n, k] x, float[n] s, {onnx.TensorProto.DataType.Name(kind).lower()}[n] z) => (float[n, k] y) "
        "{ y = QuantizeLinear<axis = 0>(x, s, z) }"
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x, "s": scale.reshape(-1), "z": zero.reshape(-1)})
    wanted = wanted.view(np.uint8) if dtype.startswith("float8") else wanted.astype(q.qvalue.dtype)
    np.testing.assert_array_equal(q.qvalue, wanted)


@pytest.mark.parametrize(("dtype", "scheme"), [("uint4", "symmetric"), ("uint4", "affine"), ("uint8", "symmetric")])
def test_the_operator_of_matmul_nbits_reads_our_bytes(dtype, scheme):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: requirements-dev.txt has what needs it")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: requirements-dev.txt has it")
    rng, bits = np.random.default_rng(4), int(dtype[4:])
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 160), (3, 160)))
    q = quantize(w, dtype, scheme=scheme, granularity=PerGroup(32), dialect="onnxruntime")
    assert scheme == "affine" or (q.scale < 0).any()
    inputs = {"x": x, "b": q.to_bytes("dense").reshape(5, 5, 4 * bits), "s": q.scale.reshape(-1)}
    if scheme == "affine":
        zeros = aqt_lite.layouts.LAYOUTS["dense"].holding(dtype, bits)
        inputs["z"] = zeros.packed({"codes": q.zero_point}).reshape(-1)
    node = onnx.helper.make_node(
        "MatMulNBits", list(inputs), ["y"], domain="com.microsoft", K=160, N=5, bits=bits, block_size=32
    )
    kinds = {n: onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in inputs.items()}
    infos = [onnx.helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in inputs.items()]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (3, 5))
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", infos, [out]), opset_imports=opsets, ir_version=10
    )
    (y,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)
    np.testing.assert_allclose(y, x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "scheme"), [("uint4", "symmetric"), ("uint4", "affine"), ("uint8", "affine")])
def test_the_last_block_of_matmul_nbits_may_be_shorter(dtype, scheme):
    ort = pytest.importorskip("onnxruntime.capi._pybind_state", reason="onnxruntime is not installed")
    bits, (rows, columns, size) = int(dtype[4:]), (5, 150, 32)
    w = np.random.default_rng(9).standard_normal((rows, columns)).astype(np.float32)
    w[1], w[2, 128:], w[3, 128:] = 0, 0, 0.7  # blocks of zeros and constants, shorter ones among them
    blocks = -(-columns // size)
    packed, scale = np.zeros((rows, blocks, size * bits // 8), np.uint8), np.zeros((rows, blocks), np.float32)
    zero = np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
    quantize_there = getattr(ort, f"quantize_matmul_{bits}bits")
    quantize_there(packed, w.T.copy(), scale, zero, size, rows, columns, scheme == "symmetric")
    q = quantize(w, dtype, scheme=scheme, granularity=PerGroup(size), dialect="onnxruntime")
    there = scale != 0  # of zeros it is 0 there, and 1 here
    np.testing.assert_array_equal(np.asarray(q.scale)[there], scale[there])
    codes = aqt_lite.layouts.LAYOUTS["dense"].holding(dtype, bits)
    found = codes.unpacked(packed.reshape(rows, -1), (rows, blocks * size), signed=False)["codes"][:, :columns]
    np.testing.assert_array_equal(q.qvalue, found)
    if scheme == "affine":
        zeros = codes.unpacked(zero, (rows, zero.shape[1] * 8 // bits), signed=False)["codes"][:, :blocks]
        np.testing.assert_array_equal(q.zero_point[there], zeros[there])


def test_mlx_reads_our_words():
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: requirements-dev.txt has it")
    w = np.random.default_rng(5).standard_normal((4, 256)).astype(np.float32)
    with mx.stream(mx.cpu):
        for bits, group in ((2, 32), (3, 64), (4, 64), (5, 128), (6, 32), (8, 128)):
            q = quantize(w, f"uint{bits}", offset="data", granularity=PerGroup(group), dialect="mlx")
            words = q.to_bytes("dense_int32").view(np.uint32)
            theirs = [np.array(a) for a in mx.quantize(mx.array(w), group_size=group, bits=bits)]
            for mine, wanted in zip((words, q.scale, q.offset), theirs, strict=True):
                np.testing.assert_array_equal(mine, wanted)
            values = mx.dequantize(*map(mx.array, theirs), group_size=group, bits=bits)
            np.testing.assert_allclose(np.array(values), q.dequantize(), rtol=1e-6, atol=1e-6)
        for name, group in (("mxfp4", 32), ("nvfp4", 16)):
            q = quantize(w, name, dialect="mlx")
            words, scale = q.to_bytes("dense_int32").view(np.uint32), q.scale.qvalue
            values = mx.dequantize(
                mx.array(words), mx.array(scale), group_size=group, bits=4, mode=name, dtype=mx.float32
            )
            np.testing.assert_array_equal(np.array(values), q.dequantize())


def test_products_with_negative_scales(backend):
    """Plain ones, with offsets and zero points, of weights large enough for compiled loops."""
    rng = np.random.default_rng(6)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((520, 320), (3, 320)))
    for dtype, how in (
        ("uint4", {"dialect": "mlx", "offset": "data"}),
        ("uint4", {"dialect": "onnxruntime"}),
    ):
        q = quantize(backend.asarray(w), dtype, granularity=PerGroup(32), **how)
        assert (backend.to_numpy(q.scale) < 0).any()
        values = backend.to_numpy(q.dequantize())
        assert np.abs(values - w).max() < 0.5
        for mode in ("fast",) if "offset" in how else ("fast", "reproducible"):
            y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), q, mode=mode))
            np.testing.assert_allclose(y, x @ values.T, rtol=1e-3, atol=1e-3)
        if backend.name == "jax":
            np.testing.assert_array_equal(jax.jit(dequantize)(q), values)
            y = jax.jit(aqt_lite.linear)(backend.asarray(x), q)
            np.testing.assert_allclose(y, x @ values.T, rtol=1e-3, atol=1e-3)


def test_negative_scales_are_stored_and_read(tmp_path):
    x = np.random.default_rng(7).standard_normal((2, 64)).astype(np.float32)
    q = quantize(x, "uint4", granularity=PerGroup(32), dialect="onnxruntime")
    aqt_lite.save(tmp_path / "q.safetensors", {"w": q})
    assert_same_bits(aqt_lite.load(tmp_path / "q.safetensors")["w"], q)
    again = aqt_lite.QArray.from_codes(q.qvalue, q.scale, q.zero_point, dtype="uint4", granularity=PerGroup(32))
    assert_same_bits(again, q)
    assert aqt_lite.error_report(x, q).max_abs_error < 0.5
    with pytest.raises(ValueError, match="a negative scale is a positive one with every code negated"):
        quantize(x, scale=-0.1)
    given = quantize(x, "int4", scale=-0.25, dialect="onnxruntime", on_clip="saturate")
    np.testing.assert_array_equal(given.qvalue, np.clip(np.rint(x / -0.25), -8, 7))


def zero_of(dtype, rows):
    """Zero points of every parity, where the type has them."""
    element = aqt_lite.formats.FORMATS[dtype].element
    if not element.zero_points:
        return {}
    low, high = element.codes
    return {"zero_point": np.random.default_rng(2).integers(low, high + 1, (rows, 1)).astype(np.int32)}


@needs("jax", "torch")
def test_derivatives_go_straight_through():
    x = np.asarray([[0.3, -1.0, 0.9]], np.float32)
    of_jax = jax.grad(lambda v: fake_quantize(v, dialect="torch").sum())(jnp.asarray(x))
    leaf = torch.tensor(x, requires_grad=True)
    fake_quantize(leaf, dialect="torch").sum().backward()
    np.testing.assert_array_equal(of_jax, np.ones_like(x))
    np.testing.assert_array_equal(leaf.grad.numpy(), np.ones_like(x))


def test_a_dialect_of_ones_own(backend):
    """A record is all there is to write: here ModelOpt's range with TFLite's order, dividing."""
    mine = Dialect("mine", narrow_from=None, divides_range=True, divides=True, zero_first=True, affine=("uint8",))
    x = golden.rows("int8", 5)[:4]
    q = quantize(backend.asarray(x), granularity=PerChannel(0), dialect=mine)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(backend.to_numpy(q.scale), scale)
    np.testing.assert_array_equal(backend.to_numpy(q.qvalue), np.clip(np.rint(x / scale), -128, 127))
    with pytest.raises(ValueError, match="dialect='mine' has no affine int8: it has uint8; 'aqt_lite' has all"):
        quantize(x, scheme="affine", dialect=mine)


def test_the_smallest_scales_of_others_are_kept(tmp_path):
    """torchao goes down to the smallest normal number, a binary step below what this library chooses."""
    for dtype in ("int2", "int8", "uint8"):
        q = quantize(np.zeros((2, 8), np.float32), dtype, scheme="affine", dialect="torchao")
        assert q.scale.min() == np.finfo(np.float32).smallest_normal
        aqt_lite.save(tmp_path / "q.npz", q)
        assert_same_bits(aqt_lite.load(tmp_path / "q.npz"), q)
        again = aqt_lite.QArray.from_codes(q.qvalue, q.scale, q.zero_point, dtype=dtype, granularity=PerTensor())
        assert_same_bits(again, q)


def test_values_of_sixteen_bits_and_of_float64(backend):
    """The rules are those of float32, which holds float16 exactly; float64 has its own."""
    x = golden.rows("int8", 1)[:4]
    for name in ("torch", "tflite"):
        wide = quantize(x.astype(np.float64), dialect=name)
        assert wide.scale.dtype == np.float64
    if backend.name != "array_api_strict":
        half = x.astype(np.float16)
        q = quantize(backend.asarray(half), granularity=PerChannel(0), dialect="onnx")
        same = quantize(half.astype(np.float32), granularity=PerChannel(0), dialect="onnx")
        np.testing.assert_array_equal(backend.to_numpy(q.qvalue), same.qvalue)


def test_what_a_dialect_has_not():
    x = [1.0, -2.0]
    for words, how in [
        (r"dialect='onnx' has no symmetric nf4: it has int4, int8, int16; 'aqt_lite' has all", {"dtype": "nf4"}),
        (r"dialect='quanto' has no affine int8: it has none", {"dialect": "quanto", "scheme": "affine"}),
        (r"dialect='onnx' has zero points, and no offsets: leave offset out", {"offset": "data"}),
        (r"keeps scales in the dtype of its arithmetic: leave scale_dtype out", {"scale_dtype": "float16"}),
        (r"dialect='torchy' is not known .*: use one of 'aqt_lite', 'onnx', .* or a Dialect", {"dialect": "torchy"}),
        (
            r"dialect='mlx' has no offsets for int8: take one of uint2, uint3, .*, or leave",
            {"dialect": "mlx", "offset": "data"},
        ),
        (
            r"dialect='mlx' has no affine uint4: it has uint2, .*, uint8 with offset='data'; 'aqt_lite' has all",
            {"dialect": "mlx", "dtype": "uint4", "scheme": "affine"},
        ),
        (r"dialect='onnx' has no codes for missing values: leave mask, ", {"missing": "nan"}),
        (r"dialect='quanto' has no scales for int4", {"dialect": "quanto", "dtype": "int4", "scale": 0.1}),
    ]:
        with pytest.raises(ValueError, match=words):
            quantize(x, **{"dialect": "onnx", **how})
    with pytest.raises(TypeError, match=r"dialect is a int: give a name, or an aqt_lite\.Dialect"):
        quantize(x, dialect=3)
    for words, how in [
        ("reach='max' is not known: use 'top', 'half range', 'each side' or 'lowest'", {"reach": "max"}),
        ("least_scale=-1.0: give a normal float32", {"least_scale": -1.0}),
        ("instead=1.0 without least_scale", {"instead": 1.0}),
        (r"range_of_zeros=\(1.0, 2.0\): give a range that holds 0", {"range_of_zeros": (1.0, 2.0)}),
    ]:
        with pytest.raises(ValueError, match=words):
            Dialect("wrong", **how)


def test_bad_values_are_refused_in_every_dialect(backend):
    for name in NAMES:
        dtype, scheme = golden.cases(name)[0]
        for bad in (np.nan, np.inf):
            x = backend.asarray(np.asarray([1.0, bad, -2.0], np.float32))
            with pytest.raises(ValueError, match="x has 1 non-finite values of 3, the first at index"):
                quantize(x, dtype, **golden.asked(scheme), dialect=name)
    with pytest.raises(
        ValueError, match="the range of a block overflows float32"
    ):  # the range of these overflows where it is not halved first
        quantize(backend.asarray(np.asarray([3e38, -3e38], np.float32)), scheme="affine", dialect="torch")
    x = backend.asarray(np.asarray([3e38, -3e38, np.nan, np.inf], np.float32))
    with pytest.raises(ValueError, match="the range of a block overflows float32"):
        quantize(x, scheme="affine", dialect="torch", nonfinite="ignore")
    assert np.isfinite(backend.to_numpy(quantize(x[2:], dialect="torch", nonfinite="ignore").dequantize())).all()


@pytest.mark.parametrize("dialect", ["torchao", "compressed-tensors"])
def test_the_scale_of_a_block_of_zeros_may_be_given_back(dialect, backend):
    x = np.zeros((2, 64), np.float32)
    x[1, 32:] = np.arange(-16, 16)
    there = backend.asarray(x)
    scale, _ = choose_qparams(there, "mxfp4", dialect=dialect)
    assert_same_bits(
        quantize(there, "mxfp4", scale=scale, dialect=dialect, on_clip="saturate"),
        quantize(there, "mxfp4", dialect=dialect),
    )
    large = np.zeros((4096, 64), np.float32)
    chosen, _ = choose_qparams(large, "mxfp4", dialect=dialect)
    assert not quantize(large, "mxfp4", scale=chosen, dialect=dialect).qvalue.any()
    with pytest.raises(ValueError, match="scale"):  # no scale of other values
        quantize(there + 1, "mxfp4", scale=scale, dialect=dialect)


def test_scales_of_sixteen_bits_that_are_largest_magnitudes(backend):
    largest = np.asarray([1.5, 77.0], np.float16)
    codes = backend.asarray(np.ones((2, 3), np.int8))
    if backend.name == "array_api_strict":
        return  # which has no such type
    rows = QArray.from_codes(codes, backend.asarray(largest), granularity=PerChannel(0), dialect="bitsandbytes")
    wanted = largest.astype(np.float32) * np.float32(1 / 127)
    assert (backend.to_numpy(rows.scale).ravel() == wanted).all()


def test_tensor_scales_that_are_none():
    codes, scales = np.zeros((1, 16), np.uint8), np.full((1, 1), 56, np.uint8)
    for bad in (0.0, -1.0, np.nan, np.inf, np.float32([np.nan])):
        with pytest.raises(ValueError, match=r"tensor_scale=.*: it must be positive and finite"):
            QArray.from_codes(codes, scales, tensor_scale=bad, dtype="nvfp4")
    with pytest.raises(ValueError, match=r"tensor_scale has shape \(2,\)"):
        QArray.from_codes(codes, scales, tensor_scale=[1.0, 2.0], dtype="nvfp4")
    for bad in ("1", True, object()):
        with pytest.raises(TypeError, match=r"tensor_scale is a .*: give a number"):
            QArray.from_codes(codes, scales, tensor_scale=bad, dtype="nvfp4")


def test_a_dialect_that_makes_whole_arrays(backend):
    x = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    there = backend.asarray(x)
    q = quantize(there, "q4_0", dialect="gguf")
    assert q.dtype == "q4_0"
    assert bytes(q.to_bytes("gguf")) == bytes(quantize(x, "q4_0", dialect="gguf").to_bytes("gguf"))
    assert_same_bits(choose_qparams(there, "q4_0", dialect="gguf")[0], q.scale)
    assert_same_bits(fake_quantize(there, "q4_0", dialect="gguf"), q.dequantize())
    for name, value in (("granularity", PerGroup(32)), ("scale", 1.0), ("missing", "nan"), ("rounding", "half_away")):
        with pytest.raises(ValueError, match=f"{name} is given, but dialect='gguf' chooses all but the dtype itself"):
            quantize(there, "q4_0", dialect="gguf", **{name: value})
    with pytest.raises(ValueError, match="dtype='int8'"):
        quantize(there, "int8", dialect="gguf")


def test_problems_of_forms_know_dialects():
    x = golden.rows("int8", 2)
    problem = Problem(x, Call("int8", "symmetric", PerChannel(0), dialect="onnx"))
    q = quantize(x, granularity=PerChannel(0))  # other numbers
    assert disagreements([problem], [Bits(q.qvalue, q.scale, None, q.dequantize())], (NUMPY,))
