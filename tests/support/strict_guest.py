"""A small strict guest on this machine's KVM: the real loader, and parts that it loads.

It runs in user mode with its code in shared memory, which hosts can do that interpret kernel mode
and read instructions by the memslot's address; stack, manifest and all that is loaded are private.
A test may stand between the loader and its window.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from kvm_bindings.exits import Exit, IoExit
from kvm_bindings.x86_64 import System
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.doorbells import PORT_NAME
from vmm.arch.x86_64.micro_guest import VERBS
from vmm.arch.x86_64.page_tables import payload_tables
from vmm.arch.x86_64.registers import payload_entry
from vmm.arch.x86_64.strict.launch import AREA, Addressing, Entry, Launch, launch
from vmm.boot.manifest import Part
from vmm.conversion.making import make_backing
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.ranges import NOWHERE, Range
from vmm.devices.bus import PortBus, PortDevice
from vmm.devices.doorbell import DoorbellActions, DoorbellBank
from vmm.devices.load_window import LoadWindow
from vmm.host.probes.micro_guest import Verb
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, LaunchMemory

C_BIT = 38
MIB = 1 << 20
WINDOW = Range(layout.LAUNCH_WINDOW_GPA, layout.LAUNCH_WINDOW_SIZE)
Fill = Callable[[LoadWindow, int, GuestMemory], None]
"""What the monitor does when chunk `number` is asked for; an honest one calls `window.write`."""


class StrictGuest:
    """A VM with one vCPU that loads `parts` by itself. A context manager; main thread only."""

    def __init__(
        self,
        system: System,
        parts: Sequence[Part],
        *,
        size: int = 32 * MIB,
        backing: str = "guest_memfd",
        flags: int = 0,
        after: bytes = VERBS[Verb.DONE_FOR_EVER],
        rsi: int = 0,
        rdi: int = 0,
        change: Callable[[list[tuple[int, bytes]]], list[tuple[int, bytes]]] = lambda same: same,
        fill: Fill | None = None,
        common: Range = NOWHERE,
    ) -> None:
        """`after` is the code that runs when all is loaded, in shared memory at PAYLOAD_GPA, with
        `rsi` and `rdi`. `change` is what a monitor does to what it puts in place."""
        alias = 1 << C_BIT
        ram = [Range(0, size)]
        tables = payload_tables(ram, alias)
        state = payload_entry(layout.LAUNCH_GPA, tables.cr3, layout.LAUNCH_HEADER_GPA)
        stays = layout.LAUNCH_STAGE_ONE_TABLES_GPA - layout.LAUNCH_GPA
        addressing = Addressing(0, alias, 0, stays, WINDOW)
        entry = Entry(layout.PAYLOAD_GPA, rsi, rdi)
        self.launch: Launch = launch(parts, addressing, entry, state, tables.writes, flags)
        self.reason: str | None = None
        """Why the loader failed."""
        self.loaded = False
        self._fill = fill
        with ExitStack() as opened:
            self.vm = opened.enter_context(system.create_vm())
            self.private = make_backing(self.vm, backing, size)
            opened.callback(self.private.close)
            shared = MemfdBacking(size, "pyvmm-shared")
            private = [
                Range(layout.PAYLOAD_PRIVATE_START, AREA.start - layout.PAYLOAD_PRIVATE_START),
                Range(AREA.end, size - AREA.end),
            ]
            self.memory = GuestMemory(ram, shared, self.private, private, common)
            opened.callback(self.memory.close)
            scheme = CbitScheme(C_BIT)
            scheme.install(self.vm, self.memory)
            self.window = LoadWindow(self.memory, self._done, self._failed)
            self.window.open(WINDOW.start, WINDOW.size, parts)
            converter = Converter(self.memory, scheme)
            actions = DoorbellActions(converter.convert, lambda gpa, size: 0, lambda code: None)
            self._ports = PortBus()
            self._ports.add(layout.LOADER_PORT, layout.LOADER_PORTS, self)
            bell: PortDevice = DoorbellBank(0, PORT_NAME, actions)
            self._ports.add(layout.DOORBELL_PORT, layout.DOORBELL_PORTS, bell)
            into = LaunchMemory(self.memory)
            into.pwrite(after, layout.PAYLOAD_GPA)
            self.placed = change(list(self.launch.writes))
            """What the monitor put in place, in the end."""
            for gpa, data in self.placed:
                into.pwrite(data, gpa)
            into.seal()
            self.vcpu = self.vm.create_vcpu(0)
            opened.callback(self.vcpu.close)
            self.vcpu.set_cpuid2(system.supported_cpuid())
            self.vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
            self.vcpu.set_regs(state.regs)
            self._opened = opened.pop_all()

    # -- the loader's port, with the test between -----------------------------------------------

    def read(self, offset: int, size: int) -> int:
        return self.window.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and self._fill is not None:
            self._fill(self.window, value, self.memory)
        else:
            self.window.write(offset, size, value)

    def _done(self) -> None:
        self.loaded = True

    def _failed(self, reason: str) -> None:
        self.reason = reason

    def run(self) -> Exit:
        """Until the loader fails, or what comes after it makes an exit that is not the loader's."""
        exit = self.vcpu.run()
        while isinstance(exit, IoExit) and self.reason is None:
            found = self._ports.find(exit.port)
            if found is None:
                break
            device, offset = found
            if exit.is_write:
                device.write(offset, exit.size, int.from_bytes(exit.data, "little"))
            else:
                answer = device.read(offset, exit.size)
                self.vcpu.answer_io(answer.to_bytes(exit.size, "little"))
            exit = self.vcpu.run()
        return exit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()


def random_part(name: str, gpa: int, size: int) -> Part:
    """Bytes that nobody has seen before."""
    return Part(name, gpa, size, os.urandom(size))
