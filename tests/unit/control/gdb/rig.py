"""A guest of fake vCPUs under a debugger: a real target, server, loop and guest memory."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from kvm_bindings import KvmError, Vcpu
from kvm_bindings.exits import DebugExit, Exit
from tests.support.fake_vcpu import PRIVATE_START, FakeVcpu, Rig, Step
from tests.support.gdb_client import GdbClient
from vmm.arch.debug import (
    Abilities,
    Caught,
    Cause,
    Hardware,
    NotMapped,
    Register,
    Unwritable,
    Watch,
)
from vmm.control.gdb.server import GdbServer
from vmm.control.gdb.target import Target
from vmm.core.event_loop import EventLoop
from vmm.exits.run_loop import install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup
from vmm.memory.debugging import DebugAccess

ALL = Abilities(*[True] * 8)
VIRTUAL = 0xFFFF_8000_0000_0000
"""Where the fake guest's page tables show its memory, one to one; below that nothing is mapped."""


class FakeDebug:
    """An architecture of two registers, whose memory is seen at VIRTUAL."""

    description = "<target/>"
    registers: Sequence[Register] = (Register("r0", 64), Register("pc", 32))
    breakpoint_instruction = b"\xcc"
    watches: Container[Watch] = (Watch.EXECUTE, Watch.WRITE, Watch.ACCESS)
    most_hardware = 2
    caches_code = False

    def __init__(self, abilities: Abilities = ALL) -> None:
        self.abilities = abilities
        self.values: dict[int, list[int]] = {}
        self.armed: list[tuple[int, bool, bool, tuple[Hardware | None, ...]]] = []
        self.passed_on: list[tuple[int, Exit]] = []
        self.user_mode = False
        self.peeks: tuple[int, int] | None = None
        self.peeked = b"nothing"
        self.tables_gpa: int | None = None
        self.refuses = False  # KVM_SET_GUEST_DEBUG

    def read_registers(self, vcpu: Any) -> list[int]:
        return list(self.values.setdefault(vcpu.index, [0x1122, 0x1000 + vcpu.index]))

    def write_registers(self, vcpu: Any, values: dict[int, int]) -> None:
        if 1 in values and values[1] % 2:
            raise Unwritable("pc is odd")
        for number, value in values.items():
            self.values.setdefault(vcpu.index, [0, 0])[number] = value

    def is_user_mode(self, vcpu: Any) -> bool:
        return self.user_mode

    def walk(
        self, vcpu: Any, address: int, read_entry: Callable[[int, int], bytes]
    ) -> tuple[int, int]:
        if self.tables_gpa is not None:
            read_entry(self.tables_gpa, 8)
        if address < VIRTUAL:
            raise NotMapped(f"{address:#x} is not mapped")
        return address - VIRTUAL, 0x1000 - address % 0x1000

    def places(self, kind: Watch) -> range:
        return range(self.most_hardware)

    def arm(
        self,
        vcpu: Any,
        *,
        step: bool,
        software: bool,
        hardware: Sequence[Hardware | None],
        peek: Callable[[int, int], bytes],
    ) -> None:
        if self.refuses:
            raise KvmError("KVM_SET_GUEST_DEBUG", errno.EINVAL)
        if step and self.peeks is not None:
            self.peeked = peek(*self.peeks)
        self.armed.append((vcpu.index, step, software, tuple(hardware)))

    def caught(self, vcpu: Any, exit: Any, hardware: Sequence[Hardware | None]) -> Caught:
        if exit.exception == 3:
            return Caught(Cause.SOFTWARE, exit.pc)
        if exit.dr6 == 1 << 14:
            return Caught(Cause.STEP, exit.pc)
        if exit.dr6 < len(hardware) and hardware[exit.dr6] is not None:
            return Caught(Cause.HARDWARE, exit.pc, exit.dr6)
        return Caught(Cause.GUEST, exit.pc)

    def pass_on(self, vcpu: Any, exit: Any) -> None:
        self.passed_on.append((vcpu.index, exit))


STEPPED = DebugExit(1, 0x1001, 1 << 14, 0)


def broken_at(address: int) -> DebugExit:
    return DebugExit(3, address, 0, 0)


def hit(number: int) -> DebugExit:
    return DebugExit(1, 0x2000, number, 0)


class ScriptedVcpu(FakeVcpu):
    """`then` adds an exit to what it meets when it is next in the guest."""

    def then(self, *exits: Step) -> None:
        self._steps += exits


class Debugged:
    """Guest, loop on a thread, and a server at `path`. Shared memory below PRIVATE_START."""

    def __init__(self, path: Path, vcpus: int = 1, **access: Any) -> None:
        install_kick_handler()
        self.rig = Rig()
        self.group = VcpuGroup()
        self.vcpus = [ScriptedVcpu(index=number) for number in range(vcpus)]
        self.outcomes: list[object] = []
        self.quits: list[None] = []
        for vcpu in self.vcpus:
            self.group.add(cast(Vcpu, vcpu), self.rig.handlers, self.outcomes.append)
        self.debug = FakeDebug()
        self.access = DebugAccess(self.rig.memory, **access)
        self.target = Target(self.debug, self.vcpus, self.group, self.access)
        self.rig.handlers.table[DebugExit] = ("debug", self.target.on_debug_exit)
        self.loop = EventLoop()
        self.path = path
        self.server = GdbServer(str(path))
        self.server.serve(self.loop, self.target, lambda: self.quits.append(None))
        self.group.start()
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        self.clients: list[GdbClient] = []
        self._ended = False

    @property
    def memory(self) -> Any:
        return self.rig.memory

    def client(self) -> GdbClient:
        made = GdbClient.at(self.path)
        self.clients.append(made)
        return made

    def on_loop(self, call: Callable[[], object]) -> Any:
        """What `call` returns, called on the loop's thread."""
        done, found = threading.Event(), SimpleNamespace(value=None)

        def run() -> None:
            found.value = call()
            done.set()

        self.loop.set_timer(0, run)
        assert done.wait(20)
        return found.value

    def end(self, status: int = 0) -> None:
        if self._ended:
            return
        self._ended = True
        if self._thread.is_alive():
            self.group.stop()
            assert self.group.join(10)
            self.on_loop(lambda: self.server.close(status))
            self.loop.stop()
            self._thread.join(10)
        self.server.close(0)
        self.target.close()
        self.loop.close()
        self.rig.close()
        assert [r.error for r in self.group.runners if r.error] == []


__all__ = ["PRIVATE_START", "Debugged", "FakeDebug"]
