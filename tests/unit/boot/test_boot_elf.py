"""ELF program headers: what is loaded where, and every bad field refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.images import KERNEL_BASE, Part, build_elf, patch
from vmm.arch.x86_64.elf import ElfImage, parse_elf
from vmm.boot.errors import ImageError
from vmm.boot.source import open_source


def parse(tmp_path: Path, image: bytes) -> ElfImage:
    path = tmp_path / "vmlinux"
    path.write_bytes(image)
    with open_source(path, "kernel") as source:
        return parse_elf(source)


def test_elf_valid_gives_segments_in_address_order(tmp_path: Path) -> None:
    parts = (Part(0x200000, b"b" * 10, 0x1000), Part(0x100000, b"a" * 20))
    image = build_elf(parts, entry=0x100004)

    elf = parse(tmp_path, image)

    low, high = elf.segments
    assert (low.paddr, low.filesz, low.memsz) == (0x100000, 20, 20)
    assert (high.paddr, high.filesz, high.memsz) == (0x200000, 10, 0x1000)
    assert image[low.offset : low.offset + 20] == b"a" * 20
    assert (elf.entry, elf.memory_start, elf.memory_end) == (0x100004, 0x100000, 0x201000)


def test_elf_dynamic_type_is_accepted(tmp_path: Path) -> None:
    assert parse(tmp_path, patch(build_elf(), e_type=3)).entry == KERNEL_BASE


def test_elf_segment_of_bss_alone_is_kept(tmp_path: Path) -> None:
    elf = parse(tmp_path, build_elf((Part(0x100000, b"x"), Part(0x200000, b"", 0x5000))))

    assert elf.memory_end == 0x205000


def test_elf_segment_without_any_bytes_is_left_out(tmp_path: Path) -> None:
    elf = parse(tmp_path, build_elf((Part(0x100000, b"x"), Part(0x200000, b""))))

    assert len(elf.segments) == 1


BAD = [
    ({"class": 1}, "32-bit ELF"),
    ({"class": 1, "e_machine": 3}, "32-bit ELF for 32-bit x86"),
    ({"data": 2, "e_machine": 0x1600}, "big-endian for s390"),
    ({"data": 9}, "unknown byte order"),
    ({"e_machine": 183}, "for arm64"),
    ({"e_machine": 243}, "for RISC-V"),
    ({"e_machine": 999}, "unknown machine"),
    ({"e_type": 1}, "relocatable object"),
    ({"e_type": 4}, "core dump"),
    ({"e_type": 77}, "unknown type"),
    ({"e_phentsize": 32}, "program headers of 32 bytes"),
    ({"e_phnum": 0}, "0 ELF program headers"),
    ({"e_phnum": 0xFFFF}, "65535 ELF program headers"),
    ({"e_phoff": 0xFFFFFFFFFFFFFFF0}, "not inside the file"),
    ({"e_phoff": 1 << 40}, "not inside the file"),
    ({"e_entry": 0}, "entry"),
    ({"e_entry": KERNEL_BASE + 0x1800}, "entry"),
    ({"e_entry": 0xFFFFFFFF81000000}, "entry"),
    ({"p_type": 3}, "user space"),
    ({"p_offset": 0xFFFFFFFFFFFFFFFF}, "the file has"),
    ({"p_filesz": 0x2000, "p_offset": 177}, "the file has"),
    ({"p_filesz": 0x2001}, "in the file for"),
    ({"p_filesz": 0xFFFFFFFFFFFFFFFF, "p_memsz": 0xFFFFFFFFFFFFFFFF}, "the file has"),
    ({"p_paddr": 0xFFFFFFFFFFFFF000}, "physical memory"),
    ({"p_memsz": 0xFFFFFFFFFFFFFFFF}, "physical memory"),
    ({"p_paddr": 1 << 32, "p_memsz": (1 << 30)}, "more than"),
    ({"p_memsz": 0x4001}, "overlap"),
    ({"p_paddr": KERNEL_BASE + 0x4000}, "overlap"),
]


@pytest.mark.parametrize(("values", "words"), BAD)
def test_elf_bad_field_is_refused_by_name(
    tmp_path: Path, values: dict[str, int], words: str
) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        parse(tmp_path, patch(build_elf(), **values))

    assert "\n" not in str(caught.value)


def test_elf_without_loadable_segment_is_refused(tmp_path: Path) -> None:
    image = patch(build_elf((Part(0x100000, b"x"),)), p_type=4)

    with pytest.raises(ImageError, match="no ELF segment to load"):
        parse(tmp_path, image)


@pytest.mark.parametrize("size", [4, 16, 63, 64, 100, 0x1000])
def test_elf_file_cut_off_is_an_image_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(ImageError, match=r"not inside the file|the file has"):
        parse(tmp_path, build_elf()[:size])
