"""x86-64 for a debugger: the numbering of registers, page tables walked, exits told apart."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from kvm_bindings import KvmError
from kvm_bindings import ioctls as common
from kvm_bindings.exits import DebugExit
from kvm_bindings.x86_64 import ioctls
from vmm.arch.debug import (
    Abilities,
    Caught,
    Cause,
    Hardware,
    NotMapped,
    Unwritable,
    Watch,
)
from vmm.arch.x86_64.debug import X86Debug

C_BIT = 1 << 51
PRESENT, LARGE = 1, 1 << 7
CR0_PE, CR0_PG, EFER_LMA, CR4_LA57 = 1, 1 << 31, 1 << 10, 1 << 12
NAMES = [register.name for register in X86Debug.registers]


class Registers:
    """Registers, and what it is told of debugging."""

    index = 0

    def __init__(self, **sregs: Any) -> None:
        self.regs = {name: n for n, name in enumerate(
            ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11",
             "r12", "r13", "r14", "r15", "rip", "rflags"))}  # fmt: skip
        segment = {"base": 0, "selector": 0x10, "dpl": 0}
        self.sregs: dict[str, Any] = {
            **{name: dict(segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")},
            "gdt": {"base": 0x500, "limit": 1}, "idt": {"base": 0, "limit": 0},
            "cr0": CR0_PE | CR0_PG, "cr2": 0, "cr3": 0x1000, "cr4": 0, "cr8": 0,
            "efer": EFER_LMA, "apic_base": 0, **sregs,
        }  # fmt: skip
        self.fpu = bytes(range(152)) + bytes(256) + struct.pack("<II", 0x1F80, 0)
        self.told: list[tuple[int, tuple[int, ...]]] = []

    def get_regs(self) -> dict[str, int]:
        return dict(self.regs)

    def set_regs(self, values: dict[str, int]) -> None:
        self.regs = dict(values)

    def get_sregs(self) -> dict[str, Any]:
        return self.sregs

    def update_sregs(self, values: dict[str, Any]) -> None:
        if values.get("cr0") == 0:
            raise KvmError("KVM_SET_SREGS", 22)
        for name, value in values.items():
            self.sregs[name] = {**self.sregs[name], **value} if isinstance(value, dict) else value

    def get_fpu(self) -> bytes:
        return self.fpu

    def set_fpu(self, data: bytes) -> None:
        self.fpu = data

    def set_guest_debug(self, control: int, registers: tuple[int, ...] = (0,) * 8) -> None:
        self.told.append((control, tuple(registers)))


def debug(block: int = 0) -> X86Debug:
    return X86Debug(Abilities(*[True] * 8), block)


def Vcpu(**sregs: Any) -> Any:
    return Registers(**sregs)


# -- registers ------------------------------------------------------------------------------------


def test_description_names_all_registers_in_their_order_with_their_sizes() -> None:
    made = debug()
    tree = ET.fromstring(made.description)

    named = [(reg.get("name"), int(reg.get("bitsize", "0"))) for reg in tree.iter("reg")]

    assert named == [tuple(register) for register in made.registers]
    assert NAMES[:17] == [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
    ]  # fmt: skip
    assert NAMES[17:24] == ["eflags", "cs", "ss", "ds", "es", "fs", "gs"]


def test_values_stand_under_their_names() -> None:
    vcpu = Vcpu()
    vcpu.sregs["gs"] = {"base": 0xFFFF_8880_0000_0000, "selector": 3, "dpl": 0}

    values = dict(zip(NAMES, debug().read_registers(vcpu), strict=True))

    assert (values["rsp"], values["rbp"], values["rip"], values["eflags"]) == (6, 7, 16, 17)
    assert (values["gs"], values["gs_base"]) == (3, 0xFFFF_8880_0000_0000)
    assert (values["cr3"], values["gdt_base"]) == (0x1000, 0x500)
    assert values["st1"] == int.from_bytes(bytes(range(16, 26)), "little")
    assert (values["fctrl"], values["fstat"], values["mxcsr"]) == (0x8180, 0x8382, 0x1F80)
    assert values["ftag"] == 0b00_11_11_11_11_00_11_11  # 132: the second and seventh are in use


def test_general_control_and_vector_registers_are_set() -> None:
    vcpu, made = Vcpu(), debug()
    wanted = {"rip": 0x1234, "eflags": 2, "rsp": 9, "cr2": 5, "fs_base": 6, "xmm15": 7, "st0": 8}

    made.write_registers(vcpu, {NAMES.index(name): value for name, value in wanted.items()})

    values = dict(zip(NAMES, made.read_registers(vcpu), strict=True))
    assert {name: values[name] for name in wanted} == wanted
    assert values["rax"] == 0 and values["st1"] and values["gs_base"] == 0


@pytest.mark.parametrize("name", ["cs", "ss", "gdt_base", "tr_base", "ftag"])
def test_register_that_others_would_have_to_follow_is_not_set(name: str) -> None:
    vcpu, made = Vcpu(), debug()

    with pytest.raises(Unwritable, match=name):
        made.write_registers(vcpu, {NAMES.index(name): 0x99, NAMES.index("rax"): 0x77})

    assert vcpu.regs["rax"] == 0


def test_register_that_keeps_its_value_may_be_any() -> None:
    vcpu, made = Vcpu(), debug()

    made.write_registers(vcpu, dict(enumerate(made.read_registers(vcpu))))


def test_value_that_kvm_refuses_is_a_sentence() -> None:
    with pytest.raises(Unwritable, match="cr0"):
        debug().write_registers(Vcpu(), {NAMES.index("cr0"): 0})


# -- page tables ----------------------------------------------------------------------------------


class Tables:
    """Page tables to be walked; an entry that isn't there is zero."""

    def __init__(self, entries: dict[int, int]) -> None:
        self._entries = entries
        self.reads = 0

    def __call__(self, gpa: int, size: int) -> bytes:
        self.reads += 1
        return self._entries.get(gpa, 0).to_bytes(size, "little")


def test_walk_keeps_the_bit_that_the_guest_has_set() -> None:
    tables = Tables(
        {
            0x1000 | C_BIT: 0x2000 | C_BIT | PRESENT,
            0x2000 | C_BIT: 0x3000 | C_BIT | PRESENT,
            0x3000 | C_BIT: 0x4000 | C_BIT | PRESENT,
            (0x4000 | C_BIT) + 8: 0x7000 | C_BIT | PRESENT | 1 << 63,
        }
    )

    assert debug().walk(Vcpu(cr3=0x1000 | C_BIT), 0x1234, tables) == (0x7234 | C_BIT, 0xDCC)


@pytest.mark.parametrize(("level", "size"), [(2, 2 << 20), (3, 1 << 30)])
def test_large_page_ends_the_walk(level: int, size: int) -> None:
    page = 4 * size
    entries = {0x1000: 0x2000 | PRESENT, 0x2000: page | LARGE | PRESENT | 1 << 12}
    if level == 2:
        entries = {**entries, 0x2000: 0x3000 | PRESENT, 0x3000: page | LARGE | PRESENT | 1 << 12}

    assert debug().walk(Vcpu(), 0x1234, Tables(entries)) == (page + 0x1234, size - 0x1234)


def test_five_levels_are_walked_where_the_guest_has_them() -> None:
    high = 1 << 48
    tables = Tables({0x1000 + 8: 0x2000 | PRESENT, 0x2000: 0x3000 | PRESENT,
                     0x3000: LARGE | PRESENT})  # fmt: skip

    assert debug().walk(Vcpu(cr4=CR4_LA57), high | 0x10, tables)[0] == 0x10


def test_walk_of_tables_that_lead_to_themselves_ends() -> None:
    tables = Tables({0x1000: 0x1000 | PRESENT})

    assert debug().walk(Vcpu(), 0, tables) == (0x1000, 0x1000)
    assert tables.reads == 4


@pytest.mark.parametrize("address", [1 << 47, 1 << 63, 0xFFFF_0000_0000_0000])
def test_address_that_is_not_canonical_is_not_mapped(address: int) -> None:
    with pytest.raises(NotMapped, match="canonical"):
        debug().walk(Vcpu(), address, Tables({}))


def test_entry_that_is_not_present_is_named_by_its_level() -> None:
    with pytest.raises(NotMapped, match="level 3"):
        debug().walk(Vcpu(), 0, Tables({0x1000: 0x2000 | PRESENT}))


def test_without_paging_addresses_are_physical() -> None:
    assert debug().walk(Vcpu(cr0=CR0_PE), 0x1234, Tables({})) == (0x1234, 0xDCC)


def test_32_bit_tables_are_not_guessed_at() -> None:
    with pytest.raises(NotMapped, match="32-bit"):
        debug().walk(Vcpu(efer=0), 0x1234, Tables({}))


# -- breakpoints ----------------------------------------------------------------------------------

ENABLE = common.KVM_GUESTDBG_ENABLE


def unread(address: int, size: int) -> bytes:
    raise AssertionError("x86's KVM holds interrupts off by itself")


def test_nothing_is_asked_of_kvm_where_nothing_is_armed() -> None:
    vcpu = Vcpu()

    debug().arm(vcpu, step=False, software=False, hardware=[None] * 4, peek=unread)

    assert vcpu.told == []


def test_kinds_and_sizes_are_encoded_in_dr7() -> None:
    vcpu = Vcpu()
    wanted = [
        Hardware(Watch.EXECUTE, 0x10, 1),
        Hardware(Watch.WRITE, 0x20, 8),
        None,
        Hardware(Watch.ACCESS, 0x30, 4),
    ]

    debug().arm(vcpu, step=False, software=False, hardware=wanted, peek=unread)

    ((control, registers),) = vcpu.told
    assert control == ENABLE | ioctls.KVM_GUESTDBG_USE_HW_BP
    assert registers[:4] == (0x10, 0x20, 0, 0x30)
    assert registers[7] == 1 << 10 | 0b10_00_10_10 | 0b1001 << 20 | 0b1111 << 28


def test_same_state_is_told_once_and_its_end_too() -> None:
    vcpu, made = Vcpu(), debug(ioctls.KVM_GUESTDBG_BLOCKIRQ)

    for step in (True, True, False, False):
        made.arm(vcpu, step=step, software=False, hardware=[], peek=unread)

    assert [control for control, _ in vcpu.told] == [
        ENABLE | common.KVM_GUESTDBG_SINGLESTEP | ioctls.KVM_GUESTDBG_BLOCKIRQ,
        0,
    ]


@pytest.mark.parametrize(
    ("exit", "caught"),
    [
        (DebugExit(3, 8, 0, 0), Caught(Cause.SOFTWARE, 8)),
        (DebugExit(1, 8, 1 << 14, 0), Caught(Cause.STEP, 8)),
        (DebugExit(1, 8, 1 << 14 | 2, 0), Caught(Cause.HARDWARE, 8, 1)),
        (DebugExit(1, 8, 1, 0), Caught(Cause.GUEST, 8)),
    ],
)
def test_exits_are_told_apart(exit: DebugExit, caught: Caught) -> None:
    hardware = [None, Hardware(Watch.EXECUTE, 8, 1), None, None]

    assert debug().caught(Vcpu(), exit, hardware) == caught


@pytest.mark.parametrize(
    ("vector", "flag"), [(3, ioctls.KVM_GUESTDBG_INJECT_BP), (1, ioctls.KVM_GUESTDBG_INJECT_DB)]
)
def test_guests_own_exception_is_injected_with_what_is_armed(vector: int, flag: int) -> None:
    vcpu, made = Vcpu(), debug()
    made.arm(vcpu, step=False, software=True, hardware=[], peek=unread)

    made.pass_on(vcpu, DebugExit(vector, 8, 0, 0))

    assert vcpu.told[-1][0] == ENABLE | ioctls.KVM_GUESTDBG_USE_SW_BP | flag


def test_what_kvm_lacks_is_said_in_words() -> None:
    able = Abilities(True, False, False, False, True, True, True, False)

    assert able.lacking() == (
        "single steps in user mode, software breakpoints in kernel mode or user mode, "
        "watchpoints in user mode"
    )
