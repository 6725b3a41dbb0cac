"""The store: one writer, one sweep, each result once."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.sweeps.store import Result, Store

ROOT = Path(__file__).resolve().parents[3]
OK = Result("ok", {"guest_ns": 1.0}, None, None, None, "here", 0.1, 1)
FAILED = Result("failed", {}, None, "it broke", "log", "here", 0.1, 1)


def opened(path: Path, name: str = "s") -> Store:
    return Store(str(path), name)


def test_result_stored_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "s.sqlite")) as store:
        store.put("k", {"policy": "A"}, ["d"], OK)
    with closing(opened(tmp_path / "s.sqlite")) as store:
        assert store.results() == {"k": OK}


def test_result_that_is_there_stays_and_a_failed_one_is_replaced(tmp_path: Path) -> None:
    other = OK._replace(figures={"guest_ns": 2.0})
    with closing(opened(tmp_path / "s.sqlite")) as store:
        store.put("a", {}, [], OK)
        store.put("a", {}, [], other)
        store.put("b", {}, [], FAILED)
        store.put("b", {}, [], FAILED)
        store.put("c", {}, [], FAILED)
        store.put("c", {}, [], other)

        found = store.results()

    assert found == {"a": OK, "b": FAILED._replace(tries=2), "c": other._replace(tries=2)}


def test_definition_is_noted_when_it_changes(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "s.sqlite")) as store:
        for text in ("one", "one", "two", "one"):
            store.begin(text, "0.1.0", [])
    with closing(sqlite3.connect(tmp_path / "s.sqlite")) as db:
        rows = db.execute("SELECT definition FROM definitions ORDER BY id").fetchall()

    assert rows == [("one",), ("two",), ("one",)]


def test_store_of_another_sweep_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "s.sqlite", "boot").close()

    with pytest.raises(UsageError, match=r"is the store of the sweep 'boot', not of 'disk'; give"):
        opened(tmp_path / "s.sqlite", "disk")


def test_store_that_is_being_written_is_refused_and_may_be_read(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "s.sqlite")) as store:
        store.put("k", {}, [], OK)
        with pytest.raises(UsageError, match="is being written by another sweep; wait for it"):
            opened(tmp_path / "s.sqlite")
        with closing(sqlite3.connect(tmp_path / "s.sqlite")) as db:
            assert db.execute("SELECT count(*) FROM results").fetchone() == (1,)


def test_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("my thesis " * 200)
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute("CREATE TABLE mine(x)")
    newer = tmp_path / "newer"
    opened(newer).close()
    with closing(sqlite3.connect(newer)) as db:
        db.execute("PRAGMA user_version = 99")

    for name, message in (
        ("text", "is no store of a sweep: file is not a database"),
        ("db", "is a database of another program"),
        ("newer", "has the layout 99 of another pyvmm"),
        (".", "is a directory, not a regular file"),
        ("no/where", "unable to open database file"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(tmp_path / name)
    assert text.read_text() == "my thesis " * 200


def test_store_that_is_only_read_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such store; it is made by running the sweep"):
        Store(str(tmp_path / "s.sqlite"), "s", create=False)

    assert not (tmp_path / "s.sqlite").exists()


def test_results_before_a_kill_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    program = (
        "import sys, itertools\n"
        "from vmm.sweeps.store import Store, Result\n"
        "store = Store(sys.argv[1], 's')\n"
        "for n in itertools.count():\n"
        "    store.put(f'{n:06}', {}, [], Result('ok', {'n': n}, None, None, None, '', 0, 1))\n"
        "    print(n, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= 50:
                break
        writer.send_signal(signal.SIGKILL)
        last = int(line)

    with closing(opened(path)) as store:
        found = store.results()

    assert len(found) > last
    assert all(result.figures == {"n": int(key)} for key, result in found.items())
    assert sorted(found) == [f"{n:06}" for n in range(len(found))]
