"""Opens a trace again: mapped, not loaded."""

from __future__ import annotations

import os
from pathlib import Path

from vmm.core.errors import UsageError
from vmm.core.given import open_given, read_given
from vmm.trace.arrays import Integers, mmap_ninja, np
from vmm.trace.facts import read_facts
from vmm.trace.layout import COLUMNS, MOST_ROWS, MOST_TIME, Column

_CHUNK = 1 << 20
_MOST_SMALL = 64
"""Bytes of what says a column's shape and type."""
_MOST_TORN = 1 << 16
"""Events past the end that a killed run may have left."""
_COPY = "copy the folder again, or record again"


class Trace:
    """A trace's columns by name, all of `rows` events, in the order in which they ended.

    `torn`: events at the end that a killed run had not written completely; they are left out.
    `complete`: the run has ended its trace itself. Mapped files, one per column, are held until
    `close`.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises UsageError that says what is wrong with `path`."""
        self.path = Path(path)
        folder = _open_folder(self.path)
        try:
            self.facts = read_facts(self.path, folder)
            self.names: list[str] = self.facts["names"]
            self.complete: bool = self.facts.get("complete") is True
            # The last file to be made; without it the run was killed before anything was flushed.
            began = self.complete or _exists(f"{COLUMNS[-1].name}/data.ninja", folder)
            columns = {
                column.name: _open_column(self.path, folder, column) if began else _no_rows(column)
                for column in COLUMNS
            }
        finally:
            os.close(folder)
        self.rows = min(rows for rows, _, _ in columns.values())
        self.torn = max(max(rows, held) for rows, held, _ in columns.values()) - self.rows
        self._cells = {name: cells[: self.rows] for name, (_, _, cells) in columns.items()}
        self._check_rows()

    def _check_rows(self) -> None:
        """Times that can be added without an overflow. Raises UsageError."""
        for start in range(0, self.rows, _CHUNK):
            part = slice(start, start + _CHUNK)
            for name in ("time_ns", "latency_ns"):
                cells = self._cells[name][part]
                row = int(np.argmax(cells))
                if cells[row] > MOST_TIME:
                    raise UsageError(
                        f"{self.path} is damaged: {name} of event {start + row} is {cells[row]}, "
                        f"more than {MOST_TIME}; {_COPY}"
                    )

    def close(self) -> None:
        """Let go of the mapped files; the columns are gone then."""
        self._cells = {}

    def __getitem__(self, column: str) -> Integers:
        return self._cells[column]

    def name(self, number: int) -> str:
        """What the low half of a row's detail stands for."""
        return self.names[number] if number < len(self.names) else f"#{number}"


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        what = "no such folder"
    except NotADirectoryError:
        what = "is not a folder"
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        what = str(error.strerror) if isinstance(error, OSError) else str(error)
    raise UsageError(f"{path}: {what}; give the DIR of a run with --trace DIR")


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _open_column(path: Path, folder: int, column: Column) -> tuple[int, int, Integers]:
    """How many rows count, how many are there, and the cells."""
    about = f"{path} is damaged: column {column.name}: "
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        inside = os.open(column.name, flags, dir_fd=folder)
    except OSError as error:
        raise UsageError(f"{about}{error.strerror}; {_COPY}") from None
    try:
        small = {
            name: read_given(
                f"{name}.ninja", f"{about}{name}.ninja", _COPY,
                most=_MOST_SMALL, folder=inside, follow=False,
            )
            for name in ("shape", "dtype", "order", "type")
        }  # fmt: skip
        shape = small["shape"]
        said = (small["type"], small["dtype"], small["order"])
        if said != (b"numpy", column.dtype.encode(), b"C") or len(shape) != 8:
            raise UsageError(
                f"{path} is damaged: column {column.name} is no array of {column.dtype}; {_COPY}"
            )
        rows = int.from_bytes(shape, "little")
        if rows > MOST_ROWS:
            raise UsageError(
                f"{path}: column {column.name} has {rows} events; {MOST_ROWS} at most are "
                f"recorded and read: {_COPY}"
            )
        data = open_given(
            "data.ninja", f"{about}data.ninja", _COPY,
            most=(MOST_ROWS + _MOST_TORN) * column.size, folder=inside, follow=False,
        )  # fmt: skip
        held = os.fstat(data).st_size // column.size
        os.close(data)
        if held < rows:
            raise UsageError(
                f"{path} is truncated: column {column.name} holds {held} of {rows} events; {_COPY}"
            )
        if rows == 0:
            return 0, held, _no_rows(column)[2]  # an empty file can't be mapped
        return rows, held, mmap_ninja.np_open_existing(Path(f"/proc/self/fd/{inside}"))
    finally:
        os.close(inside)


def _no_rows(column: Column) -> tuple[int, int, Integers]:
    return 0, 0, np.empty(0, column.dtype)
