"""Initial registers against the values the processor manuals and the boot protocol ask for."""

from __future__ import annotations

import struct

import pytest

from vmm.arch.x86_64.registers import (
    InitialState,
    gdt_bytes,
    linux64_entry,
    payload_entry,
)

KVM_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11"),
    *("r12", "r13", "r14", "r15", "rip", "rflags"),
)
KVM_SEGMENT = {
    *("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl"),
    "unusable",
}
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

STATES = [linux64_entry(0x100_0000, 0x9000), payload_entry(0x10_0000, 0x9000)]


@pytest.mark.parametrize("state", STATES)
def test_state_has_exactly_kvms_field_names(state: InitialState) -> None:
    assert set(state.regs) == set(KVM_REGS)
    assert set(state.sregs) == {*SEGMENTS, "gdt", "idt", "cr0", "cr2", "cr3", "cr4", "efer"}
    for name in SEGMENTS:
        assert set(state.sregs[name]) == KVM_SEGMENT  # type: ignore[literal-required]


@pytest.mark.parametrize("state", STATES)
def test_state_is_long_mode_with_interrupts_off(state: InitialState) -> None:
    assert state.sregs["cr0"] == 0x8005_0033
    assert state.sregs["cr4"] & 0x20, "PAE"
    assert state.sregs["efer"] == 0x500
    assert state.sregs["cs"]["l"] == 1
    assert state.sregs["cs"]["db"] == 0
    assert state.regs["rflags"] & 0x200 == 0
    assert state.regs["rflags"] & 2


@pytest.mark.parametrize("state", STATES)
def test_state_passes_intels_tr_and_ldtr_checks(state: InitialState) -> None:
    # SDM vol. 3, 27.3.1.2: TR usable, busy 64-bit TSS, present, system, not from the LDT.
    task = state.sregs["tr"]
    assert (task["type"], task["s"], task["present"], task["unusable"]) == (11, 0, 1, 0)
    assert task["selector"] & 4 == 0
    assert task["g"] == 0
    assert state.sregs["ldt"]["unusable"] == 1


def test_linux_entry_follows_the_64_bit_boot_protocol() -> None:
    state = linux64_entry(0x123_4000, 0x9000 | 1 << 38, boot_params_gpa=0x7000)

    assert state.regs["rip"] == 0x123_4000
    assert state.regs["rsi"] == 0x7000
    assert state.sregs["cr3"] == 0x40_0000_9000
    assert state.sregs["cs"]["selector"] == 0x10
    assert {state.sregs[name]["selector"] for name in ("ds", "es", "ss")} == {0x18}
    assert state.sregs["cs"]["dpl"] == 0


def test_payload_entry_runs_at_cpl_3_with_iopl_3() -> None:
    state = payload_entry(0x10_0000, 0x9000, info_gpa=0x7000)

    assert state.regs["rdi"] == 0x7000
    assert state.regs["rflags"] == 0x3002
    for name in ("cs", "ss"):
        segment = state.sregs[name]
        assert (segment["dpl"], segment["selector"] & 3) == (3, 3)


def test_gdt_has_the_classic_descriptors() -> None:
    entries = struct.unpack("<8Q", gdt_bytes())

    assert entries[:4] == (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    assert entries[4:6] == (0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF)
    assert entries[6:] == (0x0000_8B00_0600_2068, 0)


@pytest.mark.parametrize("state", STATES)
def test_selectors_name_their_descriptors(state: InitialState) -> None:
    gpa, table = state.writes[0]
    assert (state.sregs["gdt"]["base"], state.sregs["gdt"]["limit"]) == (gpa, len(table) - 1)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment = state.sregs[name]
        (entry,) = struct.unpack_from("<Q", table, segment["selector"] & ~7)
        assert entry >> 40 & 0xF == segment["type"]
        assert entry >> 45 & 3 == segment["dpl"]
        assert entry >> 53 & 1 == segment["l"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("port", [0, 0x3F8, 0x500, 0x604, 0xC0FF, 0xFFFF])
def test_tss_allows_every_port_to_whoever_asks_it(state: InitialState, port: int) -> None:
    # SDM vol. 1, 19.5.2: two bytes of the map are read, both within the limit.
    task = state.sregs["tr"]
    tss = dict(state.writes)[task["base"]]
    (base,) = struct.unpack_from("<H", tss, 102)

    assert base + port // 8 + 1 <= task["limit"] == len(tss) - 1
    (bits,) = struct.unpack_from("<H", tss, base + port // 8)
    assert bits >> port % 8 & 1 == 0
    assert tss[-1] == 0xFF
