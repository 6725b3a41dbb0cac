"""The bench guest with private memory: in user mode from its first instruction, as the embedded
payload is, so that it runs where KVM interprets the kernel's mode and returns from no hypercall.

Without private memory it is a kernel like any other (`--kernel`).
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.architecture import X86
from vmm.arch.x86_64.guests import PayloadGuest
from vmm.core.errors import UsageError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import Range
from vmm.core.suboptions import size_text
from vmm.memory.guest_memory import LaunchMemory

if TYPE_CHECKING:
    from vmm.arch.options import GuestOptions
    from vmm.arch.x86_64.registers import InitialState

# What firmware/x86_64/bench/bench.inc says; pages of page tables are 2 MiB.
IMAGE = Range(0, 0x40_0000)
"""The image and all below: shared from the start."""
QUEUE = Range(0x40_0000, 0x20_0000)
IOMMU_QUEUE = Range(0x60_0000, 0x20_0000)
BUFFERS = Range(0x100_0000, 0x400_0000)
OWN_BUFFERS = Range(0x500_0000, 0x400_0000)


class BenchGuest(PayloadGuest):
    """Shared code; everything else starts private. `append` is what it is told.

    Without an IOMMU it shares its disk's queue and a bounce buffer; behind one it shares the
    IOMMU's queue, and lends the others' pages.
    """

    host_loads_private = True  # what it lends, the host has to reach

    def __init__(self, options: GuestOptions) -> None:
        """Raises UsageError for too little memory."""
        super().__init__(options)
        if options.memory < OWN_BUFFERS.end:
            raise UsageError(
                f"--mem {size_text(options.memory)}: the bench guest needs "
                f"{OWN_BUFFERS.end >> 20}M or more"
            )

    def private_ranges(self, ram: list[Range]) -> list[Range]:
        return [piece for area in ram for piece in area.without(IMAGE)]

    def load(
        self, launch: LaunchMemory, ram: list[Range], alias: int, functions: Sequence[str]
    ) -> InitialState:
        from vmm._firmware import bench_path
        from vmm.arch.x86_64.elf import parse_elf
        from vmm.arch.x86_64.page_tables import user_tables
        from vmm.arch.x86_64.payload import PayloadInfo
        from vmm.arch.x86_64.registers import payload_entry
        from vmm.boot.kernel import transfer_exactly
        from vmm.boot.source import open_source

        source = open_source(bench_path(), "bench guest")
        try:
            image = parse_elf(source)
            for segment in image.segments:
                transfer_exactly(source, launch, segment.offset, segment.paddr, segment.filesz)
        finally:
            source.close()
        shared = [IMAGE, IOMMU_QUEUE] if self._options.iommu else [IMAGE, QUEUE, BUFFERS]
        tables = user_tables(ram, shared, alias)
        # Its first byte is the entry in user mode (bench.ld).
        state = payload_entry(image.memory_start, tables.cr3)
        state.regs["rsi"] = layout.CMDLINE_GPA
        info = PayloadInfo(ram[0].end, c_bit_mask=alias, doorbell_port=layout.DOORBELL_PORT)
        command_line = self._options.append.encode("ascii") + b"\0"
        for gpa, data in [
            (layout.BOOT_PARAMS_GPA, info.page()),
            (layout.CMDLINE_GPA, command_line),
            *tables.writes,
            *state.writes,
        ]:
            launch.pwrite(data, gpa)
        return state


class WithBenchGuest(X86):
    """x86-64 with the bench guest where the payload is: what runs without a kernel."""

    def payload_guest(self, options: GuestOptions) -> BenchGuest:
        return BenchGuest(options)
