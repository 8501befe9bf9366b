"""What JAX's functions are told where they take a container for an array.

Owns: the hook by which they ask for one. Imports: the words.

``jax.numpy`` asks ``__jax_array__`` of what is no array, and so do the operators of its arrays, ``x @ q``, which leave
the answer alone where it is no array either, and ask the container instead. So the answer is an object that is no array
and raises as soon as anything is asked of it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from aqt_lite._ways import no_array_of

__all__ = ["refuse"]


def refuse(cls: type) -> None:
    """Make functions of ``jax.numpy``, but no operators, raise TypeError with the way where given a ``cls``."""
    cls.__jax_array__ = _no_array_of  # type: ignore[attr-defined]


class _NoArray:
    """No array, and says why to whoever asks."""

    __slots__ = ("_words",)

    def __init__(self, words: str) -> None:
        self._words = words

    def __getattr__(self, name: str) -> NoReturn:
        if name == "aval":  # isinstance(..., jax.Array) asks for it
            raise AttributeError(name)
        raise TypeError(self._words)

    def __format__(self, how: str) -> NoReturn:  # within JAX's own words
        raise TypeError(self._words)


def _no_array_of(node: Any) -> _NoArray:
    return _NoArray(
        no_array_of("jax.numpy", node, "aqt_lite.linen.quantize, aqt_lite.nnx.quantize_ or aqt_lite.equinox.quantize")
    )
