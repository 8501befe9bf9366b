"""Which adapter serves an array: built-in ones by the array's type, others once registered or through entry points.

Owns: the table of adapters and of their kernels, one instance each, and container registration. Imports: the
``Backend`` interface. No adapter, and so no framework, is imported before an array of it (or its name) turns up, and no
kernel before an operation runs: kernels build on the operations, and those on the container, which is registered here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._generic import GenericBackend
from aqt_lite._kernels import Kernels
from aqt_lite._namespace import Array, is_array
from aqt_lite._near import not_known, shown
from aqt_lite._protocol import Backend, Node, Ways

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "available_backends",
    "backend_of",
    "get_backend",
    "kernels_of",
    "opened",
    "register_backend",
    "register_container",
    "ways_of",
]

ENTRY_POINT_GROUP = "aqt_lite.backends"


def _has_shape_and_dtype(x: Any) -> bool:
    return not isinstance(x, type) and hasattr(x, "shape") and hasattr(x, "dtype")


def _is_of_numpy(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic)


# Functions with import statements, which torch.compile follows where an operation first runs inside what it compiles.


def _no_kernels() -> Kernels:
    return {}


def _kernels_of_numpy() -> Kernels:
    from aqt_lite.backends.cpu import kernels

    return kernels.KERNELS


def _kernels_of_torch() -> Kernels:
    from aqt_lite.backends.torch import products

    return products.KERNELS


def _kernels_of_jax() -> Kernels:
    from aqt_lite.backends.jax import products

    return products.KERNELS


@dataclass(frozen=True)
class _Builtin:
    adapter: str  # "module:class"
    needs: str  # module that must be importable
    install: str  # what to do where it is not
    array_modules: tuple[str, ...]  # top-level modules of its array types
    is_array: Callable[[Any], bool] = _has_shape_and_dtype  # which of those modules' types are arrays
    has_trees: bool = False  # whether it must know containers from its import on
    savers: tuple[
        tuple[str, str], ...
    ] = ()  # modules on top of it that must, too, with "module:function" that tells them
    kernels: Callable[[], Kernels] = _no_kernels


_BUILTIN = {
    "numpy": _Builtin(
        "aqt_lite.backends.numpy:NumpyBackend",
        "numpy",
        "pip install numpy",
        ("numpy", "ml_dtypes"),
        _is_of_numpy,
        kernels=_kernels_of_numpy,
    ),
    "jax": _Builtin(
        "aqt_lite.backends.jax:JaxBackend",
        "jax",
        "pip install 'aqt_lite[jax]'",
        ("jax", "jaxlib"),
        has_trees=True,
        savers=(("flax.serialization", "aqt_lite.backends.jax.flax_state:register"),),
        kernels=_kernels_of_jax,
    ),
    "torch": _Builtin(
        "aqt_lite.backends.torch:TorchBackend",
        "torch",
        "pip install 'aqt_lite[torch]'",
        ("torch",),
        has_trees=True,
        kernels=_kernels_of_torch,
    ),
    "array_api_strict": _Builtin(
        "aqt_lite.backends.strict:StrictBackend",
        "array_api_strict",
        "pip install array-api-strict",
        ("array_api_strict",),
    ),
}

_Adapter = TypeVar("_Adapter", bound=type[Backend])


class _Registered(NamedTuple):
    """An adapter that the program itself made known; as an entry point."""

    name: str
    adapter: type[Backend]

    def load(self) -> type[Backend]:
        return self.adapter


_registered: dict[str, _Registered] = {}
_instances: dict[str, Backend] = {}
_loaded_kernels: dict[str, Kernels] = {}
_by_type: dict[type, Backend] = {}
_lock = threading.RLock()  # of _instances and _containers; never held while importing, for imports have locks too


def get_backend(name: str) -> Backend:
    """The adapter of that name; ValueError for an unknown name, ImportError where its library is missing."""
    found = _instances.get(name) if isinstance(name, str) else None
    return found if found is not None else _load(name)


def _load(name: str) -> Backend:
    if not isinstance(name, str):
        raise TypeError(f"backend={shown(name)}: give the backend's name, one of {', '.join(_names())}")
    builtin = _BUILTIN.get(name)
    if builtin is not None:
        if importlib.util.find_spec(builtin.needs) is None:
            raise ImportError(f"backend={name!r} needs the package {builtin.needs}: {builtin.install}")
        module, _, attribute = builtin.adapter.partition(":")
        cls = getattr(importlib.import_module(module), attribute)
    else:
        plugin = next((e for e in _plugins() if e.name == name), None)
        if plugin is None:
            raise ValueError(not_known("backend", name, _names()))
        cls = plugin.load()
        _check(cls, f"the entry point for backend={name!r}")
        if cls.name != name:
            raise TypeError(
                f"the entry point for backend={name!r} leads to the adapter of {cls.name!r}: name them alike"
            )
    with _lock:
        found = _instances.get(name)
        if found is not None:  # another thread was faster
            return found
        instance: Backend = cls()
        for container in _containers:
            instance.register_container(*container)
        _instances[name] = instance
        return instance


def _check(adapter: Any, where: str) -> None:
    """TypeError where ``adapter`` is no class of adapters, or lacks what each must say of itself."""
    if not (isinstance(adapter, type) and issubclass(adapter, Backend)):
        raise TypeError(f"{where} must be a subclass of aqt_lite.testing.Backend, the class itself: got {adapter!r}")
    where = f"{where}, {adapter.__name__},"
    lacks = {*adapter.__abstractmethods__, *(m for m in ("name", "array_modules") if not hasattr(adapter, m))}
    if lacks:
        raise TypeError(f"{where} lacks {', '.join(sorted(lacks))}: define each in the class")
    if not isinstance(adapter.name, str):
        raise TypeError(f"{where} has name={adapter.name!r}: give what users are to write as backend=, a string")
    modules = adapter.array_modules
    if not (isinstance(modules, tuple) and all(isinstance(m, str) and "." not in m for m in modules)):
        raise TypeError(f"{where} has array_modules={modules!r}: give a tuple of the names of top-level modules")


def register_backend(adapter: _Adapter) -> _Adapter:
    """Make an adapter known to this process: by its name, and for arrays of its library.

    A package makes its adapter known to every process by an entry point instead, in the group ``aqt_lite.backends``.

    Parameters
    ----------
    adapter : type
        A subclass of :class:`aqt_lite.testing.Backend`; one that was registered under the same name is replaced.

    Returns
    -------
    type
        ``adapter``, so that this may decorate the class.

    Raises
    ------
    TypeError
        It is no such class, or lacks one of the members that every adapter must have.
    ValueError
        Its name is that of a built-in backend.

    Examples
    --------
    >>> import aqt_lite
    >>> from aqt_lite.testing import Backend
    >>> @aqt_lite.register_backend
    ... class MyBackend(Backend):
    ...     name = "mylib"
    Traceback (most recent call last):
    TypeError: adapter, MyBackend, lacks array_modules, asarray, to_numpy, xp: define each in the class
    """
    _check(adapter, "adapter")
    name = adapter.name
    if name in _BUILTIN:
        raise ValueError(f"adapter.name is {name!r}, a built-in backend: use another name")
    with _lock:
        _registered[name] = _Registered(name, adapter)
        _instances.pop(name, None)
        _by_type.clear()  # arrays of the library may have been met before
    return adapter


def kernels_of(name: str) -> Kernels:
    """The kernels of the built-in backend of that name, loaded on the first call; none for any other."""
    found = _loaded_kernels.get(name)
    if found is None:
        builtin = _BUILTIN.get(name)
        found = _loaded_kernels[name] = {} if builtin is None else builtin.kernels()
    return found


def _names() -> list[str]:
    return sorted({*_BUILTIN, *(e.name for e in _plugins())})


def backend_of(x: Array) -> Backend | None:
    """The adapter for an array, or None where ``x`` is no array of any library."""
    found = _by_type.get(type(x))
    if found is None:
        found = _find(type(x), x)
        if found is not None:
            _by_type[type(x)] = found
    return found


def _find(array_type: type, x: Array) -> Backend | None:
    if refusal(x, "x"):
        return None
    roots = [cls.__module__.partition(".")[0] for cls in array_type.__mro__]
    for root in roots:
        for name, builtin in _BUILTIN.items():
            if root in builtin.array_modules:  # modules, dtypes and classes of a library are no arrays
                return get_backend(name) if builtin.is_array(x) else None
    if not _has_shape_and_dtype(x):
        return None
    for plugin in _plugins():
        try:
            adapter = get_backend(plugin.name)
        except Exception as error:  # a plug-in that has nothing to do with x must not stop this
            warnings.warn(f"the plug-in for backend={plugin.name!r} fails to load: {error}", stacklevel=2)
            continue
        if any(root in adapter.array_modules for root in roots):
            return adapter
    if is_array(x):
        generic = GenericBackend.for_array(x)
        with _lock:
            found = _instances.setdefault(generic.name, generic)  # known by name from here on
        return found if isinstance(found, GenericBackend) else generic
    return None


def _plugins() -> tuple[_Registered | EntryPoint, ...]:
    return (*_registered.values(), *_entry_points())


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points  # a tenth of what importing this package takes

    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def available_backends() -> dict[str, str]:
    """Every known backend and whether it can be used here: "installed", or what is missing.

    Looks for packages without importing any of them.

    Returns
    -------
    dict
        Name to "installed", or to a sentence that says why not and what to do.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.available_backends()["numpy"]
    'installed'
    """
    found = {}
    for name, builtin in _BUILTIN.items():
        present = builtin.needs in sys.modules or importlib.util.find_spec(builtin.needs) is not None
        found[name] = "installed" if present else f"not installed: {builtin.install}"
    for plugin in _plugins():
        try:
            get_backend(plugin.name)
        except Exception as error:  # a broken plug-in is reported, not raised: the others still work
            found[plugin.name] = f"fails to load: {error}"
        else:
            found[plugin.name] = "installed"
    return found


# ---- containers: a class that compilers must see as a tree of arrays


def opened(node: Any) -> Node | None:
    """``node`` as a container of the trees of a library in use; None where none knows it."""
    return next((found for b in list(_instances.values()) if (found := b.opened(node)) is not None), None)


def ways_of(node: Any) -> Ways:
    """What to do with a model, said by the first library in use that knows better than to take it as a tree."""
    return next((found for b in list(_instances.values()) if any(found := b.ways_of(node))), Ways())


_Container = tuple[type, Callable[[Any], Any], Callable[[Any, Any], Any], tuple[str, ...]]
_containers: list[_Container] = []


def register_container(
    cls: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any], names: tuple[str, ...]
) -> None:
    """Make ``cls`` a tree node for every framework, whether it is imported before or after this call.

    A container that holds NumPy arrays may reach a framework's compiler without any call into this package after the
    framework's import, so registration follows that import.
    """
    with _lock:
        _containers.append((cls, flatten, unflatten, names))
        for instance in _instances.values():
            instance.register_container(cls, flatten, unflatten, names)
    for name, builtin in _BUILTIN.items():
        if builtin.has_trees:
            _once_imported(builtin.needs, functools.partial(_load_adapter, name))
        for module, tell in builtin.savers:
            _once_imported(module, functools.partial(_tell, module, tell))


def _once_imported(module: str, tell: Callable[[], None]) -> None:
    """Call ``tell`` now, or when ``module`` has been imported."""
    found = sys.modules.get(module)
    if found is not None and not getattr(found.__spec__, "_initializing", False):
        tell()
    elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, tell))


def _load_adapter(name: str) -> None:
    if _BUILTIN[name].adapter.partition(":")[0] not in sys.modules:  # else it is what imports the framework
        _run_or_warn(f"backend={name!r}", lambda: get_backend(name))


def _tell(saver: str, place: str) -> None:
    module, _, function = place.partition(":")
    _run_or_warn(f"{saver} with arrays", lambda: getattr(importlib.import_module(module), function)())


def _run_or_warn(what: str, tell: Callable[[], Any]) -> None:
    """Nobody has asked for it yet: where it does not work, imports go on, and who asks gets the error."""
    try:
        tell()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"{what} of aqt_lite cannot be used here ({problem})", RuntimeWarning, stacklevel=3)


class _AfterImport:
    """Calls ``tell``, which makes a module know the containers, once that module has been imported.

    A finder of ``sys.meta_path`` without its base class, whose module imports a tenth of all that this package does.
    """

    def __init__(self, module: str, tell: Callable[[], None]) -> None:
        self.module, self.tell = module, tell

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        # Not importlib.util.find_spec: that would come back here. A look-up need not be an import, so this stays.
        others = (finder.find_spec for finder in list(sys.meta_path) if finder is not self)
        spec = next((spec for find in others if (spec := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.tell()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
