"""The instructions of small guests, as words with their assembly beside them.

x19 holds DONE_GPA throughout: the call conventions leave it alone, also across a hypercall (SMCCC).
A verb ends with a store there: an exit that carries a word, whatever isolates the guest.
"""

from __future__ import annotations

import struct

DONE_GPA = 0xFFFF_F000
"""The last page that a MemoryBus has; small guests have no RAM in the GiB around it."""
DEVICES_GPA = 0xC000_0000
"""That GiB, which is Device memory."""
FAULT_GPA = DONE_GPA + 8
"""Stored to by every exception, with the syndrome (ESR_EL1)."""

Code = tuple[tuple[int, str], ...]
"""Instructions, each with its assembly for GNU as ("." is its own address)."""

DONE: Code = ((0xB900027F, "str wzr, [x19]"), (0x17FFFFFF, "b . - 4"))
"""Again at each run."""
EXCHANGE: Code = (
    (0xF9400402, "ldr x2, [x0, #8]"),
    (0xF9000401, "str x1, [x0, #8]"),
    (0xB9000262, "str w2, [x19]"),
    (0x17FFFFFD, "b . - 12"),
)
"""x0: address, x1: word."""
READ: Code = ((0xF9400001, "ldr x1, [x0]"), (0xF9000261, "str x1, [x19]"))
"""x0: address; says the word and leaves it in x1."""
WRITE: Code = ((0xF9000001, "str x1, [x0]"), (0xF900027F, "str xzr, [x19]"))
"""x0: address, x1: word."""
FILL: Code = (
    # No writeback: the processor describes plain accesses alone, and any of these may exit.
    (0xB40000A2, "cbz x2, . + 20"),
    (0xF9000001, "str x1, [x0]"),
    (0x91002000, "add x0, x0, #8"),
    (0xD1000442, "sub x2, x2, #1"),
    (0x17FFFFFC, "b . - 16"),
    (0xF900027F, "str xzr, [x19]"),
)
"""x0: address, x1: word, x2: words."""
HOLDS: Code = (
    (0xB40000E2, "cbz x2, . + 28"),
    (0xF9400003, "ldr x3, [x0]"),
    (0xEB01007F, "cmp x3, x1"),
    (0x54000081, "b.ne . + 16"),
    (0x91002000, "add x0, x0, #8"),
    (0xD1000442, "sub x2, x2, #1"),
    (0x17FFFFFA, "b . - 24"),
    (0xF9000262, "str x2, [x19]"),
)
"""As FILL; says the number of words that are left, and leaves it in x2."""
HVC: Code = ((0xD4000002, "hvc #0"), (0xF9000260, "str x0, [x19]"))
"""x0: function, x1 to x3: arguments; says the answer and leaves it in x0."""
SMC: Code = ((0xD4000003, "smc #0"), (0xF9000260, "str x0, [x19]"))

SHARE_AND_BACK: Code = (
    (0xF9000295, "str x21, [x20]"),
    (0xB900027F, "str wzr, [x19]"),
    (0xAA1603E0, "mov x0, x22"),
    (0xD4000002, "hvc #0"),
    (0xB9000260, "str w0, [x19]"),
    (0xAA1703E0, "mov x0, x23"),
    (0xAA1403E1, "mov x1, x20"),
    (0xD4000002, "hvc #0"),
    (0xB9000260, "str w0, [x19]"),
    (0x14000000, "b ."),
)
"""x20: address (in x1, too; x2 and x3 are 0), x21: word, x22 and x23: MEM_SHARE and MEM_UNSHARE.
Says 0 when the word is there, then the answer to each of the calls."""

TAKE_INTERRUPT: Code = (
    (0x52800020, "mov w0, #1"),
    (0xD518CCE0, "msr icc_igrpen1_el1, x0"),
    (0x52801FE0, "mov w0, #255"),
    (0xD5184600, "msr icc_pmr_el1, x0"),
    (0xD5033FDF, "isb"),
    (0xB900027F, "str wzr, [x19]"),
    (0xD538CC00, "mrs x0, icc_iar1_el1"),
    (0xD5033F9F, "dsb sy"),
    (0x6B14001F, "cmp w0, w20"),
    (0x54FFFFA1, "b.ne . - 12"),
    (0xB9000260, "str w0, [x19]"),
    (0xD518CC20, "msr icc_eoir1_el1, x0"),
    (0xD5033FDF, "isb"),
    (0xB900027F, "str wzr, [x19]"),
    (0x14000000, "b ."),
)
"""x20: an INTID. Says 0 when the processor's interface to the GIC is on, the INTID when that
interrupt has come, and 0 when it is ended. It asks again and again: nothing depends on WFI."""

BREAKPOINTS: Code = (
    (0x528ACF02, "mov w2, #0x5678"),
    (0xD503201F, "nop"),
    (0xD4200000, "brk #0"),
    (0xF9000001, "str x1, [x0]"),
    (0x14000000, "b ."),
)
"""For a debugger's part of KVM: 0x5678 in x2 before anything else. x0: address."""

EXCEPTION: Code = (
    (0xD5385200, "mrs x0, esr_el1"),
    (0xF9000660, "str x0, [x19, #8]"),
    (0x14000000, "b ."),
)
VECTORS, VECTOR_SIZE = 16, 0x80


def assembled(code: Code) -> bytes:
    """The instructions as bytes."""
    return struct.pack(f"<{len(code)}I", *(word for word, _ in code))


def vectors() -> bytes:
    """A table for VBAR_EL1 in which every exception is told at FAULT_GPA."""
    return assembled(EXCEPTION).ljust(VECTOR_SIZE, b"\0") * VECTORS
