"""MSR answers: those of an SEV guest, and #GP for everything else."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64.msrs import MsrTable


def test_reads_of_an_sev_guest_are_answered() -> None:
    table = MsrTable(c_bit=True)

    assert table.read(0xC001_0131) == 1
    assert table.read(0xC001_0010) == 1 << 23


@pytest.mark.parametrize("index", [0xC001_0131, 0xC001_0010, 0x4B56_4D08, 0x10, 2**32 - 1])
def test_reads_of_an_ordinary_guest_fault(index: int) -> None:
    assert MsrTable(c_bit=False).read(index) is None


def test_unknown_reads_and_writes_fault() -> None:
    table = MsrTable(c_bit=True)

    assert table.read(0xDEAD) is None
    assert not table.write(0xDEAD, 1)


def test_status_registers_are_read_only() -> None:
    table = MsrTable(c_bit=True)

    assert not table.write(0xC001_0131, 0)
    assert not table.write(0xC001_0010, 0)
    assert table.read(0xC001_0131) == 1


def test_migration_control_keeps_what_was_written() -> None:
    table = MsrTable(c_bit=True)

    assert table.read(0x4B56_4D08) == 0
    assert table.write(0x4B56_4D08, 1)
    assert table.migration_ready
    assert table.read(0x4B56_4D08) == 1


def test_migration_control_with_reserved_bits_faults() -> None:
    table = MsrTable(c_bit=True)

    assert not table.write(0x4B56_4D08, 2)
    assert not MsrTable(c_bit=False).write(0x4B56_4D08, 1)
