"""The golden vectors: every form of every backend gives them, exact arithmetic still does, and so can third parties."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forms import (
    COMPILED,
    CONSTANT,
    FORMS,
    JAX,
    JIT,
    NUMPY,
    STRICT,
    TORCH,
    Bits,
    Call,
    Problem,
    differing,
    disagreements,
)
from golden.generate import FILE, FORMATS_FILE, FORMATS_SCHEMA, SCHEMA, decoded, encoded
from optional import jax, needs, torch
from oracles import exact

import aqt_lite
from aqt_lite import PerBlock, QArray
from aqt_lite.testing import assert_same_bits

BUILT_IN = frozenset([*aqt_lite.formats.FORMATS, *aqt_lite.formats.BITROUND])  # before a test registers more
ROOT = Path(__file__).parent.parent
VECTORS = json.loads(FILE.read_text())
PRODUCTS = pytest.mark.parametrize("case", VECTORS["products"], ids=lambda case: case["name"])


def per_block(block):
    """A block shape as the library's granularity."""
    return PerBlock(tuple(-1 if size is None else size for size in block))


def problem_of(case):
    """The call that a case asks for, and what it has to return."""
    scale, zero_point, codes, values = (decoded(case[k]) for k in ("scale", "zero_point", "codes", "values"))
    call = Call(case["element"], case["scheme"], per_block(case["block"]), case["nonfinite"])
    given = (scale, zero_point) if case["given"] else ()
    return Problem(decoded(case["x"]), call, *given), Bits(codes, scale, zero_point, values)


def quantizations(which=slice(None)):
    return map(list, zip(*map(problem_of, VECTORS["quantize"][which]), strict=True))


@pytest.mark.parametrize("form", [form for form in FORMS if form in (NUMPY, STRICT, TORCH)])
def test_every_form_quantizes_to_the_vectors(form):
    assert not disagreements(*quantizations(), [form])


@pytest.mark.exhaustive_unless(step=[8])
@pytest.mark.parametrize(("form", "step"), [(JIT, 1), (CONSTANT, 16), (JIT, 8), (JAX, 5), (COMPILED, 24)])
def test_forms_that_compile_quantize_to_the_vectors(form, step):
    """Some of them: a graph of all takes a minute to compile."""
    assert not disagreements(*quantizations(slice(None, None, step)), [form])


def test_exact_arithmetic_still_gives_the_vectors():
    for case in VECTORS["quantize"]:
        (x, _, scale, zero_point, _), expected = problem_of(case)
        e = exact.quantize(x, case["element"], case["scheme"], tuple(case["block"]), scale, zero_point)
        assert differing(Bits(e.codes, e.scale, e.zero_point, e.values), expected) == 0, case["name"]


# ---- every format

FORMAT_CASES = json.loads(FORMATS_FILE.read_text())


def kept_scale(field):
    """Scales as ``Bits`` where they are kept in a format of their own."""
    if field is None or "codes" not in field:
        return decoded(field)
    return Bits(decoded(field["codes"]), kept_scale(field["scale"]), None, decoded(field["values"]))


def format_problem_of(case):
    """The call that a case of v2.json asks for, and what it has to return."""
    key = None if case["key"] is None else int(case["key"], 16)
    zero_point, codes, values, offset, storage = (
        decoded(case[k]) for k in ("zero_point", "codes", "values", "offset", "storage")
    )
    call = Call(
        case["format"],
        case["scheme"],
        per_block(case["block"]),
        offset="data" if case["offset_from_data"] else None,
        **{name: case[name] for name in ("scale_dtype", "scale_mode", "rounding")},
        key=key,
    )
    scale = kept_scale(case["scale"])
    given = (scale, zero_point, offset) if case["given"] else ()
    return Problem(decoded(case["x"]), call, *given), Bits(codes, scale, zero_point, values, offset, storage)


def formats(which=slice(None)):
    return map(list, zip(*map(format_problem_of, FORMAT_CASES["formats"][which]), strict=True))


@pytest.mark.exhaustive_where(form=CONSTANT)
@pytest.mark.parametrize(("form", "step"), [(NUMPY, 1), (STRICT, 1), (TORCH, 1), (JIT, 29), (CONSTANT, 59), (JAX, 31)])
def test_every_form_gives_the_vectors_of_formats(form, step):
    """Compiling takes a second or so for each: some of them for what compiles. test_formats has torch compiled."""
    assert not disagreements(*formats(slice(3 % step, None, step)), [form])


def test_exact_arithmetic_still_gives_the_vectors_of_formats():
    exactly = [case for case in FORMAT_CASES["formats"] if case["made_by"] == "exact"]
    assert len(exactly) >= len(FORMAT_CASES["formats"]) - len(FORMAT_CASES["codebooks"])
    for case in exactly:
        (x, call, scale, zero_point, offset), expected = format_problem_of(case)
        how = {name: getattr(call, name) for name in ("scale_dtype", "scale_mode", "rounding", "key")}
        offset = call.offset if offset is None else offset
        e = exact.quantize(x, call.dtype, call.scheme, tuple(case["block"]), scale, zero_point, offset=offset, **how)
        found = Bits(e.codes, e.scale, e.zero_point, e.values, e.offset, e.storage)
        if isinstance(e.scale, exact.Exact):
            found = found._replace(scale=Bits(e.scale.codes, e.scale.scale, None, e.scale.values))
        assert differing(found, expected) == 0, case["name"]


def test_the_second_file_covers_every_format_and_says_what_it_is():
    assert FORMATS_FILE.stat().st_size < 1_000_000
    assert FORMAT_CASES["header"]["version"] == 2
    assert FORMAT_CASES["header"]["schema"] == FORMATS_SCHEMA
    assert {frozenset(case) for case in FORMAT_CASES["formats"]} == {frozenset(FORMATS_SCHEMA["formats"])}
    assert {case["format"] for case in FORMAT_CASES["formats"]} == BUILT_IN
    for name, numbers in FORMAT_CASES["codebooks"].items():
        assert aqt_lite.formats.FORMATS[name].element.numbers == tuple(decoded(numbers).tolist())


def operands(case):
    """x (a QArray where it is quantized), the weight and the bias, on NumPy."""
    w, x = case["w"], case["x"]
    weight = QArray.from_codes(
        *(decoded(w[k]) for k in ("codes", "scale", "zero_point")), granularity=per_block(w["block"])
    )
    if "codes" in x:
        parts = (decoded(x[k]) for k in ("codes", "scale", "zero_point"))
        return QArray.from_codes(*parts, granularity=per_block([1, None])), weight, decoded(case["bias"])
    return decoded(x), weight, decoded(case["bias"])


def moved(backend, case):
    x, w, bias = operands(case)
    x = x.to_backend(backend.name) if isinstance(x, QArray) else backend.asarray(x)
    return x, w.to_backend(backend.name), None if bias is None else backend.asarray(bias)


@pytest.mark.exhaustive_unless(case=VECTORS["products"][::2])
@PRODUCTS
def test_every_backend_multiplies_to_the_vectors(backend, case):
    dtype = case["x"]["dtype"]
    if backend.name == "array_api_strict" and dtype not in ("float32", "float64"):
        pytest.skip(f"the standard has no {dtype}")
    y = getattr(aqt_lite, case["op"])(*moved(backend, case), mode="reproducible")
    assert_same_bits(y, decoded(case["y"]))


@pytest.mark.exhaustive_unless(case=VECTORS["products"][::8])  # a second or more each
@PRODUCTS
@needs("jax")
def test_jitted_products_give_the_vectors(case):
    """The weight as an argument, and as a constant that the function closes over."""
    x, w, bias = moved(aqt_lite._registry.get_backend("jax"), case)
    op = partial(getattr(aqt_lite, case["op"]), mode="reproducible")
    assert_same_bits(jax.jit(op)(x, w, bias), decoded(case["y"]))
    assert_same_bits(jax.jit(lambda x: op(x, w, bias))(x), decoded(case["y"]))


@pytest.mark.exhaustive  # test_dots has a compiled product
@needs("torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, about torch.jit
def test_compiled_torch_products_give_the_vectors():
    cases = VECTORS["products"][1::16]  # compiling takes seconds for each
    arguments = [moved(aqt_lite._registry.get_backend("torch"), case) for case in cases]
    ops = [getattr(aqt_lite, case["op"]) for case in cases]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def products(arguments):
        return [op(*a, mode="reproducible") for op, a in zip(ops, arguments, strict=True)]

    for y, case in zip(products(arguments), cases, strict=True):
        assert_same_bits(y, decoded(case["y"]))


@PRODUCTS
def test_exact_arithmetic_still_gives_the_products(case):
    w, x, bias = case["w"], case["x"], decoded(case["bias"])
    parts = [decoded(w[k]) for k in ("codes", "scale", "zero_point")]
    if "codes" in x:
        left = [decoded(x[k]) for k in ("codes", "scale", "zero_point")]
        y = exact.integer_product(*left, *parts, bias, x["dtype"])
    else:
        y = exact.linear(decoded(x), *parts, tuple(w["block"]), bias, contract=1 if case["op"] == "linear" else 0)
    assert_same_bits(y, decoded(case["y"]))


# ---- the file


def test_the_file_is_small_and_says_what_it_is():
    assert FILE.stat().st_size < 300_000
    assert VECTORS["header"]["version"] == 1
    assert VECTORS["header"]["schema"] == SCHEMA
    for kind in ("quantize", "products"):
        assert {frozenset(case) for case in VECTORS[kind]} == {frozenset(SCHEMA[kind])}


def test_the_vectors_cover_every_type_and_scheme():
    seen = {(case["x"]["dtype"], case["element"], case["scheme"]) for case in VECTORS["quantize"]}
    floats, integers = ("float16", "bfloat16", "float32", "float64"), ("int8", "uint8", "int16", "uint16")
    assert seen >= {(f, i, s) for f in floats for i in integers for s in ("symmetric", "affine")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "uint16", "int32"])
def test_encoding_keeps_every_bit(dtype):
    kind = aqt_lite._registry.get_backend("numpy").dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 256, 6 * kind.itemsize, dtype=np.uint8)
    x = bits.view(kind).reshape(2, 3)
    assert decoded(encoded(x)).tobytes() == x.tobytes()
    assert decoded(encoded(x)).shape == x.shape


def test_the_page_runs_without_this_library(capsys):
    """docs/golden.md's example, run as a third party would run it, agrees on every case and finds a planted error."""
    example, of_dialects = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "golden.md").read_text(), re.DOTALL)
    assert "aqt_lite" not in example
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        exec(compile(example, "golden.md", "exec"), {})
        found = re.fullmatch(r"(\d+) cases, 0 wrong codes\n", capsys.readouterr().out)
        assert found
        assert int(found[1]) >= 2
        broken = example.replace("np.rint(", "np.trunc(")
        assert broken != example
        exec(compile(broken, "golden.md", "exec"), {})
        assert " 0 wrong" not in capsys.readouterr().out
        exec(compile(of_dialects, "golden.md", "exec"), {})
        other = of_dialects.replace('dialect="torchao"', 'dialect="tflite"')
        with pytest.raises(AssertionError, match="They differ"):
            exec(compile(other, "golden.md", "exec"), {})
    finally:
        os.chdir(here)
