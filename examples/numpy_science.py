"""A scientist's field, four times smaller, with an error that is known beforehand. NumPy and nothing else.

python examples/numpy_science.py [folder for the file, by default out]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import aqt_lite
from aqt_lite import PerGroup
from aqt_lite.testing import assert_same_bits


def temperature_field(rows: int = 512, columns: int = 1024) -> np.ndarray:
    """Made-up temperatures in kelvin: cold poles, a warm equator, and weather of all sizes."""
    rng = np.random.default_rng(0)
    ky, kx = np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None, :]
    k = np.hypot(ky, kx)
    k[0, 0] = np.inf
    noise = rng.normal(size=k.shape) + 1j * rng.normal(size=k.shape)
    weather = np.fft.irfft2(noise * k**-1.5, s=(rows, columns))
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rows)[:, None]
    return (255 + 45 * np.cos(latitude) + 2.5 * weather / weather.std()).astype(np.float32)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    folder.mkdir(parents=True, exist_ok=True)
    field = temperature_field()
    print(f"A field of {field.shape} temperatures, {field.min():.1f} to {field.max():.1f} K, {field.nbytes} bytes.\n")

    # Codes spread over [-amax, amax]: take away what is known, so that none is spent on the
    # 250 K that every value has.
    mean = field.mean(axis=1, keepdims=True)
    anomaly = field - mean

    print("1. A given tolerance: 0.05 K. A step of 0.1 K rounds to within half of it, wherever nothing is clipped.\n")
    tolerance = 0.05
    q = aqt_lite.quantize(anomaly, "int8", scale=2 * tolerance)
    report = aqt_lite.error_report(anomaly, q, worst=0)
    print(report)
    # The subtraction that an error is, and the products in float32, add roundings of their own: hence 1e-4.
    kept = report.clipped == 0 and report.max_abs_error <= tolerance * (1 + 1e-4)
    print(f"{'tolerance kept':<20}{'yes' if kept else 'NO'}\n")

    print("2. The same bytes, best used: a step of its own for every 256 neighbours.\n")
    q = aqt_lite.quantize(anomaly, "int8", granularity=PerGroup(256))
    print(aqt_lite.error_report(anomaly, q, worst=1))
    error = np.abs(anomaly.astype(np.float64) - q.dequantize())
    bound = np.repeat(q.scale, 256, axis=1) / 2  # known from the scales alone, value by value
    within = bool((error <= bound * (1 + 1e-4)).all())
    print(f"{'within scale / 2':<20}{'yes' if within else 'NO'}, every value\n")

    half = np.abs(anomaly.astype(np.float64) - anomaly.astype(np.float16)).max()
    print(f"For comparison, float16 takes {anomaly.size * 2} bytes, and its largest error is {half:.4f} K.\n")

    print("3. To a file and back.\n")
    path = folder / "field.npz"
    aqt_lite.save(path, {"anomaly": q, "mean": mean})
    saved = aqt_lite.load(path)
    loaded = saved["anomaly"]
    restored = saved["mean"] + loaded.dequantize()
    assert_same_bits(loaded, q)
    print(
        f"{path}: {path.stat().st_size} bytes, {field.nbytes / path.stat().st_size:.2f}x smaller, the same bits again."
    )
    print(f"Largest error of the restored temperatures: {np.abs(restored - field).max():.4f} K.")
    imported = sorted({"jax", "torch"} & set(sys.modules))
    print(f"Frameworks imported: {', '.join(imported) or 'none'}.")


if __name__ == "__main__":
    main()
