"""What a request to the virtual IOMMU costs, against conversions of the same pages.

    python -m tests.bench.iommu_cost [--rounds N] [--json FILE]

Exits are made by hand and handled by what handles a guest's, and rings are written as a driver
writes them, into a memfd. Each number is from the exit to the answer: a hypercall that
converts pages (scheme cbit), and the write to the IOMMU's notify register, after which the answers
to all requests on its queue are there. They take turns on the same pages: share, unshare, map,
unmap, one after the other, pages that are given up being there before the clock starts. KVM_RUN
is left out; the last line has it, by a guest on this machine's KVM whose every exit is one of the
same four.

The second table is what translation adds: the verbs that devices use, by GPA in shared memory
(GuestMemory) and by IOVA in lent memory (IommuMemory), in turns. The third is a disk's queue with
its driver: from shared memory, with a copy for each read (bounced), and behind the IOMMU with data
buffers that are mapped all the time, mapped for each read and unmapped together or one by one.
Rings and headers are mapped all the time, and not in what is said to be lent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from kvm_bindings.exits import HypercallExit, IoExit
from kvm_bindings.x86_64 import System
from tests.bench.conversion_cost import Side
from tests.support.fake_vcpu import FakeVcpu
from tests.support.iommu import map_request, unmap_request
from tests.support.real_memory import VERBS, RealMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import BAR, VirtioMachine
from tests.support.x86 import exit_handlers
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.arch.x86_64.msrs import MsrTable
from vmm.conversion.lending import Lender
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.bus import PortBus
from vmm.devices.virtio import iommu
from vmm.devices.virtio.block import T_IN, VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.iommu import VirtioIommu
from vmm.devices.virtio.pci_function import NOTIFY
from vmm.exits.outcome import Outcome
from vmm.exits.run_loop import install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.engines import make_engine
from vmm.memory.lending import IommuMemory, LendingMemory

RAM = 256 << 20
PRIVATE_FROM = 64 << 20
AREA = 96 << 20
POOL = 80 << 20
"""What is mapped all the time beside, page by page, as a guest's rings and buffers are."""
POOL_PAGES = 64
IOVA = 0x10_0000_0000
DOMAIN = 1
KEEP = 1  # FALLOC_FL_KEEP_SIZE
TARGET = 2.0
TARGET_US = 1.5

CASES = {"4 KiB": (1, 1), "64 KiB": (16, 1), "4 KiB, 8 a kick": (1, 8), "4 KiB, 32 a kick": (1, 32)}
"""Name -> pages of a mapping, and requests at one kick (as many conversions, one by one)."""


class Guest:
    """What the bench drives: an IOMMU, a device behind it, and the exits that lead there."""

    def __init__(self, opened: ExitStack) -> None:
        shared, private = MemfdBacking(RAM), MemfdBacking(RAM)
        ram = Range(0, RAM)
        areas = (Range(PRIVATE_FROM, RAM - PRIVATE_FROM),)
        self.memory = LendingMemory((ram,), shared, private, areas)
        opened.callback(self.memory.close)
        self.shared, self.private = shared, private
        converter = Converter(self.memory, CbitScheme(38))
        self.device = VirtioIommu()
        self.device.lending = Lender(self.memory, converter)
        endpoint = self.device.endpoint("blk0", 8)
        self.behind = IommuMemory(self.memory, endpoint)
        self.machine = VirtioMachine(self.device, RealMemory(self.memory))  # type: ignore[arg-type]
        opened.callback(self.machine.close)
        # Its notify is served by the vCPU that writes it (vmm.wiring.prompt).
        self.machine.transport._notified = self.machine.transport.notify
        self.machine.up(size=64)
        self.vcpu: Any = FakeVcpu()
        self._handlers = exit_handlers(self.memory, converter, print, ports=self.machine.ports)
        self._kick = IoExit(BAR + NOTIFY, 2, 1, True, struct.pack("<H", iommu.REQUESTS))
        self._heads = [self.machine.room(64) for _ in range(64)]
        self._tails = [self.machine.room(16) for _ in range(64)]
        attach = struct.pack("<B3xIIII", iommu.T_ATTACH, DOMAIN, 8, 0, 0)
        self.ask([attach])
        for number in range(POOL_PAGES):
            self.ask([map_request(number << 16, PAGE_SIZE, POOL + 2 * number * PAGE_SIZE, 3, 1)])

    def ask(self, requests: list[bytes]) -> int:
        """Nanoseconds from the kick to the answer."""
        self.offer(requests)
        started = time.perf_counter_ns()
        self.kick()
        elapsed = time.perf_counter_ns() - started
        self.collect(len(requests))
        return elapsed

    def offer(self, requests: list[bytes]) -> None:
        """Put them on the queue."""
        machine = self.machine
        queue = machine.queues[iommu.REQUESTS]
        for request, head, tail in zip(requests, self._heads, self._tails, strict=False):
            machine.memory.poke(request, head)
            chain = queue.chain([Piece(head, len(request)), Piece(tail, 4, True)])
            queue.available = (queue.available + 1) & 0xFFFF
            slot = queue.avail + 4 + 2 * ((queue.available - 1) % queue.size)
            machine.memory.poke(struct.pack("<H", chain), slot)
        queue.set_available_index(queue.available)

    def kick(self) -> None:
        """What the guest's notify leads to."""
        self._handlers.io(self.vcpu, self._kick)
        machine = self.machine
        while machine.rung:  # a turn's time was over
            machine.transport.notify(machine.rung.pop())

    def collect(self, count: int) -> None:
        """All of them have to be answered well."""
        machine = self.machine
        answers = {machine.memory.peek(1, tail) for tail in self._tails[:count]}
        if answers != {b"\0"} or len(machine.queues[iommu.REQUESTS].collect()) != count:
            raise RuntimeError(f"the IOMMU answered {answers}")

    def convert(self, gpas: list[int], pages: int, *, to_shared: bool) -> int:
        """Nanoseconds from the first hypercall to the last answer."""
        losing = self.private if to_shared else self.shared
        for gpa in gpas:
            os.posix_fallocate(losing.fd, gpa, pages * PAGE_SIZE)
        attributes = 0 if to_shared else 16
        exits = [
            HypercallExit(KVM_HC_MAP_GPA_RANGE, (gpa, pages, attributes, 0, 0, 0), 1)
            for gpa in gpas
        ]
        started = time.perf_counter_ns()
        for each in exits:
            self._handlers.hypercall(self.vcpu, each)
        elapsed = time.perf_counter_ns() - started
        if any(self.vcpu.hypercalls):
            raise RuntimeError(f"conversions answered {self.vcpu.hypercalls}")
        self.vcpu.hypercalls.clear()
        return elapsed


def requests(guest: Guest, pages: int, count: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds for one of each, and the ratio of a map and its unmap to a share
    and its unshare, median of the rounds."""
    size = pages * PAGE_SIZE
    gpas = [AREA + 2 * size * number for number in range(count)]
    maps = [map_request(IOVA + (gpa << 1), size, gpa, 3, DOMAIN) for gpa in gpas]
    unmaps = [unmap_request(IOVA + (gpa << 1), size, DOMAIN) for gpa in gpas]
    steps: dict[str, Callable[[], int]] = {
        "share": lambda: guest.convert(gpas, pages, to_shared=True),
        "unshare": lambda: guest.convert(gpas, pages, to_shared=False),
        "map": lambda: guest.ask(maps),
        "unmap": lambda: guest.ask(unmaps),
    }
    times: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    figures = {f"{name}_us": statistics.median(each) / 1000 / count for name, each in times.items()}
    pairs = zip(times["map"], times["unmap"], times["share"], times["unshare"], strict=True)
    figures["ratio"] = statistics.median((m + u) / (s + n) for m, u, s, n in pairs)
    worst = max(figures["map_us"], figures["unmap_us"])
    conversion = (figures["share_us"] + figures["unshare_us"]) / 2
    figures["worst_ratio"] = worst / conversion
    return figures


class OneExit:
    """A port device of a guest on KVM that does nothing but exit: at its first port the next
    step is prepared and its clock starts, at the second it is carried out, at the third it ends."""

    # again: out 0x80, eax; out 0x84, eax; out 0x88, eax; jmp again
    GUEST = bytes.fromhex("e780 e784 e788 ebf8")

    def __init__(self, guest: Guest, rounds: int, done: Callable[[], None]) -> None:
        gpa = AREA
        convert = [
            HypercallExit(KVM_HC_MAP_GPA_RANGE, (gpa, 1, attributes, 0, 0, 0), 1)
            for attributes in (0, 16)
        ]
        ask = [map_request(IOVA, PAGE_SIZE, gpa, 3, DOMAIN), unmap_request(IOVA, PAGE_SIZE, DOMAIN)]
        self._guest = guest
        self._steps: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("share", lambda: self._fill(guest.private), lambda: self._convert(convert[0])),
            ("unshare", lambda: self._fill(guest.shared), lambda: self._convert(convert[1])),
            ("map", lambda: guest.offer(ask[:1]), guest.kick),
            ("unmap", lambda: guest.offer(ask[1:]), guest.kick),
            ("nothing", lambda: None, lambda: None),
        ]
        self.times: dict[str, list[int]] = {name: [] for name, _, _ in self._steps}
        self._left = rounds * len(self._steps)
        self._done = done
        self._started = 0

    def _fill(self, losing: MemfdBacking) -> None:
        os.posix_fallocate(losing.fd, AREA, PAGE_SIZE)

    def _convert(self, exit: HypercallExit) -> None:
        self._guest._handlers.hypercall(self._guest.vcpu, exit)

    def read(self, offset: int, size: int) -> int:
        raise RuntimeError("the guest reads no clock")

    def write(self, offset: int, size: int, value: int) -> None:
        now = time.perf_counter_ns()
        name, prepare, carry_out = self._steps[-self._left % len(self._steps)]
        if offset == 0:
            prepare()
            self._started = time.perf_counter_ns()
        elif offset == 4:
            carry_out()
        else:
            self.times[name].append(now - self._started)
            if name.endswith("map"):
                self._guest.collect(1)
            self._left -= 1
            if not self._left:
                self._done()


def with_exits(guest: Guest, rounds: int) -> dict[str, float]:
    """Medians in microseconds with the exit of a guest on this machine's KVM. Raises OSError
    without KVM.

    What is measured has two exits, that which is handled and that which ends the clock; half of
    what two that do nothing take is left out.
    """
    with ExitStack() as opened:
        system = opened.enter_context(System())
        side = Side(opened, system, "cbit", 1)
        side.memory.pwrite(OneExit.GUEST, layout.PAYLOAD_GPA)
        group = VcpuGroup()
        exits = OneExit(guest, rounds, group.stop)
        ports = PortBus()
        ports.add(0x80, 12, exits)
        converter = Converter(side.memory, side.scheme)
        problems: list[Outcome] = []

        def stop(outcome: Outcome) -> None:
            problems.append(outcome)
            group.stop()

        handlers = exit_handlers(side.memory, converter, stop, ports=ports, msrs=MsrTable(False))
        group.add(side.vcpu, handlers, stop)
        group.start()
        while not group.join(60.0):
            pass
        if problems:
            raise RuntimeError(problems[0].reason)
        medians = {name: statistics.median(each) / 1000 for name, each in exits.times.items()}
        an_exit = medians.pop("nothing") / 2
        return {name: taken - an_exit for name, taken in medians.items()} | {"exit": an_exit}


def verbs(guest: Guest, rounds: int, repeats: int = 200) -> dict[str, tuple[float, float]]:
    """Microseconds of a verb by GPA and by IOVA: medians of `rounds` turns of `repeats` calls."""
    data = bytes(PAGE_SIZE)
    memory, behind = guest.memory, guest.behind
    memory.shared.pwrite(data * 64, 0x10_0000)
    guest.private.pwrite(data * 2 * POOL_PAGES, POOL)
    by_gpa = [number for n in range(32) for number in (0x10_0000 + 2 * n * PAGE_SIZE, 64)]
    by_iova = [number for n in range(32) for number in (n << 16, 64)]
    one = bytes(64 * 32)
    cases: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "read of 16 bytes": (lambda: memory.pread(16, 0x10_0000), lambda: behind.pread(16, 0), 1),
        "write of 16 bytes": (
            lambda: memory.pwrite(data[:16], 0x10_0000),
            lambda: behind.pwrite(data[:16], 0),
            1,
        ),
        "read of 4 KiB": (
            lambda: memory.pread(PAGE_SIZE, 0x10_0000),
            lambda: behind.pread(PAGE_SIZE, 0),
            1,
        ),
        "read of 32 pieces, each": (
            lambda: memory.read_many(by_gpa),
            lambda: behind.read_many(by_iova),
            32,
        ),
        "write of 32 pieces, each": (
            lambda: memory.write_many(by_gpa, one),
            lambda: behind.write_many(by_iova, one),
            32,
        ),
    }
    found: dict[str, tuple[float, float]] = {}
    for name, (gpa, iova, pieces) in cases.items():
        times: tuple[list[int], list[int]] = [], []
        for _ in range(rounds):
            for call, kept in zip((gpa, iova), times, strict=True):
                started = time.perf_counter_ns()
                for _ in range(repeats):
                    call()
                kept.append(time.perf_counter_ns() - started)
        plain, lent = (statistics.median(each) / 1000 / repeats / pieces for each in times)
        found[name] = plain, lent
    return found


class _Behind:
    """The disk's memory with the guest's own accesses, for the driver: IOVA `at` is GPA `at` +
    OFFSET, page by page."""

    OFFSET = 128 << 20

    def __init__(self, guest: Guest, memory: IommuMemory) -> None:
        self.size = PRIVATE_FROM
        self._fd = guest.private.fd
        for verb in VERBS:
            setattr(self, verb, getattr(memory, verb))

    def peek(self, size: int, gpa: int) -> bytes:
        return os.pread(self._fd, size, gpa + self.OFFSET)

    def poke(self, data: bytes, gpa: int) -> None:
        os.pwrite(self._fd, data, gpa + self.OFFSET)

    def close(self) -> None:
        """The guest's memory is closed by who made it."""


class Disk:
    """A disk in the page cache; its driver has it read `depth` times `size` bytes at once."""

    BYTES = 64 << 20
    BUFFERS = 1 << 20
    """Where they begin; what is below, rings and headers, is mapped all the time."""

    def __init__(self, opened: ExitStack, memory: Any, fd: int) -> None:
        sectors = self.BYTES // 512
        self.machine = VirtioMachine(
            VirtioBlock(DiskFile(os.dup(fd), "d", sectors, False, b"")), memory
        )
        opened.callback(self.machine.close)
        self.machine.up(size=128)
        self._heads = [self.machine.room(32) for _ in range(32)]

    def turn(
        self, size: int, depth: int, before: Callable[[int], object], after: Callable[[int], object]
    ) -> None:
        """`before` and `after` each read, with its buffer."""
        machine = self.machine
        buffers = [self.BUFFERS + 2 * size * number for number in range(depth)]
        if 2 * size * depth > PRIVATE_FROM - self.BUFFERS:
            buffers = [self.BUFFERS + size * number for number in range(depth)]
        for number, (head, buffer) in enumerate(zip(self._heads, buffers, strict=False)):
            before(buffer)
            sector = number * 37 * size % (self.BYTES - size) // 512
            machine.memory.poke(struct.pack("<IIQ", T_IN, 0, sector), head)
            data = Piece(buffer, size, True)
            machine.give(0, Piece(head, 16), data, Piece(head + 16, 1, True))
        machine.kick(0)
        answered = len(machine.queues[0].collect())
        while answered < depth:
            machine.settle()
            more = len(machine.queues[0].collect())
            if not more:
                raise RuntimeError(f"{depth - answered} reads were not answered")
            answered += more
        for buffer in buffers:
            after(buffer)


class Reads(NamedTuple):
    """Microseconds a read by way, and the bytes that the device could reach where buffers are
    mapped for each read: average over the turns, and most."""

    us: dict[str, float]
    average: int
    peak: int


SHAPES = ((4 << 10, 1), (4 << 10, 32), (64 << 10, 8), (1 << 20, 4), (1 << 20, 32))
BOUNCE_BUFFER = 64 << 20
"""What stock Linux shares for it with 512 MiB or more."""


def disks(opened: ExitStack, rounds: int) -> dict[str, Reads]:
    """Reads, driver and all: medians of turns that the ways take alternately."""
    plain, guest = Guest(opened), Guest(opened)
    fd = os.memfd_create("disk")
    opened.callback(os.close, fd)
    os.ftruncate(fd, Disk.BYTES)
    os.posix_fallocate(fd, 0, Disk.BYTES)
    endpoint = guest.device.endpoint("blk1", 16)
    guest.ask([struct.pack("<B3xIIII", iommu.T_ATTACH, 2, 16, 0, 0)])
    engines = make_engine("auto", guest.shared), make_engine("auto", guest.private)
    for engine in engines:
        opened.callback(engine.close)
    behind = _Behind(guest, IommuMemory(guest.memory, endpoint, engines))
    whole = map_request(0, Disk.BUFFERS, _Behind.OFFSET, 3, 2)
    guest.ask([whole])
    shared = Disk(opened, RealMemory(plain.memory), fd)
    lent = Disk(opened, behind, fd)
    return {
        f"{size >> 10} KiB, depth {depth}": _reads(guest, shared, lent, size, depth, rounds)
        for size, depth in SHAPES
    }


def _reads(guest: Guest, shared: Disk, lent: Disk, size: int, depth: int, rounds: int) -> Reads:
    """One size and depth."""
    lender = guest.device.lending
    assert isinstance(lender, Lender)

    def lend(iova: int, size: int) -> None:
        guest.ask([map_request(iova, size, iova + _Behind.OFFSET, 3, 2)])

    bounce, private = bytearray(1 << 20), bytearray(1 << 20)
    pool = 2 * size * depth
    pending: list[int] = []

    def copy(buffer: int) -> None:
        private[:size] = bounce[:size]  # the guest's own copy

    def lend_one(buffer: int) -> None:
        lend(buffer, size)

    def give_back(buffer: int) -> None:
        guest.ask([unmap_request(buffer, size, 2)])

    def give_back_later(buffer: int) -> None:
        pending.append(buffer)
        if len(pending) == depth:
            guest.ask([unmap_request(each, size, 2) for each in pending])
            pending.clear()

    def nothing(buffer: int) -> None:
        """No IOMMU, or mapped already."""

    def premapped() -> None:
        lent.turn(size, depth, nothing, nothing)

    ways: dict[str, Callable[[], None]] = {
        "shared": lambda: shared.turn(size, depth, nothing, nothing),
        "bounced": lambda: shared.turn(size, depth, nothing, copy),
        "premapped": premapped,
        "lazy": lambda: lent.turn(size, depth, lend_one, give_back_later),
        "strict": lambda: lent.turn(size, depth, lend_one, give_back),
    }
    times: dict[str, list[int]] = {name: [] for name in ways}
    held = over = 0.0
    counts = lender.counts
    counts.peak_lent_bytes = 0
    for _ in range(max(rounds * 32 // depth // (1 + size // (64 << 10)), 5)):
        for name, way in ways.items():
            if name == "premapped":
                lend(Disk.BUFFERS, min(pool, PRIVATE_FROM - Disk.BUFFERS))
            before = lender.as_dict()
            started = time.perf_counter_ns()
            way()
            times[name].append(time.perf_counter_ns() - started)
            if name == "premapped":
                guest.ask([unmap_request(0, PRIVATE_FROM, 2)])
                lend(0, Disk.BUFFERS)
                counts.peak_lent_bytes = 0
            elif name == "strict":
                now = lender.as_dict()
                over += now["over_s"] - before["over_s"]
                held += now["average_lent_bytes"] * now["over_s"]
                held -= before["average_lent_bytes"] * before["over_s"]
    always = Disk.BUFFERS + POOL_PAGES * PAGE_SIZE
    return Reads(
        {name: statistics.median(each) / 1000 / depth for name, each in times.items()},
        round(held / over) - always if over else 0,
        counts.peak_lent_bytes - always,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the virtual IOMMU costs.")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    install_kick_handler()
    with ExitStack() as opened:
        guest = Guest(opened)
        table = {
            name: requests(guest, pages, count, max(options.rounds // count, 1))
            for name, (pages, count) in CASES.items()
        }
        added = verbs(guest, max(options.rounds // 20, 1))
        exits = with_exits(guest, options.rounds)
        reads = disks(opened, max(options.rounds // 10, 1))
    print(f"{'us a request':<19}{'share':>8}{'unshare':>9}{'map':>8}{'unmap':>8}   ratio")
    for name, each in table.items():
        print(
            f"{name:<19}{each['share_us']:>8.1f}{each['unshare_us']:>9.1f}{each['map_us']:>8.1f}"
            f"{each['unmap_us']:>8.1f}   {each['ratio']:.2f}, "
            f"the dearer {each['worst_ratio']:.2f} (target {TARGET})"
        )
    conversion = exits["share"] + exits["unshare"]
    print(
        f"{'4 KiB, and its exit':<19}{exits['share']:>8.1f}{exits['unshare']:>9.1f}"
        f"{exits['map']:>8.1f}{exits['unmap']:>8.1f}   "
        f"{(exits['map'] + exits['unmap']) / conversion:.2f}, "
        f"the dearer {2 * max(exits['map'], exits['unmap']) / conversion:.2f} "
        f"(an exit that does nothing takes {exits['exit']:.1f})"
    )
    print(f"\n{'us':<26}{'by GPA':>8}{'by IOVA':>9}   more")
    for name, (plain, lent) in added.items():
        print(f"{name:<26}{plain:>8.2f}{lent:>9.2f}   {lent - plain:+.2f} (target {TARGET_US})")
    ways = ("shared", "bounced", "premapped", "lazy", "strict")
    print(f"\n{'us a read':<19}{''.join(f'{way:>11}' for way in ways)}   lent: average, most")
    for name, read in reads.items():
        print(
            f"{name:<19}{''.join(f'{read.us[way]:>11.1f}' for way in ways)}   "
            f"{read.average / 1024:,.0f} KiB, {read.peak / 1024:,.0f} KiB, "
            f"{100 * read.average / BOUNCE_BUFFER:.2f} and {100 * read.peak / BOUNCE_BUFFER:.2f} % "
            "of 64 MiB"
        )
    if options.json is not None:
        figures = {
            "requests": table,
            "exits": exits,
            "verbs": added,
            "disks": {name: each._asdict() for name, each in reads.items()},
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
