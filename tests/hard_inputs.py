"""Inputs on which careless arithmetic gives different codes: near ties, the ends of the range, every bit pattern.

Rows are meant to be blocks of their own (``PerChannel(0)``).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np


def dtype_of(name):
    """NumPy's dtype object."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def neighbours(x, reach):
    """Each number with those up to ``reach`` units in the last place below and above, along a new last axis."""
    x = np.asarray(x)
    signed = np.dtype(f"i{x.dtype.itemsize}")
    bits = x.view(signed)
    away = np.arange(-reach, reach + 1, dtype=signed)  # of larger magnitude, since floats are sign and magnitude
    return np.where(x[..., None] == 0, away * 0, bits[..., None] + away).astype(signed).view(x.dtype)


def near_ties(scales, codes, dtype="float32", reach=3):
    """``(k + 0.5) * scale`` for all k in ``codes``, and neighbours: one row for each scale."""
    scales = np.asarray(scales, dtype=np.float64)
    ties = ((np.asarray(codes) + 0.5) * scales[:, None]).astype(dtype_of(dtype))
    return neighbours(ties, reach).reshape(len(scales), -1)


def random_scales(count, seed, low=-30, high=30):
    """float32 scales with random significands, spread over powers of two from ``low`` to ``high``."""
    rng = np.random.default_rng(seed)
    return np.ldexp(1 + rng.random(count), rng.integers(low, high, count)).astype(np.float32)


def calibrated_near_ties(rows, columns, dtype, most=127, seed=0):
    """Rows whose own calibration puts their values next to ties: ``(k + 0.5) * amax / most``, and the amax itself."""
    rng = np.random.default_rng(seed)
    low, high = (-6, 8) if dtype == "float16" else (-40, 40)
    kind = dtype_of(dtype)
    amax = np.ldexp(1 + rng.random(rows), rng.integers(low, high, rows)).astype(kind)
    k = rng.integers(-most, most, (rows, columns))
    ties = ((k + 0.5) * (amax.astype(np.float64) / most)[:, None]).astype(kind)
    x = np.take_along_axis(neighbours(ties, 3), rng.integers(0, 7, (rows, columns, 1)), axis=2)[..., 0]
    x = np.minimum(np.maximum(x, -amax[:, None]), amax[:, None])  # clip would widen bfloat16
    x[:, 0] = amax * rng.choice(np.asarray([-1, 1], dtype=kind), rows)
    return x


def random_magnitudes(rows, columns, dtype, seed=0):
    """Normal numbers, each row times a power of two of its own, from subnormal to the largest."""
    rng = np.random.default_rng(seed)
    low, high = {"float16": (-24, 12), "float64": (-1074, 1019)}.get(dtype, (-149, 124))
    x = np.ldexp(rng.normal(size=(rows, columns)), np.linspace(low, high, rows).astype(int)[:, None])
    limit = float(ml_dtypes.finfo(dtype_of(dtype)).max)
    return np.clip(x, -limit, limit).astype(dtype_of(dtype))


def ends(columns, dtype):
    """Rows from the ends of the type's range, and other blocks that have broken a quantizer somewhere."""
    kind = dtype_of(dtype)
    info = ml_dtypes.finfo(kind)
    limit, normal, subnormal = (float(v) for v in (info.max, info.smallest_normal, info.smallest_subnormal))
    tiny = 2.0**-1021 if dtype == "float64" else 2.0**-125  # the contract's smallest statistic
    starts = [
        [0.0],
        [-0.0],
        [0.0, -0.0],
        [subnormal],
        [-subnormal, subnormal],
        [subnormal, 1.0],
        [normal, -normal],
        [1e-30, -1e-30, 3e-31],
        [limit],
        [-limit],
        [limit, -limit],
        [limit, -limit, 1.0, subnormal, -subnormal],
        [limit, -limit / 3],
        [-limit, limit / 7, limit / 254],
        [min(3e38, limit), -min(3e38, limit), 1e-30],
        [5.0],
        [-5.0],
        [100.0, 101.0],
        [-100.0, -101.0, -100.5],
        [1e-3, 1e3],
        [255.0, 0.5, 1.5, 2.5],
        [-127.5, 127.5, 0.5, -0.5],
    ]
    for edge in [f * tiny for f in (0.5, 1, 2, 127, 127.5, 128, 254, 255, 256, 32767, 65535)]:
        for sign in (1, -1):
            around = neighbours(np.asarray([sign * edge], dtype=kind), 2)[0].astype(np.float64)
            starts += [[v] for v in around] + [[v, -v / 3] for v in around[1:4]]
    rows = np.zeros((len(starts), columns))
    for row, start in zip(rows, starts, strict=True):
        row[:] = np.resize(start, columns)
    return rows.astype(kind)


def every_pattern(dtype):
    """All 65,536 numbers of a 16-bit type, in the order of their bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype_of(dtype))


def every_finite(dtype):
    """All finite ones of them, one row for each exponent and sign."""
    x = every_pattern(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = x[np.isfinite(x)]
    return x.reshape(-1, 1024 if dtype == "float16" else 128)


def rows_for_dialects(bits, seed, columns=64):
    """Rows whose calibration puts values next to ties under one of several conventions, and blocks of every kind."""
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal(columns) * 10.0 ** rng.uniform(-3, 3) for _ in range(4)]
    rows += [np.abs(rows[0]), -np.abs(rows[1]), np.zeros(columns), np.full(columns, 3.7), np.full(columns, -0.02)]
    rows += [rng.standard_normal(columns) * 1e-28, rng.standard_normal(columns) * 1e34]
    half = 2.0 ** (bits - 1)
    for steps in (half - 1, half - 0.5, half) * 2:  # what the largest magnitude becomes
        top = float(np.float32(rng.uniform(0.5, 40)))
        ties = (rng.integers(-half, half, columns) + 0.5) * (top / steps)
        row = np.clip(_moved_a_little(ties, rng), -top, top)
        row[rng.integers(columns)] = top * rng.choice([-1, 1])
        rows.append(row)
    for _ in range(6):  # zero points of every parity
        low, high = (float(np.float32(sign * rng.uniform(0.1, 9))) for sign in (-1, 1))
        scale = (high - low) / (2 * half - 1)
        ties = (rng.integers(0, 2 * half, columns) - np.round(-low / scale) + 0.5) * scale
        row = np.clip(_moved_a_little(ties, rng), low, high)
        row[:2] = low, high
        rows.append(row)
    return np.stack(rows).astype(np.float32)


def _moved_a_little(x, rng):
    near = x.astype(np.float32)
    return near + np.spacing(near) * rng.integers(-2, 3, len(near)).astype(np.float32)
