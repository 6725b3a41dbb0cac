"""Where a sweep's results are: one SQLite file, written by one process at a time.

Each result is a transaction of its own, in the mode WAL where the file system has it: whoever is
killed leaves the results before it whole, and others may read meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vmm.core.errors import OutputError, UsageError
from vmm.core.given import Unusable, open_given
from vmm.sweeps.content import Content

APPLICATION = 0x7079766D
"""What SQLite's header says of whose file it is (PRAGMA application_id): "pyvm"."""
LAYOUT = 1
_MOST = 1 << 40
_SCHEMA = """
CREATE TABLE about(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE definitions(
    id INTEGER PRIMARY KEY, at REAL NOT NULL, pyvmm TEXT NOT NULL, definition TEXT NOT NULL);
CREATE TABLE contents(digest TEXT PRIMARY KEY, name TEXT NOT NULL, bytes INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE results(
    key TEXT PRIMARY KEY,
    status TEXT NOT NULL CHECK (status IN ('ok', 'failed')),
    cell TEXT NOT NULL,
    contents TEXT NOT NULL,
    figures TEXT NOT NULL,
    ended TEXT,
    error TEXT,
    log TEXT,
    worker TEXT NOT NULL,
    at REAL NOT NULL,
    seconds REAL NOT NULL,
    tries INTEGER NOT NULL) WITHOUT ROWID;
"""


class Result(NamedTuple):
    """What is stored of a cell. `figures` of a failed one are empty; `error` and `log` say why."""

    status: str
    figures: Mapping[str, float]
    ended: str | None
    error: str | None
    log: str | None
    worker: str
    seconds: float
    tries: int


class Store:
    """An open store; nobody else writes to it before `close`."""

    def __init__(self, path: str, name: str, *, create: bool = True) -> None:
        """`name` is the sweep's: a store has the results of one. Raises UsageError."""
        self.path = path
        is_new = not os.path.exists(path)
        if is_new and not create:
            raise UsageError(f"{path}: no such store; it is made by running the sweep")
        if not is_new:
            try:
                os.close(open_given(path, path, "give another --store", most=_MOST))
            except Unusable:
                raise
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=10)
        except sqlite3.Error as error:
            raise UsageError(f"--store {path}: {error}; give another path") from None
        self._lock: int | None = None
        try:
            self._open(name)
        except sqlite3.DatabaseError as error:
            self.close()
            raise UsageError(
                f"{path} is no store of a sweep: {error}; give another --store"
            ) from None
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> None:
        # Closing any descriptor of the file would drop SQLite's own locks: this one stays open.
        self._lock = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is being written by another sweep; wait for it, or give another "
                "--store"
            ) from None
        self._db.execute("PRAGMA journal_mode = WAL")  # where it can't be had it stays as it is
        self._db.execute("PRAGMA synchronous = NORMAL")
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not application and not tables:
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO about VALUES ('sweep', ?)", (name,))
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {LAYOUT}")
            return
        if application != APPLICATION:
            raise UsageError(f"{self.path} is a database of another program; give another --store")
        (layout,) = self._db.execute("PRAGMA user_version").fetchone()
        if layout != LAYOUT:
            raise UsageError(
                f"{self.path} has the layout {layout} of another pyvmm, not {LAYOUT}; "
                "give another --store"
            )
        (other,) = self._db.execute("SELECT value FROM about WHERE name = 'sweep'").fetchone()
        if other != name:
            raise UsageError(
                f"{self.path} is the store of the sweep {other!r}, not of {name!r}; "
                "give another --store"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OutputError(f"{self.path} could not be written: {error}; make room") from error

    def begin(self, definition: str, pyvmm: str, contents: Iterable[Content]) -> None:
        """Note what is about to be run: the definition, and what its digests are of."""
        with self._transaction():
            (last,) = self._db.execute("SELECT max(id), definition FROM definitions").fetchone()[
                1:
            ] or (None,)
            if last != definition:
                self._db.execute(
                    "INSERT INTO definitions(at, pyvmm, definition) VALUES (?, ?, ?)",
                    (time.time(), pyvmm, definition),
                )
            self._db.executemany(
                "INSERT OR IGNORE INTO contents VALUES (?, ?, ?)",
                ((each.digest, each.name, each.bytes) for each in contents),
            )

    def statuses(self) -> dict[str, str]:
        """The status of every stored result, by its key."""
        return dict(self._db.execute("SELECT key, status FROM results"))

    def put(
        self, key: str, cell: Mapping[str, Any], contents: Iterable[str], result: Result
    ) -> None:
        """Store a result; one that is there with figures already stays. Raises OutputError."""
        row = (
            key, result.status, json.dumps(cell), json.dumps(sorted(contents)),
            json.dumps(dict(result.figures)), result.ended, result.error, result.log,
            result.worker, time.time(), result.seconds,
        )  # fmt: skip
        with self._transaction():
            self._db.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1) "
                "ON CONFLICT (key) DO UPDATE SET status = excluded.status, cell = excluded.cell, "
                "contents = excluded.contents, figures = excluded.figures, "
                "ended = excluded.ended, error = excluded.error, log = excluded.log, "
                "worker = excluded.worker, at = excluded.at, seconds = excluded.seconds, "
                "tries = tries + 1 WHERE results.status = 'failed'",
                row,
            )

    def results(self) -> dict[str, Result]:
        """Everything that is stored, by key."""
        rows = self._db.execute(
            "SELECT key, status, figures, ended, error, log, worker, seconds, tries FROM results"
        )
        return {
            key: Result(status, json.loads(figures), *rest) for key, status, figures, *rest in rows
        }

    def close(self) -> None:
        """Let others write."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
