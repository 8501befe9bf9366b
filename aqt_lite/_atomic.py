"""Files that are whole or not there: written beside their place, forced to the disk, then put in it at once.

Owns: ``replacing``. Imports: nothing of this package.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import BinaryIO

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[str], BinaryIO]]:
    """Files to be written, ``begin(path)`` each, which take their places in that order if nothing fails inside.

    All are on the disk before the first takes its place. If something fails, nothing of them is left.
    """
    begun: list[_Replacement] = []

    def begin(path: str) -> BinaryIO:
        begun.append(_Replacement(path))
        return begun[-1].file

    try:
        yield begin
        for new in begun:
            new.file.flush()
            os.fsync(new.file.fileno())
        for new in begun:
            new.commit()
    except OSError as error:
        if error.filename is None and begun:  # a full disk
            error.filename = begun[-1].path
        raise
    finally:
        for new in begun:
            new.discard()


class _Replacement:
    """A file that takes the place of another.

    Where the system has files without a name (Linux, most file systems), it has none before that, so that not even a
    killed process leaves anything behind.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)  # a link stays one: what it leads to is replaced
        self._folder, name = os.path.split(self.path)
        self._name = f".{name}.{secrets.token_hex(8)}.tmp"
        self._has_name = False
        try:
            self.file: BinaryIO = os.fdopen(self._open(), "w+b")
        except OSError as error:
            error.filename = path  # not the temporary name
            raise

    def _open(self) -> int:
        if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # a file system that has no such files
                return os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        found = os.open(os.path.join(self._folder, self._name), flags, 0o666)
        self._has_name = True
        return found

    def commit(self) -> None:
        if not self._has_name:
            with self._opened_folder() as folder:  # given, it makes Python follow the link that /proc has
                os.link(f"/proc/self/fd/{self.file.fileno()}", self._name, dst_dir_fd=folder)
            self._has_name = True
        self.file.close()
        os.replace(os.path.join(self._folder, self._name), self.path)
        self._has_name = False
        if hasattr(os, "O_DIRECTORY"):
            with self._opened_folder() as folder:
                os.fsync(folder)  # the new entry of the folder, too

    @contextlib.contextmanager
    def _opened_folder(self) -> Iterator[int]:
        folder = os.open(self._folder, os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield folder
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Leave nothing of it; after ``commit`` there is nothing to do."""
        with contextlib.suppress(OSError):  # that it could not be written was raised already
            self.file.close()
        if self._has_name:
            os.unlink(os.path.join(self._folder, self._name))
            self._has_name = False
