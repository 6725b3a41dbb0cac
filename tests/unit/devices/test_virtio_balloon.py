"""virtio-balloon from the guest's side, on real guest memory: what goes back to the host."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.control import FakeOperations
from tests.support.memory import data_pages, guest_memory, page, pages, pattern
from tests.support.virtio_driver import NEEDS_RESET, VERSION_1, Piece
from tests.support.virtio_machine import DATA, VirtioMachine
from vmm.control.control_socket import ControlSocket
from vmm.core.errors import PrivateAccess, UnmappedAccess, UsageError
from vmm.core.event_loop import EventLoop, drain
from vmm.core.ranges import Range
from vmm.devices.virtio import balloon
from vmm.devices.virtio.balloon import DEFLATE, INFLATE, STATS, VirtioBalloon
from vmm.devices.virtio.balloon_control import open_balloon
from vmm.devices.virtio.budget import LOOK_EVERY, TURN_CALLS, Budget
from vmm.memory.backings.memfd import MemfdBacking

PAGE = 4096


@pytest.fixture
def machine() -> Iterator[VirtioMachine]:
    made = VirtioMachine(VirtioBalloon(64))
    yield made
    made.close()


def numbers(machine: VirtioMachine, *page_numbers: int) -> Piece:
    return machine.place(struct.pack(f"<{len(page_numbers)}I", *page_numbers))


def discarded(machine: VirtioMachine) -> list[Range]:
    """The ranges that a device gives back from now on."""
    areas: list[Range] = []
    original = machine.memory.discard

    def discard(gpa: int, size: int) -> None:
        areas.append(Range(gpa, size))
        original(gpa, size)

    machine.memory.discard = discard  # type: ignore[method-assign]
    return areas


def test_balloon_asks_for_its_size_and_hears_of_the_actual(machine: VirtioMachine) -> None:
    machine.up()
    config = machine.driver.device_config
    assert machine.ports.read(config, 4) == 64

    machine.ports.write(config + 4, 4, 60)

    assert machine.ports.read(config + 4, 4) == 60
    machine.ports.write(config, 4, 1)  # not the driver's to write
    assert machine.ports.read(config, 4) == 64
    assert machine.device.statistics.as_dict()["size"] == 60 * PAGE


def test_balloon_inflates_page_runs_with_one_discard_each(machine: VirtioMachine) -> None:
    machine.up()
    areas = discarded(machine)
    head = machine.give(INFLATE, numbers(machine, 0x85, 0x83, 0x84, 0x90, 0x84))

    machine.kick(INFLATE)

    assert areas == [Range(0x83000, 3 * PAGE), Range(0x90000, PAGE)]
    assert machine.queues[INFLATE].collect() == [(head, 0)]
    assert machine.device.statistics.as_dict()["inflated"] == 4 * PAGE


def test_balloon_deflates_without_touching_memory(machine: VirtioMachine) -> None:
    machine.up()
    areas = discarded(machine)
    machine.give(DEFLATE, numbers(machine, 0x85))

    machine.kick(DEFLATE)

    assert areas == []
    assert machine.device.statistics.as_dict()["deflated"] == PAGE


@pytest.mark.parametrize("queue", balloon.REPORTING)
def test_balloon_reported_pages_are_discarded(machine: VirtioMachine, queue: int) -> None:
    machine.up()
    areas = discarded(machine)
    head = machine.give(queue, Piece(0x80000, 0x2000, True), Piece(0x90000, 0x1000, True))

    machine.kick(queue)

    assert areas == [Range(0x80000, 0x2000), Range(0x90000, 0x1000)]
    assert machine.queues[queue].collect() == [(head, 0)]


def test_balloon_reported_pages_with_poison_stay(machine: VirtioMachine) -> None:
    """5.5.6.5: the guest would miss its pattern."""
    machine.driver.enable()
    machine.up()
    machine.ports.write(machine.driver.device_config + 12, 4, 0xAAAAAAAA)
    areas = discarded(machine)
    machine.give(4, Piece(0x80000, 0x2000, True))

    machine.kick(4)

    assert areas == []


@pytest.mark.parametrize(
    ("queue", "piece"),
    [
        (INFLATE, Piece(0x40000, 3)),
        (DEFLATE, Piece(0x40000, 3)),
        (INFLATE, Piece(0, 4 * balloon.MOST_PAGES + 4)),
        (4, Piece(0x80001, 0x1000, True)),
        (4, Piece(0x80000, 0xFFF, True)),
        (4, Piece(0x80000, balloon.MOST_REPORTED + PAGE, True)),
    ],
)
def test_balloon_request_that_names_no_pages_stops_the_device(
    machine: VirtioMachine, queue: int, piece: Piece
) -> None:
    machine.up()
    areas = discarded(machine)
    machine.give(queue, piece)

    machine.kick(queue)

    assert machine.driver.status & NEEDS_RESET
    assert areas == []


def test_balloon_page_that_is_no_ram_stops_the_device(machine: VirtioMachine) -> None:
    machine.up()
    machine.give(INFLATE, numbers(machine, 0xFFFF_FFFF))

    machine.kick(INFLATE)

    assert machine.driver.status & NEEDS_RESET
    assert machine.device.statistics.refused == 1


def test_balloon_driver_may_hand_over_physical_addresses(machine: VirtioMachine) -> None:
    """Linux' driver refuses F_ACCESS_PLATFORM whatever the device says."""
    machine.driver.enable()

    assert machine.driver.negotiate(VERSION_1)


# --- statistics and control ---


class Controlled:
    def __init__(self, path: Path) -> None:
        self.machine = VirtioMachine(open_balloon(f"control={path}", 512 << 20))
        self.client = socket.socket(socket.AF_UNIX)
        self.client.connect(str(path))
        self.client.setblocking(False)

    def say(self, line: str) -> str:
        self.client.sendall(line.encode() + b"\n")
        self.machine.settle()
        try:
            return self.client.recv(4096).decode()
        except BlockingIOError:
            return ""


@pytest.fixture
def controlled(tmp_path: Path) -> Iterator[Controlled]:
    made = Controlled(tmp_path / "c")
    yield made
    made.client.close()
    made.machine.close()


def test_balloon_control_changes_the_size(controlled: Controlled) -> None:
    machine = controlled.machine
    machine.up()

    assert controlled.say("size 8M") == "ok\n"

    assert machine.ports.read(machine.driver.device_config, 4) == 2048
    assert machine.driver.isr() & 2


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("size", "error: say"),
        ("size x", "error: say"),
        ("size 513M", "error: the guest has 512M"),
        ("hello there", "error: say"),
    ],
)
def test_balloon_control_refuses_other_words(
    controlled: Controlled, line: str, answer: str
) -> None:
    assert controlled.say(line).startswith(answer)


def test_balloon_control_hears_the_guests_statistics(controlled: Controlled) -> None:
    machine = controlled.machine
    machine.up()
    old = machine.place(struct.pack("<HQHQ", 4, 1, 5, 2))
    first = machine.give(STATS, old)
    machine.kick(STATS)  # the driver's buffer at the start answers no question

    assert controlled.say("stats") == ""
    assert machine.queues[STATS].collect() == [(first, 0)]

    machine.give(STATS, machine.place(struct.pack("<HQHQHQ", 4, 1000, 5, 2000, 99, 3) + b"x"))
    machine.kick(STATS)
    answer = json.loads(controlled.client.recv(4096))
    assert answer == {"free_memory": 1000, "total_memory": 2000, "size": 0}


def test_balloon_second_statistics_buffer_stops_the_device(controlled: Controlled) -> None:
    controlled.machine.up()
    for _ in range(2):
        controlled.machine.give(STATS, controlled.machine.place(b""))

    controlled.machine.kick(STATS)

    assert controlled.machine.driver.status & NEEDS_RESET


def test_balloon_control_client_that_talks_without_end_is_hung_up(controlled: Controlled) -> None:
    controlled.client.sendall(b"x" * 1000)

    controlled.machine.settle()

    try:
        assert controlled.client.recv(1) == b""
    except ConnectionResetError:
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=x", "size=x is no size such as 64M; write --balloon [size=SIZE]"),
        ("size=", "'size' has no value"),
        ("size=1G", "size=1G is more than the guest's 512M"),
        ("pages=3", "unknown option 'pages'"),
        ("control={dir}/no/c", "cannot listen there: No such file"),
    ],
)
def test_balloon_bad_input_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        open_balloon(text.replace("{dir}", str(tmp_path)), 512 << 20)

    assert os.listdir(tmp_path) == []


# --- which side of guest memory it is that goes back ---


def test_discard_takes_the_side_that_the_guest_uses() -> None:
    private = pages(4, 4)
    shared_backing, private_backing = MemfdBacking(page(64)), MemfdBacking(page(64))
    with guest_memory(private, shared=shared_backing, private_backing=private_backing) as memory:
        memory.pwrite(pattern(page(4)), 0)
        private_backing.pwrite(pattern(page(4)), private.start)

        memory.discard(page(3), page(2))  # a shared page and a private one

        assert data_pages(shared_backing.fd) == {0, 1, 2}
        assert data_pages(private_backing.fd) == {5, 6, 7}
        assert memory.residency() == (page(3), page(3))
        assert memory.pread(PAGE, page(3)) == bytes(PAGE)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0, 0), (1, PAGE), (0, 1), (page(64), PAGE), (page(63), page(2)), (-PAGE, PAGE)],
)
def test_discard_of_what_is_no_ram_is_refused(gpa: int, size: int) -> None:
    with guest_memory() as memory, pytest.raises(UnmappedAccess):
        memory.discard(gpa, size)


def test_discard_of_converting_pages_is_refused() -> None:
    with guest_memory(pages(4, 4)) as memory:
        memory.begin_conversion(pages(4, 1))
        with pytest.raises(PrivateAccess):
            memory.discard(page(3), page(2))
        memory.discard(page(5), page(1))


# --- turns ---

ISOLATED = 65_000


@pytest.fixture
def eager(machine: VirtioMachine) -> Iterator[VirtioMachine]:
    """A driver that gives up ISOLATED pages, no two of them neighbours, with each of 8 chains.
    `calls["discard"]` counts what comes of it; nothing is discarded."""
    machine.up(size=128)
    pages = machine.place(struct.pack(f"<{ISOLATED}I", *range(1024, 1024 + 2 * ISOLATED, 2)))

    def discard(gpa: int, size: int) -> None:
        machine.memory.calls["discard"] += 1

    machine.memory.discard = discard  # type: ignore[method-assign]
    for _ in range(8):
        machine.give(INFLATE, pages)
    yield machine


def test_balloon_turn_makes_a_bounded_number_of_calls_and_goes_on(eager: VirtioMachine) -> None:
    """The first version took a minute for a turn of 128 such chains."""
    calls = eager.memory.calls
    eager.driver.notify(INFLATE)
    eager.rung.clear()

    eager.transport.notify(INFLATE)

    assert 0 < calls["discard"] <= TURN_CALLS
    assert eager.rung == [INFLATE]
    assert eager.queues[INFLATE].collect() == []  # the request isn't done

    eager.settle()

    assert calls["discard"] == 8 * ISOLATED
    assert len(eager.queues[INFLATE].collect()) == 8
    assert eager.device.statistics.as_dict()["inflated"] == 8 * ISOLATED * PAGE


def test_balloon_turn_is_as_short_on_every_queue(eager: VirtioMachine) -> None:
    """Deflating costs no call, but naming 65,000 pages takes time as well."""
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return float(looks)  # a second has passed at every look

    queue = eager.device._queues[DEFLATE]
    queue.budget = Budget(clock)
    pages = Piece(DATA, 4 * ISOLATED)
    eager.give(DEFLATE, pages)

    eager.transport.notify(DEFLATE)

    assert eager.rung == [DEFLATE]
    assert eager.device.statistics.as_dict()["deflated"] <= LOOK_EVERY * PAGE


def test_balloon_reset_in_the_middle_of_a_request_forgets_it(eager: VirtioMachine) -> None:
    eager.driver.notify(INFLATE)
    eager.transport.notify(INFLATE)
    before = eager.memory.calls["discard"]

    eager.up(size=128)
    eager.settle()

    assert eager.memory.calls["discard"] == before
    assert eager.queues[INFLATE].used_index() == 0


def test_balloon_list_that_becomes_private_in_the_middle_stops_the_device(
    eager: VirtioMachine,
) -> None:
    eager.driver.notify(INFLATE)
    eager.rung.clear()
    eager.transport.notify(INFLATE)
    eager.memory.private.append(Range(DATA, 4 * ISOLATED))

    eager.settle()

    assert eager.driver.status & NEEDS_RESET
    assert eager.queues[INFLATE].used_index() == 0


def test_balloon_quit_is_answered_in_the_middle_of_a_request(
    eager: VirtioMachine, tmp_path: Path
) -> None:
    """On the real loop, with the real control socket: a turn or two later, not 8 requests."""
    loop = EventLoop()
    operations = FakeOperations()
    control = ControlSocket(str(tmp_path / "c"))
    control.serve(loop, operations)  # type: ignore[arg-type]
    operations.quit = loop.stop  # type: ignore[method-assign]
    bell = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def rung() -> None:
        drain(bell)
        eager.transport.notify(INFLATE)
        if eager.rung:
            os.eventfd_write(bell, 1)
            eager.rung.clear()

    loop.add(bell, rung)
    client = socket.socket(socket.AF_UNIX)
    discard, calls = eager.memory.discard, eager.memory.calls

    def ask_to_quit(gpa: int, size: int) -> None:
        discard(gpa, size)
        if calls["discard"] == 100:
            client.connect(str(tmp_path / "c"))
            client.sendall(b'{"command": "quit"}\n')

    eager.memory.discard = ask_to_quit  # type: ignore[method-assign]

    loop.run()

    assert json.loads(client.recv(100)) == {"ok": True}
    assert calls["discard"] <= 3 * TURN_CALLS
    client.close()
    control.close()
    loop.close()
    os.close(bell)


def test_balloon_large_report_is_discarded_piece_by_piece(machine: VirtioMachine) -> None:
    machine.up()
    areas: list[Range] = []
    machine.memory.discard = lambda gpa, size: areas.append(Range(gpa, size))  # type: ignore[method-assign]
    machine.give(balloon.REPORTING[1], Piece(0x10_1000, 1 << 30, True))

    machine.kick(balloon.REPORTING[1])

    assert max(area.size for area in areas) == balloon.DISCARD_AT_ONCE
    assert areas[0] == Range(0x10_1000, 0xF_F000)  # up to the next whole piece
    assert areas[-1].end == 0x4010_1000
    assert all(a.end == b.start for a, b in itertools.pairwise(areas))
    assert len(machine.queues[balloon.REPORTING[1]].collect()) == 1
