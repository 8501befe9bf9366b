"""Speed, side by side in one run: quantize and dequantize against copying, products against the float32 product.

    make bench                                  everything, written to benchmarks/results.json
    python benchmarks/run.py --quick            smaller arrays, nothing written: does the harness work here?
    python benchmarks/run.py --only products    one part

Every candidate's result is checked against float64 before it is timed. Candidates of one row take turns, so that
whatever disturbs the machine disturbs all of them; a figure is the median of the turns, with the spread of the middle
half. Peers take part where they are installed (`pip install 'aqt_lite[bench]'`). On a machine with an accelerator that
JAX sees, the part "accelerator" runs there; without one it runs on the CPU, to show that it runs, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# They force an older kernel of BLAS, which would flatter us: 8 rows and more in float32 took 1.4 to 1.8 times as long.
if found := [name for name in os.environ if name.startswith("OPENBLAS_") and name != "OPENBLAS_NUM_THREADS"]:
    print(f"starts again without {', '.join(found)}", flush=True)
    others = {name: value for name, value in os.environ.items() if name not in found}
    os.execve(sys.executable, [sys.executable, *sys.argv], others)

import jax
import jax.numpy as jnp
import numpy as np
import torch

import aqt_lite
import aqt_lite.jax
from aqt_lite import PerChannel, PerGroup, PerTensor
from aqt_lite.backends.cpu import runtime
from aqt_lite.backends.cpu.runtime import cores, map_ranges

ROOT = Path(__file__).resolve().parent.parent
SEED = 20260101
CACHE_BYTES = 96 << 20  # rotating over more weights than this keeps them out of any cache of a small machine

KINDS = ["numpy", "numpy alone", "torch", "jax"]

Candidate = Callable[[int], object]


# ---- measuring


def take_turns(
    candidates: dict[str, Candidate], seconds: float = 0.6, least: int = 5, most: int = 40
) -> dict[str, dict]:
    """Milliseconds a call of each candidate: median and the quartiles around it."""
    for call in candidates.values():  # compile, allocate, wake the threads
        call(0)
        call(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begun = time.perf_counter()
    for turn in range(most):
        for name, call in candidates.items():
            time.sleep(0.11)  # threads of the one before (BLAS's: 0.1 s) go on spinning, and would take a core away
            awake = time.perf_counter() + 0.05
            while True:  # brings the candidate's own threads and caches back, and a virtual machine's idle core
                call(turn)
                if time.perf_counter() > awake:
                    break
            for nth in range(5):  # one alone says little of short calls; long ones are few
                start = time.perf_counter()
                call(turn + 1 + nth)
                times[name].append((time.perf_counter() - start) * 1e3)
                if time.perf_counter() > awake + 0.02:
                    break
        if turn + 1 >= least and time.perf_counter() - begun > seconds * len(candidates):
            break
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"ms": middle, "low": low, "high": high, "turns": len(values)}


def rotating(make: Callable[[int], object], nbytes: int, most: int = 8) -> list:
    """Enough copies to exceed the cache: make(0), make(1), ..."""
    return [make(i) for i in range(min(most, max(2, -(-CACHE_BYTES // nbytes))))]


def wait(y):
    return y.block_until_ready() if hasattr(y, "block_until_ready") else y


def error(y, exact) -> float:
    """Root mean square error relative to the root mean square of the exact result; of the worst row, where it has rows.

    Row by row: beside one with an outlier, the others would not be seen.
    """
    y = y.numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    off, whole = (np.sqrt(np.mean(a**2, axis=-1)) for a in (y.astype(np.float64) - exact, exact))
    return float(np.max(off / whole))


# ---- the machine


def path_of(results: str) -> Path:
    """Where results of this processor are kept, those of the first page without a name."""
    named = name_of(machine()["processor"])
    return ROOT / "benchmarks" / f"{results}{named and '-'}{named}.json"


def name_of(processor: str) -> str:
    """Of AVX-512 VNNI the maker, which is none for the first page's; of others the most that the processor has."""
    model, _, sets = processor.partition(", ")
    named = [f for f in ("avx512_vnni", "avx_vnni", "avx512f", "avx2") if f in sets.split()] or [platform.machine()]
    if named[0] != "avx512_vnni":
        return named[0]
    maker = model.replace("(", " ").split()[0].lower()
    return "" if maker == "amd" else maker


def copy_speed() -> float:
    """Bytes a second, read and written, of copying an array larger than the cache on all cores."""
    x = np.ones(1 << 26, np.float32)
    y = np.zeros_like(x)
    return 2 * x.nbytes / (take_turns({"copy": lambda i: copy(x, y)}, seconds=2)["copy"]["ms"] * 1e-3)


def read_speed() -> float:
    """Bytes a second that all cores read of an array larger than the cache."""
    x = np.ones(1 << 26, np.float32)
    call = {"read": lambda _: map_ranges(lambda lo, hi: x[lo:hi].max(), x.size, 1 << 16, x.size, 8)}
    return x.nbytes / (take_turns(call, seconds=2)["read"]["ms"] * 1e-3)


def copy(x: np.ndarray, y: np.ndarray) -> None:
    """Copy one array to another of its size on all cores."""
    x, y = x.reshape(-1), y.reshape(-1)
    map_ranges(lambda lo, hi: np.copyto(y[lo:hi], x[lo:hi]), x.size, 1 << 16)


def machine() -> dict:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        family = f"{fields.get('vendor_id', '')} family {fields.get('cpu family', '')} model {fields.get('model', '')}"
        named = fields.get("model name", "")
        model = family if named in ("", "unknown") else named
        flags = fields.get("flags", "").split()
        model += ", " + " ".join(f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni") if f in flags)
    versions = {m.__name__: m.__version__ for m in (np, jax, torch)}
    try:
        import numba

        versions["numba"] = numba.__version__
    except ImportError:
        versions["numba"] = "not installed"
    return {
        "processor": model,
        "blas": kernel_of_blas(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "versions": versions,
        "jax_devices": sorted({d.device_kind for d in jax.devices()}),
        "date": time.strftime("%Y-%m-%d"),
    }


def kernel_of_blas() -> str:
    """Which of its kernels NumPy's BLAS has chosen."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "unknown: threadpoolctl is not installed"
    named = [
        f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}".strip()
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    ]
    return ", ".join(dict.fromkeys(named)) or "unknown"


def earlier(path: Path, machine: dict) -> dict:
    """Results of earlier runs of parts on this machine; none, where there are none."""
    if not path.exists():
        return {"machine": machine}
    found: dict = json.loads(path.read_text())
    theirs, ours = found["machine"]["processor"], machine["processor"]
    if theirs != ours:
        raise SystemExit(f"{path.name} is of {theirs}, and this is {ours}: run everything, or move that file away")
    return found


# ---- quantize and dequantize


def naive_numpy(x, axis):
    scale = np.abs(x).max(axis=axis, keepdims=True) / 127
    return np.clip(np.round(x / scale), -127, 127).astype(np.int8), scale


def naive_jax(axis):
    @jax.jit
    def quantize(x):
        scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
        return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale

    return quantize


def quantization(size: int) -> list[dict]:
    """Rows of the table: what, who, ms, billions of elements a second, share of the limit that copying sets.

    Copying takes its turns with the candidates of each row, since memory is not as fast at one minute as at another.
    """
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((size, size), dtype=np.float32)
    j, t = jnp.asarray(x), torch.from_numpy(x)
    rows: list[dict] = []
    copied = np.zeros_like(x)

    def add(what: str, candidates: dict[str, Candidate], bytes_an_element: float) -> None:
        everyone = take_turns({"copy": lambda i: copy(x, copied), **candidates}, seconds=2.5, least=5)
        limit = 2 * x.nbytes / (everyone.pop("copy")["ms"] * 1e-3) / bytes_an_element / 1e9
        for who, found in everyone.items():
            rate = x.size / (found["ms"] * 1e-3) / 1e9
            rows.append({"what": what, "who": who, **found, "gelt_s": rate, "of_limit": rate / limit})
            print(f"  {what:34} {who:22} {found['ms']:9.2f} ms  {rate:6.2f} Gelt/s  {rate / limit:5.2f} of limit")

    def check(q, steps: float) -> None:
        assert np.abs(q.dequantize() - x).max() <= float(q.scales.max()) * steps

    def ours(dtype: str, granularity, steps: float = 0.51) -> dict[str, Candidate]:
        how = {} if granularity is None else {"granularity": granularity}
        q = aqt_lite.quantize(x, dtype, **how)
        check(q, steps)
        jitted = jax.jit(lambda a: aqt_lite.quantize(a, dtype, **how))
        return {
            "aqt_lite NumPy": lambda i: aqt_lite.quantize(x, dtype, **how),
            "aqt_lite NumPy, out=": lambda i: aqt_lite.quantize(x, dtype, **how, out=q.storage),
            "aqt_lite JAX": lambda i: wait(aqt_lite.quantize(j, dtype, **how).storage),
            "aqt_lite jax.jit": lambda i: wait(jitted(j).storage),
            "aqt_lite torch": lambda i: aqt_lite.quantize(t, dtype, **how),
        }

    for name, granularity, shape, axis, nbytes in [
        ("quantize per channel (axis 0)", PerChannel(0), x.shape, 1, 5),
        ("quantize per channel (axis 1)", PerChannel(1), x.shape, 0, 9),
        ("quantize per tensor", PerTensor(), x.shape, None, 9),
        ("quantize per group of 128", PerGroup(128), (-1, 128), 1, 5 + 4 / 128),
        ("quantize per group of 32", PerGroup(32), (-1, 32), 1, 5 + 4 / 32),
    ]:
        plain = naive_jax(axis)
        add(
            name,
            {
                "naive NumPy": lambda i, shape=shape, axis=axis: naive_numpy(x.reshape(shape), axis),
                "naive jax.jit": lambda i, shape=shape, plain=plain: wait(plain(j.reshape(shape))[0]),
                **ours("int8", granularity),
                **peers_quantize(t, granularity),
            },
            nbytes,
        )
    add("quantize, int4, groups of 32, packed", ours("int4", PerGroup(32)), 4.5 + 4 / 32)
    # a block's largest may lie up to two steps beyond the largest number, as OCP has it
    add("quantize, mxfp4, packed", ours("mxfp4", None, steps=2.01), 4.5 + 1 / 32)
    values = np.zeros_like(x)

    def back(dtype: str, granularity) -> dict[str, Candidate]:
        q = aqt_lite.quantize(x, dtype, granularity=granularity)
        qj, qt = q.to_backend("jax"), q.to_backend("torch")
        jitted = jax.jit(aqt_lite.jax.dequantize)
        return {
            "aqt_lite NumPy": lambda i: q.dequantize(),
            "aqt_lite NumPy, out=": lambda i: q.dequantize(out=values),
            "aqt_lite JAX": lambda i: wait(qj.dequantize()),
            "aqt_lite jax.jit": lambda i: wait(jitted(qj)),
            "aqt_lite torch": lambda i: qt.dequantize(),
        }

    q = aqt_lite.quantize(x, granularity=PerChannel(0))
    naive = {"naive NumPy": lambda i: q.storage.astype(np.float32) * q.scale}
    add("dequantize per channel", {**naive, **back("int8", PerChannel(0))}, 5)
    add("dequantize, int4, groups of 32, packed", back("int4", PerGroup(32)), 4.5 + 4 / 32)
    add("dequantize, mxfp4, packed", back("mxfp4", None), 4.5 + 1 / 32)
    add("dequantize, float8_e4m3fn, groups of 32", back("float8_e4m3fn", PerGroup(32)), 5 + 4 / 32)
    return rows


def peers_quantize(t, granularity) -> dict[str, Candidate]:
    if not isinstance(granularity, PerChannel) or granularity.axis != 0:
        return {}
    try:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine
    except ImportError:
        return {}
    block = (1, t.shape[1])

    def torchao(i: int):
        scale, zero = choose_qparams_affine(t, MappingType.SYMMETRIC, block, torch.int8)
        return quantize_affine(t, block, scale, zero, torch.int8)

    return {"torchao": torchao}


# ---- products


def products(sizes: list[int], rows_of_x: list[int], kinds: list[str]) -> list[dict]:
    """Rows: backend, size, M, who, ms, times as fast as the backend's own float32 product, and the share of reading."""
    table: list[dict] = []
    read = read_speed()
    for size in sizes:
        rng = np.random.default_rng(SEED)
        w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
        weights = {"channel": aqt_lite.quantize(w, granularity=PerChannel(0))}
        for m in rows_of_x:
            x = rng.standard_normal((m, size), dtype=np.float32)
            # the error is that of the product: against the values that the codes stand for, in float64
            exact = x.astype(np.float64) @ weights["channel"].dequantize().astype(np.float64).T
            for kind in kinds:
                makers = {"numpy": on_numpy, "numpy alone": on_numpy_alone, "torch": on_torch, "jax": on_jax}
                candidates = makers[kind](w, weights, x)
                floats = x.astype(np.float64) @ w.astype(np.float64).T
                own = max(error(call(0), floats) for who, call in candidates.items() if who.startswith("float32"))
                errors = {}
                for who, call in candidates.items():
                    if not who.startswith(("float32", "peer")):
                        errors[who] = error(call(0), exact)
                        assert errors[who] <= 2 * own, f"{kind} {who} at M={m}: {errors[who]:.1e}, {own:.1e}"
                found = take_turns(candidates)
                base = min(times["ms"] for who, times in found.items() if who.startswith("float32"))
                for who, times in found.items():
                    nbytes = w.nbytes if who.startswith("float32") else weights["channel"].nbytes
                    row = {
                        "backend": kind,
                        "size": size,
                        "m": m,
                        "who": who,
                        **times,
                        "times_as_fast": base / times["ms"],
                        "read_share": None if who.startswith("peer") else nbytes / read / (times["ms"] * 1e-3),
                    }
                    # a peer that quantizes for itself computes another product: its error is not this one's
                    table.append({**row, "error": None if who.startswith("peer") else errors.get(who, own)})
                    print(
                        f"  {kind:11} {size:6} M={m:<5} {who:28} {times['ms']:9.3f} ms [{times['low']:.3f}, "
                        f"{times['high']:.3f}]  {row['times_as_fast']:6.2f}x"
                        + ("" if table[-1]["error"] is None else f"  error {table[-1]['error']:.1e}")
                    )
    return table


def on_numpy(w, weights, x) -> dict[str, Candidate]:
    floats = rotating(lambda i: w.copy(), w.nbytes)
    turned = rotating(lambda i: w.T.copy(), w.nbytes)
    channel = rotating(lambda i: copied(weights["channel"]), w.size)
    dense = rotating(lambda i: copied(aqt_lite.quantize(w.T, granularity=PerChannel(1))), w.size)
    return {
        "float32": lambda i: x @ floats[i % len(floats)].T,
        "float32, (in, out)": lambda i: x @ turned[i % len(turned)],
        "linear": lambda i: aqt_lite.linear(x, channel[i % len(channel)]),
        "linear, reproducible": lambda i: aqt_lite.linear(x, channel[i % len(channel)], mode="reproducible"),
        "dense": lambda i: aqt_lite.dense(x, dense[i % len(dense)]),
    }


def on_numpy_alone(w, weights, x) -> dict[str, Candidate]:
    """As where numba is not installed."""

    def alone(call: Candidate) -> Candidate:
        def quiet(i: int) -> object:
            loops, runtime.compiled_loops = runtime.compiled_loops, lambda: None
            try:
                return call(i)
            finally:
                runtime.compiled_loops = loops

        return quiet

    return {who: alone(call) for who, call in on_numpy(w, weights, x).items()}


def copied(q):
    import copy

    return copy.deepcopy(q)


def on_torch(w, weights, x) -> dict[str, Candidate]:
    x = torch.from_numpy(x)
    floats = rotating(lambda i: torch.from_numpy(w.copy()), w.nbytes)
    turned = rotating(lambda i: torch.from_numpy(w.T.copy()), w.nbytes)
    channel = rotating(lambda i: weights["channel"].to_backend("torch"), w.size)
    dense = rotating(
        lambda i: aqt_lite.quantize(w.T, granularity=PerChannel(1)).to_backend("torch").for_dense(), w.size
    )
    found: dict[str, Candidate] = {
        "float32": lambda i: x @ floats[i % len(floats)].T,
        "float32, (in, out)": lambda i: x @ turned[i % len(turned)],
        "linear": lambda i: aqt_lite.linear(x, channel[i % len(channel)]),
        "linear, reproducible": lambda i: aqt_lite.linear(x, channel[i % len(channel)], mode="reproducible"),
        "dense, stored for it": lambda i: aqt_lite.dense(x, dense[i % len(dense)]),
    }

    def notebook(i: int):
        q = channel[i % len(channel)]
        return torch.nn.functional.linear(x, q.storage.to(torch.float32)) * q.scale.T

    found["peer: the notebook's form"] = notebook
    return found | peers_on_torch(w, x)


def peers_on_torch(w, x) -> dict[str, Candidate]:
    def layer() -> torch.nn.Linear:
        made = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        made.weight = torch.nn.Parameter(torch.from_numpy(w.copy()), requires_grad=False)
        return made

    found: dict[str, Candidate] = {}
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        pass
    else:
        of_torchao = layer()
        quantize_(of_torchao, Int8WeightOnlyConfig())
        found["peer: torchao, int8 weights"] = lambda i: of_torchao(x)
    try:
        from optimum.quanto import freeze, qint8, quantize
    except ImportError:
        pass
    else:
        of_quanto = torch.nn.Sequential(layer())
        quantize(of_quanto, weights=qint8)
        freeze(of_quanto)
        found["peer: quanto, int8 weights"] = lambda i: of_quanto(x)
    return found


def on_jax(w, weights, x) -> dict[str, Candidate]:
    x = jnp.asarray(x)
    floats = rotating(lambda i: jnp.array(w), w.nbytes)
    turned = rotating(lambda i: jnp.array(w.T.copy()), w.nbytes)
    channel = rotating(lambda i: weights["channel"].to_backend("jax"), w.size)
    dense = rotating(lambda i: aqt_lite.quantize(w.T, granularity=PerChannel(1)).to_backend("jax").for_dense(), w.size)
    raw = rotating(lambda i: aqt_lite.quantize(w.T, granularity=PerChannel(1)).to_backend("jax"), w.size)
    plain = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
    matmul = jax.jit(jnp.matmul)
    linear, dot = jax.jit(aqt_lite.linear), jax.jit(aqt_lite.dense)
    reproducible = jax.jit(lambda x, q: aqt_lite.linear(x, q, mode="reproducible"))
    naive = jax.jit(
        lambda x, q: jax.lax.dot_general(x, q.storage.astype(jnp.float32), (((1,), (1,)), ((), ()))) * q.scale.T
    )
    found: dict[str, Candidate] = {
        "float32": lambda i: wait(plain(x, floats[i % len(floats)])),
        "float32, (in, out)": lambda i: wait(matmul(x, turned[i % len(turned)])),
        "linear": lambda i: wait(linear(x, channel[i % len(channel)])),
        "linear, reproducible": lambda i: wait(reproducible(x, channel[i % len(channel)])),
        "dense": lambda i: wait(dot(x, raw[i % len(raw)])),
        "dense, stored for it": lambda i: wait(dot(x, dense[i % len(dense)])),
        "peer: plain jax.jit": lambda i: wait(naive(x, channel[i % len(channel)])),
    }
    try:
        import qwix
    except ImportError:
        return found
    theirs = qwix.quantize(jnp.array(w), "int8", channelwise_axes=(0,))
    dot_general = jax.jit(lambda x, q: qwix.dot_general(x, q, (((1,), (1,)), ((), ()))))
    found["peer: qwix"] = lambda i: wait(dot_general(x, theirs))
    return found


# ---- small arrays


def small() -> list[dict]:
    """Microseconds a call where overhead is all: one row times 256 x 256, and quantizing 64 x 64."""
    rng = np.random.default_rng(SEED)
    w, x = rng.standard_normal((256, 256), dtype=np.float32), rng.standard_normal((1, 256), dtype=np.float32)
    little = rng.standard_normal((64, 64), dtype=np.float32)
    q = aqt_lite.quantize(w, granularity=PerChannel(0))
    qj, qt = q.to_backend("jax"), q.to_backend("torch")
    j, t, wj, wt = jnp.asarray(x), torch.from_numpy(x), jnp.asarray(w), torch.from_numpy(w)
    plain, jitted = jax.jit(lambda x, w: x @ w.T), jax.jit(aqt_lite.linear)
    calls = {
        "quantize 64 x 64, NumPy": lambda: aqt_lite.quantize(little),
        "quantize 64 x 64 per channel, NumPy": lambda: aqt_lite.quantize(little, granularity=PerChannel(0)),
        "float32 product, NumPy": lambda: x @ w.T,
        "linear, NumPy": lambda: aqt_lite.linear(x, q),
        "float32 product, torch": lambda: t @ wt.T,
        "linear, torch": lambda: aqt_lite.linear(t, qt),
        "float32 product, JAX jit": lambda: plain(j, wj).block_until_ready(),
        "linear, JAX eager call": lambda: aqt_lite.linear(j, qj).block_until_ready(),
        "linear, JAX jit": lambda: jitted(j, qj).block_until_ready(),
    }
    times = take_turns(
        {name: lambda i, call=call: [call() for _ in range(50)] for name, call in calls.items()}, least=15
    )
    rows = []
    for name, found in times.items():
        rows.append({"who": name, "us": found["ms"] * 1e3 / 50})
        print(f"  {name:38} {rows[-1]['us']:8.1f} us")
    return rows


# ---- accelerators


def accelerator(sizes: list[int], rows_of_x: list[int]) -> dict:
    """JAX on its default device: copying, quantize, dequantize, products, and codes that differ from the CPU's."""
    device = jax.devices()[0]
    kind = f"{device.platform}: {device.device_kind}"
    if device.platform == "cpu":
        print("  no accelerator here: run on the CPU, so these are no figures of an accelerator")
    found: dict = {"device": kind, "measured": device.platform != "cpu", "rows": []}
    rng = np.random.default_rng(SEED)
    block = jnp.ones(1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * block.nbytes / (take_turns({"copy": lambda i: wait(copy(block))})["copy"]["ms"] * 1e-3)
    found["copy_gb_s"] = bandwidth / 1e9
    for size in sizes:
        host = rng.standard_normal((size, size), dtype=np.float32)
        w = jnp.asarray(host)
        q = aqt_lite.quantize(w, granularity=PerChannel(0))
        expected = aqt_lite.quantize(host, granularity=PerChannel(0))
        differ = int((np.asarray(q.storage) != expected.storage).sum()) + int(
            (np.asarray(q.scale) != expected.scale).sum()
        )
        found["rows"].append({"what": "codes and scales that differ from the CPU's", "size": size, "count": differ})
        quantized = jax.jit(lambda w: aqt_lite.quantize(w, granularity=PerChannel(0)))
        steps = {
            "quantize per channel": (lambda i: wait(quantized(w).storage), 9),  # noqa: B023 - called before w changes
            "dequantize": (lambda i: wait(q.dequantize()), 5),  # noqa: B023
        }
        for name, times in take_turns({name: call for name, (call, _) in steps.items()}).items():
            share = steps[name][1] * w.size / (times["ms"] * 1e-3) / bandwidth
            found["rows"].append({"what": name, "size": size, **times, "of_copy_bandwidth": share})
        for m in rows_of_x:
            x = jnp.asarray(rng.standard_normal((m, size), dtype=np.float32))
            forms = {
                "float32, default precision": jax.jit(lambda x: x @ w.T),  # noqa: B023
                "float32, highest precision": jax.jit(lambda x: jnp.matmul(x, w.T, precision="highest")),  # noqa: B023
                "linear": jax.jit(lambda x: aqt_lite.linear(x, q)),  # noqa: B023
                "linear, reproducible": jax.jit(lambda x: aqt_lite.linear(x, q, mode="reproducible")),  # noqa: B023
            }
            times = take_turns({name: lambda i, f=f: wait(f(x)) for name, f in forms.items()})  # noqa: B023
            for name, each in times.items():
                ratio = times["float32, default precision"]["ms"] / each["ms"]
                row = {"what": name, "size": size, "m": m, **each, "times_default_float32": ratio}
                if name == "linear":
                    row["of_copy_bandwidth"] = w.size / (each["ms"] * 1e-3) / bandwidth
                found["rows"].append(row)
            y = np.asarray(forms["linear, reproducible"](x))
            bits = y.view(np.uint32) != aqt_lite.linear(np.asarray(x), expected, mode="reproducible").view(np.uint32)
            found["rows"].append(
                {"what": "reproducible bits that differ", "size": size, "m": m, "count": int(bits.sum())}
            )
    for row in found["rows"]:
        print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, and nothing is written")
    named = ["quantization", "products", "small", "accelerator"]
    parser.add_argument("--only", choices=named, help="one part, printed; nothing is written without --splice")
    parser.add_argument("--splice", action="store_true", help="with --only: write that part into the results there are")
    parser.add_argument("--backends", choices=KINDS, nargs="+", default=KINDS, help="with --only products: of these")
    parser.add_argument(
        "--out", type=Path, default=path_of("results"), help="the file of results, by default %(default)s"
    )
    options = parser.parse_args()
    if options.splice and (options.quick or not options.only):
        parser.error("--splice goes with --only, which says what is spliced, and not with --quick")
    if options.backends != KINDS and options.only != "products":
        parser.error("--backends goes with --only products: the whole run is of all")
    torch.set_num_threads(cores())
    parts = [options.only] if options.only else named
    results: dict = {"machine": machine()}
    print(json.dumps(results["machine"], indent=2))
    results["copy_gb_s"] = copy_speed() / 1e9
    print(f"copy: {results['copy_gb_s']:.1f} GB/s, read and written")
    if "quantization" in parts:
        size = 1024 if options.quick else 8192
        print(f"\nquantize and dequantize, {size} x {size} float32")
        results["quantization"] = quantization(size)
    if "products" in parts:
        print("\nproducts: x (M, K) float32, int8 weights; times as fast as the backend's own float32 product")
        results["products"] = products([512] if options.quick else [4096, 8192], [1, 8, 64, 512], options.backends)
    if "small" in parts:
        print("\nsmall arrays")
        results["small"] = small()
    if "accelerator" in parts:
        on_cpu = jax.devices()[0].platform == "cpu"
        print("\naccelerator")
        sizes, rows = ([512], [1, 8]) if on_cpu or options.quick else ([8192, 16384], [1, 8, 32, 512, 4096])
        results["accelerator"] = accelerator(sizes, rows)
    if options.only and options.splice:
        before = {"copy_gb_s": results["copy_gb_s"]} | earlier(options.out, results["machine"])
        if "products" in parts:  # of the others as they are
            others = [row for row in before.get("products", []) if row["backend"] not in options.backends]
            results["products"] = others + results["products"]
        options.out.write_text(json.dumps({**before, options.only: results[options.only]}, indent=1) + "\n")
    elif not (options.quick or options.only):
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
