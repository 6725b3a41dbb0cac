"""The two kinds of guest: a Linux kernel, or the embedded payload. What to load, how to enter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.msrs import LINUX_ENTRY_MSRS
from vmm.arch.x86_64.registers import InitialState, linux64_entry, payload_entry
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.machine.config import MachineConfig
from vmm.machine.images import OpenedImages
from vmm.memory.guest_memory import LaunchMemory

if TYPE_CHECKING:
    from vmm.boot.kernel import KernelImage, OpenedKernel
    from vmm.boot.source import Source

DEFAULT_COMMAND_LINE = "console=ttyS0 panic=-1"
"""Before --append: console on the serial line; a panic ends the run at once."""


class Guest(Protocol):
    """What the machine needs to know of what it runs."""

    host_loads_private: bool
    """Whether its private memory is filled by the host before it runs."""
    needs_hypercalls: bool
    """Whether it asks for conversions by KVM_HC_MAP_GPA_RANGE."""
    two_addresses: bool
    """Whether it picks the side of a page by an address bit, and can't do without."""
    msrs: Mapping[int, int]
    """Model-specific registers that it expects to find set."""
    unpaged_end: int
    """Below this it runs processors without paging, which can't set the C-bit."""

    def finish_opening(self) -> None:
        """Wait for images that are on their way. Raises UsageError for a bad one."""
        ...

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        """What starts as private memory when there is any."""
        ...

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """What it will surely write as private memory while it boots, as far as one can tell."""
        ...

    def load(self, launch: LaunchMemory, ram: list[Range], c_mask: int) -> InitialState:
        """Write the guest into its memory; the first vCPU's state."""
        ...

    def close(self) -> None: ...


class LinuxGuest:
    """A bzImage or vmlinux, entered at the uncompressed kernel's 64-bit entry."""

    host_loads_private = True
    needs_hypercalls = True
    two_addresses = True
    msrs: Mapping[int, int] = LINUX_ENTRY_MSRS

    def __init__(self, config: MachineConfig, kernel: OpenedKernel, initrd: Source | None) -> None:
        """Takes over the images, of which the kernel may still be on its way."""
        self._config = config
        # Linux starts every processor but the first in real mode, somewhere in low RAM.
        self.unpaged_end = layout.EBDA_END if config.cpus > 1 else 0
        self._opened = kernel
        self._initrd = initrd
        self._image: KernelImage | None = None
        self._command_line = b""
        self._initrd_place: Range | None = None

    def finish_opening(self) -> None:
        from vmm.arch.x86_64.boot_params import command_line
        from vmm.boot.kernel import place_initrd

        self._image = image = self._opened.finish()
        ram = layout.ram_ranges(self._config.memory)
        image.check_fits(ram, reserved=_BOOT_MEMORY)
        text = f"{DEFAULT_COMMAND_LINE} {self._config.append}".strip()
        header = image.setup_header
        if self._initrd is not None:
            limit = layout.FOUR_GIB if header is None else header.initrd_addr_max + 1
            occupied = [*_BOOT_MEMORY, image.memory]
            self._initrd_place = place_initrd(self._initrd, ram[0], limit, occupied)
        self._command_line = (
            command_line(text) if header is None else command_line(text, header.cmdline_size)
        )

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        """All of RAM: Linux shares what it wants shared."""
        return ram

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        from vmm.arch.x86_64.bounce_buffer import early_allocations

        expected = early_allocations(ram, 0 if self._initrd is None else self._initrd.size)
        return [] if expected is None else [expected]

    def load(self, launch: LaunchMemory, ram: list[Range], c_mask: int) -> InitialState:
        from vmm.arch.x86_64.acpi.tables import RSDP_GPA, acpi_tables
        from vmm.arch.x86_64.boot_params import boot_params
        from vmm.arch.x86_64.page_tables import identity_tables
        from vmm.boot.kernel import transfer_exactly

        image, initrd = self._image, self._initrd_place
        assert image is not None
        header = image.setup_header
        if self._initrd is not None and initrd is not None:
            transfer_exactly(self._initrd, launch, 0, initrd.start, initrd.size)
        image.load(launch)
        tables = acpi_tables(self._config.cpus, _pci_interrupts(len(self._config.disks)))
        page_tables = identity_tables(c_mask)
        state = linux64_entry(image.entry, page_tables.cr3)
        params = boot_params(
            ram,
            setup_header=None if header is None else header.raw,
            initrd=initrd,
            rsdp_gpa=RSDP_GPA,
        )
        writes = [(layout.CMDLINE_GPA, self._command_line), (layout.BOOT_PARAMS_GPA, params)]
        for gpa, data in [*writes, *tables, *page_tables.writes, *state.writes]:
            launch.pwrite(data, gpa)
        return state

    def close(self) -> None:
        self._opened.close()
        if self._image is not None:
            self._image.close()
        if self._initrd is not None:
            self._initrd.close()


class PayloadGuest:
    """The embedded payload: shared code, private data from 2 MiB up."""

    host_loads_private = False
    needs_hypercalls = False
    two_addresses = False
    msrs: Mapping[int, int] = {}
    unpaged_end = 0  # it never starts another processor

    def __init__(self, config: MachineConfig) -> None:
        """Raises UsageError when the payload would not fit."""
        from firmware import MIN_RAM_BYTES

        if config.memory < MIN_RAM_BYTES:
            raise UsageError(
                f"--mem {config.memory >> 20}M: the embedded payload needs "
                f"{MIN_RAM_BYTES >> 20}M or more"
            )
        self._config = config

    def finish_opening(self) -> None:
        """Everything is there."""

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        start = layout.PAYLOAD_PRIVATE_START
        return [Range(start, ram[0].end - start), *ram[1:]]

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """It has little memory and touches it bit by bit."""
        return []

    def load(self, launch: LaunchMemory, ram: list[Range], c_mask: int) -> InitialState:
        from firmware import payload_path
        from vmm.arch.x86_64.page_tables import payload_tables
        from vmm.arch.x86_64.payload import PayloadInfo

        fd = os.open(payload_path(), os.O_RDONLY | os.O_CLOEXEC)
        try:
            launch.transfer_in(fd, 0, layout.PAYLOAD_GPA, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        info = PayloadInfo(
            ram_bytes=ram[0].end,
            c_bit_mask=c_mask,
            doorbell_port=0 if self._config.private_memory is None else layout.DOORBELL_PORT,
            has_disk=bool(self._config.disks),
        )
        page_tables = payload_tables(ram, c_mask)
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


_BOOT_MEMORY = (Range(0, layout.HIGH_RAM_START),)
"""The low megabyte holds boot_params, command line, page tables and ACPI tables."""


def _pci_interrupts(disks: int) -> dict[int, int]:
    """PCI device number -> GSI of its INTA; disks are devices 1, 2, ... of bus 0."""
    return {device: layout.pci_intx_gsi(device) for device in range(1, disks + 1)}


def make_guest(config: MachineConfig, images: OpenedImages) -> Guest:
    """The guest that the configuration names. Raises UsageError for one that can't be."""
    if images.kernel is None:
        return PayloadGuest(config)
    return LinuxGuest(config, images.kernel, images.initrd)
