"""The two kinds of guest: a Linux kernel, or the embedded payload. What to load, how to enter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.doorbells import HYPERCALL_NAME, PORT_NAME
from vmm.arch.x86_64.msrs import LINUX_ENTRY_MSRS
from vmm.arch.x86_64.registers import InitialState, linux64_entry, payload_entry
from vmm.core.errors import HostError, UsageError
from vmm.core.lean_typing import TYPE_CHECKING, Any, Protocol
from vmm.core.ranges import NOWHERE, Range, page_align_up
from vmm.memory.guest_memory import LaunchMemory

if TYPE_CHECKING:
    from vmm.arch.options import GuestOptions
    from vmm.arch.protocol import Guest, OpenedKernel
    from vmm.arch.x86_64 import kernel as x86
    from vmm.arch.x86_64.strict.launch import Launch
    from vmm.boot.manifest import Part
    from vmm.boot.source import Source
    from vmm.devices.load_window import LoadWindow

    class X86Guest(Guest, Protocol):
        """What x86's platform needs of a guest besides."""

        msrs: Mapping[int, int]
        """Model-specific registers that it expects to find set."""
        window: LoadWindow | None
        """What its loader asks, made by the platform; None where it has no loader."""

    class LoadedGuest(X86Guest, Protocol):
        """One that is written into memory, and not restored."""

        def load(
            self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
        ) -> InitialState:
            """See Platform.load; the first vCPU's state."""
            ...


DEFAULT_COMMAND_LINE = "console=ttyS0 panic=-1"
"""Before --append: console on the serial line; a panic ends the run at once."""
STRICT_COMMAND_LINE = f"{DEFAULT_COMMAND_LINE} noapic"
"""A strict guest's, which is told of no IOAPIC: without `noapic` Linux' setup_local_APIC() masks
the line by which the 8259's interrupts come in, and its console waits for the first for ever."""


class LinuxGuest:
    """A bzImage or vmlinux, entered at the uncompressed kernel's 64-bit entry.

    The host loads it, or (`load_itself`) the loader that it starts with does.
    """

    host_loads_private = True
    loads_itself = False
    doorbell = HYPERCALL_NAME
    two_addresses = True
    msrs: Mapping[int, int] = LINUX_ENTRY_MSRS

    def __init__(self, options: GuestOptions, kernel: OpenedKernel, initrd: Source | None) -> None:
        """Takes over the images, of which the kernel may still be on its way."""
        self._options = options
        # Linux starts every processor but the first in real mode, from a trampoline in low RAM.
        several = options.is_private and options.cpus > 1
        self.unpaged = layout.TRAMPOLINE if several else NOWHERE
        self._opened: x86.OpenedKernel = kernel  # type: ignore[assignment]  # X86.open_kernel's
        self._initrd = initrd
        self._reserved: tuple[Range, ...] = _BOOT_MEMORY
        self._image: x86.KernelImage | None = None
        self._command_line = b""
        self._initrd_place: Range | None = None
        self._launch: Launch | None = None
        self.window: LoadWindow | None = None
        """What the loader asks, from the platform; it is opened by `load`."""

    def load_itself(self) -> None:
        """Be a strict guest: before anything else but the constructor."""
        from vmm.arch.x86_64.strict.launch import AREA

        self.host_loads_private = False
        self.loads_itself = True
        self._reserved = (*_BOOT_MEMORY, AREA)

    @property
    def unfit_to_load_itself(self) -> str | None:
        """Why this guest can't be a strict one; None where it can."""
        if self._options.iommu:
            return "--iommu lends devices private memory, which the host can't reach"
        return None

    @property
    def launch(self) -> dict[str, Any] | None:
        """For reports: how it was loaded, where it loaded itself."""
        return None if self._launch is None else self._launch.as_dict()

    def finish_opening(self) -> None:
        from vmm.arch.x86_64.boot_params import command_line
        from vmm.boot.kernel import place_initrd

        self._image = image = self._opened.finish()
        ram = layout.ram_ranges(self._options.memory)
        initrd_bytes = 0 if self._initrd is None else page_align_up(self._initrd.size)
        image.check_fits(ram, self._reserved, self._besides_kernel() + initrd_bytes)
        default = STRICT_COMMAND_LINE if self.loads_itself else DEFAULT_COMMAND_LINE
        text = f"{default} {self._options.append}".strip()
        header = image.setup_header
        if self._initrd is not None:
            limit = layout.FOUR_GIB if header is None else header.initrd_addr_max + 1
            occupied = [*self._reserved, image.memory]
            besides = self._besides_kernel()
            self._initrd_place = place_initrd(self._initrd, ram[0], limit, occupied, besides)
        self._command_line = (
            command_line(text) if header is None else command_line(text, header.cmdline_size)
        )

    def _besides_kernel(self) -> int:
        """Bytes that Linux takes before it has started anything, beside kernel and initrd."""
        if not self._options.is_private:
            return 0
        from vmm.arch.x86_64.bounce_buffer import room_needed

        return room_needed(self._options.memory)

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        """All of RAM, for Linux shares what it wants shared; but not where a loader starts."""
        if not self.loads_itself:
            return ram
        from vmm.arch.x86_64.strict.launch import AREA

        return [piece for area in ram for piece in area.without(AREA)]

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        from vmm.arch.x86_64.bounce_buffer import early_allocations

        expected = early_allocations(ram, 0 if self._initrd is None else self._initrd.size)
        return [] if expected is None else [expected]

    def load(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> InitialState:
        if self.loads_itself:
            return self._start_loader(launch, ram, alias, functions)
        from vmm.arch.x86_64.page_tables import identity_tables
        from vmm.boot.kernel import transfer_exactly

        image, initrd = self._image, self._initrd_place
        assert image is not None
        if self._initrd is not None and initrd is not None:
            transfer_exactly(self._initrd, launch, 0, initrd.start, initrd.size)
        image.load(launch)
        page_tables = identity_tables(alias)
        state = linux64_entry(image.entry, page_tables.cr3)
        tables = [place for _, places in self._tables(ram, functions) for place in places]
        for gpa, data in [*tables, *page_tables.writes, *state.writes]:
            launch.pwrite(data, gpa)
        return state

    def _tables(
        self, ram: list[Range], functions: Sequence[str]
    ) -> list[tuple[str, list[tuple[int, bytes]]]]:
        """What the kernel is told of its machine: by name, what goes where as (gpa, bytes)."""
        from vmm.arch.x86_64.acpi.tables import RSDP_GPA, acpi_tables
        from vmm.arch.x86_64.boot_params import boot_params

        assert self._image is not None
        header = self._image.setup_header
        others = _iommu_table(functions) if "iommu" in functions else []
        tables = acpi_tables(
            self._options.cpus,
            _pci_interrupts(len(functions)),
            others,
            ioapic=not self.loads_itself,
        )
        params = boot_params(
            ram,
            setup_header=None if header is None else header.raw,
            initrd=self._initrd_place,
            rsdp_gpa=RSDP_GPA,
            low_ram=self.unpaged if self.unpaged.size else layout.LOW_RAM,
        )
        return [
            ("command line", [(layout.CMDLINE_GPA, self._command_line)]),
            ("boot_params", [(layout.BOOT_PARAMS_GPA, params)]),
            ("ACPI tables", tables),
        ]

    def parts(self, ram: list[Range], functions: Sequence[str]) -> list[Part]:
        """All that a strict guest's loader loads; the files stay this guest's."""
        from vmm.arch.x86_64.strict.launch import parts_of

        image, initrd = self._image, self._initrd_place
        assert image is not None
        return parts_of(
            image,
            None if initrd is None or self._initrd is None else (self._initrd, initrd),
            [*self._tables(ram, functions), ("descriptors", linux64_entry(0, 0).writes)],
        )

    def measured(self, ram: list[Range], alias: int, functions: Sequence[str]) -> Launch:
        """The launch of a strict guest, with its measurement. Raises ImageError, UsageError."""
        from vmm.arch.x86_64.strict.launch import linux_launch

        assert self._image is not None
        return linux_launch(
            self.parts(ram, functions), self._image.entry, alias, self._options.cpus, self.unpaged
        )

    def _start_loader(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> InitialState:
        found = self._launch = self.measured(ram, alias, functions)
        for gpa, data in found.writes:
            launch.pwrite(data, gpa)
        # Not filled yet, but sure to be: the same reason to map it ahead.
        launch.written += [Range(part.gpa, part.size) for part in found.parts]
        assert self.window is not None
        self.window.open(layout.LAUNCH_WINDOW_GPA, layout.LAUNCH_WINDOW_SIZE, found.parts)
        return found.state

    def close(self) -> None:
        self._opened.close()
        if self._image is not None:
            self._image.close()
        if self._initrd is not None:
            self._initrd.close()


class PayloadGuest:
    """The embedded payload: shared code, private data from 2 MiB up."""

    host_loads_private = False
    loads_itself = False
    launch = None
    window = None
    doorbell = PORT_NAME
    two_addresses = False
    msrs: Mapping[int, int] = {}
    unpaged = NOWHERE  # it never starts another processor

    def __init__(self, options: GuestOptions) -> None:
        """Raises UsageError when the payload would not fit."""
        from vmm._firmware import MIN_RAM_BYTES
        from vmm.core.suboptions import size_text

        if options.memory < MIN_RAM_BYTES:
            raise UsageError(
                f"--mem {size_text(options.memory)}: the embedded payload needs "
                f"{MIN_RAM_BYTES >> 20}M or more"
            )
        self._options = options

    def finish_opening(self) -> None:
        """Everything is there."""

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        start = layout.PAYLOAD_PRIVATE_START
        return [Range(start, ram[0].end - start), *ram[1:]]

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """It has little memory and touches it bit by bit."""
        return []

    def load(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> InitialState:
        from vmm._firmware import payload_path
        from vmm.arch.x86_64.page_tables import payload_tables
        from vmm.arch.x86_64.payload import PayloadInfo

        try:
            fd = os.open(payload_path(), os.O_RDONLY | os.O_CLOEXEC)
        except LookupError as error:
            raise HostError(f"{error}; install pyvmm again") from None
        try:
            launch.transfer_in(fd, 0, layout.PAYLOAD_GPA, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        info = PayloadInfo(
            ram_bytes=ram[0].end,
            c_bit_mask=alias,
            doorbell_port=layout.DOORBELL_PORT if self._options.is_private else 0,
            has_disk=bool(functions) and functions[0].startswith("blk"),
        )
        page_tables = payload_tables(ram, alias)
        state = payload_entry(layout.PAYLOAD_GPA, page_tables.cr3)
        for gpa, data in [
            (layout.BOOT_PARAMS_GPA, info.page()),
            *page_tables.writes,
            *state.writes,
        ]:
            launch.pwrite(data, gpa)
        return state

    def close(self) -> None:
        """Nothing is held open."""


class RestoredGuest:
    """A guest out of a snapshot, with its memory and its registers: nothing is loaded."""

    host_loads_private = True
    loads_itself = False
    launch = None
    window = None
    two_addresses = False
    msrs: Mapping[int, int] = {}

    def __init__(self, options: GuestOptions, doorbell: str, private: Sequence[Range]) -> None:
        """Raises UsageError for a doorbell that there isn't."""
        if doorbell not in (HYPERCALL_NAME, PORT_NAME):
            raise UsageError(f"{doorbell!r:.40} is no way of asking for conversions")
        self.doorbell = doorbell
        several = options.is_private and options.cpus > 1 and doorbell == HYPERCALL_NAME
        self.unpaged = layout.TRAMPOLINE if several else NOWHERE  # as LinuxGuest has it
        self._private = list(private)

    def finish_opening(self) -> None:
        """Everything is there."""

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        return self._private

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """It is past that."""
        return []

    def close(self) -> None:
        """Nothing is held open."""


_BOOT_MEMORY = (Range(0, layout.HIGH_RAM_START),)
"""The low megabyte holds boot_params, command line, page tables and ACPI tables."""


def _iommu_table(functions: Sequence[str]) -> list[bytes]:
    """What says that the function of that name translates for the others, but not for a balloon,
    whose drivers name physical pages."""
    from vmm.arch.x86_64.acpi.viot import viot

    slots = {name: slot for slot, name in enumerate(functions, start=1)}
    iommu = slots.pop("iommu")
    slots.pop("balloon", None)
    return [viot(iommu, slots.values())]


def _pci_interrupts(functions: int) -> dict[int, int]:
    """PCI device number -> GSI of its INTA; functions are devices 1, 2, ... of bus 0."""
    return {device: layout.pci_intx_gsi(device) for device in range(1, functions + 1)}
