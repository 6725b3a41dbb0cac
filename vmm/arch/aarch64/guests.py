"""The two kinds of guest: a Linux kernel, or the embedded payload. What to load, how to enter."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.rsi import DOORBELL_NAME
from vmm.core.errors import HostError, UsageError
from vmm.core.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.core.ranges import NOWHERE, Range

if TYPE_CHECKING:
    from vmm.arch.aarch64 import kernel as arm
    from vmm.arch.options import GuestOptions
    from vmm.arch.protocol import Guest, OpenedKernel
    from vmm.boot.source import Source
    from vmm.core.lean_typing import Protocol
    from vmm.memory.guest_memory import LaunchMemory

    class ArmGuest(Guest, Protocol):
        """What arm64's platform needs of a guest besides."""

        def learn(self, scheme: str) -> None:
            """Its VM's scheme is known now ("none": an ordinary one)."""
            ...

        def load(self, launch: LaunchMemory, ram: list[Range], functions: Sequence[str]) -> Entry:
            """See Platform.load; after `learn`."""
            ...


MMIO_DOORBELL_NAME = "mmio"
"""The registers at layout.DOORBELL_GPA."""
PKVM_DOORBELL_NAME = "pkvm"
"""A protected guest's hypercalls, which the hypervisor answers, and nobody tells us of."""

DEFAULT_COMMAND_LINE = "console=ttyS0 panic=-1"
"""Before --append: console on the serial line; a panic ends the run at once."""


class Entry(NamedTuple):
    """How the first vCPU starts; all else is as KVM_ARM_VCPU_INIT leaves it: EL1h, interrupts
    masked, MMU off, the other registers zero (booting.rst wants exactly that)."""

    pc: int
    x0: int


class LinuxGuest:
    """An arm64 Image, entered at its first byte."""

    host_loads_private = True
    loads_itself = False
    launch = None
    two_addresses = True
    unpaged = NOWHERE  # it starts processors through PSCI, at private addresses like any other

    def __init__(self, options: GuestOptions, kernel: OpenedKernel, initrd: Source | None) -> None:
        """Takes over the images, of which the kernel may still be on its way."""
        self.doorbell = DOORBELL_NAME
        self._scheme = "none"
        self._options = options
        self._opened: arm.OpenedKernel = kernel  # type: ignore[assignment]  # Arm64.open_kernel's
        self._initrd = initrd
        self._image: arm.KernelImage | None = None
        self._initrd_place: Range | None = None
        self._command_line = ""

    def finish_opening(self) -> None:
        from vmm.boot.kernel import place_initrd

        append = self._options.append
        if self._scheme == "realm":  # first, so that the user's word counts
            append = f"swiotlb={layout.bounce_slots(self._options.memory)} {append}"
        self._command_line = _command_line(append)
        self._image = image = self._opened.finish()
        (ram,) = layout.ram_ranges(self._options.memory)
        # Whether there is a pool is known later; its place is kept free in any case.
        ours = [layout.pool_place(ram), layout.tree_place(ram)]
        image.check_fits([ram], ours)
        if self._initrd is not None:
            limit = layout.RAM_START // layout.GIB * layout.GIB + layout.INITRD_WINDOW
            self._initrd_place = place_initrd(self._initrd, ram, limit, [*ours, image.memory])

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        """All of RAM: Linux shares what it wants shared."""
        return ram

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """None: arm64's KVM has no KVM_PRE_FAULT_MEMORY."""
        return []

    def learn(self, scheme: str) -> None:
        self._scheme = scheme
        if scheme == "pkvm":
            self.doorbell = PKVM_DOORBELL_NAME

    def load(self, launch: LaunchMemory, ram: list[Range], functions: Sequence[str]) -> Entry:
        from vmm.arch.aarch64.device_tree import Machine, device_tree
        from vmm.boot.kernel import transfer_exactly

        image, initrd = self._image, self._initrd_place
        assert image is not None
        image.load(launch)
        if self._initrd is not None and initrd is not None:
            transfer_exactly(self._initrd, launch, 0, initrd.start, initrd.size)
        tree = device_tree(
            Machine(
                ram[0],
                self._options.cpus,
                self._command_line,
                initrd,
                # Linux looks for a realm's monitor only where PSCI is called by SMC.
                psci_method="smc" if self._scheme == "realm" else "hvc",
                pool=layout.pool_place(ram[0]) if self._scheme == "pkvm" else None,
            )
        )
        place = layout.tree_place(ram[0])
        launch.pwrite(tree, place.start)
        return Entry(image.entry, place.start)

    def close(self) -> None:
        self._opened.close()
        if self._image is not None:
            self._image.close()
        if self._initrd is not None:
            self._initrd.close()


class PayloadGuest:
    """The embedded payload: shared code, private data from 2 MiB into RAM on."""

    host_loads_private = False
    loads_itself = False
    launch = None
    two_addresses = False
    unpaged = NOWHERE

    def __init__(self, options: GuestOptions) -> None:
        """Raises UsageError when the payload would not fit."""
        from vmm._firmware import MIN_RAM_BYTES
        from vmm.core.suboptions import size_text

        if options.memory < MIN_RAM_BYTES:
            raise UsageError(
                f"--mem {size_text(options.memory)}: the embedded payload needs "
                f"{MIN_RAM_BYTES >> 20}M or more"
            )
        self.doorbell = MMIO_DOORBELL_NAME
        self._scheme = "none"
        self._options = options

    def learn(self, scheme: str) -> None:
        self._scheme = scheme
        if scheme == "pkvm":
            self.doorbell = PKVM_DOORBELL_NAME

    def finish_opening(self) -> None:
        """Everything is there."""

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        start = layout.PAYLOAD_PRIVATE_START
        return [Range(start, ram[0].end - start)]

    def early_private_writes(self, ram: list[Range]) -> list[Range]:
        """It has little memory and touches it bit by bit."""
        return []

    def load(self, launch: LaunchMemory, ram: list[Range], functions: Sequence[str]) -> Entry:
        from vmm._firmware import payload_path
        from vmm.arch.aarch64.payload import PayloadInfo

        try:
            fd = os.open(payload_path("aarch64"), os.O_RDONLY | os.O_CLOEXEC)
        except LookupError as error:
            raise HostError(f"{error}; install pyvmm again") from None
        try:
            launch.transfer_in(fd, 0, layout.PAYLOAD_GPA, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        info = PayloadInfo(
            ram=ram[0],
            scheme=self._scheme,
            has_disk=bool(functions) and functions[0].startswith("blk"),
        )
        launch.pwrite(info.page(), layout.PAYLOAD_INFO_GPA)
        # Its own memory is shared: a realm reaches that by addresses with the bit alone.
        bit = 1 << layout.REALM_SHARED_BIT if self._scheme == "realm" else 0
        return Entry(layout.PAYLOAD_GPA | bit, layout.PAYLOAD_INFO_GPA | bit)

    def close(self) -> None:
        """Nothing is held open."""


def _command_line(append: str) -> str:
    """The whole command line. Raises UsageError for one that Linux would cut."""
    text = f"{DEFAULT_COMMAND_LINE} {append}".strip()
    size = len(text.encode("utf-8", "surrogateescape"))
    if "\0" in text:
        raise UsageError("the kernel command line contains a NUL character: remove it")
    if size >= layout.CMDLINE_MAX:
        raise UsageError(
            f"the kernel command line has {size} bytes, an arm64 kernel takes "
            f"{layout.CMDLINE_MAX - 1}: shorten --append"
        )
    return text
