"""A trace on disk while it grows: one folder per column in mmap-ninja's format, and a sidecar.

The format is written by hand: it is four small files beside the raw data, and importing the
library (numpy with it) would cost more than the whole of a traced boot may. Readers use it.

What survives a kill: a batch is appended to every column's data first, then every column's shape
(8 bytes, one pwrite) is moved. Rows that all shapes and all data have are complete; anything past
them is a torn tail, which the reader finds. Nothing is synced: a machine that loses power may
lose any of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import ExitStack, suppress
from typing import Any

from vmm.core.errors import UsageError, tell
from vmm.core.output import write_all
from vmm.trace.layout import COLUMNS, FORMAT, ROW, SIDECAR, VERSION, Column
from vmm.trace.sidecar import to_json

_SHAPE = struct.Struct("<Q")
_NEW_SIDECAR = f"{SIDECAR}.new"
_COLUMN_FILES = {f"{name}.ninja" for name in ("type", "dtype", "order", "shape", "data")}
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class TraceStore:
    """Appends rows; one thread at a time. Everything is reached from an fd of the folder, never
    through a link that somebody put there, and only what an earlier trace left is replaced."""

    def __init__(self, path: str) -> None:
        """Make the folder, or empty one that holds a trace. Raises UsageError naming `path`."""
        self._path = path
        self.rows = 0
        self._files: list[_ColumnFiles] = []
        self._opened = ExitStack()
        try:
            self._folder = self._open_folder()
            self._opened.callback(os.close, self._folder)
            earlier = self._earlier()
            self.write_sidecar({"complete": False, "names": [""]})
            if earlier:
                tell(f"--trace {path}: the trace that was there is replaced")
                self._remove_columns(earlier)
        except OSError as error:
            self._opened.close()
            raise UsageError(
                f"--trace {path} cannot be written: {error.strerror}; give another folder"
            ) from None
        except UsageError:
            self._opened.close()
            raise

    def _open_folder(self) -> int:
        """The folder, made if need be, and locked: two runs in one would make a mess."""
        try:
            os.makedirs(self._path, exist_ok=True)
            fd = os.open(self._path, _FOLDER)
        except (FileExistsError, NotADirectoryError):
            if not os.path.lexists(self._path):
                raise  # something on the way is a file
            raise UsageError(
                f"--trace {self._path} is not a folder; give a new folder's name"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UsageError(
                f"--trace {self._path}: another pyvmm is writing its trace there; give a new "
                "folder's name"
            ) from None
        except OSError:
            pass  # a file system without locks
        return fd

    def _earlier(self) -> set[str]:
        """The columns of an earlier trace; anything else is not ours to touch (UsageError)."""
        found = set(os.listdir(self._folder))
        columns = found & {column.name for column in COLUMNS}
        others = sorted(found - {SIDECAR, _NEW_SIDECAR} - columns)
        for name in found - set(others) - columns:
            if not stat.S_ISREG(self._mode(name, self._folder)):
                others.append(name)
        if columns and SIDECAR not in found:
            others += sorted(columns)  # folders that happen to have such a name
        for column in sorted(columns):
            if not stat.S_ISDIR(self._mode(column, self._folder)):
                others.append(column)
                continue
            folder = os.open(column, _FOLDER | os.O_NOFOLLOW, dir_fd=self._folder)
            try:
                others += [
                    f"{column}/{name}"
                    for name in os.listdir(folder)
                    if name not in _COLUMN_FILES or not stat.S_ISREG(self._mode(name, folder))
                ]
            finally:
                os.close(folder)
        if others:
            raise UsageError(
                f"--trace {self._path} holds something else ({others[0]}); give a new folder's name"
            )
        return columns

    @staticmethod
    def _mode(name: str, folder: int) -> int:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode

    def _remove_columns(self, columns: set[str]) -> None:
        for column in columns:
            folder = os.open(column, _FOLDER | os.O_NOFOLLOW, dir_fd=self._folder)
            try:
                for name in os.listdir(folder):
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
            os.rmdir(column, dir_fd=self._folder)

    def open_columns(self) -> None:
        """Make the columns' files, which the first `append` does else: 45 of them take a while."""
        if not self._files:
            self._files = [_ColumnFiles(self._folder, column, self._opened) for column in COLUMNS]

    def append(self, rows: memoryview, count: int) -> None:
        """Write `count` rows (layout.ROW) from the front of `rows`. Raises OSError."""
        self.open_columns()
        for column, files in zip(COLUMNS, self._files, strict=True):
            cells = rows[: count * ROW.size].cast(column.code)
            files.append(cells[column.offset // column.size :: ROW.size // column.size])
        self.rows += count
        for files in self._files:
            files.commit(self.rows)

    def write_sidecar(self, facts: dict[str, Any]) -> None:
        """Replace the sidecar, wholly or not at all. Raises OSError."""
        text = to_json({"format": FORMAT, "version": VERSION, **facts})
        with suppress(FileNotFoundError):
            os.unlink(_NEW_SIDECAR, dir_fd=self._folder)  # of a run that was killed
        try:
            _write_file(self._folder, _NEW_SIDECAR, text + "\n")
        except OSError:
            with suppress(OSError):
                os.unlink(_NEW_SIDECAR, dir_fd=self._folder)
            raise
        folders = {"src_dir_fd": self._folder, "dst_dir_fd": self._folder}
        os.replace(_NEW_SIDECAR, SIDECAR, **folders)

    def close(self) -> None:
        self._opened.close()


class _ColumnFiles:
    """One column: data.ninja grows, shape.ninja says how much of it counts."""

    def __init__(self, trace: int, column: Column, opened: ExitStack) -> None:
        os.mkdir(column.name, dir_fd=trace)
        folder = os.open(column.name, _FOLDER | os.O_NOFOLLOW, dir_fd=trace)
        try:
            for name, text in (("type", "numpy"), ("dtype", column.dtype), ("order", "C")):
                _write_file(folder, f"{name}.ninja", text)
            self._shape = _create(folder, "shape.ninja")
            opened.callback(os.close, self._shape)
            self.commit(0)
            self._data = _create(folder, "data.ninja")
            opened.callback(os.close, self._data)
        finally:
            os.close(folder)

    def append(self, cells: memoryview) -> None:
        write_all(self._data, cells.tobytes())

    def commit(self, rows: int) -> None:
        if os.pwrite(self._shape, _SHAPE.pack(rows), 0) != _SHAPE.size:
            raise OSError(errno.EIO, "half of a row count is written")


def _create(folder: int, name: str) -> int:
    """A file that nobody has made before."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o666, dir_fd=folder)


def _write_file(folder: int, name: str, text: str) -> None:
    fd = _create(folder, name)
    try:
        write_all(fd, text.encode())
    finally:
        os.close(fd)
