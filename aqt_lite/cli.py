"""The command line: ``aqt-lite pack``, ``unpack``, ``verify`` and ``info``, for files of netCDF and stores of zarr.

Owns: arguments, what is printed, and the check that reads again what was written. Imports: ``aqt_lite.xarray``, and
``_netcdf`` for copies of files, when a command runs, so that ``--help`` needs nothing.

A file is made beside its place, read again and compared with its source, and only then put there: what has the name
that was asked for is whole and within its bound.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
        way = "" if "pip install" in str(error) else ": pip install 'aqt_lite[science]'"
        print(f"aqt-lite: {error}{way}", file=sys.stderr)
        return 1
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last are those of damaged HDF5
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
        "NAME=NUMBER,... for those that are to be packed, as for the others; a NAME may be a path, group/name",
    )  # fmt: skip
    how.add_argument(
        "--max-rel-err", type=_numbers, metavar="E", help="floats with the fewest bits that keep this relative error"
    )
    how.add_argument(
        "--information", type=_numbers, metavar="SHARE",
        help="floats with the fewest bits that keep this share of the information that neighbours share; 0.99 is "
        "usual; NAME=SHARE where not all variables have any",
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
        found = {_normal(name.strip()): kind(number) for name, _, number in pairs}
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is neither {what} nor NAME=NUMBER,NAME=NUMBER") from None
    if "" in found or len(found) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must name each variable once")
    return found


def _normal(name: str) -> str:
    """A path from the root; what has no slash is a name."""
    return f"/{name.strip('/')}" if "/" in name else name


def _counts(text: str) -> Any:
    """A whole number, or whole numbers by names."""
    return _numbers(text, int)


# ---- the commands


def _pack(options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    names = ("max_abs_err", "max_rel_err", "information", "keepbits")
    how = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    ((argument, asked),) = how.items()

    def chosen(group: str, raw: Any) -> list[Any]:
        floats = {name: v for name, v in raw.data_vars.items() if v.dtype.kind == "f" or _is_packed(v)}
        if isinstance(asked, dict):
            return [name for name in floats if name in _named(asked, group, floats)]
        return [name for name, variable in floats.items() if not fields.is_time(variable)]

    _check_target(options)
    with _opened(options.source, chosen) as tree:
        of_groups = _asked_of_groups(tree, argument, asked)
        if options.max_abs_err is None:
            _write_rounded(tree, argument, of_groups, options)
        else:
            _write_packed(tree, of_groups, options)
    with _opened(options.target) as again:
        print(_table(again))
    _print_sizes(options)


def _named(asked: dict[str, Any], group: str, names: Iterable[Any]) -> dict[Any, Any]:
    """What is asked by name of variables of a group: of one by its path, or of all groups that have one so called."""
    keys = [(name, key) for name in names for key in (name, f"/{_path(group, name)}") if key in asked]
    return {name: asked[key] for name, key in keys}


def _path(group: str, name: Any) -> str:
    return f"{group.strip('/')}/{name}".lstrip("/")


def _asked_of_groups(tree: _Tree, argument: str, asked: Any) -> dict[str, dict[Any, Any]]:
    """What is asked of each variable of each group."""
    from aqt_lite import xarray as fields

    if not isinstance(asked, dict):
        found = {group: dict.fromkeys(fields.floats_of(ds), asked) for group, ds in tree.groups.items()}
        if not any(found.values()):
            raise ValueError(f"{tree.path} has no floating-point variable to pack")
        return found
    paths = {_path(group, name): str(name) for group, ds in tree.groups.items() for name in ds.data_vars}
    known = {*paths.values(), *(f"/{path}" for path in paths)}
    unknown = [name for name in asked if name not in known]
    if unknown:
        option = f"--{argument.replace('_', '-')}"
        raise ValueError(f"{option} names {unknown[0]!r}; {tree.path} has the variables {', '.join(paths)}")
    return {group: _named(asked, group, ds.data_vars) for group, ds in tree.groups.items()}


def _write_packed(tree: _Tree, bounds: dict[str, dict[Any, float]], options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    found, encodings = {}, {}
    with _telling("choosing"):
        for group, ds in tree.groups.items():
            with _in_group(group):
                found[group], encodings[group] = fields.packed(
                    ds, bounds[group], options.dtype, says_type=_is_store(options.target)
                )
    for group, encoding in encodings.items():
        for name, of_name in encoding.items():
            of_name.update(_layout(tree.groups[group][name], options))
    _write(tree, found, encodings, options, tree.groups, bounds)


def _write_rounded(tree: _Tree, argument: str, asked: dict[str, dict[Any, Any]], options: argparse.Namespace) -> None:
    """Floats of few significant bits, which are read again bit for bit."""
    from aqt_lite import xarray as fields

    if options.dtype != "auto":
        raise ValueError("--dtype is for the integers of --max-abs-err; what is rounded stays of its type")
    found, encodings = dict(tree.groups), {}
    with _telling("choosing"):
        for group, ds in tree.groups.items():
            with _in_group(group):
                how: dict[str, Any] = {argument: asked[group]}
                found[group] = fields.bitround(ds, **how) if asked[group] else ds
            encodings[group] = {name: _as_floats(found[group][name], ds[name], options) for name in asked[group]}
    _write(tree, found, encodings, options, found, {group: dict.fromkeys(e, 0.0) for group, e in encodings.items()})


def _as_floats(variable: Any, source: Any, options: argparse.Namespace | None = None) -> dict[Any, Any]:
    """The encoding of floats, compressed where ``options`` say how."""
    layout = {} if options is None else _layout(source, options)
    return {"_FillValue": variable.dtype.type("nan"), **layout}


def _unpack(options: argparse.Namespace) -> None:
    from aqt_lite import xarray as fields

    floats: set[tuple[str, Any]] = set()  # as they are, which stay so

    def chosen(group: str, raw: Any) -> list[Any]:
        packed = _packed_in(group, raw)
        floats.update((group, name) for name, v in raw.data_vars.items() if v.dtype.kind == "f" and name not in packed)
        return packed

    _check_target(options)
    with _opened(options.source, chosen, values=True) as tree:
        found, encodings = {}, {}
        for group, ds in tree.groups.items():
            names = [name for name, v in ds.data_vars.items() if v.dtype.kind == "f" and (group, name) not in floats]
            found[group] = ds.assign({name: fields.without_packing(fields.in_its_type(ds[name])) for name in names})
            encodings[group] = {name: _as_floats(found[group][name], ds[name]) for name in names}
        exactly = {group: dict.fromkeys(encoding, 0.0) for group, encoding in encodings.items()}
        _write(tree, found, encodings, options, tree.groups, exactly)
    _print_sizes(options)


def _verify(options: argparse.Namespace) -> None:
    """What the target says of its own variables, held against the source."""
    from aqt_lite import xarray as fields

    for path in (options.source, options.target):
        _check_source(path)
    with _opened(options.target) as again:
        said = {(group, name): v.attrs for group, ds in again.groups.items() for name, v in ds.data_vars.items()}
        table = _table(again)
    quantized = [name for (_, name), attrs in said.items() if fields.ATTRIBUTE in attrs]
    if quantized:
        raise ValueError(f"variable {quantized[0]!r} is quantized, and states no bound: compare with error_report")
    bounds = {place: float(attrs[fields.BOUND]) for place, attrs in said.items() if fields.BOUND in attrs}
    kept = {place: int(attrs[fields.KEPT]) for place, attrs in said.items() if fields.KEPT in attrs}
    if not (bounds or kept):
        raise ValueError(f"{options.target} states no bound ({fields.BOUND}) and no bits kept ({fields.KEPT})")

    def stated(group: str, _: Any) -> list[Any]:
        return [name for at, name in (*bounds, *kept) if at == group]

    with _opened(options.source, stated) as tree:
        for group, name in (*bounds, *kept):
            if group not in tree.groups or name not in tree.groups[group].data_vars:
                raise ValueError(
                    f"{options.source} has no variable {_path(group, name)!r}, of which {options.target} states a bound"
                )
        sources, within = {}, {}
        for group, ds in tree.groups.items():
            bits = {name: n for (at, name), n in kept.items() if at == group}
            sources[group] = fields.bitround(ds, bits) if bits else ds
            within[group] = {name: e for (at, name), e in bounds.items() if at == group} | dict.fromkeys(bits, 0.0)
        _check(sources, options.target, within)
        if not (_is_store(options.source) or _is_store(options.target)):
            _check_copy(tree, options.target, {group: set(ds.variables) for group, ds in tree.groups.items()})
    print(table)
    print(f"{options.target} holds {options.source}: {len(bounds) + len(kept)} variables as stated, all others exactly")


def _info(options: argparse.Namespace) -> None:
    _check_source(options.source)
    with _opened(options.source) as tree:
        print(_table(tree))
    print(f"{options.source}: {_bytes_of(options.source):,} bytes")


# ---- reading and writing


@dataclass
class _Tree:
    """What is in a file: a Dataset for each group, by its path, "/" for the file itself."""

    path: str
    groups: dict[str, Any]
    files: list[Any]
    """To be closed."""
    names: dict[str, list[Any]]
    """Variables of each group as they lie there."""
    composed: dict[str, list[str]]
    """Others of each group that no Dataset can have: compounds and ragged arrays of files of netCDF."""

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()


@contextmanager
def _in_group(group: str) -> Iterator[None]:
    """Errors and warnings say which group they are about."""
    if group == "/":
        yield
        return
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.showwarning = lambda message, *where, **how: show(f"group {group}: {message}", *where, **how)
        try:
            yield
        except (ValueError, TypeError) as error:
            raise type(error)(f"group {group}: {error}") from None


def _is_packed(variable: Any) -> bool:
    """Whether a variable, as it lies in its file, holds codes of CF for floats.

    A ``_FillValue`` alone makes none, nor does a factor that is an integer: values are of its type.
    """
    said = variable.attrs
    return ("scale_factor" in said or "add_offset" in said) and not _is_integer(said.get("scale_factor", 1.0))


def _is_integer(number: Any) -> bool:
    return isinstance(number, int) or (getattr(number, "dtype", None) is not None and number.dtype.kind in "iu")


def _packed_in(_: str, raw: Any) -> list[Any]:
    return [name for name, variable in raw.data_vars.items() if _is_packed(variable)]


def _opened(path: str, decoded: Callable[[str, Any], list[Any]] = _packed_in, *, values: bool = False) -> _Tree:
    """Datasets whose arrays are read chunk by chunk; with ``values``, of quantized variables, too.

    Of what is in a group, ``decoded`` says which have values in place of codes and NaN where they are missing; all
    others are as they lie there, bit for bit. What belongs to other variables, bounds of cells for instance, are
    coordinates: a bound in units of the data is not for them.
    """
    import dask  # noqa: F401  # said to be missing before anything is done
    import xarray as xr

    from aqt_lite import xarray as fields

    tree = _Tree(path, {}, [], {}, _composed(path))
    how: dict[str, Any] = {"engine": "zarr", "consolidated": False} if _is_store(path) else {}
    # Nothing is taken out of attributes, where xarray would drop what it does not find in the same group.
    how |= {"decode_times": False, "decode_coords": False, "cache": False}
    try:
        raws = {}
        for group, names in tree.composed.items():
            raws[group] = xr.open_dataset(path, group=group, mask_and_scale=False, drop_variables=names, **how)
            tree.files.append(raws[group])
            tree.names[group] = list(raws[group].variables)
        related = _related(raws)
        for group, raw in raws.items():
            names = decoded(group, raw.set_coords(related[group]))
            masked = {str(name): name in names for name in raw.variables}
            left_out = tree.composed[group]
            ds = xr.open_dataset(path, group=group, mask_and_scale=masked, drop_variables=left_out, **how)
            tree.files.append(ds)
            for variable in ds.variables.values():
                if "_FillValue" not in variable.attrs:
                    variable.encoding.setdefault("_FillValue", None)  # or xarray would write one where there was none
            ds = ds.set_coords(related[group])
            ds = ds.assign({name: variable.chunk(_chunks_of(variable)) for name, variable in ds.data_vars.items()})
            quantized = any(fields.ATTRIBUTE in variable.attrs for variable in ds.data_vars.values())
            tree.groups[group] = fields.dequantize(ds) if values and quantized else ds
    except BaseException:
        tree.__exit__()
        raise
    return tree


def _composed(path: str) -> dict[str, list[str]]:
    """The groups of a file, and in each what only a copy of the file can have."""
    try:
        if _is_store(path):
            import zarr

            root = zarr.open_group(path, mode="r", use_consolidated=False)
            found = [name for name, member in root.members(max_depth=None) if isinstance(member, zarr.Group)]
            return {"/": [], **{f"/{name}": [] for name in sorted(found)}}
        from aqt_lite import _netcdf

        return _netcdf.composed(path)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} is no file of netCDF or store of zarr that can be read: {why}") from None


def _related(raws: dict[str, Any]) -> dict[str, list[Any]]:
    """Variables of each group that attributes of others name: in the same group, or in one within it."""
    from aqt_lite import xarray as fields

    found: dict[str, dict[Any, None]] = {group: {} for group in raws}
    for group, raw in raws.items():
        for name in (name for variable in (raw, *raw.variables.values()) for name in fields.named_by(variable.attrs)):
            at = group
            while name not in raws[at].variables and at != "/":
                at = at.rpartition("/")[0] or "/"
            if name in raws[at].variables:
                found[at][name] = None
    return {group: list(names) for group, names in found.items()}


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


def _write(
    tree: _Tree,
    found: dict[str, Any],
    encodings: dict[str, dict[Any, Any]],
    options: argparse.Namespace,
    meant: dict[str, Any],
    bounds: dict[str, dict[Any, float]],
) -> None:
    """The Datasets ``found`` in a file beside the target, which takes its place once it is read again.

    It holds what ``meant`` has: some variables within their bounds, and all others exactly.
    """
    from aqt_lite import xarray as fields

    store = _is_store(options.target)
    copied = not (store or _is_store(options.source))
    parts = {group: _prepared(ds, encodings[group]) for group, ds in found.items()}

    def write(beside: str) -> None:
        if copied:
            changes = {group: _changes(tree.names[group], parts[group], encodings[group]) for group in parts}
            _copy(tree, beside, changes)
            _check_copy(tree, beside, changes)
        else:
            _write_apart(tree, beside, parts, store)
        _check(meant, beside, bounds, others=not copied)

    fields.written(options.target, write, store=store, sources=[options.source])


def _prepared(ds: Any, encoding: dict[Any, Any]) -> Any:
    """A Dataset with the encoding that it is written with. Coordinates say so in attributes, if they do."""
    ds = ds.reset_coords().copy(deep=False)
    for name, variable in ds.variables.items():
        variable.encoding = encoding.get(name, variable.encoding)
    return ds


def _changes(before: list[Any], after: Any, encoding: dict[Any, Any]) -> dict[Any, Any]:
    """Variables of a group that are new, are written anew, or are None, for they are gone."""
    gone = dict.fromkeys(name for name in before if name not in after.variables)
    return {**gone, **{name: v for name, v in after.variables.items() if name in encoding or name not in before}}


def _copy(tree: _Tree, path: str, changes: dict[str, dict[Any, Any]]) -> None:
    from aqt_lite import _netcdf

    _netcdf.copy(tree.path, path, changes)


def _check_copy(tree: _Tree, path: str, changed: dict[str, Any]) -> None:
    from aqt_lite import _netcdf

    broken = _netcdf.difference(tree.path, path, changed)
    if broken is not None:
        raise ValueError(broken)


def _write_apart(tree: _Tree, path: str, parts: dict[str, Any], store: bool) -> None:
    """Group by group, as xarray writes them."""
    from aqt_lite import xarray as fields

    lost = [_path(group, name) for group, names in tree.composed.items() for name in names]
    if lost:
        raise ValueError(f"variable {lost[0]!r} has elements of several numbers, which zarr has no type for")
    for group, ds in parts.items():
        mode: Any = "w" if group == "/" else "a"
        if store:
            fields.without_codecs(ds).to_zarr(path, group=group, mode=mode, consolidated=False)
        else:
            ds.to_netcdf(path, group=group, mode=mode, format="NETCDF4")


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


def _check(meant: dict[str, Any], path: str, bounds: dict[str, dict[Any, float]], *, others: bool = True) -> None:
    """ValueError where a file does not hold what is meant: some variables within bounds, the ``others`` exactly."""
    from aqt_lite import xarray as fields

    with _opened(path, lambda group, raw: list(bounds.get(group, ()))) as again:
        for group, ds in meant.items():
            if group not in again.groups:
                raise ValueError(f"group {group} is not in {path}")
            there, within = again.groups[group], bounds[group]
            with _in_group(group):
                for name, variable in ds.variables.items():
                    if name in within:
                        what = f"checking {_path(group, name)}"
                        fields.check_within(ds[name], there[name], within[name], _progress(what))
                    elif others and (name not in there.variables or not _same(variable, there[name].variable)):
                        raise ValueError(f"variable {name!r} is not read again as it was written")


def _same(a: Any, b: Any) -> bool:
    """Whether variables are equal, and numbers of one type; text may be kept in several."""
    as_here = [variable.dtype.newbyteorder("=") for variable in (a, b)]
    return bool(a.equals(b) and (as_here[0] == as_here[1] or a.dtype.kind in "OSUT"))


# ---- what is printed


def _table(tree: _Tree) -> str:
    """Variables, how they are kept, and the largest error that they were packed for, or the bits that they have."""
    rows = [("variable", "shape", "kept as", "values", "bytes", "max abs err", "bits kept")]
    for group, ds in tree.groups.items():
        notes = {
            str(variable.attrs.get("quantization")) for variable in ds.data_vars.values()
        }  # of CF: no data in them
        rows += [
            _row(_path(group, name), variable)
            for name, variable in ds.data_vars.items()
            if name not in notes or variable.ndim
        ]
        rows += [(_path(group, name), "", "compound or ragged", "", "", "", "") for name in tree.composed[group]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(name: str, variable: Any) -> tuple[str, str, str, str, str, str, str]:
    kept, said = variable.encoding.get("dtype", variable.dtype), variable.attrs
    size = variable.size * getattr(kept, "itemsize", variable.dtype.itemsize)
    values = "quantized" if "aqt_lite" in said else str(variable.dtype)
    shape = " x ".join(map(str, variable.shape)) or "1"
    bound, bits = said.get("max_abs_error"), said.get("quantization_nsb", "")
    bound = "" if bound is None else f"{float(bound):g}"
    return name, shape, str(kept), values, f"{size:,}", bound, str(bits)


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


if __name__ == "__main__":
    sys.exit(main())
