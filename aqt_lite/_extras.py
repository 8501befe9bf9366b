"""Packages that a module wants and that are not installed.

Owns: the error that says what installs them. Imports: nothing of this package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["installed_by"]


@contextlib.contextmanager
def installed_by(way: str, module: str) -> Iterator[None]:
    """Imports that ``module`` begins with: what is missing of them is an error that names the ``way`` to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "aqt_lite").partition(".")[0]
        if package == "aqt_lite":
            raise
        raise ModuleNotFoundError(f"{module} needs the package {package}: {way}", name=error.name) from None
