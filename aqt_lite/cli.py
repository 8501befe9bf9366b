"""The command line: ``aqt-lite pack``, ``unpack``, ``verify`` and ``info``, for files of netCDF and stores of zarr.

Owns: arguments, what is printed, and the check that reads again what was written. Imports: ``aqt_lite.xarray`` when a
command runs, so that ``--help`` needs nothing.

A file is made beside its place, read again and compared with its source, and only then put there: what has the name
that was asked for is whole and within its bound.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aqt_lite

__all__ = ["main"]

_ZARR = ".zarr"
_MOST_ELEMENTS = 1 << 21
"""Elements that are read together: 8 MB of float32."""

_EPILOG = """examples:
  aqt-lite pack in.nc out.nc --max-abs-err 0.05             every floating-point variable within 0.05
  aqt-lite pack in.nc out.nc --max-abs-err t=0.05,q=1e-6    these two, each in its own units
  aqt-lite pack in.nc out.nc --max-rel-err 1e-3             floats with few bits, relative errors (BitRound)
  aqt-lite pack in.nc out.nc --information 0.99             floats with the bits that carry information
  aqt-lite info out.nc
  aqt-lite verify in.nc out.nc                              compare once more, when files have been copied
  aqt-lite unpack out.nc again.nc
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where something is wrong with the data, 2 with the arguments."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **how: print(
                f"aqt-lite: warning: {message}", file=sys.stderr
            )
            options.run(options)
    except BrokenPipeError:  # the reader, `head` for instance, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        print(f"aqt-lite: {error}: pip install 'aqt_lite[science]'", file=sys.stderr)
        return 1
    except (OSError, ValueError, TypeError) as error:
        print(f"aqt-lite: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "aqt-lite",
        description="Pack fields so that a stated error is kept, unpack them, and say what is in a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aqt-lite {aqt_lite.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    pack = commands.add_parser("pack", help="write integers or rounded floats that every reader has within a bound")
    pack.add_argument("source", help="file of netCDF, or store of zarr (its name ends in .zarr)")
    pack.add_argument("target", help="where to write; likewise")
    how = pack.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--max-abs-err", type=_numbers, metavar="E",
        help="integers, with this largest error in units of the data: one number for all floating-point variables, or "
        "NAME=NUMBER,... for those that are to be packed, as for the others",
    )  # fmt: skip
    how.add_argument(
        "--max-rel-err", type=_numbers, metavar="E", help="floats with the fewest bits that keep this relative error"
    )
    how.add_argument(
        "--information", type=_numbers, metavar="SHARE",
        help="floats with the fewest bits that keep this share of the information that neighbours share; 0.99 is usual",
    )  # fmt: skip
    how.add_argument("--keepbits", type=_counts, metavar="N", help="floats with N bits after the leading one")
    pack.add_argument("--dtype", default="auto", help="of integers: auto, int8, int16, int32, uint8, uint16")
    pack.add_argument("--deflate", type=int, default=1, metavar="LEVEL", choices=range(10), help="0 to 9; 1 by default")
    pack.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    pack.set_defaults(run=_pack)

    unpack = commands.add_parser("unpack", help="write the values of a packed or quantized file")
    unpack.add_argument("source")
    unpack.add_argument("target")
    unpack.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    unpack.set_defaults(run=_unpack)

    verify = commands.add_parser("verify", help="compare a packed file with its source, element by element")
    verify.add_argument("source", help="the file that was packed")
    verify.add_argument("target", help="the file that was made of it")
    verify.set_defaults(run=_verify)

    info = commands.add_parser("info", help="say what is in a file, and what its bounds are")
    info.add_argument("source")
    info.set_defaults(run=_info)
    return parser


def _numbers(text: str, kind: Callable[[str], Any] = float) -> Any:
    """A number, or numbers by names."""
    try:
        if "=" not in text:
            return kind(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        found = {name.strip(): kind(number) for name, _, number in pairs}
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is neither {what} nor NAME=NUMBER,NAME=NUMBER") from None
    if "" in found or len(found) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must name each variable once")
    return found


def _counts(text: str) -> Any:
    """A whole number, or whole numbers by names."""
    return _numbers(text, int)


# ---- the commands


def _pack(options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    names = ("max_abs_err", "max_rel_err", "information", "keepbits")
    how = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    (asked,) = how.values()

    def chosen(raw: Any) -> list[Any]:
        floats = {name: v for name, v in raw.data_vars.items() if v.dtype.kind == "f" or _is_packed(v)}
        if isinstance(asked, dict):
            return [name for name in floats if name in asked]
        return [name for name, variable in floats.items() if not fields.is_time(variable)]

    _check_target(options)
    with _opened(options.source, chosen) as ds:
        if options.max_abs_err is None:
            _write_rounded(ds, how, options)
        else:
            _write_packed(ds, options)
    with _opened(options.target) as again:
        print(_table(again))
    _print_sizes(options)


def _write_packed(ds: Any, options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    with _telling("choosing"):
        packed, encoding = fields.packed(ds, options.max_abs_err, options.dtype, says_type=_is_store(options.target))
    bounds = fields.bounds_of(ds, options.max_abs_err)
    for name, of_name in encoding.items():
        of_name.update(_layout(ds[name], options))
    _write(packed, encoding, options, lambda path: _check(ds, path, bounds))


def _write_rounded(ds: Any, how: dict[str, Any], options: argparse.Namespace) -> None:
    """Floats of few significant bits, which are read again bit for bit."""
    from aqt_lite import xarray as fields

    if options.dtype != "auto":
        raise ValueError("--dtype is for the integers of --max-abs-err; what is rounded stays of its type")
    with _telling("choosing"):
        rounded = fields.bitround(ds, **how)
    names = [name for name, variable in rounded.data_vars.items() if fields.KEPT in variable.attrs]
    encoding: dict[Any, Any] = {
        name: {"_FillValue": rounded[name].dtype.type("nan"), **fields.related(ds[name]), **_layout(ds[name], options)}
        for name in names
    }
    _write(rounded, encoding, options, lambda path: _check(rounded, path, dict.fromkeys(names, 0.0)))


def _unpack(options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    floats: list[Any] = []  # as they are, which stay so

    def chosen(raw: Any) -> list[Any]:
        packed = _packed_in(raw)
        floats.extend(name for name, v in raw.data_vars.items() if v.dtype.kind == "f" and name not in packed)
        return packed

    _check_target(options)
    with _opened(options.source, chosen, values=True) as ds:
        names = [name for name, v in ds.data_vars.items() if v.dtype.kind == "f" and name not in floats]
        bare = ds.assign({name: fields.without_packing(fields.in_its_type(ds[name])) for name in names})
        encoding: dict[Any, Any] = {
            name: {"_FillValue": bare[name].dtype.type("nan"), **fields.related(ds[name])} for name in names
        }
        _write(bare, encoding, options, lambda path: _check(ds, path, dict.fromkeys(names, 0.0)))
    _print_sizes(options)


def _verify(options: argparse.Namespace) -> None:
    """What the target says of its own variables, held against the source."""
    from aqt_lite import xarray as fields

    for path in (options.source, options.target):
        _check_source(path)
    with _opened(options.target) as again:
        said = {name: variable.attrs for name, variable in again.data_vars.items()}
        table = _table(again)
    quantized = [name for name, attrs in said.items() if fields.ATTRIBUTE in attrs]
    if quantized:
        raise ValueError(f"variable {quantized[0]!r} is quantized, and states no bound: compare with error_report")
    bounds = {name: float(attrs[fields.BOUND]) for name, attrs in said.items() if fields.BOUND in attrs}
    kept = {name: int(attrs[fields.KEPT]) for name, attrs in said.items() if fields.KEPT in attrs}
    if not (bounds or kept):
        raise ValueError(f"{options.target} states no bound ({fields.BOUND}) and no bits kept ({fields.KEPT})")
    with _opened(options.source, lambda raw: [*bounds, *kept]) as ds:
        missing = [name for name in (*bounds, *kept) if name not in ds.data_vars]
        if missing:
            raise ValueError(
                f"{options.source} has no variable {missing[0]!r}, of which {options.target} states a bound"
            )
        _check(fields.bitround(ds, kept) if kept else ds, options.target, {**bounds, **dict.fromkeys(kept, 0.0)})
    print(table)
    print(f"{options.target} holds {options.source}: {len(bounds) + len(kept)} variables as stated, all others exactly")


def _info(options: argparse.Namespace) -> None:
    _check_source(options.source)
    with _opened(options.source) as ds:
        print(_table(ds))
    print(f"{options.source}: {_bytes_of(options.source):,} bytes")


# ---- reading and writing


def _is_packed(variable: Any) -> bool:
    """Whether a variable, as it lies in its file, holds codes of CF: a ``_FillValue`` alone makes no floats."""
    return "scale_factor" in variable.attrs or "add_offset" in variable.attrs


def _packed_in(raw: Any) -> list[Any]:
    return [name for name, variable in raw.data_vars.items() if _is_packed(variable)]


def _opened(path: str, decoded: Callable[[Any], list[Any]] = _packed_in, *, values: bool = False) -> Any:
    """A Dataset whose arrays are read chunk by chunk; with ``values``, of quantized variables, too.

    Of what is in the file, ``decoded`` says which have values in place of codes and NaN where they are missing; all
    others are as they lie there, bit for bit.
    """
    import dask  # noqa: F401  # said to be missing before anything is done
    import xarray as xr

    from aqt_lite import xarray as fields

    how: dict[str, Any] = {"engine": "zarr", "consolidated": False} if _is_store(path) else {}
    try:
        groups = [name for name in xr.open_groups(path, decode_times=False, **how) if name != "/"]
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} is no file of netCDF or store of zarr that can be read: {why}") from None
    if groups:
        raise ValueError(f"{path} has the groups {', '.join(groups)}, and a file without groups is written: split it")
    # Bounds of cells and the like are coordinates: a bound in units of the data is not for them.
    how |= {"decode_times": False, "decode_coords": "all", "cache": False}
    with xr.open_dataset(path, mask_and_scale=False, **how) as raw:
        names = decoded(raw)
        masked = {str(name): name in names for name in raw.variables}
    ds = xr.open_dataset(path, mask_and_scale=masked, **how)
    for variable in ds.variables.values():
        if "_FillValue" not in variable.attrs:
            variable.encoding.setdefault("_FillValue", None)  # or xarray would write one where there was none
    ds = ds.assign({name: variable.chunk(_chunks_of(variable)) for name, variable in ds.data_vars.items()})
    quantized = any(fields.ATTRIBUTE in variable.attrs for variable in ds.data_vars.values())
    return fields.dequantize(ds) if values and quantized else ds


def _chunks_of(variable: Any) -> dict[Any, int]:
    """Lengths along the dimensions: whole chunks of the file, or whole rows, that are a few MB."""
    stored = variable.encoding.get("chunksizes") or variable.encoding.get("chunks")
    taken = list(stored) if stored and len(stored) == variable.ndim else [1] * variable.ndim
    for axis in reversed(range(variable.ndim)):
        fit = max(1, _MOST_ELEMENTS // max(1, math.prod(taken)))
        taken[axis] = min(variable.shape[axis], taken[axis] * fit)
    return dict(zip(variable.dims, taken, strict=True))


def _is_store(path: str) -> bool:
    return path.rstrip("/\\").endswith(_ZARR)


def _write(ds: Any, encoding: dict[Any, Any], options: argparse.Namespace, check: Callable[[str], None]) -> None:
    """The Dataset in a file beside the target, which takes its place if ``check`` says nothing of it."""
    from aqt_lite import xarray as fields

    store = _is_store(options.target)

    ds = ds.copy(deep=False)
    for name, variable in ds.variables.items():
        # xarray gives a variable of which nothing is said all coordinates that there are, and refuses them in encoding=
        stated = {"coordinates": variable.encoding.get("coordinates")}
        variable.encoding = {**encoding.get(name, variable.encoding), **stated}

    def write(beside: str) -> None:
        if store:
            fields.without_codecs(ds).to_zarr(beside, consolidated=False)
        else:
            ds.to_netcdf(beside, format="NETCDF4")
        check(beside)

    fields.written(options.target, write, store=store, sources=[options.source])


def _check_source(path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")


def _check_target(options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    _check_source(options.source)
    if os.path.exists(options.target):
        if os.path.samefile(options.source, options.target):
            raise ValueError("source and target are the same: give another target")
        fields.check_replaceable(options.target, store=_is_store(options.target), sources=[options.source])
        if not options.overwrite:
            raise FileExistsError(f"{options.target} exists: give another target, or --overwrite")
    folder = os.path.dirname(os.path.abspath(options.target))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder {folder} does not exist")


def _layout(variable: Any, options: argparse.Namespace) -> dict[str, Any]:
    """How codes lie in the target: in the chunks of the source, compressed."""
    if _is_store(options.target):
        return {}
    chunks = variable.encoding.get("chunksizes")
    where = {} if chunks is None or len(chunks) != variable.ndim else {"chunksizes": chunks}
    if not options.deflate or not variable.ndim:
        return where
    return {**where, "zlib": True, "shuffle": True, "complevel": options.deflate}


def _check(ds: Any, path: str, bounds: dict[Any, float]) -> None:
    """ValueError where a file does not hold ``ds``: some variables within their bounds, the others exactly."""
    from aqt_lite import xarray as fields

    with _opened(path, lambda raw: list(bounds)) as again:
        for name, variable in ds.variables.items():
            if name in bounds:
                fields.check_within(ds[name], again[name], bounds[name], _progress(f"checking {name}"))
            elif name not in again.variables or not _same(variable, again[name].variable):
                raise ValueError(f"variable {name!r} is not read again as it was written")


def _same(a: Any, b: Any) -> bool:
    """Whether variables are equal, and numbers of one type; text may be kept in several."""
    as_here = [variable.dtype.newbyteorder("=") for variable in (a, b)]
    return bool(a.equals(b) and (as_here[0] == as_here[1] or a.dtype.kind in "OSUT"))


# ---- what is printed


def _table(ds: Any) -> str:
    """Variables, how they are kept, and the largest error that they were packed for, or the bits that they have."""
    rows = [("variable", "shape", "kept as", "values", "bytes", "max abs err", "bits kept")]
    notes = {str(variable.attrs.get("quantization")) for variable in ds.data_vars.values()}  # of CF: no data in them
    for name, variable in ds.data_vars.items():
        if name in notes and not variable.ndim:
            continue
        kept, said = variable.encoding.get("dtype", variable.dtype), variable.attrs
        size = variable.size * getattr(kept, "itemsize", variable.dtype.itemsize)
        values = "quantized" if "aqt_lite" in said else str(variable.dtype)
        shape = " x ".join(map(str, variable.shape)) or "1"
        bound, bits = said.get("max_abs_error"), said.get("quantization_nsb", "")
        bound = "" if bound is None else f"{float(bound):g}"
        rows.append((str(name), shape, str(kept), values, f"{size:,}", bound, str(bits)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _print_sizes(options: argparse.Namespace) -> None:
    before, after = _bytes_of(options.source), _bytes_of(options.target)
    how = f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"
    print(f"{options.source}: {before:,} bytes -> {options.target}: {after:,} bytes, {how}; read again and compared")


def _bytes_of(path: str) -> int:
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Inside, whoever looks at all values shows how far that is, where there is a terminal to show it on."""
    if not sys.stderr.isatty():
        yield
        return
    with aqt_lite.progress(
        lambda done, of: print(f"\r{what}: {100 * done // max(of, 1):3d}%", end="", file=sys.stderr, flush=True)
    ):
        yield
    print(file=sys.stderr)


def _progress(what: str) -> Callable[[int, int], None]:
    """Shows how far something is, where there is a terminal to show it on."""
    if not sys.stderr.isatty():
        return lambda done, of: None

    def show(done: int, of: int) -> None:
        print(f"\r{what}: {100 * done // max(of, 1)}%", end="\n" if done >= of else "", file=sys.stderr, flush=True)

    return show
