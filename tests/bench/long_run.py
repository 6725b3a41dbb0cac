"""Many lives of a machine's parts in one process, for as long as one likes: does anything grow?

    python -m tests.bench.long_run [--seconds 3600] [--guest-hours 24] [--every 60] [--seed N]
                                   [--json FILE]

What would take a guest a day happens here without its pauses, in rounds. Each round has
- payload runs: whole machines on this host's KVM with every kind of device, opened and closed;
- random conversion programs on this host's KVM, compared with the reference, with what the
  kernel holds behind either side (`tests.fuzz.conversion_programs`);
- lives of each virtio device under a hostile driver: work, resets, conversions, a host that
  comes, talks and hangs up, a pause in between (`tests.fuzz.attacked`);
- conversions by one `Converter` that lives for all of the run, beside a disk whose data is read
  back: page states, accounting and the kernel's count of each side have to agree at every look;
- pauses and dumps of a guest that another pyvmm runs all the while.

`--guest-hours` is how long the guest of that one `Converter` believes to have run at the end: its
clock, which late discards are due by, goes as much faster. All else has no clock but the host's:
KVM's timers count as ever, and what a day does to those isn't seen here.

Every `--every` seconds a line says what this process and the other one hold. Exit status 1 when
open fds, threads, or mappings of guest memory are not what they were, when resident memory of
either goes on growing (by more than 4 MiB after the first quarter), or when anything is wrong in
a round. The last line of standard output is the result as JSON; `--json` writes it to a file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

from kvm_bindings.x86_64 import System
from tests.fuzz import conversion_programs
from tests.fuzz.attacked import DEVICES, Attacked, attacked
from tests.fuzz.hostile_driver import HostileDriver
from tests.fuzz.oracles import assert_holds_little
from tests.support import guests
from tests.support.control_client import ask
from tests.support.conversion import share, unshare
from tests.support.fake_memory import FakeMemory
from tests.support.memory import data_pages, page
from tests.support.real_memory import RealMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.exits.outcome import POWEROFF
from vmm.exits.run_loop import install_kick_handler
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy.builtin import DeferredDiscard

MOST_GROWTH_KIB = 4096
REST = 60.0
"""Seconds that the other pyvmm has for an answer."""


def require(fact: bool, words: str) -> None:
    """Raises AssertionError where something is not as it should be."""
    if not fact:
        raise AssertionError(words)


class Part(Protocol):
    """Something that is done in every round; raises where something is wrong."""

    done: Counter[str]

    def round(self) -> None: ...


class Payloads:
    """Whole machines, one after another, each with other parts."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._rng = rng
        disk = folder / "payload-disk"
        disk.write_bytes(bytes(1 << 20))
        plain = MachineConfig(memory=32 << 20)
        private = plain._replace(private_memory="auto", report=str(folder / "report.json"))
        deferring = ("vmm.policy.builtin:DeferredDiscard", ("seconds=0.01",))
        self._configurations = [
            plain,
            private._replace(cpus=2, disks=(str(disk),), trace=str(folder / "trace")),
            private._replace(cpus=4, disks=(f"{disk},queues=4",), policies=(deferring,)),
            private._replace(
                rng=True, vsock=f"path={folder / 'pv'}",
                consoles=(f"file={folder / 'pc'}", f"socket={folder / 'ps'},name=x"),
                balloon=f"size=4M,control={folder / 'pb'}", control=str(folder / "pctl"),
            ),
        ]  # fmt: skip

    def round(self) -> None:
        for configuration in self._rng.sample(self._configurations, 2):
            outcome = Machine(configuration).run()
            require(outcome.exit == POWEROFF, f"payload: {outcome}")
            self.done["payload runs"] += 1


class Programs:
    """Random conversion programs on every scheme and backing that this host has."""

    def __init__(self, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._seed = seed
        self._cells = conversion_programs.kvm_cells(System())

    def round(self) -> None:
        for cell in self._cells:
            for _ in range(4):
                divergence = conversion_programs.compare(
                    cell, self._seed, self.done["conversion programs"]
                )
                require(divergence is None, f"conversion program: {divergence}")
                self.done["conversion programs"] += 1


class Devices:
    """Each virtio device and a driver that means harm; new ones after each look, for which all
    are closed: who talks to them comes and goes."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._folder = folder
        self._rng = rng
        self._opened: dict[str, tuple[ExitStack, Attacked, HostileDriver]] = {}

    def _open(self, name: str) -> tuple[ExitStack, Attacked, HostileDriver]:
        folder = self._folder / f"{name}"
        folder.mkdir(exist_ok=True)
        stack = ExitStack()
        target, driver = stack.enter_context(attacked(name, self._rng, folder))
        self.done["devices opened"] += 1
        return stack, target, driver

    def round(self) -> None:
        for name in DEVICES:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            _, target, driver = self._opened[name]
            driver.episode(100)
            assert_holds_little(driver.machine)
            with driver.machine.transport.held(1.0):
                self.done["device pauses"] += 1
            driver.machine.driver.status = 0
            target.leaked = b""  # what came out is of interest elsewhere
            self.done[f"{name} lives"] += 1

    def close(self) -> None:
        while self._opened:
            name, (opened, _, _) = self._opened.popitem()
            opened.close()
            for left in (self._folder / name).iterdir():
                left.unlink()


class Ledger:
    """One converter and one disk for the whole run, and what the kernel must hold by our count.

    The disk's rings and data are in the first pages, which stay shared; the rest is converted.
    """

    PAGES = 4096
    FIRST = 512
    DATA = 64 << 10

    def __init__(self, folder: Path, rng: random.Random, rate: float) -> None:
        """`rate`: seconds of the guest in one of the host."""
        self.done: Counter[str] = Counter()
        self._rng = rng
        self._rate, self._started = rate, time.monotonic()
        size = page(self.PAGES)
        self._private, self._shared = MemfdBacking(size), MemfdBacking(size)
        half = page(self.PAGES // 2)
        self._memory = GuestMemory(
            (Range(0, size),), self._shared, self._private, [Range(half, half)]
        )
        self._skipped = 0.0
        self._converter = Converter(
            self._memory, CbitScheme(47), DeferredDiscard(1.0, 4 << 20), clock=self.now
        )
        self._is_shared = [number < self.PAGES // 2 for number in range(self.PAGES)]
        self._start = sum(self._is_shared)
        # Pages that were written since their state changed.
        self._held: dict[bool, set[int]] = {False: set(), True: set()}
        path = folder / "ledger-disk"
        path.touch()
        os.truncate(path, 8 << 20)  # no large buffer: glibc would keep all later ones
        real = cast(FakeMemory, RealMemory(self._memory))
        self._machine = VirtioMachine(VirtioBlock(open_disk(str(path))), memory=real)
        self._header, self._status = self._machine.place(bytes(16)), self._machine.blank(1)
        self._data = self._machine.blank(self.DATA)

    def now(self) -> float:
        """The guest's seconds since the start."""
        return self._skipped + (time.monotonic() - self._started) * self._rate

    def round(self) -> None:
        for _ in range(200):
            self._convert()
            self._touch()
        self._skipped += 2.0
        while self._memory.bytes_in(PageState.DEFERRED):
            self._converter.settle()
        self._look()
        self._use_disk()

    def _convert(self) -> None:
        rng = self._rng
        first = rng.randrange(self.FIRST, self.PAGES)
        count = min(rng.choice((1, 1, 2, 16, 64)), self.PAGES - first)
        to_shared = rng.random() < 0.5
        self._skipped += rng.random() / 20
        if rng.random() < 0.2:
            self._converter.settle()
        answer = self._converter.convert((share if to_shared else unshare)(first, count))
        require(answer == 0, f"conversion of {count} pages from {first}: {answer}")
        for number in range(first, first + count):
            if self._is_shared[number] is not to_shared:
                self._is_shared[number] = to_shared
                for held in self._held.values():
                    held.discard(number)
        self.done["conversions"] += 1

    def _touch(self) -> None:
        """As the guest would, on the side that the page is on."""
        number = self._rng.randrange(self.FIRST, self.PAGES)
        is_shared = self._is_shared[number]
        backing = self._shared if is_shared else self._private
        os.pwrite(backing.fd, b"touched", page(number))
        self._held[is_shared].add(number)

    def _look(self) -> None:
        """States, accounting, and the kernel's count (data pages, and blocks) of each side."""
        shared = sum(self._is_shared)
        require(self._memory.bytes_in(PageState.SHARED) == page(shared), "bytes shared")
        require(self._memory.bytes_in(PageState.PRIVATE) == page(self.PAGES - shared), "private")
        counts = self._converter.accounting
        gained = counts.share.bytes - counts.unshare.bytes
        require(gained == page(shared - self._start), f"accounting says {gained:#x}")
        require(self._memory.other_side_bytes() == 0, "a side that nobody uses is there")
        for is_shared, backing in ((False, self._private), (True, self._shared)):
            found = data_pages(backing.fd)
            own = {number for number in found if number >= self.FIRST}
            wrong = own ^ self._held[is_shared]
            require(not wrong, f"{backing}: pages {sorted(wrong)[:9]} of {len(own)}")
            blocks = os.fstat(backing.fd).st_blocks * 512
            require(blocks == page(len(found)), f"{blocks} bytes of blocks, {len(found)} pages")
        residency = self._memory.residency()
        require(residency.private_bytes == page(len(self._held[False])), f"{residency}")
        self.done["looks at the kernel's count"] += 1

    def _use_disk(self) -> None:
        self._machine.up(size=16)  # a new driver
        for _ in range(10):
            sector = self._rng.randrange(((8 << 20) - self.DATA) // 512)
            data = self._rng.randbytes(self.DATA)
            self._machine.memory.poke(data, self._data.gpa)
            self._request(1, sector)
            self._machine.memory.poke(bytes(self.DATA), self._data.gpa)
            self._request(0, sector)
            read = self._machine.memory.peek(self.DATA, self._data.gpa)
            require(read == data, f"the disk's sector {sector} reads back as something else")
        self._machine.driver.status = 0

    def _request(self, kind: int, sector: int) -> None:
        self._machine.memory.poke(struct.pack("<IIQ", kind, 0, sector), self._header.gpa)
        data = Piece(self._data.gpa, self.DATA, writable=kind == 0)
        self._machine.give(0, self._header, data, self._status)
        self._machine.kick(0)
        require(self._machine.text(self._status, 1) == b"\0", "the disk failed")
        self._machine.queues[0].collect()
        self.done["disk requests"] += 1

    def close(self) -> None:
        self._machine.close()
        self._memory.close()


class Outside:
    """A guest that halts, run by another pyvmm, which is paused, asked and told by its socket.

    An ordinary VM: not every host can run a kernel with private memory.
    """

    def __init__(self, folder: Path) -> None:
        self.done: Counter[str] = Counter()
        kernel, disk, self._path = folder / "kernel", folder / "outside-disk", folder / "control"
        kernel.write_bytes(guests.kernel(guests.say(b"ready\r\n") + guests.HALT))
        disk.write_bytes(bytes(1 << 20))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmm", "--kernel", str(kernel), "--mem", "64M", "--rng",
             "--disk", f"{disk},queues=2", "--control", str(self._path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        require(b"ready" in self.process.stdout.readline(), "the other pyvmm's guest is not ready")

    def ask(self, command: str, **more: object) -> dict[str, Any]:
        return ask(self._path, command, seconds=REST, **more)

    def round(self) -> None:
        for _ in range(10):
            require(self.ask("pause")["ok"], "no pause")
            require(self.ask("status")["state"] == "paused", "not paused")
            require(self.ask("resume")["ok"], "no resume")
            self.done["pauses"] += 1
        require(not self.ask("convert", kind="share", gpa=0, size=4096)["ok"], "converted")
        state = self.ask("dump-state")
        require(state["pages"] == [[0, 64 << 20, "shared"]], f"states {state['pages']}")
        resident = state["residency"]["shared_bytes"]
        require(0 < resident <= 64 << 20, f"{resident} bytes resident")
        self.done["dumps"] += 1

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.process.wait)
            stack.callback(self.process.kill)
            self.ask("quit")
            self.process.wait(REST)


def held_by(pid: int) -> dict[str, int]:
    """What a process holds now."""
    proc = Path(f"/proc/{pid}")
    maps = (proc / "maps").read_text().splitlines()
    status = (proc / "status").read_text()
    return {
        "fds": len(os.listdir(proc / "fd")),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "mappings": sum(("memfd:" in m or "kvm" in m) and ".so" not in m for m in maps),
        "resident_kib": int(status.split("VmRSS:")[1].split()[0]),
    }


def grown(samples: list[dict[str, dict[str, int]]]) -> list[str]:
    """What is more than it was after the first quarter, in words."""
    wrong = []
    first, last = samples[len(samples) // 4], samples[-1]
    for process, now in last.items():
        before = first[process]
        for name in ("fds", "threads", "mappings"):
            if now[name] != before[name]:
                wrong.append(f"{process}: {before[name]} {name}, now {now[name]}")
        growth = now["resident_kib"] - before["resident_kib"]
        if growth > MOST_GROWTH_KIB:
            wrong.append(f"{process}: resident memory has grown by {growth} KiB")
    return wrong


def run(
    options: argparse.Namespace, folder: Path, console: int, stack: ExitStack
) -> dict[str, Any]:
    rng = random.Random(options.seed)
    install_kick_handler()
    rate = options.guest_hours * 3600 / options.seconds
    ledger, outside = Ledger(folder, rng, rate), Outside(folder)
    devices = Devices(folder, rng)
    for opened in (ledger, outside, devices):
        stack.callback(opened.close)
    parts: list[Part] = [Payloads(folder, rng), Programs(options.seed), devices, ledger, outside]
    started = looked = time.monotonic()
    samples: list[dict[str, dict[str, int]]] = []
    rounds, wrong = 0, ""
    try:
        while time.monotonic() - started < options.seconds:
            for part in parts:
                part.round()
            rounds += 1
            if rounds == 1 or time.monotonic() - looked >= options.every:
                looked = time.monotonic()
                devices.close()
                gc.collect()
                samples.append(
                    {"this": held_by(os.getpid()), "other": held_by(outside.process.pid)}
                )
                said = f"{looked - started:7.0f} s, {rounds} rounds: {json.dumps(samples[-1])}\n"
                os.write(console, said.encode())
    except Exception as error:
        wrong = f"round {rounds + 1}: {type(error).__name__}: {error}"
    done: Counter[str] = sum((part.done for part in parts), Counter())
    problems = [wrong] if wrong else []
    problems += grown(samples) if samples else ["nothing was looked at"]
    return {
        "ok": not problems,
        "wrong": problems,
        "seconds": round(time.monotonic() - started),
        "guest_seconds": round(ledger.now()),
        "seed": options.seed,
        "rounds": rounds,
        "done": dict(sorted(done.items())),
        "python_threads": threading.active_count(),
        "samples": samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Does anything grow while machines come and go?")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--guest-hours", type=float, default=24.0, help="the guest's time")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two looks")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--json", type=Path, help="write the result there as well")
    options = parser.parse_args()
    console = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # the payloads' words
    os.close(null)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result = run(options, folder, console, stack)
    text = json.dumps(result)
    os.write(console, text.encode() + b"\n")
    if options.json is not None:
        options.json.write_text(text + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
