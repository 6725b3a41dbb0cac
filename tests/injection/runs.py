"""Runs of the command into which errors are injected, and what is seen of each."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import firmware
from kvm_bindings.x86_64 import System
from tests.injection import injecting
from tests.injection.asking import ASKERS, MEMORY, Answers, snapshot
from tests.injection.injecting import FOR_EVER, SHORT, Ended, Fault
from tests.injection.row import (
    BY_STRACE,
    CALLER,
    DROPPED,
    EINTR,
    ENDS_1,
    ENDS_2,
    ENDS_3,
    GUEST,
    RESET,
    SAID,
    SAME,
    Row,
)
from vmm.arch import architecture
from vmm.control.memory_file.place import Place
from vmm.core.errors import HostError
from vmm.core.lean_typing import Any, NamedTuple
from vmm.memory.transfer import ENGINES

BENCH = ("pread", "fd2fd", "hva", "mmap", "trace", "process")
"""Scenarios of the bench guest, most named after the engine of its disk."""
PAYLOAD = {
    "none": (),
    "cbit": ("--private-mem",),
    "remap": ("--private-mem", "--scheme", "remap"),
    "readable": ("--private-mem=guest_memfd-mmap",),
}
DEVICES = {"devices": False, "devices apart": True}
"""Whether each has a process: the payload, with all devices that this host can give it."""
_TESTS = "rr4096x8n64 wr4096x8n64 rs131072x4n16 ws131072x4n16"
_DISK = 4 << 20
_BYTES = 64 * 4096 + 16 * (128 << 10)
_INTERRUPTIONS = 20
"""How often a call is interrupted that is to be repeated."""


COUNTED = "errors are counted"
"""And the guest, which has what it wants, goes on to its end."""


class Seen(NamedTuple):
    """What is to be seen of a run that has ended."""

    ended: Ended
    report: dict[str, Any] | None
    disk: str
    """A digest of what is on its disk."""
    rounds: tuple[Answers, ...] = ()
    """What somebody asked it, and what came of that."""
    leftovers: tuple[str, ...] = ()

    @property
    def disk_counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = (self.report or {}).get("io", {}).get("blk0", {})
        return counts


@functools.cache
def _obstacle(scenario: str) -> str:
    if scenario.startswith("memory file"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                Place(os.path.join(folder, "tried")).leave(mounted=False)
            except HostError as error:
                return str(error)
    if scenario.startswith("gdb"):
        with System() as system:
            able = architecture().debug(system).abilities
        if not (able.kernel_steps and able.kernel_hardware):
            return f"this host's KVM has no {able.lacking()}"
    return ""


def require(*scenarios: str) -> None:
    """Skip the test where the host can't do one of them."""
    for scenario in scenarios:
        if why := _obstacle(scenario):
            pytest.skip(why)


def words_of(scenario: str, folder: Path) -> list[str]:
    """The command; what it writes is in `folder`."""
    disk = folder / "disk.img"
    disk.write_bytes(random.Random(scenario).randbytes(1 << 20) * (_DISK >> 20))
    more = ["--disk", str(disk), "--mem", "64M", *_reported(folder)]
    if scenario in DEVICES:
        return injecting.pyvmm(*more, *_devices(folder, apart=DEVICES[scenario]))
    if scenario in PAYLOAD:
        return injecting.pyvmm(*PAYLOAD[scenario], *more)
    if scenario == "trace":
        shutil.rmtree(folder / "trace", ignore_errors=True)
        more += ["--trace", str(folder / "trace")]
    engine = scenario if scenario in ENGINES else "pread"
    more[1] += f",io={engine}{',process' if scenario == 'process' else ''}"
    guest = ["--kernel", firmware.bench_path(), "--append", f"-- {_TESTS}"]
    return injecting.pyvmm(*guest, "--allow-mapped-io", *more)


def _devices(folder: Path, *, apart: bool) -> list[str]:
    """The guest drives none of them: what is looked at is their start and end."""
    process = ",process" if apart else ""
    return [
        "--net", f"passt={_passt()}{process}", "--vsock", f"path={folder / 'v'}{process}",
        "--console", f"file={folder / 'out'}{process}",
        "--console", f"socket={folder / 's'}{process}", "--console", f"pty{process}",
        "--rng", "--balloon", f"size=1M,control={folder / 'b'}",
    ]  # fmt: skip


@functools.cache
def _passt() -> Path:
    """A socket that is connected to, and no more; there until the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="pyvmm-"))
    atexit.register(shutil.rmtree, folder)
    listener = socket.socket(socket.AF_UNIX)
    atexit.register(listener.close)
    listener.bind(str(folder / "passt"))
    listener.listen(4096)
    return folder / "passt"


def _reported(folder: Path) -> tuple[str, str]:
    return "--report", str(folder / "report.json")


def seen(scenario: str, folder: Path, *faults: Fault, rounds: bool = False) -> Seen:
    """Run it with these faults; `rounds`: with one after the other."""
    if scenario == "restore":
        words = injecting.pyvmm("--restore", str(snapshot()), *_reported(folder))
        return _seen(folder, injecting.run(words, *faults, typed=b"x"))
    if scenario not in ASKERS:
        return _seen(folder, injecting.run(words_of(scenario, folder), *faults))
    require(scenario)
    asker = ASKERS[scenario](folder, len(faults) if rounds else 0)
    words = injecting.pyvmm(*asker.options(), *MEMORY, *_reported(folder))
    run = _seen(folder, injecting.run(words, *faults, meanwhile=asker))
    return run._replace(rounds=tuple(asker.answers), leftovers=tuple(asker.leftovers()))


def injected(row: Row, error: int, folder: Path) -> Seen:
    """Run the row's scenario with one of its errors. Raises AssertionError where nothing could
    be injected: then the table names a call that isn't made."""
    fault = fault_of(row, error)
    if row.by == BY_STRACE:
        words = words_of(row.scenario, folder)
        call = "ioctl" if row.call.isupper() else row.call
        where = call, error, row.match, fault.first, fault.last
        run = _seen(folder, injecting.run_under_strace(words, *where))
    else:
        run = seen(row.scenario, folder, fault)
    assert run.ended.injected, f"{row.name}: no such call in {row.scenario}"
    return run


def carried_out(*cells: tuple[Row, int]) -> list[str]:
    """What the programs' own outcomes are, or what is wrong; all in one process."""
    ended = injecting.programs(*[(row.scenario, fault_of(row, error)) for row, error in cells])
    if ended.status:
        return [f"status {ended.status}: {ended.errors}"]
    return [
        said if injected else f"no such call; {said}"
        for said, injected in zip(ended.output.splitlines(), ended.each, strict=True)
    ]


def fault_of(row: Row, error: int) -> Fault:
    last = row.first + _INTERRUPTIONS if error == EINTR else FOR_EVER if row.lasts else row.first
    name = "ioctl" if row.call.isupper() else row.call
    return Fault(name, row.match, error, row.first, last, row.request)


def _seen(folder: Path, ended: Ended) -> Seen:
    written = folder / "report.json"
    report = json.loads(written.read_text()) if written.exists() else None
    written.unlink(missing_ok=True)
    disk = folder / "disk.img"
    content = disk.read_bytes() if disk.exists() else b""
    return Seen(ended, report, hashlib.sha256(content).hexdigest())


def outcome(row: Row, error: int, run: Seen) -> str:
    """Which of the table's outcomes it is; else what is wrong."""
    ended = run.ended
    lines = _lines(ended)
    if ended.status < 0:
        return f"ended by signal {-ended.status}" if ended.status != -9 else "it hung"
    unkind = ("Traceback", "internal error:", "[Errno ")
    if any(word in ended.errors for word in unkind) or len(lines) > 1:
        return f"stderr: {ended.errors}"
    output = ended.output.splitlines()
    went_well = bool(output) and _is_end(output[-1])
    if went_well and ended.status == 0:
        if any(map(was_refused, run.rounds)):
            return CALLER
        if lines:
            return SAID
        return SAME if not run.disk_counts.get("errors") else COUNTED
    if row.call == "write" and row.on == "console" and ended.status == 0:
        return DROPPED
    if _guest_was_told(ended.output, error):
        return GUEST
    if "waited for in vain" in ended.output:
        return RESET
    return {1: ENDS_1, 2: ENDS_2, 3: ENDS_3}.get(ended.status, f"status {ended.status}")


_NOT_OURS = re.compile(r"fuse: |fusermount3: |pyvmm: --console pty\S* is /dev/")
"""libfuse's words are its own (before 3.17 it can't be told to be silent); a terminal's name is no
error."""


def _lines(ended: Ended) -> list[str]:
    """What was said, and is ours."""
    return [line for line in ended.errors.splitlines() if not _NOT_OURS.match(line)]


def was_refused(answers: Answers) -> bool:
    return any(_REFUSAL.search(answer) for answer in answers)


_REFUSAL = re.compile(r": (E[A-Z]+|error)$")
"""An answer that is an error's name, or a debugger's."""


def _is_end(line: str) -> bool:
    return line == "done" or (line.startswith("payload: all ") and line.endswith(" passed"))


def _guest_was_told(output: str, error: int) -> bool:
    words = ["error a request that failed", "status byte of the request: expected 0x0, saw 0x1"]
    if error != SHORT:
        words.append(f"expected 0x0, saw -{error}")
    return any(each in output for each in words)


def problems(row: Row, error: int, run: Seen, without: Seen) -> list[str]:
    """What doesn't add up in a run whose outcome is the right one. `without`: the same run with
    nothing injected."""
    found: list[str] = []
    report, counts = run.report, run.disk_counts
    expected = row.cells[error]
    if expected != SAID:
        found += run.leftovers
    if expected == SAME:
        if run.rounds != without.rounds:
            found.append(f"answers {run.rounds}, not {without.rounds}")
        if _file_counts(run) != _file_counts(without):
            found.append(f"counts {_file_counts(run)}, not {_file_counts(without)}")
        if run.disk != without.disk:
            found.append("the disk's content is another one")
        known = without.disk_counts
        moved = ("requests", "bytes_read", "bytes_written")
        if [counts.get(each) for each in moved] != [known.get(each) for each in moved]:
            found.append(f"counts {counts}, not {known}")
    if expected in (GUEST, RESET) and row.path == "disk":
        if counts.get("errors", 0) < 1:
            found.append(f"no error is counted: {counts}")
        engine = counts.get("engine", {}).get("bytes", {})
        total = counts.get("bytes_read", 0) + counts.get("bytes_written", 0)
        # What a batch moved before it was served one by one is moved twice, and counted so.
        if sum(engine.values()) < total:
            found.append(f"{total} bytes are counted, {engine} were moved")
    said = _lines(run.ended)
    if expected in (ENDS_1, ENDS_2, ENDS_3) and not (said and said[0].startswith("pyvmm: ")):
        found.append(f"no sentence: {run.ended.errors!r}")
    if expected in (GUEST, RESET, SAME) and report is None:
        found.append("no report")
    if report is not None:
        pages = report["pages"]
        if pages["private_bytes"] + pages["shared_bytes"] != pages["ram_bytes"]:
            found.append(f"pages don't add up: {pages}")
        if report["residency"].get("other_side_bytes"):
            found.append(f"the other side holds pages: {report['residency']}")
        if expected == GUEST and row.path == "conversion":
            failed = sum(report["conversions"][kind]["failed"] for kind in ("share", "unshare"))
            if failed < 1:
                found.append(f"no failure is counted: {report['conversions']}")
    return found


def _file_counts(run: Seen) -> object:
    return (run.report or {}).get("memory_file")


def report_of_trace(folder: Path) -> subprocess.CompletedProcess[str]:
    """`pyvmm report` on what a run has left."""
    return subprocess.run(
        [sys.executable, "-m", "vmm", "report", str(folder / "trace")],
        cwd=injecting.ROOT, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"COLUMNS": "100"},
    )  # fmt: skip
