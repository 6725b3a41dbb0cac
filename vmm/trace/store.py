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
from pathlib import Path
from typing import Any

from vmm.core.errors import UsageError
from vmm.trace.layout import COLUMNS, FORMAT, ROW, SIDECAR, VERSION, Column

_SHAPE = struct.Struct("<Q")
_NEW_SIDECAR = f"{SIDECAR}.new"


class TraceStore:
    """Appends rows; one thread at a time."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder, or empty one that holds a trace. Raises UsageError naming `path`."""
        self._path = Path(path)
        self.rows = 0
        try:
            self._require_ours()
            self._path.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                self._files = [_ColumnFiles(self._path / c.name, c, opened) for c in COLUMNS]
                self._opened = opened.pop_all()
        except OSError as error:
            raise UsageError(
                f"--trace {path} cannot be written: {error.strerror}; give another folder"
            ) from None

    def _require_ours(self) -> None:
        """An earlier trace is replaced; anything else in the folder is not ours to touch."""
        if not self._path.exists():
            return
        if not self._path.is_dir():
            raise UsageError(f"--trace {self._path} is not a folder; give a new folder's name")
        ours = {SIDECAR, _NEW_SIDECAR, *(column.name for column in COLUMNS)}
        others = sorted(set(os.listdir(self._path)) - ours)
        if others:
            raise UsageError(
                f"--trace {self._path} holds something else ({others[0]}); give a new folder's name"
            )

    def append(self, rows: memoryview, count: int) -> None:
        """Write `count` rows (layout.ROW) from the front of `rows`. Raises OSError."""
        for column, files in zip(COLUMNS, self._files, strict=True):
            cells = rows[: count * ROW.size].cast(column.code)
            files.append(cells[column.offset // column.size :: ROW.size // column.size])
        self.rows += count
        for files in self._files:
            files.commit(self.rows)

    def write_sidecar(self, facts: dict[str, Any]) -> None:
        """Replace the sidecar, wholly or not at all. Raises OSError."""
        import json  # a run's start does not wait for it where nothing is traced

        text = json.dumps({"format": FORMAT, "version": VERSION, **facts}, indent=1)
        new = self._path / _NEW_SIDECAR
        new.write_text(text + "\n")
        os.replace(new, self._path / SIDECAR)

    def close(self) -> None:
        self._opened.close()


class _ColumnFiles:
    """One column: data.ninja grows, shape.ninja says how much of it counts."""

    def __init__(self, folder: Path, column: Column, opened: ExitStack) -> None:
        folder.mkdir(exist_ok=True)
        for name, text in (("type", "numpy"), ("dtype", column.dtype), ("order", "C")):
            (folder / f"{name}.ninja").write_text(text)
        # The shape first: rows of an earlier trace must not be counted as this one's.
        self._shape = self._create(folder / "shape.ninja", opened)
        self.commit(0)
        self._data = self._create(folder / "data.ninja", opened)

    @staticmethod
    def _create(path: Path, opened: ExitStack) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        opened.callback(os.close, fd)
        return fd

    def append(self, cells: memoryview) -> None:
        rest = memoryview(cells.tobytes())
        while rest:
            rest = rest[os.write(self._data, rest) :]

    def commit(self, rows: int) -> None:
        os.pwrite(self._shape, _SHAPE.pack(rows), 0)
