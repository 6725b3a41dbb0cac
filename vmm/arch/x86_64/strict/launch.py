"""How a strict guest starts: what lies in shared memory, the vCPU's state, and the measurement of
both. Data in, bytes and values out; the loader is firmware/x86_64/loader."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

from vmm._firmware import loader_path
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.page_tables import launch_tables
from vmm.arch.x86_64.registers import InitialState, SpecialRegisters, linux64_entry
from vmm.boot.manifest import FilePart, Part, digests, measurement
from vmm.core.errors import UsageError
from vmm.core.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.core.ranges import NOWHERE, PAGE_SIZE, Range

if TYPE_CHECKING:
    from vmm.arch.x86_64.kernel import KernelImage
    from vmm.boot.source import Source

AREA = Range(layout.LAUNCH_GPA, layout.LAUNCH_END - layout.LAUNCH_GPA)
MAGIC = int.from_bytes(b"PVMMLOAD", "little")
FLAG_PLAIN_HASH = 1 << 0
MOST_PARTS = 80

_HEADER = struct.Struct("<17Q")
_HEADER_SIZE = 0x100
_PART = struct.Struct("<QQ32s")

# Intel SDM vol. 3, 11.4.4 and 11.12.1: in x2APIC mode every access to the local APIC is an RDMSR
# or a WRMSR, so that KVM never has to read an instruction for it.
_APIC_BOOT_PROCESSOR, _APIC_X2APIC, _APIC_ENABLED = 1 << 8, 1 << 10, 1 << 11
OTHERS_APIC_BASE = layout.LAPIC_GPA | _APIC_ENABLED | _APIC_X2APIC
"""Of the processors that the first one starts: an INIT leaves it as it is (SDM vol. 3, 11.12.5)."""
APIC_BASE = OTHERS_APIC_BASE | _APIC_BOOT_PROCESSOR


class StrictRegisters(SpecialRegisters):
    """The special registers, and what others leave as KVM made it."""

    apic_base: int


class Addressing(NamedTuple):
    """Where the loader finds the two sides, and what it does with itself.

    `shared` and `private` are VA - GPA of each side. `cr3`: the tables with which it goes on in
    private memory; 0: its code stays where it is. `copy_size` counts the bytes of the launch area
    that it copies into private memory, `back` is what it converts back to private memory.
    """

    shared: int
    private: int
    cr3: int
    copy_size: int
    back: Range


class Entry(NamedTuple):
    """What the loader jumps to (a virtual address), with two arguments."""

    address: int
    rsi: int = 0
    rdi: int = 0


class Launch(NamedTuple):
    """Everything that the host puts in place before the guest's first instruction."""

    writes: list[tuple[int, bytes]]
    """What goes to shared memory, as (gpa, bytes); all other memory is empty."""
    state: InitialState
    measurement: str
    parts: Sequence[Part]
    digests: Sequence[bytes]
    c_mask: int
    cpus: int = 1
    common: Range = NOWHERE
    """Where its processors start, open to the host for as long as the guest runs."""

    def as_dict(self) -> dict[str, object]:
        """For reports: the measurement, and what it is of."""
        common = {"gpa": self.common.start, "bytes": self.common.size, "until": "the guest's end"}
        return {
            "measurement": self.measurement,
            "c_bit": self.c_mask.bit_length() - 1,
            **({"common": common} if self.common.size else {}),
            "parts": [
                {"name": part.name, "gpa": part.gpa, "bytes": part.size, "sha256": digest.hex()}
                for part, digest in zip(self.parts, self.digests, strict=True)
            ],
        }


def loader_bytes() -> bytes:
    """The loader's image."""
    with open(loader_path(), "rb") as file:
        return file.read()


def header(
    parts: Sequence[Part],
    digests: Sequence[bytes],
    addressing: Addressing,
    entry: Entry,
    flags: int = 0,
) -> bytes:
    """The header and the manifest behind it, as loader.inc lays them out.

    Raises UsageError for more parts than there is room for.
    """
    if len(parts) > MOST_PARTS:
        raise UsageError(
            f"the kernel comes in {len(parts)} parts, a strict guest's loader takes {MOST_PARTS}; "
            "use a kernel with fewer segments"
        )
    fields = _HEADER.pack(
        MAGIC,
        layout.LAUNCH_GPA,
        addressing.copy_size,
        addressing.shared,
        addressing.private,
        addressing.cr3,
        layout.LAUNCH_WINDOW_GPA,
        layout.LAUNCH_WINDOW_SIZE,
        len(parts),
        addressing.back.start // PAGE_SIZE,
        addressing.back.size // PAGE_SIZE,
        entry.address,
        entry.rsi,
        entry.rdi,
        layout.LOADER_PORT,
        layout.DOORBELL_PORT,
        flags,
    )
    table = [
        _PART.pack(part.gpa, part.size, digest) for part, digest in zip(parts, digests, strict=True)
    ]
    return fields.ljust(_HEADER_SIZE, b"\0") + b"".join(table)


def linux_launch(
    parts: Sequence[Part], entry: int, c_mask: int, cpus: int = 1, common: Range = NOWHERE
) -> Launch:
    """The launch of a Linux kernel with all parts of it, for so many processors. Raises UsageError,
    and ImageError for a file that can't be read."""
    first, second = launch_tables(c_mask)
    addressing = Addressing(
        layout.LAUNCH_SHARED_OFFSET, 0, second.cr3, layout.LAUNCH_COPY_SIZE, AREA
    )
    # It enters the kernel as the 64-bit boot protocol wants it, in the state that it has itself.
    state = linux64_entry(layout.LAUNCH_GPA + layout.LAUNCH_SHARED_OFFSET, first.cr3)
    sregs: StrictRegisters = {**state.sregs, "apic_base": APIC_BASE}
    regs = {
        **state.regs,
        "rdi": layout.LAUNCH_HEADER_GPA + layout.LAUNCH_SHARED_OFFSET,
        "rsi": 0,
        "rsp": 0,
    }
    return launch(
        parts,
        addressing,
        Entry(entry, rsi=layout.BOOT_PARAMS_GPA),
        InitialState(regs, sregs, []),
        [*first.writes, *second.writes],
        cpus=cpus,
    )._replace(common=common)


def launch(
    parts: Sequence[Part],
    addressing: Addressing,
    entry: Entry,
    state: InitialState,
    tables: Sequence[tuple[int, bytes]],
    flags: int = 0,
    cpus: int = 1,
) -> Launch:
    """Loader, manifest and tables in their places, measured with the vCPU's state."""
    found = digests(parts)
    writes = [
        (layout.LAUNCH_GPA, loader_bytes()),
        (layout.LAUNCH_HEADER_GPA, header(parts, found, addressing, entry, flags)),
        *tables,
        *state.writes,
    ]
    c_mask = addressing.cr3 & -layout.FOUR_GIB or addressing.private
    return Launch(writes, state, measured(writes, state, cpus), parts, found, c_mask, cpus)


def measured(writes: Sequence[tuple[int, bytes]], state: InitialState, cpus: int = 1) -> str:
    """The measurement of a launch: all that is in memory at its start, and the vCPUs' registers.
    Those of the others are what KVM makes of a processor that waits to be started.

    CPUID and MSRs, which are the host's or KVM's to say, are no part of it.
    """
    registers = json.dumps([state.regs, state.sregs], sort_keys=True).encode()
    records = [(f"memory {gpa:#x}", data) for gpa, data in writes]
    others = json.dumps({"apic_base": OTHERS_APIC_BASE}).encode()
    waiting = [(f"vCPU {index}", others) for index in range(1, cpus)]
    return measurement([*records, ("vCPU 0", registers), *waiting])


def parts_of(
    image: KernelImage,
    initrd: tuple[Source, Range] | None,
    tables: Sequence[tuple[str, Sequence[tuple[int, bytes]]]],
) -> list[Part]:
    """The kernel's segments, the initrd with its place, and tables, each as a part.

    What lies past a segment's bytes (bss) is no part: private memory is zero until it is written.
    """
    parts = []
    loaded = [segment for segment in image.segments if segment.filesz]
    for number, segment in enumerate(loaded, start=1):
        name = "kernel" if len(loaded) == 1 else f"kernel, segment {number}"
        content = FilePart(image.source.fd, segment.offset, image.source.name)
        parts.append(Part(name, segment.paddr, segment.filesz, content))
    if initrd is not None:
        source, place = initrd
        content = FilePart(source.fd, 0, source.name)
        parts.append(Part("initrd", place.start, place.size, content))
    return parts + [joined(name, places) for name, places in tables]


def joined(name: str, places: Sequence[tuple[int, bytes]]) -> Part:
    """One part out of several pieces that lie close together, with zeros between them."""
    start = min(gpa for gpa, _ in places)
    data = bytearray(max(gpa + len(piece) for gpa, piece in places) - start)
    for gpa, piece in places:
        data[gpa - start : gpa - start + len(piece)] = piece
    return Part(name, start, len(data), bytes(data))
