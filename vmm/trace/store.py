"""A trace on disk while it grows: one folder per column in mmap-ninja's format, and a sidecar.

The format is written by hand: it is four small files beside the raw data, and importing the
library (numpy with it) would cost more than the whole of a traced boot may. Readers use it.

What survives a kill: a batch is appended to every column's data first, then every column's shape
(8 bytes, one pwrite) is moved. Rows that all shapes and all data have are complete; anything past
them is a torn tail, which the reader finds. Nothing is synced: a machine that loses power may
lose any of it.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from typing import Any

from vmm.core.errors import UsageError
from vmm.core.output import write_all
from vmm.trace.layout import COLUMNS, FORMAT, ROW, SIDECAR, VERSION, Column
from vmm.trace.sidecar import to_json

_SHAPE = struct.Struct("<Q")
_NEW_SIDECAR = f"{SIDECAR}.new"


class TraceStore:
    """Appends rows; one thread at a time."""

    def __init__(self, path: str) -> None:
        """Make the folder, or empty one that holds a trace. Raises UsageError naming `path`."""
        self._path = path
        self.rows = 0
        self._files: list[_ColumnFiles] = []
        self._opened = ExitStack()
        try:
            held = self._held()
            os.makedirs(path, exist_ok=True)
            self.write_sidecar({"complete": False, "names": [""]})
            if held:
                self.open_columns()  # an earlier trace's rows are none of ours
        except OSError as error:
            raise UsageError(
                f"--trace {path} cannot be written: {error.strerror}; give another folder"
            ) from None

    def _held(self) -> set[str]:
        """What lies in the folder: an earlier trace at most, anything else is not ours to touch."""
        try:
            found = set(os.listdir(self._path))
        except FileNotFoundError:
            return set()
        except NotADirectoryError:
            if not os.path.exists(self._path):
                raise  # something on the way is a file
            raise UsageError(
                f"--trace {self._path} is not a folder; give a new folder's name"
            ) from None
        others = sorted(found - {SIDECAR, _NEW_SIDECAR, *(column.name for column in COLUMNS)})
        if others:
            raise UsageError(
                f"--trace {self._path} holds something else ({others[0]}); give a new folder's name"
            )
        return found

    def open_columns(self) -> None:
        """Make the columns' files, which the first `append` does else: 45 of them take a while."""
        if not self._files:
            self._files = [
                _ColumnFiles(f"{self._path}/{column.name}", column, self._opened)
                for column in COLUMNS
            ]

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
        _write_file(f"{self._path}/{_NEW_SIDECAR}", text + "\n")
        os.replace(f"{self._path}/{_NEW_SIDECAR}", f"{self._path}/{SIDECAR}")

    def close(self) -> None:
        self._opened.close()


class _ColumnFiles:
    """One column: data.ninja grows, shape.ninja says how much of it counts."""

    def __init__(self, folder: str, column: Column, opened: ExitStack) -> None:
        os.makedirs(folder, exist_ok=True)
        for name, text in (("type", "numpy"), ("dtype", column.dtype), ("order", "C")):
            _write_file(f"{folder}/{name}.ninja", text)
        # The shape first: rows of an earlier trace must not be counted as this one's.
        self._shape = _create(f"{folder}/shape.ninja")
        opened.callback(os.close, self._shape)
        self.commit(0)
        self._data = _create(f"{folder}/data.ninja")
        opened.callback(os.close, self._data)

    def append(self, cells: memoryview) -> None:
        write_all(self._data, cells.tobytes())

    def commit(self, rows: int) -> None:
        os.pwrite(self._shape, _SHAPE.pack(rows), 0)


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def _write_file(path: str, text: str) -> None:
    fd = _create(path)
    try:
        write_all(fd, text.encode())
    finally:
        os.close(fd)
