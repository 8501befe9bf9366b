"""XLA's foreign-function interface, spoken by numba: the layout of its structs, errors, and unknown versions."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba import njit

from aqt_lite.backends.cpu import runtime
from aqt_lite.backends.cpu.native import address_of
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, describe, dim, operand, parallel_for, result

OFFSETS = {
    "FRAME_EXTENSION": "offsetof(XLA_FFI_CallFrame, extension_start)",
    "FRAME_API": "offsetof(XLA_FFI_CallFrame, api)",
    "FRAME_CONTEXT": "offsetof(XLA_FFI_CallFrame, ctx)",
    "FRAME_OPERANDS": "offsetof(XLA_FFI_CallFrame, args.args)",
    "FRAME_RESULTS": "offsetof(XLA_FFI_CallFrame, rets.rets)",
    "FRAME_ATTRIBUTES": "offsetof(XLA_FFI_CallFrame, attrs.attrs)",
    "BUFFER_DATA": "offsetof(XLA_FFI_Buffer, data)",
    "BUFFER_DIMS": "offsetof(XLA_FFI_Buffer, dims)",
    "SCALAR_VALUE": "offsetof(XLA_FFI_Scalar, value)",
    "EXTENSION_TYPE": "offsetof(XLA_FFI_Extension_Base, type)",
    "EXTENSION_METADATA": "offsetof(XLA_FFI_Metadata_Extension, metadata)",
    "METADATA_MAJOR": "offsetof(XLA_FFI_Metadata, api_version.major_version)",
    "METADATA_MINOR": "offsetof(XLA_FFI_Metadata, api_version.minor_version)",
    "METADATA_TRAITS": "offsetof(XLA_FFI_Metadata, traits)",
    "METADATA_STATE": "offsetof(XLA_FFI_Metadata, state_type_id)",
    "API_ERROR_CREATE": "offsetof(XLA_FFI_Api, XLA_FFI_Error_Create)",
    "API_ERROR_DESTROY": "offsetof(XLA_FFI_Api, XLA_FFI_Error_Destroy)",
    "API_POOL_THREADS": "offsetof(XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads)",
    "METADATA_EXTENSION": "XLA_FFI_Extension_Metadata",
    "INTERNAL_ERROR": "XLA_FFI_Error_Code_INTERNAL",
    "API_MAJOR": "XLA_FFI_API_MAJOR",
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to read jaxlib's own header")
def test_the_layout_is_that_of_jaxlib_s_header(tmp_path):
    prints = "\n".join(f'  printf("{name} %d\\n", (int)({value}));' for name, value in OFFSETS.items())
    minor = '  printf("API_MINOR %d\\n", (int)XLA_FFI_API_MINOR);'
    head = '#include <stddef.h>\n#include <stdio.h>\n#include "xla/ffi/api/c_api.h"\n'
    (tmp_path / "layout.c").write_text(f"{head}int main() {{\n{prints}\n{minor}\n}}\n")
    build = ["cc", "-I", jax.ffi.include_dir(), str(tmp_path / "layout.c"), "-o", str(tmp_path / "layout")]
    subprocess.run(build, check=True)
    lines = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout.splitlines()
    found = {name: int(value) for name, value in (line.split() for line in lines)}
    assert found.pop("API_MINOR") >= ffi.API_MINOR, "later minor versions only add fields at the end"
    assert found == {name: getattr(ffi, name) for name in OFFSETS}


# ---- handlers


@njit
def _double(frame, start, stop):  # pragma: no cover - compiled
    n = dim(operand(frame, 0), 0)
    x, y = array(operand(frame, 0), (n,), np.float32), array(result(frame, 0), (n,), np.float32)
    for i in range(start, stop):
        if x[i] < 0:
            raise ValueError("negative")
        y[i] = 2 * x[i]


_double_address = address_of(_double, 3)


def _handler(version, grain):
    def handler(frame):  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        return parallel_for(frame, _double_address(), dim(operand(frame, 0), 0), grain)

    return handler


@pytest.fixture(params=[64, 1 << 20], ids=["many chunks", "one chunk"])
def doubled(request):
    """Twice its argument, all of it not negative, by a handler of ours."""
    name = f"aqt_lite_test_double_{request.param}"
    version = zlib.crc32(Path(str(ffi.__file__)).read_bytes())  # else numba's cache would not see that it has changed
    assert ffi.register(name, _handler(version, request.param))
    return jax.jit(lambda x: jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x))


def failing():
    """JAX raises one or the other error, as the call ends before the function returns or after."""
    return pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="a numba kernel raised an exception")


def test_a_handler_runs_every_chunk_once(doubled):
    for n in (1, 63, 64, 65, 10_000):
        x = jnp.arange(n, dtype=jnp.float32)
        np.testing.assert_array_equal(doubled(x), 2 * np.arange(n, dtype=np.float32))


def test_an_exception_in_a_chunk_fails_the_call_and_nothing_else(doubled):
    x = np.arange(10_000, dtype=np.float32)
    for at in (0, 5_000, 9_999):
        bad = x.copy()
        bad[at] = -1
        with failing():
            jax.block_until_ready(doubled(jnp.asarray(bad)))
        np.testing.assert_array_equal(doubled(jnp.asarray(x)), 2 * x)


def test_failing_and_other_calls_side_by_side(doubled):
    good = jnp.arange(5_000, dtype=jnp.float32)
    bad = good.at[4_321].set(-1)

    def call(i):
        if i % 2:
            with failing():
                jax.block_until_ready(doubled(bad))
            return True
        return bool((doubled(good) == 2 * good).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(64), timeout=300))


# ---- a version that XLA does not know

UNKNOWN = """
import warnings, numpy as np, jax, jax.numpy as jnp
import aqt_lite
from aqt_lite import PerChannel
from aqt_lite.backends.jax import dots, ffi
ffi.API_MAJOR = 99  # compiled in when the first handler is
handler_of = dots._handler
dots._handler = lambda version: handler_of(version ^ 0x3FFFFFFF)  # what numba has cached speaks the right version
rng = np.random.default_rng(0)
w, x = rng.standard_normal((300, 320)).astype("float32"), rng.standard_normal((3, 320)).astype("float32")
q = aqt_lite.quantize(w, granularity=PerChannel(0))
product = jax.jit(lambda x, q: aqt_lite.linear(x, q, mode="reproducible"))
here = jnp.asarray(x), q.to_backend("jax")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    text = product.lower(*here).compile().as_text()
    y = product(*here)
told = [str(c.message) for c in caught if "slower here" in str(c.message)]
assert len(told) == 1, [str(c.message) for c in caught]
assert "aqt_lite_fixed_point_product" not in text
assert (np.asarray(y).view("int32") == aqt_lite.linear(x, q, mode="reproducible").view("int32")).all()
print(told[0])
"""


@pytest.mark.exhaustive  # a process that compiles
@pytest.mark.skipif(runtime.integer_dots() is None, reason="the processor has no AVX-512 VNNI: XLA calls no handler")
def test_a_version_that_xla_refuses_leaves_products_to_xla_s_own_operations():
    done = subprocess.run([sys.executable, "-c", UNKNOWN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("aqt_lite: products under jax.jit are slower here"), done.stdout


def test_a_process_ends_while_its_first_product_is_computed():
    """No thread of XLA asks for the interpreter, which ends threads that do so while it finalizes."""
    script = """
import jax, jax.numpy as jnp, numpy as np
import aqt_lite
from aqt_lite.backends.cpu.native import _known

w = np.ones((256, 512), np.float32)
q = aqt_lite.quantize(w, "int8", granularity=aqt_lite.PerChannel(0)).to_backend("jax")
x = jnp.ones((4, 512))
program = jax.jit(lambda x, q: aqt_lite.linear(x, q, mode="reproducible")).lower(x, q).compile()
found = {symbol.rpartition("cpu.")[2] for symbol, (words, _) in _known.items() if words[0]}
assert found >= {f"dots.{name}.0" for name in ("prepare_rows", "refine_rows", "finish_columns", "sums_of_rows")}, found
program(x, q)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7, done.stderr
