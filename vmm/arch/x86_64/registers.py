"""The first vCPU's initial registers, as plain mappings with KVM's own field names.

Keys are exactly the members of struct kvm_regs and struct kvm_sregs. What a mapping leaves out
(apic_base, interrupt_bitmap, cr8) keeps the value that KVM_GET_SREGS answered: the APIC base
carries the boot-processor flag, so overwriting it with a constant would be wrong.
"""

from __future__ import annotations

import struct

from vmm.arch.x86_64 import layout
from vmm.core.lean_typing import NamedTuple, TypedDict

# Intel SDM vol. 3, 2.5: control registers; 2.2.1: IA32_EFER.
CR0_PE, CR0_MP, CR0_ET, CR0_NE = 1 << 0, 1 << 1, 1 << 4, 1 << 5
CR0_WP, CR0_AM, CR0_PG = 1 << 16, 1 << 18, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1  # always reads as one
RFLAGS_IOPL3 = 3 << 12

CODE_TYPE, DATA_TYPE, TSS_TYPE = 11, 3, 11  # execute/read, read/write (both accessed), busy TSS

# Selectors 0x10 and 0x18 are the boot protocol's __BOOT_CS and __BOOT_DS.
BOOT_CS, BOOT_DS, USER_CS, USER_DS, TSS_SELECTOR = 0x10, 0x18, 0x23, 0x2B, 0x30

# SDM vol. 1, 19.5.2: the I/O permission map, a bit for each port, follows the 104 bytes of the
# TSS and is closed by a byte of ones.
TSS_IO_MAP_BASE, TSS_IO_MAP = 102, 104
TSS_SIZE = TSS_IO_MAP + 65536 // 8 + 1

# The members of struct kvm_regs.
REGISTER_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)


class Segment(TypedDict):
    """struct kvm_segment: type is the descriptor's 4-bit type, limit counts bytes."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - KVM's own name
    g: int
    avl: int
    unusable: int


class Table(TypedDict):
    """struct kvm_dtable, for GDTR and IDTR."""

    base: int
    limit: int


class SpecialRegisters(TypedDict):
    """The members of struct kvm_sregs that pyvmm sets."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Table
    idt: Table
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int


class InitialState(NamedTuple):
    """Values for KVM_SET_REGS and KVM_SET_SREGS, and as (gpa, bytes) what they refer to."""

    regs: dict[str, int]
    sregs: SpecialRegisters
    writes: list[tuple[int, bytes]]


def _segment(selector: int, segment_type: int, dpl: int, *, code: bool) -> Segment:
    return Segment(
        base=0,
        limit=0xFFFF_FFFF,
        selector=selector,
        type=segment_type,
        present=1,
        dpl=dpl,
        db=0 if code else 1,
        s=1,
        l=1 if code else 0,
        g=1,
        avl=0,
        unusable=0,
    )


def _descriptor(segment: Segment) -> int:
    """The 8-byte descriptor (SDM vol. 3, 3.4.5) of a 4 GiB flat or small system segment."""
    limit = segment["limit"] >> 12 if segment["g"] else segment["limit"]
    base = segment["base"]
    access = segment["type"] | segment["s"] << 4 | segment["dpl"] << 5 | segment["present"] << 7
    flags = segment["avl"] | segment["l"] << 1 | segment["db"] << 2 | segment["g"] << 3
    return (
        limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def _task_register() -> Segment:
    """A busy 64-bit TSS: Intel's VM entry refuses a long-mode guest without one."""
    return Segment(
        base=layout.TSS_GPA,
        limit=TSS_SIZE - 1,
        selector=TSS_SELECTOR,
        type=TSS_TYPE,
        present=1,
        dpl=0,
        db=0,
        s=0,
        l=0,
        g=0,
        avl=0,
        unusable=0,
    )


def _no_ldt() -> Segment:
    return Segment(
        base=0,
        limit=0,
        selector=0,
        type=2,
        present=0,
        dpl=0,
        db=0,
        s=0,
        l=0,
        g=0,
        avl=0,
        unusable=1,
    )


def gdt_bytes() -> bytes:
    """The descriptor table both entries share: kernel and user code/data, and the TSS."""
    entries = [
        0,
        0,
        _descriptor(_segment(BOOT_CS, CODE_TYPE, 0, code=True)),
        _descriptor(_segment(BOOT_DS, DATA_TYPE, 0, code=False)),
        _descriptor(_segment(USER_CS, CODE_TYPE, 3, code=True)),
        _descriptor(_segment(USER_DS, DATA_TYPE, 3, code=False)),
        _descriptor(_task_register()),
        0,  # bits 63:32 of the TSS base: a 64-bit TSS descriptor takes two entries
    ]
    return struct.pack(f"<{len(entries)}Q", *entries)


def tss_bytes() -> bytes:
    """A TSS whose I/O permission map allows every port.

    With IOPL 3 no processor looks at it. Hosts that run CPL 3 natively without VT-x or SVM drop
    the guest's IOPL, though, and then go by the map (6.18 PVM: `out` was a triple fault).
    """
    tss = bytearray(TSS_SIZE)
    struct.pack_into("<H", tss, TSS_IO_MAP_BASE, TSS_IO_MAP)
    tss[-1] = 0xFF
    return bytes(tss)


def _descriptor_writes() -> list[tuple[int, bytes]]:
    return [(layout.GDT_GPA, gdt_bytes()), (layout.TSS_GPA, tss_bytes())]


def _special_registers(code: Segment, data: Segment, cr3: int) -> SpecialRegisters:
    return SpecialRegisters(
        cs=code,
        ds=data,
        es=data.copy(),
        fs=data.copy(),
        gs=data.copy(),
        ss=data.copy(),
        tr=_task_register(),
        ldt=_no_ldt(),
        gdt=Table(base=layout.GDT_GPA, limit=len(gdt_bytes()) - 1),
        # An empty IDT: an exception before the guest sets its own is a triple fault, at once.
        idt=Table(base=0, limit=0),
        cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG,
        cr2=0,
        cr3=cr3,
        cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
        efer=EFER_LME | EFER_LMA,
    )


def _general_registers(**values: int) -> dict[str, int]:
    return {name: values.get(name, 0) for name in REGISTER_NAMES}


def linux64_entry(
    entry: int,
    cr3: int,
    boot_params_gpa: int = layout.BOOT_PARAMS_GPA,
    stack_top: int = layout.BOOT_STACK_TOP,
) -> InitialState:
    """The state the 64-bit boot protocol asks for (Documentation/arch/x86/boot.rst).

    Long mode with flat __BOOT_CS/__BOOT_DS, interrupts off, RSI = GPA of boot_params.
    """
    code = _segment(BOOT_CS, CODE_TYPE, 0, code=True)
    data = _segment(BOOT_DS, DATA_TYPE, 0, code=False)
    regs = _general_registers(rip=entry, rsi=boot_params_gpa, rsp=stack_top, rflags=RFLAGS_FIXED)
    return InitialState(regs, _special_registers(code, data, cr3), _descriptor_writes())


def payload_entry(
    entry: int,
    cr3: int,
    info_gpa: int = layout.BOOT_PARAMS_GPA,
    stack_top: int = layout.BOOT_STACK_TOP,
) -> InitialState:
    """64-bit mode at CPL 3 with IOPL 3, interrupts off, RDI = GPA of the payload info page.

    CPL 3 because some hosts run it natively and interpret CPL 0 (field notes, section 1).
    """
    code = _segment(USER_CS, CODE_TYPE, 3, code=True)
    data = _segment(USER_DS, DATA_TYPE, 3, code=False)
    regs = _general_registers(
        rip=entry, rdi=info_gpa, rsp=stack_top, rflags=RFLAGS_FIXED | RFLAGS_IOPL3
    )
    return InitialState(regs, _special_registers(code, data, cr3), _descriptor_writes())
