"""A field packed with a stated bound: what is read again, where the errors lie, and what other ways take.

    python examples/fields.py [folder for the files and the picture, by default out]

Needs matplotlib and ``aqt_lite[science]``; zfp and SZ are among the ways if zfpy and pysz are installed. Ends with exit
status 1 if a single value is further away than its bound.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import xarray as xr
from numcodecs import Blosc
from numpy_science import temperature_field

from aqt_lite import bitround, cf, keepbits_for
from aqt_lite.xarray import to_netcdf
from aqt_lite.zarr import BoundCodec

mpl.use("Agg")
import matplotlib.pyplot as plt

BOUND = 0.05  # kelvin
BOUNDS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


class Cost(NamedTuple):
    """What a way of storing the field takes, and how far what is read again is from it."""

    error: float
    bits: float
    """A value, compressed."""


def compressed(data: np.ndarray) -> int:
    """Bytes after zstd, behind whichever shuffle serves best, as files of zarr have it."""
    shuffles = (Blosc.NOSHUFFLE, Blosc.SHUFFLE, Blosc.BITSHUFFLE)
    return min(len(Blosc("zstd", clevel=5, shuffle=s).encode(np.ascontiguousarray(data))) for s in shuffles)


def largest_error(x: np.ndarray, again: np.ndarray) -> float:
    return float(np.abs(x.astype(np.float64) - again.astype(np.float64)).max())


def cf_packing(x: np.ndarray, dtype: str) -> Iterator[Cost]:
    for bound in BOUNDS:
        try:
            packing = cf.choose_packing(x, max_abs_err=bound, dtype=dtype)
        except ValueError:  # says which is the smallest bound that the type keeps
            continue
        codes = packing.pack(x)
        yield Cost(largest_error(x, packing.unpack(codes)), 8 * compressed(codes) / x.size)


def bound_codec(x: np.ndarray) -> Iterator[Cost]:
    for bound in BOUNDS:
        codec = BoundCodec(bound, packed=False)
        data = codec.to_bytes(x)
        again = codec.to_values(data, x.shape, x.dtype)
        yield Cost(largest_error(x, again), 8 * compressed(data.view(np.uint16)) / x.size)


def bit_rounding(x: np.ndarray) -> Iterator[Cost]:
    for bound in BOUNDS:
        again = bitround(x, keepbits_for(x, max_abs_err=bound))
        yield Cost(largest_error(x, again), 8 * compressed(again) / x.size)


def with_its_information(x: np.ndarray) -> Iterator[Cost]:
    again = bitround(x, keepbits_for(x, information=0.99))
    yield Cost(largest_error(x, again), 8 * compressed(again) / x.size)


def zfp(x: np.ndarray) -> Iterator[Cost]:
    import zfpy

    for bound in BOUNDS:
        data = zfpy.compress_numpy(x, tolerance=bound)
        yield Cost(largest_error(x, zfpy.decompress_numpy(data)), 8 * len(data) / x.size)


def sz(x: np.ndarray) -> Iterator[Cost]:
    from pysz import sz, szConfig, szErrorBoundMode

    for bound in BOUNDS:
        config = szConfig()
        config.errorBoundMode, config.absErrorBound = szErrorBoundMode.ABS, bound
        data, _ = sz.compress(x, config)
        again, _ = sz.decompress(data, np.float32, x.shape)
        yield Cost(largest_error(x, again), 8 * data.nbytes / x.size)


def ways(x: np.ndarray) -> dict[str, list[Cost]]:
    found = {
        "CF, int8": list(cf_packing(x, "int8")),
        "CF, int16": list(cf_packing(x, "int16")),
        "aqt_lite.bound": list(bound_codec(x)),
        "BitRound": list(bit_rounding(x)),
        "BitRound, 99%": list(with_its_information(x)),
    }
    for name, package, way in (("zfp", "zfpy", zfp), ("SZ3", "pysz", sz)):
        if importlib.util.find_spec(package):
            found[name] = list(way(x))
        else:
            print(f"without {name}: {package} is not installed")
    return found


def picture(x: np.ndarray, again: np.ndarray, costs: dict[str, list[Cost]], path: Path) -> None:
    error = again.astype(np.float64) - x
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    limits = {"vmin": float(x.min()), "vmax": float(x.max()), "cmap": "viridis"}
    for ax, values, title in ((axes[0, 0], x, "float32"), (axes[0, 1], again, f"packed, max_abs_err={BOUND} K")):
        figure.colorbar(ax.imshow(values, origin="lower", **limits), ax=ax, label="K", shrink=0.8)
        ax.set_title(title)
    image = axes[0, 2].imshow(error, origin="lower", vmin=-BOUND, vmax=BOUND, cmap="RdBu_r")
    figure.colorbar(image, ax=axes[0, 2], label="K", shrink=0.8)
    axes[0, 2].set_title("error; the colours end at the bound")

    axes[1, 0].hist(error.ravel(), bins=101, range=(-1.2 * BOUND, 1.2 * BOUND), color="tab:blue")
    for side in (-BOUND, BOUND):
        axes[1, 0].axvline(side, color="tab:red", linestyle="--")
    axes[1, 0].set(title="errors, and the bound", xlabel="K", ylabel="values")

    row = x.shape[0] // 2
    part = slice(0, 24)
    axes[1, 1].fill_between(range(24), x[row, part] - BOUND, x[row, part] + BOUND, alpha=0.3, label="bound")
    axes[1, 1].plot(x[row, part], "k.-", label="float32")
    axes[1, 1].step(range(24), again[row, part], where="mid", color="tab:red", label="packed")
    axes[1, 1].set(title="along the equator", xlabel="longitude index", ylabel="K")
    axes[1, 1].legend()

    for name, found in costs.items():
        axes[1, 2].plot([c.bits for c in found], [c.error for c in found], "o-", label=name)
    axes[1, 2].axvline(32, color="gray", linestyle=":", label="float32")
    axes[1, 2].set(
        yscale="log", xlabel="bits a value, compressed", ylabel="largest error, K", title="size against error"
    )
    axes[1, 2].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    folder.mkdir(parents=True, exist_ok=True)
    x = temperature_field()
    field = xr.DataArray(x, dims=("lat", "lon"), name="t", attrs={"units": "K"})
    whole, packed = folder / "field.nc", folder / "field_packed.nc"
    field.to_netcdf(whole)
    to_netcdf(field, packed, max_abs_err=BOUND, encoding={"t": {"zlib": True, "complevel": 1}})
    with xr.open_dataset(packed) as ds:
        again, kept_as = ds.t.values, ds.t.encoding["dtype"]
    before, after = whole.stat().st_size, packed.stat().st_size
    print(f"{whole.name}: {before} bytes; {packed.name}: {after} bytes, {kept_as}, {before / after:.1f}x smaller")
    kept = largest_error(x, again) <= BOUND
    print(f"largest error {largest_error(x, again):.4f} K, bound {BOUND} K: {'kept' if kept else 'NOT KEPT'}\n")

    costs = ways(x)
    print(f"{'way':<16}{'largest error, K':>18}{'bits a value':>14}")
    for name, found in costs.items():
        for cost in found:
            print(f"{name:<16}{cost.error:>18.4f}{cost.bits:>14.2f}")
    picture(x, again, costs, folder / "fields.png")
    print(f"\n{folder / 'fields.png'}: original, packed, errors, and size against error.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
