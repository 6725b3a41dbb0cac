"""The ACPI tables, found and parsed as an operating system does, starting from the RSDP."""

from __future__ import annotations

import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from vmm.arch.x86_64.acpi.tables import RSDP_GPA, acpi_tables
from vmm.core.errors import UsageError
from vmm.core.ranges import Range

PCI = {1: 5, 2: 10, 3: 11}


class Memory:
    """What the tables' writes leave in guest memory."""

    def __init__(self, cpus: int = 2) -> None:
        self.writes = acpi_tables(cpus, PCI)

    def read(self, gpa: int, size: int) -> bytes:
        for start, data in self.writes:
            if start <= gpa and gpa + size <= start + len(data):
                return data[gpa - start : gpa - start + size]
        raise AssertionError(f"nothing at {gpa:#x}")

    def table(self, gpa: int) -> bytes:
        (length,) = struct.unpack("<I", self.read(gpa + 4, 4))
        return self.read(gpa, length)

    def tables(self) -> dict[str, bytes]:
        """Everything that the XSDT reaches, by signature."""
        (xsdt_gpa,) = struct.unpack("<Q", self.read(RSDP_GPA + 24, 8))
        xsdt = self.table(xsdt_gpa)
        found = {"XSDT": xsdt}
        for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
            data = self.table(gpa)
            found[data[:4].decode()] = data
        (dsdt,) = struct.unpack_from("<Q", found["FACP"], 140)
        found["DSDT"] = self.table(dsdt)
        return found


def madt_entries(data: bytes) -> list[bytes]:
    entries, at = [], 44
    while at < len(data):
        assert data[at + 1] >= 2, "an entry of no length"
        entries.append(data[at : at + data[at + 1]])
        at += data[at + 1]
    return entries


def test_rsdp_has_both_checksums_and_lies_where_firmware_puts_it() -> None:
    rsdp = Memory().read(RSDP_GPA, 36)

    assert rsdp[:8] == b"RSD PTR "
    assert 0xE0000 <= RSDP_GPA < 0x100000
    assert RSDP_GPA % 16 == 0
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0
    assert rsdp[15] == 2


def test_tables_reachable_from_the_rsdp_have_good_checksums() -> None:
    tables = Memory().tables()

    assert set(tables) == {"XSDT", "FACP", "APIC", "DSDT"}
    for signature, data in tables.items():
        assert sum(data) % 256 == 0, signature


def test_tables_do_not_overlap_and_stay_in_their_region() -> None:
    spans = sorted(Range(gpa, len(data)) for gpa, data in acpi_tables(255, PCI))

    assert spans[0].start == 0xE0000
    assert spans[-1].end <= 0x100000
    for one, other in pairwise(spans):
        assert one.end <= other.start


def test_fadt_describes_the_fixed_hardware() -> None:
    fadt = Memory().tables()["FACP"]

    def u16(at: int) -> int:
        return int(struct.unpack_from("<H", fadt, at)[0])

    def u32(at: int) -> int:
        return int(struct.unpack_from("<I", fadt, at)[0])

    assert len(fadt) == 276
    assert (u32(56), u32(64), u32(76)) == (0x600, 0x604, 0x608)
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)
    assert u16(46) == 9
    assert u32(48) == 0, "no SMI command port: always in ACPI mode"
    assert u16(109) & 0b10 == 0, "no 8042"
    assert u16(109) & 0b100, "no VGA"
    assert u16(109) & 0b1000 == 0, "MSI allowed"
    assert u16(109) & 0b100000 == 0, "RTC present"
    flags = u32(112)
    assert flags >> 10 & 1, "reset register"
    assert flags >> 8 & 1, "32-bit timer"
    assert flags >> 20 & 1 == 0, "not hardware-reduced"
    assert fadt[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, 0x60C)
    assert fadt[128] == 1


def test_facs_is_aligned_and_signed() -> None:
    memory = Memory()
    (gpa,) = struct.unpack_from("<I", memory.tables()["FACP"], 36)

    facs = memory.read(gpa, 64)

    assert gpa % 64 == 0
    assert facs[:8] == b"FACS" + struct.pack("<I", 64)


def test_madt_lists_processors_by_apic_id_and_the_ioapic() -> None:
    data = Memory(cpus=3).tables()["APIC"]
    entries = madt_entries(data)

    processors = [e for e in entries if e[0] == 0]
    assert struct.unpack_from("<I", data, 36)[0] == 0xFEE00000
    assert [(e[3], struct.unpack_from("<I", e, 4)[0]) for e in processors] == [
        *((0, 1), (1, 1), (2, 1)),
    ]
    [ioapic] = [e for e in entries if e[0] == 1]
    assert struct.unpack_from("<II", ioapic, 4) == (0xFEC00000, 0)


def test_madt_overrides_sci_and_pci_interrupts() -> None:
    overrides = {
        entry[3]: struct.unpack_from("<IH", entry, 4)
        for entry in madt_entries(Memory().tables()["APIC"])
        if entry[0] == 2
    }

    assert overrides == {9: (9, 0xD), 5: (5, 0xF), 10: (10, 0xF), 11: (11, 0xF)}


def test_madt_of_many_processors_uses_x2apic_entries_past_254() -> None:
    entries = madt_entries(Memory(cpus=300).tables()["APIC"])

    assert sum(e[0] == 0 for e in entries) == 255
    x2apic = [struct.unpack_from("<I", e, 4)[0] for e in entries if e[0] == 9]
    assert x2apic == list(range(255, 300))
    assert sum(e[0] == 10 for e in entries) == 1


def test_tables_of_too_many_processors_raise() -> None:
    with pytest.raises(UsageError, match="--cpus"):
        acpi_tables(20_000, PCI)


def test_dsdt_holds_soft_off_and_interrupt_routes() -> None:
    dsdt = Memory().tables()["DSDT"]

    # Name (_S5_, Package (4) {5, 5, 0, 0})
    assert b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" in dsdt
    # Package (4) {0x0002FFFF, 0, 0, 10}
    assert b"\x12\x0b\x04\x0c\xff\xff\x02\x00\x00\x00\x0a\x0a" in dsdt


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
def test_dsdt_through_iasl_and_back_is_the_same(tmp_path: Path) -> None:
    dsdt = Memory().tables()["DSDT"]
    (tmp_path / "dsdt.aml").write_bytes(dsdt)

    def iasl(*arguments: str) -> str:
        done = subprocess.run(
            ["iasl", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    iasl("-d", "dsdt.aml")
    (tmp_path / "dsdt.aml").unlink()
    report = iasl("-oa", "dsdt.dsl")

    # Bytes 28..36 name the compiler, byte 9 is the checksum over them.
    again = (tmp_path / "dsdt.aml").read_bytes()
    assert "0 Errors, 0 Warnings" in report
    assert again[36:] == dsdt[36:]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
@pytest.mark.parametrize("signature", ["FACP", "APIC", "XSDT"])
def test_data_table_disassembles_without_complaint(signature: str, tmp_path: Path) -> None:
    (tmp_path / "table.dat").write_bytes(Memory().tables()[signature])

    done = subprocess.run(
        ["iasl", "-d", "table.dat"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr + (tmp_path / "table.dsl").read_text()
    for complaint in ("Warning", "Error", "Incorrect checksum", "Invalid"):
        assert complaint not in text
