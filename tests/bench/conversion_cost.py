"""What a conversion costs through pyvmm, against the bare ioctls that it needs.

    python tests/bench/conversion_cost.py [--scheme NAME] [--rounds N] [--json FILE]

Two VMs of one kind. In the first a guest rings the port doorbell and pyvmm does the rest: run loop,
exit handlers, transaction, scheme, discard, answer. In the second the same guest is served by the
bare calls and nothing else: KVM_RUN for each of the doorbell's exits, the scheme's ioctls with
arguments made in advance, one fallocate. They take turns, conversion by conversion, on pages that
are there (allocated before the clock starts). A share and an unshare are one round.

The last column leaves KVM_RUN out on both sides: the transaction against the scheme's ioctls and
the hole alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvm_bindings._kvm import ffi, lib

from kvm_bindings import ioctls
from kvm_bindings.x86_64 import System, Vcpu, Vm
from tests.support.x86 import X86, exit_handlers
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.cpuid import choose_c_bit
from vmm.arch.x86_64.msrs import MsrTable
from vmm.arch.x86_64.page_tables import payload_tables
from vmm.arch.x86_64.registers import payload_entry
from vmm.conversion.making import make_scheme
from vmm.conversion.schemes.remap import RemapScheme
from vmm.conversion.transaction import Converter
from vmm.core.errors import HostError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.bus import PortBus
from vmm.exits.outcome import Outcome
from vmm.exits.run_loop import install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup
from vmm.host.choice import Wanted, choose
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory

RAM = Range(0, 256 << 20)
PRIVATE_FROM = 2 << 20
AREA_GPA = 64 << 20
SIZES = {"4 KiB": 4 << 10, "2 MiB": 2 << 20, "64 MiB": 64 << 20}
ROUNDS = {"4 KiB": 400, "2 MiB": 100, "64 MiB": 15}
TARGET = 1.3

BEGIN_PORT, END_PORT = 0x80, 0x84
# again: out 0x80, eax; mov edx, 0x500; mov eax, esi; out dx, eax; add edx, 4; mov eax, edi;
# out dx, eax; add edx, 4; mov eax, ebx; out dx, eax; add edx, 4; in eax, dx; out 0x84, eax;
# xor ebx, 3; jmp again. EBX is the command: 1 shares, 2 unshares.
GUEST = bytes.fromhex(
    "e780 ba00050000 89f0 ef 83c204 89f8 ef 83c204 89d8 ef 83c204 ed e784 83f303 ebdd"
)
PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
KEEP = 1


class Side:
    """One VM whose guest asks for conversions of `pages` pages for ever."""

    def __init__(self, opened: ExitStack, system: System, scheme: str, pages: int) -> None:
        wanted = Wanted(scheme, "auto", RAM.end, two_addresses=False, host_loads=False)
        self.chosen = choose(X86, system, wanted)
        self.vm = opened.enter_context(cast(Vm, self.chosen.vm))
        backing = self.chosen.backing
        shared = backing if backing.traits.in_place else MemfdBacking(RAM.end)
        private = Range(PRIVATE_FROM, RAM.end - PRIVATE_FROM)
        self.memory = GuestMemory([RAM], shared, backing, [private])
        opened.callback(self.memory.close)
        cpuid = system.supported_cpuid()
        self.scheme = make_scheme(self.chosen.scheme, lambda: choose_c_bit(cpuid), nullcontext)
        self.scheme.install(self.vm, self.memory)
        tables = payload_tables([RAM])
        state = payload_entry(layout.PAYLOAD_GPA, tables.cr3)
        for gpa, data in [*tables.writes, *state.writes, (layout.PAYLOAD_GPA, GUEST)]:
            self.memory.pwrite(data, gpa)
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        opened.callback(self.vcpu.close)
        self.vcpu.set_cpuid2(cpuid)
        self.vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        registers = {"rsi": AREA_GPA // PAGE_SIZE, "rdi": pages, "rbx": 1}
        self.vcpu.set_regs({**state.regs, **registers})
        self.size = pages * PAGE_SIZE

    def losing(self, kind: Kind) -> int:
        """The fd of the side that a conversion gives up."""
        assert self.memory.private is not None
        return self.memory.private.fd if kind is Kind.SHARE else self.memory.shared.fd

    def allocate(self, kind: Kind) -> None:
        """Put pages where the next conversion will take them away."""
        _check(lib.pyvmm_fallocate(self.losing(kind), KEEP, AREA_GPA, self.size))


class Bare(Side):
    """Served by ioctls alone."""

    def __init__(self, opened: ExitStack, system: System, scheme: str, pages: int) -> None:
        super().__init__(opened, system, scheme, pages)
        self._ioctls = {kind: self._prepare(kind) for kind in Kind}
        self._answer = ffi.cast("struct kvm_run *", self.vcpu._address)

    def _prepare(self, kind: Kind) -> list[tuple[int, int, Any]]:
        """The scheme's ioctls for one conversion: (fd, request, argument)."""
        attribute = 0 if kind is Kind.SHARE else ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE
        if self.chosen.scheme == "attributes":
            fields = {"address": AREA_GPA, "size": self.size, "attributes": attribute}
            argument = ffi.new("struct kvm_memory_attributes *", fields)
            return [(self.vm.fd, ioctls.KVM_SET_MEMORY_ATTRIBUTES, argument)]
        if self.chosen.scheme == "in-place":
            fields = {"offset": AREA_GPA, "size": self.size, "attributes": attribute}
            argument = ffi.new("struct kvm_memory_attributes2 *", fields)
            return [(self.losing(kind), ioctls.KVM_SET_MEMORY_ATTRIBUTES2, argument)]
        if isinstance(self.scheme, RemapScheme):
            return self._memslots(self.scheme, kind)
        return []

    def _memslots(self, scheme: RemapScheme, kind: Kind) -> list[tuple[int, int, Any]]:
        """What the scheme itself asks of KVM for this conversion, written down."""
        calls: list[tuple[int, int, Any]] = []
        pointer = self.vm._pointer

        def record(request: int, argument: Any) -> int:
            calls.append((self.vm.fd, request, argument))
            return pointer(request, argument)

        self.vm._pointer = record  # type: ignore[method-assign]
        scheme.apply(Range(AREA_GPA, self.size), kind)
        del self.vm._pointer
        return calls

    def convert(self, kind: Kind) -> None:
        """What a conversion needs of the kernel."""
        for fd, request, argument in self._ioctls[kind]:
            _check(lib.pyvmm_ioctl_pointer(fd, request, argument))
        _check(lib.pyvmm_fallocate(self.losing(kind), PUNCH, AREA_GPA, self.size))

    def round(self, kind: Kind) -> int:
        """One conversion at the guest's request; nanoseconds from its first exit to its last."""
        run, fd = lib.pyvmm_ioctl_value, self.vcpu.fd
        self.allocate(kind)
        _check(run(fd, ioctls.KVM_RUN, 0))  # BEGIN_PORT
        started = time.perf_counter_ns()
        _check(run(fd, ioctls.KVM_RUN, 0))
        _check(run(fd, ioctls.KVM_RUN, 0))
        _check(run(fd, ioctls.KVM_RUN, 0))  # the command
        self.convert(kind)
        _check(run(fd, ioctls.KVM_RUN, 0))  # asks for the result
        offset = self._answer.io.data_offset
        ffi.cast("uint32_t *", self.vcpu._address + offset)[0] = 0
        _check(run(fd, ioctls.KVM_RUN, 0))  # END_PORT
        return time.perf_counter_ns() - started


class Clock:
    """A port device of the measured VM: the guest starts and stops it around a conversion; before
    or after it the bare VM has its turn."""

    def __init__(self, measured: Side, bare: Bare, rounds: int, done: Callable[[], None]) -> None:
        self._measured = measured
        self._bare = bare
        self._left = 2 * rounds
        self._done = done
        self._kind = Kind.SHARE
        self._started = 0
        self.through: dict[Kind, list[int]] = {kind: [] for kind in Kind}
        self.bare: dict[Kind, list[int]] = {kind: [] for kind in Kind}

    def write(self, offset: int, size: int, value: int) -> None:
        now = time.perf_counter_ns()
        # Rounds begin with the one and the other in turn: whoever is first pays for what the
        # kernel does only now and then.
        bare_first = self._left // 2 % 2 == 0
        if offset == 0:
            if bare_first:
                self._bare_turn()
            self._measured.allocate(self._kind)
            self._started = time.perf_counter_ns()
            return
        if value:
            raise RuntimeError(f"the guest's answer was {value:#x}")
        self.through[self._kind].append(now - self._started)
        if not bare_first:
            self._bare_turn()
        self._kind = Kind.UNSHARE if self._kind is Kind.SHARE else Kind.SHARE
        self._left -= 1
        if not self._left:
            self._done()

    def _bare_turn(self) -> None:
        self.bare[self._kind].append(self._bare.round(self._kind))

    def read(self, offset: int, size: int) -> int:
        raise RuntimeError("the guest reads no clock")


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def measure(system: System, scheme: str, size: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds, through pyvmm and bare, with and without KVM_RUN."""
    with ExitStack() as opened:
        measured = Side(opened, system, scheme, size // PAGE_SIZE)
        bare = Bare(opened, system, scheme, size // PAGE_SIZE)
        converter = Converter(measured.memory, measured.scheme)
        group = VcpuGroup()
        clock = Clock(measured, bare, rounds, group.stop)
        ports = PortBus()
        ports.add(BEGIN_PORT, 8, clock)
        problems: list[Outcome] = []

        def stop(outcome: Outcome) -> None:
            problems.append(outcome)
            group.stop()

        handlers = exit_handlers(
            measured.memory, converter, stop, ports=ports, msrs=MsrTable(False)
        )
        group.add(measured.vcpu, handlers, stop)
        group.start()
        while not group.join(60.0):
            pass
        if problems:
            raise RuntimeError(problems[0].reason)
        alone, alone_bare = _without_kvm_run(measured, bare, converter, rounds)
    figures = {
        "through_us": _median(clock.through),
        "bare_us": _median(clock.bare),
        "transaction_us": statistics.median(alone) / 1000,
        "ioctls_us": statistics.median(alone_bare) / 1000,
    }
    figures["ratio"] = figures["through_us"] / figures["bare_us"]
    figures["ratio_without_kvm_run"] = figures["transaction_us"] / figures["ioctls_us"]
    return figures


def _without_kvm_run(
    measured: Side, bare: Bare, converter: Converter, rounds: int
) -> tuple[list[int], list[int]]:
    """Times of the transaction and of its ioctls, in nanoseconds; either is first in turn."""
    through: list[int] = []
    direct: list[int] = []
    pages = measured.size // PAGE_SIZE
    requests = {kind: ConversionRequest(kind, AREA_GPA, pages, 0, "bench") for kind in Kind}
    turns: list[tuple[Side, Callable[[Kind], object], list[int]]] = [
        (bare, bare.convert, direct),
        (measured, lambda kind: converter.convert(requests[kind]), through),
    ]
    for _ in range(rounds):
        turns.reverse()
        for kind in (Kind.SHARE, Kind.UNSHARE):
            for side, convert, times in turns:
                side.allocate(kind)
                started = time.perf_counter_ns()
                convert(kind)
                times.append(time.perf_counter_ns() - started)
    return through, direct


def _median(times: dict[Kind, list[int]]) -> float:
    """The mean of the medians of shares and unshares, in microseconds."""
    return statistics.mean(statistics.median(each) for each in times.values()) / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a conversion costs.")
    parser.add_argument("--scheme", choices=X86.schemes, help="default: each that this host has")
    parser.add_argument("--rounds", type=int, help="default: more for smaller sizes")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    install_kick_handler()
    table: dict[str, dict[str, dict[str, float]]] = {}
    worst = 0.0
    print(f"{'scheme':<11}{'size':<8}{'pyvmm':>11}{'bare':>11}{'ratio':>7}   without KVM_RUN")
    with System() as system:
        for scheme in X86.schemes if options.scheme is None else (options.scheme,):
            for name, size in SIZES.items():
                try:
                    figures = measure(system, scheme, size, options.rounds or ROUNDS[name])
                except HostError as error:
                    print(f"{scheme:<11}{str(error)[:100]}")
                    break
                table.setdefault(scheme, {})[name] = figures
                worst = max(worst, figures["ratio"])
                print(
                    f"{scheme:<11}{name:<8}{figures['through_us']:>8.1f} us"
                    f"{figures['bare_us']:>8.1f} us{figures['ratio']:>7.2f}   "
                    f"{figures['transaction_us']:.1f} us against {figures['ioctls_us']:.1f} us, "
                    f"ratio {figures['ratio_without_kvm_run']:.2f}",
                    flush=True,
                )
    print(f"worst ratio {worst:.2f}, target {TARGET}")
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
