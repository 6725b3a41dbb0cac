"""Events go into a store that mmap-ninja opens; what a kill or a full disk leaves is said."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.trace import now, rows_of, start_recorder
from vmm.core.errors import UsageError
from vmm.trace.arrays import mmap_ninja
from vmm.trace.layout import COLUMNS, Kind
from vmm.trace.reader import Trace
from vmm.trace.recorder import Recorder
from vmm.trace.store import TraceStore
from vmm.trace.summary import summarise


def test_event_recorded_is_read_back_field_by_field(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    before = now()

    recorder.record(Kind.SHARE, 3, before, 0x1000, 0x2000, recorder.name("port") | 7 << 16, 13, 2)
    recorder.close()

    [row] = rows_of(tmp_path / "t")
    fields = ("kind", "vcpu", "gpa", "bytes", "errno", "decision", "name")
    assert [row[name] for name in fields] == ["share", 3, 0x1000, 0x2000, 13, 2, "port"]
    assert row["detail"] >> 16 == 7
    assert 0 < row["latency_ns"] <= now() - before


def test_column_written_is_what_mmap_ninja_opens(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    for number in range(5):
        recorder.record(Kind.EXIT, 0, now(), gpa=number)
    recorder.close()

    opened = {c.name: mmap_ninja.np_open_existing(tmp_path / "t" / c.name) for c in COLUMNS}

    assert opened["gpa"].tolist() == [0, 1, 2, 3, 4]
    assert {name: str(cells.dtype) for name, cells in opened.items()} == {
        c.name: c.dtype for c in COLUMNS
    }


def test_buffer_full_many_times_and_many_threads_lose_nothing(tmp_path: Path) -> None:
    recorder = Recorder(TraceStore(str(tmp_path / "t")), {}, capacity=64)
    recorder.start()

    def work(vcpu: int) -> None:
        for number in range(500):
            recorder.record(Kind.EXIT, vcpu, now(), gpa=number, size=number + vcpu)

    threads = [threading.Thread(target=work, args=(vcpu,)) for vcpu in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()

    rows = rows_of(tmp_path / "t")
    for vcpu in range(4):
        assert [row["gpa"] for row in rows if row["vcpu"] == vcpu] == list(range(500))
    assert all(row["bytes"] == row["gpa"] + row["vcpu"] for row in rows)


def test_disk_full_ends_the_trace_and_not_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = start_recorder(tmp_path / "t")

    def full(self: TraceStore, rows: memoryview, count: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TraceStore, "append", full)
    for _ in range(3):
        recorder.record(Kind.EXIT, 0, now())
        recorder.flush()
    recorder.close(complete=True)

    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--trace: writing failed, the trace ends here: No space left on device" in told
    assert not Trace(tmp_path / "t").complete


def test_event_after_the_end_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = start_recorder(tmp_path / "t")
    recorder.close(complete=True)

    recorder.record(Kind.EXIT, 0, now())
    recorder.flush()

    assert Trace(tmp_path / "t").rows == 0
    assert capsys.readouterr().err == ""


def test_name_is_on_disk_before_the_rows_that_use_it(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    recorder.flush()
    recorder.record(Kind.EXIT, 0, now(), detail=recorder.name("late"))
    recorder.flush()

    names = [row["name"] for row in rows_of(tmp_path / "t")]  # as a kill would leave it
    recorder.close()

    assert names == ["late"]


def test_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(UsageError, match=r"holds something else \(thesis.tex\)"):
        TraceStore(str(tmp_path))

    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").touch()

    with pytest.raises(UsageError, match="is not a folder"):
        TraceStore(str(tmp_path / "t"))


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").touch()

    with pytest.raises(UsageError, match="t/sub cannot be written: Not a directory"):
        TraceStore(str(tmp_path / "t" / "sub"))


def test_earlier_trace_in_the_folder_is_replaced(tmp_path: Path) -> None:
    for count in (3, 1):
        recorder = start_recorder(tmp_path / "t")
        for _ in range(count):
            recorder.record(Kind.EXIT, 0, now())
        recorder.close(complete=True)

    assert (Trace(tmp_path / "t").rows, Trace(tmp_path / "t").torn) == (1, 0)


def test_rows_of_an_earlier_trace_are_gone_before_the_first_flush(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    recorder.record(Kind.EXIT, 0, now())
    recorder.close(complete=True)

    TraceStore(str(tmp_path / "t")).close()

    assert (Trace(tmp_path / "t").rows, Trace(tmp_path / "t").torn) == (0, 0)


_KILLED = """
import sys, time
from tests.support.trace import start_recorder
recorder = start_recorder(sys.argv[1])
number = 0
while True:
    recorder.record(8, 0, time.monotonic_ns(), number, number, recorder.name("io"))
    number += 1
    if number == 5000:
        recorder.flush()
        print("flushed", flush=True)
"""


def test_killed_run_leaves_what_was_flushed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"flushed\n"
        os.kill(process.pid, signal.SIGKILL)

    trace = Trace(tmp_path / "t")
    assert not trace.complete
    assert trace.rows >= 5000
    assert trace["gpa"].tolist() == trace["bytes"].tolist() == list(range(trace.rows))


def test_full_trace_counts_what_comes_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(TraceStore(str(tmp_path / "t")), {}, capacity=4, most=6)
    recorder.start()
    for number in range(15):
        recorder.record(Kind.EXIT, 0, now(), gpa=number)
    recorder.close(complete=True)

    trace = Trace(tmp_path / "t")
    assert trace["gpa"].tolist() == [0, 1, 2, 3, 4, 5]
    assert summarise(trace)["dropped_events"] == 9
    told = capsys.readouterr().err
    assert told == "pyvmm: --trace: 6 events are recorded, and no more; the guest goes on\n"


def test_names_without_end_share_one_number(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")

    numbers = [recorder.name(f"{number:0100000}") for number in range(20)]
    recorder.close(complete=True)

    assert numbers[:10] == list(range(1, 11))
    assert numbers[10:] == [0] * 10
    assert len(Trace(tmp_path / "t").names) == 11


def test_sidecar_that_does_not_fit_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TraceStore(str(tmp_path / "t"))
    before = (tmp_path / "t" / "trace.json").read_text()
    write = os.write

    def short(fd: int, data: bytes) -> int:
        if os.lseek(fd, 0, os.SEEK_CUR) >= 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:60])  # as the kernel does where the rest doesn't fit

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="No space left"):
        store.write_sidecar({"complete": True, "names": ["x" * 100]})
    store.close()

    assert (tmp_path / "t" / "trace.json").read_text() == before
    assert os.listdir(tmp_path / "t") == ["trace.json"]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.new", "gpa", "gpa/data.ninja"])
def test_folder_prepared_with_links_is_refused_and_what_they_name_stays(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data.ninja").write_text("precious")
    recorder = start_recorder(tmp_path / "t")
    recorder.record(Kind.EXIT, 0, now())
    recorder.close(complete=True)
    target = tmp_path / "precious"
    if name == "gpa":
        shutil.rmtree(tmp_path / "t" / name)
    else:
        (tmp_path / "t" / name).unlink(missing_ok=True)
        target /= "data.ninja"
    (tmp_path / "t" / name).symlink_to(target)

    with pytest.raises(UsageError, match=rf"holds something else \({name}\); give a new"):
        TraceStore(str(tmp_path / "t"))

    assert (tmp_path / "precious" / "data.ninja").read_text() == "precious"
    assert (tmp_path / "t" / name).is_symlink()


def test_hard_link_in_an_earlier_trace_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    recorder = start_recorder(tmp_path / "t")
    recorder.record(Kind.EXIT, 0, now())
    recorder.close(complete=True)
    (tmp_path / "t" / "gpa" / "data.ninja").unlink()
    os.link(tmp_path / "precious", tmp_path / "t" / "gpa" / "data.ninja")

    start_recorder(tmp_path / "t").close()

    assert (tmp_path / "precious").read_text() == "precious"


def test_folder_that_is_being_written_is_refused(tmp_path: Path) -> None:
    store = TraceStore(str(tmp_path / "t"))

    with pytest.raises(UsageError, match="another pyvmm is writing its trace there"):
        TraceStore(str(tmp_path / "t"))

    store.close()
    TraceStore(str(tmp_path / "t")).close()


def test_trace_replaced_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        start_recorder(tmp_path / "t").close()

    assert capsys.readouterr().err == (
        f"pyvmm: --trace {tmp_path}/t: the trace that was there is replaced\n"
    )
