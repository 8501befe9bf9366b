"""Adapters: the registry that finds them, what each must do, plug-ins, and libraries that nobody has registered."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from itertools import permutations
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import BACKENDS, lacks
from optional import torch

import aqt_lite
from aqt_lite import IntLimits, PerBlock, PerGroup, PerTensor, QArray, available_backends, int_limits, quantize
from aqt_lite._generic import GenericBackend
from aqt_lite._kernels import anything
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.elements import INTEGER_TYPES
from aqt_lite.ops import reference
from aqt_lite.testing import Backend, Kernel, assert_same_bits, check_backend

PLUGIN = Path(__file__).with_name("plugin")


def python(program, **environment):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- what an import costs


def test_import_is_fast_and_imports_no_framework(tmp_path):
    """As every import but the first after an installation: from compiled files, whether this run writes them or not."""
    program = """
        import sys, time
        import numpy
        start = time.perf_counter()
        import aqt_lite
        seconds = time.perf_counter() - start
        unwanted = ("jax", "torch", "matplotlib", "numba", "array_api_strict", "backends", "importlib.metadata")
        print(seconds, [m for m in unwanted if m in sys.modules])
    """
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    runs = [python(program, **compiled).split(maxsplit=1) for _ in range(5)]
    assert {unwanted.strip() for _, unwanted in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.15


def test_numpy_alone_is_enough():
    """No framework is imported by using the library on NumPy arrays, or by asking which backends there are."""
    program = """
        import sys
        import numpy as np, aqt_lite
        q = aqt_lite.quantize(np.ones((4, 8), "float32"), granularity=aqt_lite.PerGroup(4))
        aqt_lite.linear([1.0] * 8, q, mode="reproducible"), aqt_lite.error_report(np.ones((4, 8)), q), repr(q)
        aqt_lite.available_backends()
        print([m for m in ("jax", "torch", "array_api_strict", "backends") if m in sys.modules])
    """
    assert python(program).strip() == "[]"


@pytest.mark.exhaustive_where(first="torch")  # processes that import frameworks: seconds
@pytest.mark.parametrize("first", ["jax", "torch"])
def test_frameworks_may_be_imported_before_or_after(first):
    leaves = {"jax": "4", "torch": "3"}[first]  # JAX's trees have one that says what structure the others have
    tree = {
        "jax": "import jax; leaves = jax.tree_util.tree_leaves",
        "torch": "import torch.utils._pytree as t; leaves = t.tree_leaves",
    }[first]
    use = "import numpy as np; print(len(leaves(aqt_lite.quantize(np.ones(3, 'float32'), 'uint8'))))"
    assert python(f"{tree}\nimport aqt_lite\n{use}").strip() == leaves
    assert python(f"import aqt_lite\n{tree}\n{use}").strip() == leaves


@pytest.mark.exhaustive_where(look="aqt_lite.available_backends()")  # processes that import frameworks: seconds
@pytest.mark.parametrize("look", ["aqt_lite.available_backends()", "find_spec('jax'), find_spec('torch')"])
def test_a_look_up_before_the_import_changes_nothing(look):
    program = f"""
        import sys
        from importlib.util import find_spec
        import numpy as np, aqt_lite
        {look}
        import jax, torch.utils._pytree
        q = aqt_lite.quantize(np.ones(3, "float32"), "uint8")
        print(len(torch.utils._pytree.tree_leaves(q)), jax.jit(lambda q: q.dequantize())(q).shape,
              [f.module for f in sys.meta_path if type(f).__module__.startswith("aqt_lite")])
    """
    assert python(program).strip() == "3 (3,) ['flax.serialization']"  # which was not imported


@pytest.mark.parametrize("first", ["aqt_lite", "framework"])
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_an_unusable_framework_stops_nobody_else(name, first, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("__version__ = '0.0.1'\n")
    program = f"""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import {name if first == "framework" else "aqt_lite"}
            import aqt_lite, {name}
        for warning in caught:
            print(warning.category.__name__, warning.message)
        print(aqt_lite.quantize([1.0, 2.0]).qvalue)
        try:
            aqt_lite.quantize([1.0], backend="{name}")
        except ImportError as error:
            print(error.name)
    """
    warning, codes, error = python(program, PYTHONPATH=str(tmp_path)).splitlines()
    assert warning.startswith(f"RuntimeWarning backend='{name}' of aqt_lite cannot be used here (ModuleNotFoundError: ")
    assert codes == "[ 64 127]"
    assert error.partition(".")[0] == name


@pytest.mark.exhaustive_where(name="torch")  # five seconds
@pytest.mark.parametrize("name", ["numpy", "torch", "array_api_strict"])
def test_threads_share_one_adapter(name):
    program = f"""
        import threading, time
        from aqt_lite import _registry
        cls, registered = type(_registry.get_backend("{name}")), []
        cls.__init__ = lambda self: time.sleep(0.05)
        cls.register_container = lambda self, *args: registered.append(args)
        barrier, found = threading.Barrier(8), []

        def first_use():
            barrier.wait()
            found.append(_registry.get_backend("{name}"))

        _registry._instances.clear()
        threads = [threading.Thread(target=first_use) for _ in range(8)]
        [t.start() for t in threads], [t.join() for t in threads]
        print(len(found), len(set(map(id, found))), len(registered))
    """
    assert python(program).strip() == "8 1 1"


def test_threads_may_import_and_use_a_framework_at_once():
    program = """
        import importlib, threading
        import numpy as np, aqt_lite
        barrier, found = threading.Barrier(4), []

        def use(import_first):
            barrier.wait()
            if import_first:
                importlib.import_module("torch")
            found.append(aqt_lite.quantize([1.0, 2.0], backend="torch").backend)

        threads = [threading.Thread(target=use, args=(i % 2,)) for i in range(4)]
        [t.start() for t in threads], [t.join(60) for t in threads]
        print(found)
    """
    assert python(program).strip() == str(["torch"] * 4)


def test_a_missing_framework_is_explained():
    program = """
        import importlib.util, json
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name in ("jax", "torch") else find(name, *args)
        import aqt_lite
        messages = []
        for call in (lambda: aqt_lite.quantize([1.0], backend="jax"), lambda: aqt_lite.int_limits("int8", "torch")):
            try:
                call()
            except ImportError as error:
                messages.append(str(error))
        print(json.dumps([messages, aqt_lite.available_backends()]))
    """
    messages, available = json.loads(python(program))
    assert "backend='jax' needs the package jax: pip install 'aqt_lite[jax]'" in messages
    assert "backend='torch' needs the package torch: pip install 'aqt_lite[torch]'" in messages
    assert available["jax"] == "not installed: pip install 'aqt_lite[jax]'"
    assert available["numpy"] == "installed"


# ---- the registry


def test_available_backends():
    assert {name: available_backends()[name] for name in BACKENDS} == dict.fromkeys(BACKENDS, "installed")


def test_unknown_backends():
    with pytest.raises(
        ValueError, match=r"backend='tensorflow' is not known: use .*'array_api_strict', 'jax', 'numpy'"
    ):
        quantize([1.0], backend="tensorflow")
    with pytest.raises(TypeError, match="backend=3: give the backend's name"):
        get_backend(3)


def test_subclasses_find_their_adapter():
    class Mine(np.ndarray):
        pass

    class Tensor(torch.Tensor):
        pass

    assert backend_of(np.ones(2).view(Mine)).name == "numpy"
    assert backend_of(np.float32(1)).name == "numpy"
    assert backend_of(torch.ones(2).as_subclass(Tensor)).name == "torch"
    assert backend_of(torch.nn.Parameter(torch.ones(2))).name == "torch"
    assert backend_of(np.ones(2, ml_dtypes.bfloat16)).name == "numpy"
    others = (3, 2.5, [1.0], "x", None, np, np.dtype("int8"), torch.float32, torch.Tensor, torch.nn.Linear(2, 2))
    for no_array in (*others, ml_dtypes.finfo("float32")):
        assert backend_of(no_array) is None, no_array


def test_every_call_gives_the_one_instance():
    for name in BACKENDS:
        assert get_backend(name) is get_backend(name)
        assert isinstance(get_backend(name), Backend)


# ---- what every adapter must do


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_int_limits(backend, dtype):
    expected = np.iinfo(dtype)
    assert int_limits(dtype, backend.name) == IntLimits(expected.bits, int(expected.min), int(expected.max))


def test_int_limits_of_other_types():
    with pytest.raises(ValueError, match="dtype='int4' is not an integer type"):
        int_limits("int4")
    with pytest.raises(ValueError, match="dtype='float32' is not an integer type"):
        int_limits("float32", "jax")
    assert int_limits(torch.int32, "torch").max == 2**31 - 1


def test_int_limits_of_a_type_that_the_library_lacks(monkeypatch):
    import array_api_strict

    monkeypatch.delattr(array_api_strict, "uint64")
    with pytest.raises(ValueError, match="array_api_strict has no dtype uint64"):
        int_limits("uint64", "array_api_strict")


def test_conformance(backend):
    report = check_backend(backend.name)
    assert report.passed
    assert str(report).splitlines()[0].startswith(f"backend {backend.name}")
    assert len(str(report).splitlines()) == len(report.rows) + 1


def aligned(values):
    """A copy that begins where a line of the cache does: libraries share such memory without being asked."""
    room = np.zeros(values.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    there = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    there[...] = values
    return there


@pytest.mark.parametrize("shape", [(4, 6), (1024, 600)], ids=str)
def test_what_is_moved_shares_no_memory(backend, shape):
    codes, scale = aligned(np.ones(shape, "int8")), aligned(np.ones((1, 1), "float32"))
    q = QArray.from_codes(codes, scale)
    moved = q.to_backend(backend.name)
    made = backend.asarray(codes)
    there = QArray.from_codes(made, backend.asarray(scale))
    codes[...], scale[...] = 7, 7
    of_moved = () if moved.backend == "numpy" else (moved.qvalue, moved.scale)  # where it was, it is the same array
    for a in (*of_moved, made, there.scale, *quantize(there.dequantize())._arrays()):
        assert not (backend.to_numpy(a) == 7).any()


@pytest.mark.parametrize("float_dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("source", "target"), list(permutations(BACKENDS, 2)))
def test_to_backend_keeps_every_bit(source, target, float_dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if float_dtype == "bfloat16" else float_dtype)
    x = np.random.default_rng(0).standard_normal((4, 10)).astype(dtype)
    if "jax" in (source, target) and float_dtype == "float64":
        with pytest.raises(ValueError, match="JAX would narrow float64 silently"):
            quantize(x).to_backend("jax")
        return
    for element in ("int8", "uint8", "int16", "uint16"):
        for scheme in ("symmetric", "affine"):
            for granularity in (PerTensor(), PerGroup(4), PerBlock((3, -1))):
                there = quantize(x, element, scheme=scheme, granularity=granularity)
                moved = there.to_backend(source).to_backend(target)
                assert (moved.backend, moved.float_dtype) == (target, float_dtype)
                assert_same_bits(moved, there)
                if not lacks(get_backend(target), float_dtype):
                    assert_same_bits(moved.dequantize(), there.dequantize())


def test_to_backend_of_itself_and_of_strangers():
    q = quantize([1.0, 2.0])
    assert q.to_backend("numpy") is q
    with pytest.raises(ValueError, match="backend='cupy' is not known"):
        q.to_backend("cupy")


def test_moved_arrays_share_no_memory_that_could_change(backend):
    """A QArray is frozen: writing to the array that it came from must not change it."""
    x = np.asarray([[1.0, -2.0, 0.5]], "float32")
    q = quantize(x, backend=backend.name)
    there = quantize(x).to_backend(backend.name)
    before = q.dequantize()
    x[:] = 7
    assert_same_bits(q.dequantize(), before)
    assert_same_bits(there.dequantize(), before)
    back = there.to_backend("numpy")
    if backend.name == "torch":
        there.storage[:] = 3
        assert_same_bits(back.dequantize(), before)


def test_an_adapter_that_is_wrong_is_found_out():
    class Sloppy(type(get_backend("torch"))):
        name = "sloppy"

        def reciprocal(self, x):
            return torch.nextafter(1 / x, torch.zeros_like(x))

        def int_limits(self, dtype):
            return IntLimits(8, -127, 127)

        def power_of_two(self, e):
            return torch.exp2(e.to(torch.float32))

        def kernel(self, operation):
            if operation is reference.integer_matmul:
                return Kernel(lambda x, w: (x.to(torch.float16) @ w.to(torch.float16).mT).to(torch.int32), anything)
            return None

    with pytest.raises(AssertionError) as caught:
        check_backend(Sloppy())
    table = str(caught.value)
    assert "backend 'sloppy' does not keep the contract" in table
    for line in table.splitlines():
        if line.startswith(("reciprocal", "int_limits", "powers of two", "integer_matmul")):
            assert "elements differ" in line


# ---- libraries without an adapter


def test_generic_adapter_serves_any_array_api_library(monkeypatch):
    """array-api-strict with its own adapter taken away: the standard is enough."""
    import array_api_strict

    from aqt_lite import _registry

    without = {name: entry for name, entry in _registry._BUILTIN.items() if name != "array_api_strict"}
    monkeypatch.setattr(_registry, "_BUILTIN", without)
    monkeypatch.setattr(_registry, "_by_type", {})
    monkeypatch.setattr(_registry, "_instances", dict(_registry._instances))
    _registry._instances.pop("array_api_strict", None)
    x = array_api_strict.asarray(np.random.default_rng(0).standard_normal((4, 10)).astype("float32"))
    b = backend_of(x)
    assert isinstance(b, GenericBackend)
    assert (b.name, b) == ("array_api_strict", backend_of(x))
    q = quantize(x, scheme="affine", granularity=PerGroup(4))
    here = quantize(np.asarray(x), scheme="affine", granularity=PerGroup(4))
    for name in ("storage", "scale", "zero_point"):
        assert isinstance(getattr(q, name), type(x))
        assert_same_bits(getattr(q, name), getattr(here, name))
    assert_same_bits(q.dequantize(), here.dequantize())
    assert_same_bits(q.to_backend("numpy"), here)
    with np.errstate(all="ignore"):  # a library of its own decides about warnings
        assert check_backend(x).backend == "array_api_strict"
    with pytest.raises(ValueError, match="array_api_strict has no dtype bfloat16"):
        b.asarray(np.ones(2, ml_dtypes.bfloat16))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The example plug-in, installed where only the test's own processes look."""
    root = tmp_path_factory.mktemp("plugin")
    source, target = root / "source", root / "site"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(target)


def test_plugin(plugin):
    program = """
        import json, sys
        import numpy as np, aqt_lite
        from aqt_lite.testing import assert_same_bits, check_backend
        before = "wrapped_numpy" in sys.modules
        import wrapped_numpy
        values = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")
        q = aqt_lite.quantize(wrapped_numpy.Array(values), scheme="affine", granularity=aqt_lite.PerGroup(4))
        assert_same_bits(q, aqt_lite.quantize(values, scheme="affine", granularity=aqt_lite.PerGroup(4)))
        moved = aqt_lite.quantize(values, backend="wrapped_numpy")
        assert_same_bits(moved.to_backend("torch").to_backend("wrapped_numpy"), moved)
        report = check_backend("wrapped_numpy")
        print(json.dumps([before, q.backend, type(q.scale).__name__, aqt_lite.available_backends()["wrapped_numpy"],
                          aqt_lite.int_limits("int16", "wrapped_numpy").max, report.passed]))
    """
    result = json.loads(python(program, PYTHONPATH=plugin))
    assert result == [False, "wrapped_numpy", "Array", "installed", 32767, True]


def test_an_adapter_is_registered_without_a_package():
    """Also for arrays that the generic adapter had served before; and once more, as after an edit in a notebook."""
    program = """
        import numpy as np, aqt_lite, wrapped_numpy
        from aqt_lite.testing import assert_same_bits, check_backend
        from wrapped_numpy.adapter import WrappedBackend
        from aqt_lite._registry import backend_of, get_backend
        values = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")
        x = wrapped_numpy.Array(values)
        generic = backend_of(x).name
        for edition in (1, 2):
            @aqt_lite.register_backend
            class Mine(WrappedBackend):
                name, number = "mine", edition
            q = aqt_lite.quantize(x, "int4")
            assert_same_bits(q, aqt_lite.quantize(values, "int4"))
            print(generic, q.backend, check_backend("mine").passed, aqt_lite.available_backends()["mine"])
        print(get_backend("mine").number)
    """
    lines = python(program, PYTHONPATH=os.pathsep.join([str(PLUGIN), str(PLUGIN.parents[1])])).splitlines()
    assert lines == ["wrapped_numpy mine True installed"] * 2 + ["2"]


def test_what_no_adapter_is_cannot_be_registered():
    class Lacking(Backend):
        name = "lacking"

    class Text(type(get_backend("numpy"))):
        name, array_modules = "text", "mylib"

    class Number(Text):
        name, array_modules = 3, ("mylib",)

    for adapter, message in [
        (3, "adapter must be a subclass of aqt_lite.testing.Backend, the class itself: got 3"),
        (get_backend("numpy"), "the class itself: got <"),
        (Lacking, "adapter, Lacking, lacks array_modules, asarray, to_numpy, xp: define each in the class"),
        (Text, "array_modules='mylib': give a tuple of the names of top-level modules"),
        (Number, "name=3: give what users are to write as backend="),
    ]:
        with pytest.raises(TypeError, match=message):
            aqt_lite.register_backend(adapter)
    with pytest.raises(ValueError, match=r"adapter\.name is 'numpy', a built-in backend: use another name"):
        aqt_lite.register_backend(type(get_backend("numpy")))
    with pytest.raises(TypeError, match=r"backend=3: give a backend's name.*an instance of an adapter, or an array"):
        check_backend(3)


def test_a_broken_plugin_is_reported_and_the_rest_works(tmp_path):
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[aqt_lite.backends]\nbroken = no_such_module:Thing\nwrong = collections:OrderedDict\n"
        "other = aqt_lite.backends.numpy:NumpyBackend\n"
    )
    program = """
        import json, numpy as np, aqt_lite
        scale = aqt_lite.quantize(np.ones(3, "float32")).scale
        errors = []
        for name in ("broken", "wrong"):
            try:
                aqt_lite.quantize([1.0], backend=name)
            except Exception as error:
                errors.append(type(error).__name__)
        try:
            aqt_lite.quantize(object())
        except TypeError as error:
            errors.append(str(error))
        print(json.dumps([aqt_lite.available_backends(), errors, scale.tolist()]))
    """
    available, errors, scale = json.loads(python(program, PYTHONPATH=str(tmp_path)))
    assert available["broken"] == "fails to load: No module named 'no_such_module'"
    assert "must be a subclass of aqt_lite.testing.Backend" in available["wrong"]
    assert available["other"] == (
        "fails to load: the entry point for backend='other' leads to the adapter of 'numpy': name them alike"
    )
    assert errors[:2] == ["ModuleNotFoundError", "TypeError"]
    assert "x is a object: give an array" in errors[2]
    assert scale == [float(np.float32(1) * np.float32(1 / 127))]


def test_steps_are_repeated_in_order(backend):
    def step(i, state):
        total, _ = state
        return total * 2 + x[i, ...], x[i, ...]

    x = backend.asarray(np.arange(5, dtype="float32")[:, None] * np.ones((1, 3), "float32"))
    zeros = backend.xp.zeros_like(x[0, ...])
    total, last = backend.repeated(5, step, (zeros, zeros))
    assert backend.to_numpy(total).tolist() == [26.0] * 3  # ((((0 2 + 1) 2 + 2) 2 + 3) 2 + 4
    assert backend.to_numpy(last).tolist() == [4.0] * 3
    assert backend.to_numpy(backend.repeated(0, step, (zeros, zeros))[0]).tolist() == [0.0] * 3


def test_version():
    assert aqt_lite.__version__.count(".") == 2
    assert set(aqt_lite.__all__) <= set(dir(aqt_lite))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        aqt_lite.quantise  # noqa: B018
