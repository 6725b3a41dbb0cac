"""What is handed to a running machine to be written to, and what it writes."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.control import Server, line
from tests.unit.control.test_operations import Bench
from vmm.control.saving import Saving, require_writable, resident
from vmm.core.ranges import Range
from vmm.core.saved import NotSaved
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory

PAGE, MIB = 4096, 1 << 20
RAM = 8 * MIB
ALIAS = 1 << 40


class Machine:
    """Memory with a private second half, and everything else faked."""

    def __init__(self, private: MemfdBacking | None = None) -> None:
        self.private = MemfdBacking(RAM) if private is None else private
        half = Range(RAM // 2, RAM // 2)
        self.memory = GuestMemory([Range(0, RAM)], MemfdBacking(RAM), self.private, [half])
        self.stood_still = 0
        self.facts: dict[str, Any] = {"cpus": 1}
        platform: Any = SimpleNamespace(state=lambda: {"p": 1}, core_vcpus=lambda: [{"regs": {}}])
        operations: Any = SimpleNamespace(still=self._still)
        self.saving = Saving(
            operations, self.memory, platform, lambda timeout: {"d": 2}, lambda: self.facts,
            lambda: [{"policy": "m:C", "state": self.stood_still}], ALIAS,
        )  # fmt: skip

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        self.stood_still += 1
        yield

    def close(self) -> None:
        self.memory.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_snapshot_has_what_was_touched_of_the_shared_side_alone(
    machine: Machine, file: int
) -> None:
    machine.memory.shared.pwrite(b"shared", 3 * PAGE)
    machine.private.pwrite(b"private", RAM - PAGE)
    machine.memory.shared.pwrite(b"behind a private page", RAM - PAGE)

    answer = machine.saving.snapshot(file, None)

    assert answer["memory"] == [[3 * PAGE, PAGE]] and "private" not in answer
    assert answer["pages"] == [[0, RAM // 2, "shared"], [RAM // 2, RAM // 2, "private"]]
    assert answer["state"] == {
        "cpus": 1, "platform": {"p": 1}, "devices": {"d": 2},
        "policies": [{"policy": "m:C", "state": 1}],
    }  # fmt: skip
    assert os.pread(file, 6, 3 * PAGE) == b"shared"
    assert os.fstat(file).st_size == 4 * PAGE
    assert machine.stood_still == 1


def test_private_pages_come_from_their_side(machine: Machine, file: int, tmp_path: Path) -> None:
    machine.private.pwrite(b"private", RAM - PAGE)
    machine.private.pwrite(b"behind a shared page", 0)
    other = os.open(tmp_path / "private", os.O_RDWR | os.O_CREAT)
    try:
        answer = machine.saving.snapshot(file, other)

        assert answer["private"] == [[RAM - PAGE, PAGE]] and answer["memory"] == []
        assert os.pread(other, 7, RAM - PAGE) == b"private"
    finally:
        os.close(other)


def test_common_pages_come_from_their_only_side(file: int, tmp_path: Path) -> None:
    common, ram = Range(2 * PAGE, PAGE), Range(0, 4 * PAGE)
    shared, private = MemfdBacking(ram.size), MemfdBacking(ram.size)
    memory = GuestMemory([ram], shared, private, [ram], common)
    shared.pwrite(b"common", 2 * PAGE)
    private.pwrite(b"own", PAGE)
    machine = Machine()
    machine.saving._memory = memory
    other = os.open(tmp_path / "private", os.O_RDWR | os.O_CREAT)
    try:
        answer = machine.saving.snapshot(file, other)

        assert answer["private"] == [[PAGE, PAGE], [2 * PAGE, PAGE]]
        assert os.pread(other, 6, 2 * PAGE) == b"common"
    finally:
        os.close(other)
        memory.close()
        machine.close()


def test_dump_leaves_room_for_headers_and_ends_where_ram_does(machine: Machine, file: int) -> None:
    machine.memory.shared.pwrite(b"shared", 3 * PAGE)

    answer = machine.saving.dump(file)

    offset = answer["offset"]
    assert offset > 0 and offset % PAGE == 0
    assert os.pread(file, 6, offset + 3 * PAGE) == b"shared"
    assert os.fstat(file).st_size == offset + RAM


def test_dump_has_each_page_from_its_side_where_private_ones_are_wanted(
    machine: Machine, file: int
) -> None:
    machine.memory.shared.pwrite(b"shared", 3 * PAGE)
    machine.memory.shared.pwrite(b"behind a private page", RAM - PAGE)
    machine.private.pwrite(b"private", RAM - PAGE)
    machine.private.pwrite(b"behind a shared page", 3 * PAGE)

    answer = machine.saving.dump(file, private=True)

    offset = answer["offset"]
    assert answer["alias"] == ALIAS
    assert os.pread(file, 6, offset + 3 * PAGE) == b"shared"
    assert os.pread(file, 8, offset + RAM - PAGE) == b"private\0"


def test_memory_that_the_kernel_keeps_is_refused_before_the_guest_stands_still(
    file: int, tmp_path: Path
) -> None:
    class Kept(MemfdBacking):
        host_access = "kernel-refused"
        name = "kept"

    machine = Machine(Kept(RAM))
    other = os.open(tmp_path / "private", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(NotSaved, match="keeps pyvmm out of kept"):
            machine.saving.snapshot(file, other)
        with pytest.raises(NotSaved, match="keeps pyvmm out of kept; a dump of the shared side"):
            machine.saving.dump(file, private=True)
        assert machine.stood_still == 0
        machine.saving.snapshot(file, None)
    finally:
        os.close(other)
        machine.close()


def test_memory_that_is_touched_here_and_there_makes_no_more_pieces_than_there_may_be() -> None:
    backing = MemfdBacking(RAM)
    try:
        for number in range(0, RAM // PAGE, 2):
            backing.pwrite(b"x", number * PAGE)

        one_by_one = list(resident(backing, Range(0, RAM)))
        coarse = list(resident(backing, Range(PAGE, RAM - PAGE), 64 * PAGE))

        assert len(one_by_one) == RAM // PAGE // 2
        assert len(coarse) <= RAM // (64 * PAGE) + 1
        assert coarse[0].start == 2 * PAGE and coarse[-1].end <= RAM
        assert all(each.end <= after.start for each, after in pairwise(coarse))
    finally:
        backing.close()


@pytest.mark.parametrize("kind", ["pipe", "eventfd"])
def test_backing_that_lists_nothing_is_asked_piece_by_piece(kind: str) -> None:
    class Unlisted(MemfdBacking):
        pass

    backing = Unlisted(RAM)
    # In the one nobody can seek; the other stays where it is, and says so.
    pipe, other = os.pipe()
    listing, backing.fd = backing.fd, pipe if kind == "pipe" else os.eventfd(0)
    backing.resident_bytes = lambda offset=0, size=0: (  # type: ignore[method-assign]
        PAGE if offset <= 5 * MIB < offset + size else 0
    )
    try:
        assert list(resident(backing, Range(0, RAM))) == [Range(4 * MIB, 2 * MIB)]
    finally:
        for fd in {backing.fd, pipe, other}:
            os.close(fd)
        backing.fd = listing
        backing.close()


@pytest.mark.parametrize("kind", ["read-only", "append", "pipe", "folder"])
def test_file_that_can_t_be_written_to_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    flags = {"read-only": os.O_RDONLY, "append": os.O_WRONLY | os.O_APPEND}
    other = -1
    if kind == "pipe":
        other, fd = os.pipe()
    elif kind == "folder":
        fd = os.open(tmp_path, os.O_RDONLY)
    else:
        fd = os.open(tmp_path / "file", flags[kind])
    try:
        with pytest.raises(NotSaved):
            require_writable(fd)
    finally:
        os.close(fd)
        if other >= 0:
            os.close(other)


# --- standing still ---


@pytest.fixture
def still() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_guest_stands_still_for_the_block_and_goes_on(still: Bench) -> None:
    with still.operations.still():
        assert still.vcpus._holds == 1
    assert still.vcpus._holds == 0 and not still.vcpus.paused
    assert [each.split(",")[0] for each in still.devices.log] == ["held", "released"]


def test_paused_guest_is_paused_afterwards(still: Bench) -> None:
    still.operations.pause()

    with still.operations.still():
        pass

    assert still.vcpus.paused and still.operations.status().state == "paused"
    still.operations.resume()
    assert not still.vcpus.paused
    assert still.devices.log[-1].startswith("released")


def test_guest_that_a_debugger_has_stopped_stays_so(still: Bench) -> None:
    still.vcpus.freeze()

    with still.operations.still():
        pass

    assert still.vcpus.frozen


@pytest.mark.parametrize("fails", [False, True])
def test_guest_is_told_that_it_stood_still_whatever_came_of_it(
    fails: bool, still: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(still.vcpus, "_tell_stopped", lambda: told.append(still.vcpus._holds))

    with contextlib.suppress(OSError), still.operations.still():
        if fails:
            raise OSError("no room for it")

    assert told and all(told), "while all of them were held"


def test_device_that_does_not_come_to_rest_is_said_and_the_guest_goes_on(still: Bench) -> None:
    still.devices.busy = True

    with pytest.raises(NotSaved, match="a device does not come to rest"), still.operations.still():
        pytest.fail("nothing stands still")

    assert still.vcpus._holds == 0


@pytest.mark.parametrize(("still_after", "why"), [(9, "string I/O"), (2, None)])
def test_vcpu_in_the_middle_of_string_io_is_let_go_on_for_a_while(
    still: Bench, still_after: int, why: str | None
) -> None:
    class Runner:
        """Owes an exit for some time."""

        in_guest = is_looping = False
        waits = True
        looks = 0
        exit_counts: dict[str, int] = {}

        def summon(self) -> None:
            pass

        def tell_stopped(self) -> None:
            pass

        @property
        def owes(self) -> bool:
            self.looks += 1
            return self.looks < still_after

    runner: Any = Runner()
    still.vcpus.runners.append(runner)
    if why is None:
        with still.operations.still():
            assert still.vcpus._holds == 1
    else:
        with pytest.raises(NotSaved, match=why), still.operations.still():
            pytest.fail("it is not done")
    assert still.vcpus._holds == 0


# --- over the control socket ---


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "control")
    yield made
    made.stop()


def ask(server: Server, files: Sequence[int], *lines: bytes) -> list[dict[str, Any]]:
    with server.connect() as connection:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())
        connection.sendmsg([b"".join(lines)], [rights] if files else [])
        connection.shutdown(socket.SHUT_WR)
        return [json.loads(each) for each in connection.makefile("rb")]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_command_without_its_files_is_refused(server: Server, file: int) -> None:
    answers = [
        *ask(server, [], line("dump"), line("snapshot")),
        *ask(server, [file], line("snapshot", private=True)),
        *ask(server, [file, file], line("dump")),
    ]

    assert [answer["ok"] for answer in answers] == [False] * 4
    assert "0 open files came along (SCM_RIGHTS), and 1 are written to" in answers[0]["error"]


def test_files_that_come_along_are_closed_with_their_client(server: Server, file: int) -> None:
    with server.connect() as connection:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file, file]).tobytes())
        before = open_files()
        for _ in range(20):
            connection.sendmsg([line("status")], [rights])
            connection.recv(65536)
        most = open_files()
    ask(server, [], line("status"))  # by now the server has seen that it has gone

    assert most <= before + 3
    assert open_files() <= before + 1


def test_more_files_than_a_command_has_are_not_kept(server: Server, file: int) -> None:
    before = open_files()

    answers = ask(server, [file] * 100, line("dump"))

    assert not answers[0]["ok"]
    ask(server, [], line("status"))
    assert open_files() <= before + 1


def test_failure_to_write_is_answered_in_words(server: Server, file: int) -> None:
    def fail(*files: int, **options: bool) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    server.operations.dump = fail  # type: ignore[assignment,method-assign]

    (answer,) = ask(server, [file], line("dump"))

    assert answer == {
        "ok": False, "error": "it could not be written: No space left on device",
    }  # fmt: skip
