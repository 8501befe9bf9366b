"""What the library tells through ``logging``, under the name "aqt_lite".

Owns: the line before a wait that a user may wonder about, and that of a choice. Imports: nothing of this package.
"""

from __future__ import annotations

import logging

__all__ = ["announce", "announce_compilation"]

_logger = logging.getLogger("aqt_lite")
_announced: set[str] = set()


def announce_compilation(what: str) -> None:
    """Say at level INFO, once a process for each ``what``, that it is compiled when first used."""
    if what not in _announced:
        _announced.add(what)
        _logger.info("%s: compiled on first use, which takes some seconds, and cached on disk afterwards", what)


def announce(what: str) -> None:
    """Say at level INFO what was chosen in place of the user."""
    _logger.info("%s", what)
