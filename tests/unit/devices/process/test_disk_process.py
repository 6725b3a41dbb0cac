"""A disk in a process of its own: what it does is what the disk in pyvmm's own process does."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_bindings import fdops
from tests.support.device_process import SECTORS, DiskRig
from tests.support.fake_memory import BatchingFakeMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import MEMORY, VirtioMachine
from vmm.core.disk_image import SECTOR
from vmm.core.errors import HostError
from vmm.core.ranges import Range
from vmm.devices.process import protocol
from vmm.devices.process.back_end import BackEnd
from vmm.devices.process.protocol import HEAD
from vmm.devices.process.spawner import Spawner
from vmm.devices.virtio.block import (
    F_FLUSH,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    VirtioBlock,
)
from vmm.devices.virtio.block_file import open_disk

OK, IOERR, UNSUPP, NONE = 0, 1, 2, 0xCC
NEEDS_RESET = 0x40

MakeRig = Callable[..., DiskRig]


def finished(rig: DiskRig, *statuses: Piece) -> Callable[[], bool]:
    return lambda: all(rig.status(one) != NONE for one in statuses)


def _has_counted(rig: DiskRig, requests: int) -> bool:
    return rig.device.statistics.requests == requests


def _is_over(rig: DiskRig, last: Piece) -> bool:
    return rig.status(last) != NONE or bool(rig.machine.driver.status & NEEDS_RESET)


@pytest.mark.parametrize("batching", [True, False])
def test_reads_and_writes_move_what_they_say(make_rig: MakeRig, batching: bool) -> None:
    rig = make_rig(batching=batching)
    data, read = rig.read(7, 2 * SECTOR)
    written = rig.write(300, b"w" * 3 * SECTOR)

    rig.serve()
    rig.until(finished(rig, read, written))

    assert [rig.status(read), rig.status(written)] == [OK, OK]
    assert rig.machine.text(data, 2 * SECTOR) == bytes([7]) * SECTOR + bytes([8]) * SECTOR
    assert rig.disk()[300 * SECTOR : 303 * SECTOR] == b"w" * 3 * SECTOR
    counts = rig.device.statistics
    assert (counts.bytes_read, counts.bytes_written) == (2 * SECTOR, 3 * SECTOR)
    rig.until(lambda: counts.requests == 2)


def test_other_requests_are_carried_out_there(make_rig: MakeRig) -> None:
    rig = make_rig(",serial=disk-1")
    identity = rig.machine.blank(20)
    zeroes = rig.machine.place(struct.pack("<QII", 8, 8, 0))
    discard = rig.machine.place(struct.pack("<QII", 16, 8, 0))
    statuses = [
        rig.request(T_GET_ID, 0, identity),
        rig.request(T_WRITE_ZEROES, 0, zeroes),
        rig.request(T_DISCARD, 0, discard),
        rig.request(T_FLUSH, 0),
        rig.request(77, 0),
    ]

    rig.serve()
    rig.until(finished(rig, *statuses))

    assert [rig.status(one) for one in statuses] == [OK, OK, OK, OK, UNSUPP]
    assert rig.machine.text(identity, 6) == b"disk-1"
    assert rig.disk()[8 * SECTOR : 16 * SECTOR] == bytes(8 * SECTOR)
    rig.until(lambda: rig.device.statistics.flushes == 1)


def test_driver_that_cannot_flush_has_its_writes_on_the_disk(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.machine.driver.status = 0
    rig.machine.up(refuse=F_FLUSH)
    status = rig.write(3, b"x" * SECTOR)

    rig.serve()
    rig.until(finished(rig, status))

    assert rig.status(status) == OK
    assert rig.disk()[3 * SECTOR : 4 * SECTOR] == b"x" * SECTOR


def test_private_page_in_a_batch_stops_the_device_behind_what_it_could_do(
    make_rig: MakeRig,
) -> None:
    """The moves of a batch are taken for done until pyvmm refuses them: then each by itself."""
    rig = make_rig()
    good = [rig.read(number) for number in range(3)]
    bad, bad_status = rig.read(9)
    rig.memory.private.append(Range(bad.gpa & ~15, SECTOR))

    rig.serve()
    rig.until(lambda: bool(rig.machine.driver.status & NEEDS_RESET))

    assert [rig.status(status) for _, status in good] == [OK] * 3
    assert rig.machine.text(good[2][0], SECTOR) == bytes([2]) * SECTOR
    assert rig.status(bad_status) == NONE
    assert rig.device.statistics.refused == 1
    assert rig.device.statistics.deaths == 0


def test_host_that_moves_a_part_at_a_time_has_each_part_moved_once(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    assert isinstance(rig.memory, BatchingFakeMemory)
    move_in = rig.memory.move_in
    monkeypatch.setattr(rig.memory, "move_in", lambda fd, moves: move_in(fd, moves[:3]))
    reads = [rig.read(10 * number) for number in range(4)]

    rig.serve()
    rig.until(finished(rig, *(status for _, status in reads)))

    assert [rig.machine.text(data, 1)[0] for data, _ in reads] == [0, 10, 20, 30]
    assert rig.device.statistics.bytes_read == 4 * SECTOR


def test_headers_that_are_where_they_were_come_with_the_ring(make_rig: MakeRig) -> None:
    """And one that has changed is the new one."""
    rig = make_rig()
    header = rig.machine.place(struct.pack("<IIQ", T_IN, 0, 0))
    for sector in range(8):
        rig.memory.poke(struct.pack("<IIQ", T_IN, 0, sector), header.gpa)
        data, status = rig.machine.blank(SECTOR), rig.machine.blank(1)
        rig.machine.give(0, header, data, status)
        rig.serve()
        rig.until(finished(rig, status))
        assert rig.machine.text(data, 1) == bytes([sector])


def test_request_like_the_last_one_takes_one_message(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks for has come with the notify, and what tells the driver is what it says."""
    rig = make_rig()
    said: list[int] = []
    obey = rig.device._obey

    def noting(size: int) -> int | None:
        said.append(rig.device._buffer[0])
        return obey(size)

    monkeypatch.setattr(rig.device, "_obey", noting)
    header = rig.machine.place(struct.pack("<IIQ", T_IN, 0, 5))
    for _ in range(3):
        said.clear()
        status = rig.machine.blank(1)
        rig.machine.give(0, header, rig.machine.blank(SECTOR), status)
        rig.serve()
        rig.until(finished(rig, status))
        rig.machine.queues[0].collect()

    rig.machine.settle()
    assert said == [protocol.RETURN]
    assert rig.machine.interrupts == 3
    assert rig.device.statistics.requests == 3


def test_killed_process_costs_errors_and_a_new_one_goes_on(make_rig: MakeRig) -> None:
    rig = make_rig()
    before = rig.write(10, b"1" * SECTOR)
    rig.serve()
    rig.until(finished(rig, before))

    os.kill(rig.device.statistics.pid, signal.SIGKILL)
    rig.until(lambda: rig.device.statistics.deaths == 1)
    without = rig.write(11, b"2" * SECTOR)
    rig.serve()

    assert [rig.status(one) for one in (before, without)] == [OK, IOERR]
    assert rig.device.statistics.last_end == "was killed by SIGKILL"
    rig.device.restart()
    after = rig.write(12, b"3" * SECTOR)
    rig.serve()
    rig.until(finished(rig, after))
    assert rig.status(after) == OK
    assert rig.disk()[10 * SECTOR : 13 * SECTOR] == (
        b"1" * SECTOR + bytes([11]) * SECTOR + b"3" * SECTOR
    )
    assert rig.device.statistics.restarts == 1


def test_process_killed_under_load_loses_no_completed_write(make_rig: MakeRig) -> None:
    rig = make_rig()
    statuses: dict[int, Piece] = {}
    for sector in range(0, 60, 4):  # a queue of 16 takes them four at a time
        for number in range(sector, sector + 4):
            statuses[number] = rig.write(number, bytes([number + 100]) * SECTOR)
        rig.machine.driver.notify(0)
        if sector == 24:
            os.kill(rig.device.statistics.pid, signal.SIGKILL)
        if sector == 40:
            rig.until(lambda: rig.device.statistics.deaths == 1)
            rig.device.restart()
        rig.until(finished(rig, *statuses.values()))

    ended = {number: rig.status(status) for number, status in statuses.items()}
    assert set(ended.values()) == {OK, IOERR}
    assert ended[0] == ended[59] == OK
    disk = rig.disk()
    for number, status in ended.items():
        if status == OK:
            assert disk[number * SECTOR] == number + 100, f"write {number} was lost"


def test_restart_of_a_process_that_lives_fails_no_request(make_rig: MakeRig) -> None:
    rig = make_rig()
    data, status = rig.read(5)
    rig.machine.driver.notify(0)

    rig.device.restart()
    rig.until(finished(rig, status))

    assert rig.status(status) == OK
    assert rig.machine.text(data, 1) == bytes([5])
    counts = rig.device.statistics
    assert (counts.deaths, counts.restarts) == (0, 1)


def test_counts_of_a_driver_that_resets_as_soon_as_it_is_interrupted_are_heard_out(
    make_rig: MakeRig,
) -> None:
    rig = make_rig()
    _, status = rig.read(5)
    rig.machine.transport.notify(0)
    while rig.status(status) == NONE:
        rig.machine.loop.wait(10)
        rig.machine.loop.run_ready()

    rig.machine.driver.status = 0
    rig.device.hear_out(10)

    assert rig.device.statistics.requests == 1


def test_process_says_its_counts_before_it_is_done_with_a_reset(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTOR))
    disk = open_disk(str(path))
    end = BackEnd(VirtioBlock(disk, fdops.punch_hole), theirs, [disk.fd])
    end._device.statistics.requests = 3
    ours.send(HEAD.pack(protocol.RESET, 0, 0, 1))
    ours.shutdown(socket.SHUT_WR)

    end.run(1, 7)

    said = [ours.recv(protocol.LONGEST) for _ in range(3)]
    assert [packet[0] for packet in said] == [protocol.DONE, protocol.TURN, protocol.DONE]
    assert protocol.COUNTS.unpack_from(said[1], HEAD.size)[0] == 3
    ours.close()
    theirs.close()
    disk.close()


def test_counts_go_on_after_a_restart(make_rig: MakeRig) -> None:
    rig = make_rig()
    for expected in (1, 2):
        _, status = rig.read(5)
        rig.serve()
        rig.until(finished(rig, status))
        rig.until(partial(_has_counted, rig, expected))
        rig.device.restart()


def test_reset_while_the_process_works_is_a_reset(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.read(5)
    rig.machine.driver.notify(0)

    rig.machine.driver.status = 0
    rig.machine.up()
    data, status = rig.read(6)
    rig.serve()
    rig.until(finished(rig, status))

    assert rig.machine.text(data, 1) == bytes([6])
    assert rig.device.statistics.deaths == 0


def test_broken_ring_stops_the_device_and_a_reset_helps(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.machine.give(0, rig.machine.place(b"no header"))

    rig.serve()
    rig.until(lambda: bool(rig.machine.driver.status & NEEDS_RESET))

    assert "shorter than its header" in str(rig.machine.transport.failure)
    rig.machine.driver.status = 0
    rig.machine.up()
    _, status = rig.read(6)
    rig.serve()
    rig.until(finished(rig, status))
    assert rig.status(status) == OK


def test_spawner_that_is_gone_is_an_error_of_the_host(tmp_path: Path) -> None:
    spawner = Spawner(None)
    rig = DiskRig(tmp_path, spawner)
    os.kill(spawner._pid, signal.SIGKILL)
    os.waitid(os.P_PID, spawner._pid, os.WEXITED | os.WNOWAIT)

    with pytest.raises(HostError, match="is gone"):
        rig.device.restart()

    rig.close()


def test_end_of_pyvmm_ends_the_processes(tmp_path: Path) -> None:
    rig = DiskRig(tmp_path, Spawner(None))
    rig.machine.up()
    fd = os.pidfd_open(rig.device.statistics.pid)

    rig.close()

    os.set_blocking(fd, False)
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(fd, 0)
    os.close(fd)


Request = tuple[int, int, int, bool]
"""Kind, sector, sectors of data, and whether its data is in private memory."""

requests = st.lists(
    st.tuples(
        st.sampled_from([T_IN, T_OUT, T_IN, T_OUT, T_FLUSH, T_GET_ID, 77]),
        st.integers(0, SECTORS + 2),
        st.integers(1, 4),
        st.sampled_from([False] * 9 + [True]),
    ),
    min_size=1,
    max_size=5,
)


@settings(
    max_examples=20, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(requests, min_size=1, max_size=3))
def test_any_requests_end_as_they_do_in_pyvmm_s_own_process(
    tmp_path: Path, batches: list[list[Request]]
) -> None:
    rig = DiskRig(tmp_path, Spawner(None))
    path = tmp_path / "other.img"
    path.write_bytes(rig.disk())
    disk = open_disk(f"{path},serial=disk.img")
    own = VirtioMachine(VirtioBlock(disk, fdops.punch_hole, 0), BatchingFakeMemory(MEMORY))
    try:
        there, here = _outcome(rig, rig.machine, batches), _outcome(path, own, batches)
        assert there == here
        # Not how much was moved for it: what comes before a refusal may be moved twice.
        assert rig.device.statistics.refused == own.device.statistics.refused
    finally:
        rig.close()
        own.close()


def _outcome(
    disk: DiskRig | Path, machine: VirtioMachine, batches: list[list[Request]]
) -> tuple[bytes, bytes, bool]:
    """All of guest memory but the rings, in which a driver's own words are; the disk's content; and
    whether the device needs a reset. What it hasn't answered then may have been done or not (how
    many requests it takes at once depends on the time), so that data of those is left out."""
    machine.up()
    asked: list[tuple[Request, list[Piece], Piece]] = []
    for batch in batches:
        for kind, sector, count, private in batch:
            header = machine.place(struct.pack("<IIQ", kind, 0, sector))
            if kind == T_FLUSH:
                data = []
            elif kind == T_OUT:
                data = [machine.place(bytes([count]) * count * SECTOR)]
            else:
                data = [machine.blank(20 if kind == T_GET_ID else count * SECTOR)]
            if private and data:
                machine.memory.private.append(Range(data[0].gpa, 16))
            status = machine.blank(1)
            machine.give(0, header, *data, status)
            asked.append(((kind, sector, count, private), data, status))
        machine.kick(0)
        if isinstance(disk, DiskRig):
            disk.until(partial(_is_over, disk, asked[-1][2]))
        if machine.driver.status & NEEDS_RESET:
            break
    assert isinstance(machine.memory, BatchingFakeMemory)
    start = 0x40000
    memory = bytearray(machine.memory.peek(MEMORY - start, start))
    content = bytearray(disk.disk() if isinstance(disk, DiskRig) else disk.read_bytes())
    for (kind, sector, count, _), data, status in asked:
        if machine.text(status, 1)[0] != NONE:
            continue
        for piece in data:
            memory[piece.gpa - start : piece.gpa - start + piece.size] = bytes(piece.size)
        if kind == T_OUT and sector + count <= SECTORS:
            content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
    return bytes(memory), bytes(content), bool(machine.driver.status & NEEDS_RESET)
