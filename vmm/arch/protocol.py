"""What an architecture offers: everything that is not the same on all of them.

An `Architecture` is stateless: limits, guests' images, what the host's KVM must have. A `Platform`
is one VM's share of it: what is made before and after the vCPUs, the board, the exits. In the life
of a run they are used in the order in which they stand here.

For type checkers: a run doesn't import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from vmm.arch.options import GuestOptions
from vmm.core.lean_typing import TYPE_CHECKING, Any, Protocol
from vmm.host.architecture import HostArchitecture

if TYPE_CHECKING:
    from kvm_bindings import System, Vcpu, Vm
    from vmm.arch.debug import GuestDebug
    from vmm.arch.guest_cpu import Gate, GuestCpu
    from vmm.boot.source import Source
    from vmm.conversion.transaction import Converter
    from vmm.core.ranges import Range
    from vmm.core.saved import Saved, State
    from vmm.devices.bus import PortDevice
    from vmm.exits.handlers import ExitHandlers
    from vmm.exits.outcome import Outcome
    from vmm.memory.guest_memory import GuestMemory, LaunchMemory
    from vmm.wiring.board import Board, BoardParts


class OpenedKernel(Protocol):
    """A kernel whose headers are checked; it may be uncompressed beside us still."""

    def close(self) -> None:
        """Give up what isn't finished; any number of times, and no harm once a guest has it."""
        ...


class Guest(Protocol):
    """What a run needs to know of what it runs: a Linux kernel or the embedded payload."""

    host_loads_private: bool
    """Whether its private memory is filled by the host before it runs."""
    loads_itself: bool
    """Whether a loader inside it fills its private memory, from images that stay open meanwhile."""
    two_addresses: bool
    """Whether it picks the side of a page by an address bit, and can't do without."""
    doorbell: str
    """How it asks for conversions, where it has private memory."""
    unpaged: Range
    """Where it runs processors without paging, which can't set an address bit; may be empty."""

    @property
    def launch(self) -> dict[str, Any] | None:
        """For reports: what its loader was started with; None where it has none."""
        ...

    def finish_opening(self) -> None:
        """Wait for images that are on their way. Raises UsageError for a bad one."""
        ...

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        """What starts as private memory when there is any."""
        ...

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """What it will surely write as private memory while it boots, as far as one can tell."""
        ...

    def close(self) -> None:
        """Close its images; any number of times."""
        ...


class Platform(Protocol):
    """The architecture's share of one VM."""

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """In the order of their indexes; empty before `create_vcpus`."""
        ...

    def create_vcpus(self, count: int, alias: int, opened: ExitStack) -> None:
        """Make the vCPUs, closed with `opened`, and what has to follow them. `alias` is the
        scheme's address bit, as a mask. Raises KvmError, HostError."""
        ...

    def make_board(self, parts: BoardParts) -> Board:
        """Buses and fixed devices, connected to KVM. Raises KvmError."""
        ...

    def exit_handlers(
        self,
        board: Board,
        memory: GuestMemory,
        converter: Converter,
        stop: Callable[[Outcome], None],
    ) -> ExitHandlers:
        """What handles the vCPUs' exits; the doorbell is put on its bus."""
        ...

    def load(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> None:
        """Write the guest, and tables that describe its machine, into its memory; the first
        vCPU's registers. `functions` are the devices' names in PCI slots from 1 on.

        Raises UsageError for a guest that does not fit, KvmError.
        """
        ...

    def state(self) -> State:
        """What a snapshot keeps of the VM's chips and processors; no vCPU is in the guest, nor has
        an exit to complete. Raises NotSaved, KvmError."""
        ...

    def restore(self, saved: Saved) -> int:
        """Be in that state, before anything runs; the nanoseconds that have gone by since, by
        which the guest's clocks are put forward. Raises BadState."""
        ...

    def core_vcpus(self) -> list[dict[str, Any]]:
        """Each vCPU's registers for a core file, as `state`: {"regs": {name: value},
        "sregs": {name: value or {field: value}}, "fpu": the XSAVE area's first 512 bytes in
        hexadecimal, "kernel_gs_base"}. Raises NotSaved, KvmError."""
        ...


class Architecture(HostArchitecture, Protocol):
    """One architecture of guests, which is the host's."""

    largest_memory: int
    """Bytes of RAM that a guest can have at most."""

    def ram_ranges(self, size: int) -> list[Range]:
        """Where `size` bytes of RAM lie, in address order."""
        ...

    def open_kernel(self, path: str) -> OpenedKernel:
        """Open a kernel's file and begin to uncompress it. Raises ImageError (a UsageError)."""
        ...

    def linux_guest(
        self, options: GuestOptions, kernel: OpenedKernel, initrd: Source | None
    ) -> Guest:
        """The guest that runs the kernel, whose images it takes over. Raises UsageError."""
        ...

    def restored_guest(
        self, options: GuestOptions, doorbell: str, private: Sequence[Range]
    ) -> Guest:
        """A guest that is there already, in a snapshot, with these private pages; it asks for
        conversions as it did. Raises UsageError where none can be restored, or for a doorbell that
        there isn't."""
        ...

    def payload_guest(self, options: GuestOptions) -> Guest:
        """The embedded payload. Raises UsageError where it does not fit."""
        ...

    def debug(self, system: System, scheme: str = "none") -> GuestDebug:
        """What a debugger needs, after trying out what this host's KVM does for one with the VMs
        of that scheme. Raises HostError where there is nothing, KvmError."""
        ...

    def with_bench_guest(self) -> Architecture:
        """This architecture with the bench guest in the payload's place, for measurements with
        private memory. Raises HostError where there is none."""
        ...

    def choose_loading(
        self, system: System, guest: Guest, private_memory: str, scheme: str
    ) -> None:
        """Decide whether the guest loads itself, as those do whose private memory no host program
        reaches (`private_memory` and `scheme`: what the user asked for). Raises HostError where
        that was asked for by name and can't be; says in a line why "auto" does without."""
        ...

    def check_doorbell(self, system: System, guest: Guest) -> None:
        """Raises HostError where the guest's way to ask for conversions does not work here."""
        ...

    def measure(
        self, guest: Guest, ram: Sequence[Range], functions: Sequence[str], bit: int
    ) -> dict[str, Any]:
        """What a report's `launch` is for such a guest that loads itself, from its files alone;
        `bit` is the address bit that picks the private side. Raises UsageError for a guest that
        can't, and for bad images."""
        ...

    def platform(
        self, system: System, vm: Vm, guest: Guest, options: GuestOptions, scheme: str
    ) -> Platform:
        """Make in the VM what has to be there before memory and vCPUs. `scheme` is what the VM
        was made for ("none": an ordinary one). Raises KvmError, HostError."""
        ...

    def handlers_of_done(self, device: PortDevice) -> ExitHandlers:
        """What hands the exits that end a micro-guest's verb to `device` (at offset 0)."""
        ...

    def guest_cpus(
        self, system: System, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> AbstractContextManager[Sequence[GuestCpu]]:
        """`count` vCPUs that do what a test says, and reach `ram` (at or above
        guest_cpu.CODE_SIZE), with `alias` as the address bit of the private side. Their code is
        in a memslot of its own. Raises KvmError."""
        ...
