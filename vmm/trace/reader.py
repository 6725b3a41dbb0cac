"""Opens a trace again: mapped, not loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vmm.core.errors import UsageError
from vmm.trace.arrays import Integers, mmap_ninja, np
from vmm.trace.layout import COLUMNS, FORMAT, SIDECAR, VERSION, Column


class Trace:
    """A trace's columns by name, all of `rows` events, in the order in which they ended.

    `torn`: events at the end that a killed run had not written completely; they are left out.
    `complete`: the run has ended its trace itself. Mapped files, one per column, are held until
    `close`.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises UsageError that says what is wrong with `path`."""
        self.path = Path(path)
        self.facts = _read_sidecar(self.path)
        self.names: list[str] = self.facts["names"]
        self.complete: bool = self.facts.get("complete") is True
        # The last file to be made; without it the run was killed before anything was flushed.
        began = self.complete or (self.path / COLUMNS[-1].name / "data.ninja").exists()
        columns = {
            column.name: _open_column(self.path, column) if began else _no_rows(column)
            for column in COLUMNS
        }
        self.rows = min(rows for rows, _, _ in columns.values())
        self.torn = max(max(rows, held) for rows, held, _ in columns.values()) - self.rows
        self._cells = {name: cells[: self.rows] for name, (_, _, cells) in columns.items()}

    def close(self) -> None:
        """Let go of the mapped files; the columns are gone then."""
        self._cells = {}

    def __getitem__(self, column: str) -> Integers:
        return self._cells[column]

    def name(self, number: int) -> str:
        """What the low half of a row's detail stands for."""
        return self.names[number] if number < len(self.names) else f"#{number}"


def _read_sidecar(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "no such folder"
        raise UsageError(f"{path}: {what}; give the DIR of a run with --trace DIR")
    try:
        facts = json.loads((path / SIDECAR).read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path} is not a trace: it has no {SIDECAR}; give the DIR of a run with --trace DIR"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a trace: {SIDECAR} cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UsageError(f"{path} is not a trace: {SIDECAR} does not say {FORMAT}")
    if facts.get("version") != VERSION:
        raise UsageError(
            f"{path} is a trace of version {facts.get('version')}; this pyvmm reads version "
            f"{VERSION}: use the pyvmm that recorded it"
        )
    names, states = facts.get("names"), facts.get("states", [])
    if not (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(states, list)
        and all(isinstance(s, list) and [type(x) for x in s] == [int, int, str] for s in states)
    ):
        raise UsageError(f"{path} is damaged: {SIDECAR} has no usable names and states")
    return facts


def _open_column(path: Path, column: Column) -> tuple[int, int, Integers]:
    """How many rows count, how many are there, and the cells."""
    folder = path / column.name
    try:
        shape = (folder / "shape.ninja").read_bytes()
        dtype = (folder / "dtype.ninja").read_text()
        held = os.stat(folder / "data.ninja").st_size // column.size
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: column {column.name}: {error}") from None
    if dtype != column.dtype or len(shape) != 8:
        raise UsageError(f"{path} is damaged: column {column.name} is no array of {column.dtype}")
    rows = int.from_bytes(shape, "little")
    if held < rows:
        raise UsageError(
            f"{path} is truncated: column {column.name} holds {held} of {rows} events; "
            "copy the folder again, or record again"
        )
    if rows == 0:
        return 0, held, _no_rows(column)[2]  # an empty file can't be mapped
    return rows, held, mmap_ninja.np_open_existing(folder)


def _no_rows(column: Column) -> tuple[int, int, Integers]:
    return 0, 0, np.empty(0, column.dtype)
