"""What a strict Linux guest starts with, read back as loader and kernel read it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from firmware import build
from tests.support.images import Part as Segment
from tests.support.images import build_elf
from tests.unit.arch.test_boot_params import e820_of
from tests.unit.arch.test_page_tables import walk
from vmm.arch.options import GuestOptions
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.boot_params import E820Type
from vmm.arch.x86_64.guests import LinuxGuest
from vmm.arch.x86_64.kernel import OpenedKernel
from vmm.arch.x86_64.page_tables import launch_tables
from vmm.arch.x86_64.strict.launch import (
    APIC_BASE,
    AREA,
    MOST_PARTS,
    Addressing,
    Entry,
    Launch,
    header,
    joined,
    linux_launch,
    loader_bytes,
)
from vmm.boot.errors import ImageError
from vmm.boot.manifest import Part
from vmm.boot.source import open_source
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.devices import load_window

MIB = 1 << 20
C38 = 1 << 38
KERNEL_GPA = 16 * MIB


def equates(name: str) -> dict[str, int]:
    text = (build.SOURCES / "x86_64" / "loader" / name).read_text()
    found = re.findall(r"^\.equ (\w+),\s+(0x[0-9a-f]+|\d+)\b", text, re.MULTILINE)
    return {key: int(value, 0) for key, value in found}


LOADER = equates("loader.inc")


def test_layout_is_that_of_the_loaders_sources() -> None:
    assert LOADER["AREA_HEADER"] == layout.LAUNCH_HEADER_GPA - layout.LAUNCH_GPA
    assert len(loader_bytes()) <= LOADER["AREA_SCRATCH"]
    ports = ("PORT_FILL", "PORT_DONE", "PORT_FAILED", "FAILED_HEADER", "FAILED_CONVERSION")
    for name in ports:
        assert LOADER[name] == getattr(load_window, name), name


def test_header_has_each_field_where_the_loader_reads_it() -> None:
    parts = [Part("one", 0x111000, 11, b"a" * 11), Part("two", 0x222000, 22, b"b" * 22)]
    digests = [part.digest() for part in parts]
    addressing = Addressing(0x1, 0x2, 0x3, 0x4, Range(0x5000, 0x6000))

    found = header(parts, digests, addressing, Entry(0x7, rsi=0x8, rdi=0x9), flags=1)

    fields = {
        "AREA": layout.LAUNCH_GPA,
        "COPY_SIZE": 4,
        "SHARED": 1,
        "PRIVATE": 2,
        "CR3": 3,
        "WINDOW": layout.LAUNCH_WINDOW_GPA,
        "CHUNK": layout.LAUNCH_WINDOW_SIZE,
        "PARTS": 2,
        "BACK_FRAME": 5,
        "BACK_PAGES": 6,
        "ENTRY": 7,
        "ENTRY_RSI": 8,
        "ENTRY_RDI": 9,
        "LOADER_PORT": layout.LOADER_PORT,
        "DOORBELL_PORT": layout.DOORBELL_PORT,
        "FLAGS": 1,
    }
    assert struct.unpack_from("<Q", found)[0] == LOADER["HEADER_MAGIC"]
    for name, value in fields.items():
        assert struct.unpack_from("<Q", found, LOADER[f"HEADER_{name}"]) == (value,), name
    for number, (part, digest) in enumerate(zip(parts, digests, strict=True)):
        at = LOADER["HEADER_SIZE"] + number * LOADER["PART_SIZE"]
        assert struct.unpack_from("<QQ", found, at) == (part.gpa, part.size)
        assert found[at + LOADER["PART_DIGEST"] :][:32] == digest


def test_header_of_the_most_parts_fits_before_the_tables_and_of_one_more_is_refused() -> None:
    parts = [Part("part", 0, 1, b"x")] * MOST_PARTS
    addressing = Addressing(0, 0, 0, 0, AREA)

    whole = header(parts, [bytes(32)] * MOST_PARTS, addressing, Entry(0))

    assert layout.LAUNCH_HEADER_GPA + len(whole) <= layout.LAUNCH_STAGE_ONE_TABLES_GPA
    with pytest.raises(UsageError, match="comes in 81 parts, a strict guest's loader takes 80"):
        header([*parts, parts[0]], [bytes(32)] * (MOST_PARTS + 1), addressing, Entry(0))


def test_first_tables_lie_in_shared_memory_and_show_both_sides_of_the_area() -> None:
    first, _ = launch_tables(C38)

    for offset in (0, AREA.size - 1):
        private = walk(first, AREA.start + offset, 0)
        shared = walk(first, AREA.start + offset + layout.LAUNCH_SHARED_OFFSET, 0)
        assert private is not None and private.physical == AREA.start + offset | C38
        assert shared is not None and shared.physical == AREA.start + offset
        assert all(not entry & C38 for entry in shared.entries)
    assert first.cr3 & C38 == 0
    assert walk(first, KERNEL_GPA, 0) is None


def test_second_tables_lie_in_private_memory_and_are_linux_own() -> None:
    _, second = launch_tables(C38)

    for address in (0, 0x7000, KERNEL_GPA, AREA.start, 0xFFFF_F123):
        found = walk(second, address, C38)
        assert found is not None and found.physical == address | C38
        assert all(entry & C38 for entry in found.entries)
    window = walk(second, layout.LAUNCH_WINDOW_GPA + layout.LAUNCH_SHARED_OFFSET, C38)
    assert window is not None and window.physical == layout.LAUNCH_WINDOW_GPA
    assert second.cr3 == layout.LAUNCH_TABLES_GPA | C38
    assert walk(second, layout.LAUNCH_SHARED_OFFSET, C38) is None


def test_all_that_is_put_in_place_lies_in_the_part_of_the_area_that_is_copied() -> None:
    found = linux_launch([Part("kernel", KERNEL_GPA, 1, b"x")], KERNEL_GPA, C38)

    places = sorted((gpa, gpa + len(data)) for gpa, data in found.writes)
    assert places[0][0] == layout.LAUNCH_GPA
    assert places[-1][1] == layout.LAUNCH_GPA + layout.LAUNCH_COPY_SIZE
    assert all(end <= start for (_, end), (start, _) in pairwise(places))


def test_guest_starts_in_shared_memory_with_its_apic_in_x2apic_mode() -> None:
    found = linux_launch([Part("kernel", KERNEL_GPA, 1, b"x")], KERNEL_GPA, C38)

    first, _ = launch_tables(C38)
    start = walk(first, found.state.regs["rip"], 0)
    assert start is not None and start.physical == layout.LAUNCH_GPA
    sregs: dict[str, object] = dict(found.state.sregs)
    assert sregs["apic_base"] == APIC_BASE == 0xFEE0_0D00
    assert sregs["cr3"] == first.cr3


def test_pieces_that_lie_together_become_one_part_with_zeros_between() -> None:
    found = joined("tables", [(0x1010, b"cc"), (0x1000, b"aaa")])

    assert (found.gpa, found.content) == (0x1000, b"aaa" + bytes(13) + b"cc")
    assert found.size == 18


# -- a Linux guest --------------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    file = tmp_path / "vmlinux"
    segments = (Segment(KERNEL_GPA, b"k" * 5000, 8192), Segment(KERNEL_GPA + MIB, b"d" * 100))
    file.write_bytes(build_elf(segments, KERNEL_GPA))
    return file


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    file = tmp_path / "initrd"
    file.write_bytes(b"i" * 10000)
    return file


RAM = layout.ram_ranges(64 * MIB)


def guest_of(kernel: Path, initrd: Path | None = None, **options: int | str) -> LinuxGuest:
    cpus = int(options.get("cpus", 1))
    given = GuestOptions(64 * MIB, cpus, str(options.get("append", "")), is_private=True)
    source = None if initrd is None else open_source(initrd, "initrd")
    guest = LinuxGuest(given, OpenedKernel(kernel), source)
    guest.load_itself()
    guest.finish_opening()
    return guest


@pytest.fixture
def measured(kernel: Path, initrd: Path) -> Iterator[Launch]:
    with closing(guest_of(kernel, initrd)) as guest:
        yield guest.measured(RAM, C38, ["blk0"])


def test_linux_comes_in_all_its_parts(measured: Launch) -> None:
    names = [part.name for part in measured.parts]

    assert names == [
        "kernel, segment 1",
        "kernel, segment 2",
        "initrd",
        "command line",
        "boot_params",
        "ACPI tables",
        "descriptors",
    ]
    assert [part.size for part in measured.parts[:3]] == [5000, 100, 10000]
    places = sorted((part.gpa, part.gpa + part.size) for part in measured.parts)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert not any(Range(part.gpa, part.size).overlaps(AREA) for part in measured.parts)


def test_linux_is_told_of_no_ioapic(measured: Launch) -> None:
    (tables,) = (part for part in measured.parts if part.name == "ACPI tables")
    assert isinstance(tables.content, bytes)
    at = tables.content.index(b"APIC")
    (length,) = struct.unpack_from("<I", tables.content, at + 4)

    kinds, entry = set(), at + 44
    while entry < at + length:
        kinds.add(tables.content[entry])
        entry += tables.content[entry + 1]
    assert 0 in kinds and 1 not in kinds  # a local APIC, and no I/O APIC


def test_linux_is_told_to_take_interrupts_from_the_8259(measured: Launch) -> None:
    (words,) = (part.content for part in measured.parts if part.name == "command line")

    assert words == b"console=ttyS0 panic=-1 noapic\0"


def test_private_memory_is_all_but_the_launch_area(kernel: Path) -> None:
    with closing(guest_of(kernel)) as guest:
        private = guest.private_ranges(RAM)

    assert private == [Range(0, AREA.start), Range(AREA.end, 64 * MIB - AREA.end)]


@pytest.mark.parametrize(
    "changed", ["kernel", "initrd", "append", "devices", "memory", "c-bit", "cpus"]
)
def test_measurement_tells_apart_what_differs(
    changed: str, kernel: Path, initrd: Path, measured: Launch
) -> None:
    if changed == "kernel":
        data = bytearray(kernel.read_bytes())
        data[-1] ^= 1
        kernel.write_bytes(data)
    elif changed == "initrd":
        initrd.write_bytes(b"i" * 9999 + b"j")
    ram = layout.ram_ranges(80 * MIB) if changed == "memory" else RAM
    functions = ["blk0", "blk1"] if changed == "devices" else ["blk0"]
    alias = C38 >> 1 if changed == "c-bit" else C38
    words = "quiet" if changed == "append" else ""
    cpus = 2 if changed == "cpus" else 1

    with closing(guest_of(kernel, initrd, append=words, cpus=cpus)) as guest:
        found = guest.measured(ram, alias, functions)

    assert found.measurement != measured.measurement


def test_measurement_of_the_same_is_the_same(kernel: Path, initrd: Path, measured: Launch) -> None:
    with closing(guest_of(kernel, initrd)) as guest:
        assert guest.measured(RAM, C38, ["blk0"]).measurement == measured.measurement


def test_kernel_in_the_launch_area_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_bytes(build_elf((Segment(AREA.start + 4096, b"k"),), AREA.start + 4096))

    with pytest.raises(ImageError, match=r"overlaps .*, which the boot needs"):
        guest_of(file)


@pytest.mark.parametrize(("iommu", "why"), [(False, None), (True, "--iommu lends")])
def test_guest_that_cannot_load_itself_says_why(iommu: bool, why: str | None, kernel: Path) -> None:
    options = GuestOptions(64 * MIB, 2, "", is_private=True, iommu=iommu)
    with closing(LinuxGuest(options, OpenedKernel(kernel), None)) as guest:
        found = guest.unfit_to_load_itself

    assert found is None if why is None else found is not None and found.startswith(why)


# -- with several processors ----------------------------------------------------------------------


def test_common_memory_holds_nothing_of_the_launch(kernel: Path, initrd: Path) -> None:
    with closing(guest_of(kernel, initrd, cpus=2)) as guest:
        common = guest.unpaged
        launch = guest.measured(RAM, C38, ["blk0"])

    assert common.size == 32 << 10
    taken = [Range(part.gpa, part.size) for part in launch.parts]
    taken += [Range(gpa, len(data)) for gpa, data in launch.writes]
    assert not any(each.overlaps(common) for each in taken)


def test_common_memory_is_all_low_memory_that_linux_is_told_of(kernel: Path) -> None:
    with closing(guest_of(kernel, cpus=2)) as guest:
        common = guest.unpaged
        (page,) = (
            part.content
            for part in guest.measured(RAM, C38, []).parts
            if part.name == "boot_params"
        )

    assert isinstance(page, bytes)
    usable = [(start, size) for start, size, kind in e820_of(page) if kind == E820Type.RAM]
    assert [each for each in usable if each[0] < MIB] == [(common.start, common.size)]


def test_linux_finds_a_place_for_its_trampoline_in_common_memory() -> None:
    """What arch/x86/realmode/init.c looks for, and what setup.c and ebda.c reserve around it."""
    common = layout.TRAMPOLINE

    assert common.start >= 64 << 10
    assert common.end <= 0x9F000
    assert common.size >= 0x6264
    assert common.start % 4096 == common.size % 4096 == 0


def test_launch_says_what_is_common_and_for_how_long(kernel: Path) -> None:
    with closing(guest_of(kernel, cpus=2)) as guest:
        said = guest.measured(RAM, C38, []).as_dict()["common"]

    assert said == {"gpa": 0x90000, "bytes": 32768, "until": "the guest's end"}


def test_one_processor_leaves_nothing_common(kernel: Path) -> None:
    with closing(guest_of(kernel)) as guest:
        assert guest.unpaged.size == 0
        assert "common" not in guest.measured(RAM, C38, []).as_dict()


def test_ordinary_guest_keeps_its_low_memory_whatever_its_processors(kernel: Path) -> None:
    options = GuestOptions(64 * MIB, 2, "", is_private=False)
    with closing(LinuxGuest(options, OpenedKernel(kernel), None)) as guest:
        assert guest.unpaged.size == 0
