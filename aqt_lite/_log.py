"""What the library tells through ``logging``, under the name "aqt_lite".

Owns: the line about a wait that a user may wonder about, and that of a choice. Imports: nothing of this package.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

__all__ = ["announce", "announce_unless_done"]

_logger = logging.getLogger("aqt_lite")


def announce(what: str) -> None:
    """Say at level INFO what was chosen in place of the user."""
    _logger.info("%s", what)


def announce_unless_done(what: str, seconds: float) -> Callable[[], None]:
    """Say at level INFO what is being done, once it has taken so long; what is returned says that it is done."""
    if not _logger.isEnabledFor(logging.INFO):
        return lambda: None
    timer = threading.Timer(seconds, announce, (what,))
    timer.daemon = True
    timer.start()
    return timer.cancel
