"""x86-64 for a debugger: registers as gdb numbers them, the guest's page tables, KVM's breakpoints.

Registers are named and numbered by gdb's standard features org.gnu.gdb.i386.core, .sse and
.segments (gdb manual, "i386 Features"); control registers are a feature of our own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Sequence

from kvm_bindings import KvmError
from kvm_bindings import ioctls as common
from kvm_bindings.exits import DebugExit, Exit
from kvm_bindings.x86_64 import System, Vcpu, ioctls
from vmm.arch.debug import (
    Abilities,
    Caught,
    Cause,
    Hardware,
    NotMapped,
    Register,
    Unwritable,
    Watch,
)
from vmm.arch.x86_64.page_tables import LARGE, PRESENT
from vmm.core.lean_typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vmm.arch.x86_64.micro_guest import Mode

_GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{number}" for number in range(8, 16)),
)
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_X87 = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_TABLES = ("gdt", "idt", "tr", "ldt")

# struct kvm_fpu (416 bytes): where each field lies.
_FPU_CONTROL = struct.Struct("<HHBxHQQ")
_FPU_CONTROL_AT, _XMM_AT, _MXCSR_AT = 128, 152, 408

CR0_PG, CR4_LA57, EFER_LMA = 1 << 31, 1 << 12, 1 << 10
_ADDRESS_BITS = 0x000F_FFFF_FFFF_F000
"""Of a page-table entry: bits 51:12, an encryption bit among them."""

# SDM vol. 3, 19.2: DR7's enable bits, its R/W and LEN fields; DR6's bits.
_DR7_WATCH = {Watch.EXECUTE: 0, Watch.WRITE: 1, Watch.ACCESS: 3}
_DR7_LENGTH = {1: 0, 2: 1, 4: 3, 8: 2}
_DR7_FIXED = 1 << 10
_DR6_STEP = 1 << 14
_DEBUG_VECTOR, _BREAKPOINT_VECTOR = 1, 3

_ENABLE = common.KVM_GUESTDBG_ENABLE
_WAYS = {
    "step": common.KVM_GUESTDBG_SINGLESTEP,
    "software": ioctls.KVM_GUESTDBG_USE_SW_BP,
    "hardware": ioctls.KVM_GUESTDBG_USE_HW_BP,
    "watch": ioctls.KVM_GUESTDBG_USE_HW_BP,
}


def _description() -> tuple[str, list[Register]]:
    """The target description, and the same as a list."""
    registers: list[Register] = []
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>i386:x86-64</architecture>",
    ]

    def feature(name: str, *groups: tuple[Sequence[str], int, str]) -> None:
        lines.append(f'<feature name="{name}">')
        if name.endswith(".core"):
            flags = {"CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10,
                     "OF": 11, "NT": 14, "RF": 16, "VM": 17, "AC": 18, "VIF": 19, "VIP": 20,
                     "ID": 21}  # fmt: skip
            fields = "".join(f'<field name="{f}" start="{b}" end="{b}"/>' for f, b in flags.items())
            lines.append(f'<flags id="i386_eflags" size="4">{fields}</flags>')
        if name.endswith(".sse"):
            lines.append(_VECTORS)
        for names, bits, kind in groups:
            for each in names:
                group = ' group="system"' if name.startswith("org.pyvmm") else ""
                lines.append(f'<reg name="{each}" bitsize="{bits}" type="{kind}"{group}/>')
                registers.append(Register(each, bits))
        lines.append("</feature>")

    feature(
        "org.gnu.gdb.i386.core",
        (_GENERAL[:6], 64, "int64"),
        (("rbp", "rsp"), 64, "data_ptr"),
        (_GENERAL[8:], 64, "int64"),
        (("rip",), 64, "code_ptr"),
        (("eflags",), 32, "i386_eflags"),
        (_SEGMENTS, 32, "int32"),
        ([f"st{number}" for number in range(8)], 80, "i387_ext"),
        (_X87, 32, "int"),
    )
    feature(
        "org.gnu.gdb.i386.sse",
        ([f"xmm{number}" for number in range(16)], 128, "vec128"),
        (("mxcsr",), 32, "int"),
    )
    feature("org.gnu.gdb.i386.segments", (("fs_base", "gs_base"), 64, "int"))
    feature(
        "org.pyvmm.x86_64.system",
        (_CONTROL, 64, "int64"),
        ([f"{name}_base" for name in _TABLES], 64, "data_ptr"),
    )
    lines.append("</target>")
    return "\n".join(lines), registers


_VECTORS = (
    '<vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/>'
    '<vector id="v4f" type="ieee_single" count="4"/>'
    '<vector id="v2d" type="ieee_double" count="2"/>'
    '<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>'
    '<field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>'
    '<field name="uint128" type="uint128"/></union>'
)


class X86Debug:
    """See vmm.arch.debug.GuestDebug. Knows KVM through the vCPUs that it is given."""

    description: str
    registers: Sequence[Register]
    description, registers = _description()
    breakpoint_instruction = b"\xcc"
    watches: Container[Watch] = (Watch.EXECUTE, Watch.WRITE, Watch.ACCESS)
    most_hardware = 4
    caches_code = False

    def __init__(self, abilities: Abilities, known_flags: int) -> None:
        """`known_flags`: what KVM_SET_GUEST_DEBUG takes, as KVM_CAP_SET_GUEST_DEBUG2 says."""
        self.abilities = abilities
        self._block = known_flags & ioctls.KVM_GUESTDBG_BLOCKIRQ
        self._armed: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._numbers = {register.name: n for n, register in enumerate(self.registers)}

    # -- registers ----------------------------------------------------------------------------

    def read_registers(self, vcpu: Vcpu) -> list[int]:
        regs, sregs, fpu = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_fpu()
        values = {**regs, "eflags": regs["rflags"]}
        for name, value in sregs.items():
            if isinstance(value, int):
                values[name] = value
            else:
                values[name] = value.get("selector", 0)
                values[f"{name}_base"] = value["base"]
        values.update(_fpu_values(fpu))
        return [values[name] & ((1 << bits) - 1) for name, bits in self.registers]

    def write_registers(self, vcpu: Vcpu, values: dict[int, int]) -> None:
        before = self.read_registers(vcpu)
        changed = {
            self.registers[number].name: value
            for number, value in values.items()
            if value != before[number]
        }
        general = {name: value for name, value in changed.items() if name in _GENERAL_WRITABLE}
        special = {name: value for name, value in changed.items() if name in _SPECIAL_WRITABLE}
        rest = changed.keys() - general.keys() - special.keys()
        fpu = {name: changed[name] for name in rest if name in _FPU_WRITABLE}
        if refused := sorted(rest - fpu.keys()):
            raise Unwritable(f"{refused[0]} can't be set: its descriptor would not follow")
        if special:
            nested = {name.removesuffix("_base"): {"base": value}
                      for name, value in special.items() if name.endswith("_base")}  # fmt: skip
            flat = {name: value for name, value in special.items() if not name.endswith("_base")}
            try:
                vcpu.update_sregs({**flat, **nested})
            except KvmError as error:
                raise Unwritable(f"KVM refuses {', '.join(special)}: {error}") from None
        if general:
            regs = vcpu.get_regs()
            regs.update({"rflags" if n == "eflags" else n: v for n, v in general.items()})
            vcpu.set_regs(regs)
        if fpu:
            vcpu.set_fpu(_with_fpu_values(vcpu.get_fpu(), fpu))

    def is_user_mode(self, vcpu: Vcpu) -> bool:
        sregs = vcpu.get_sregs()
        return cast("dict[str, int]", sregs["ss"])["dpl"] == 3 and bool(
            cast("int", sregs["cr0"]) & 1
        )

    # -- page tables --------------------------------------------------------------------------

    def walk(
        self, vcpu: Vcpu, address: int, read_entry: Callable[[int, int], bytes]
    ) -> tuple[int, int]:
        """SDM vol. 3, 4.5: four or five levels, pages of 4 KiB, 2 MiB and 1 GiB."""
        sregs = cast("dict[str, int]", vcpu.get_sregs())
        if not sregs["cr0"] & CR0_PG:
            return address & 0xFFFF_FFFF, 0x1000 - (address & 0xFFF)
        if not sregs["efer"] & EFER_LMA:
            raise NotMapped("the vCPU pages with 32-bit tables, which are not walked")
        levels = 5 if sregs["cr4"] & CR4_LA57 else 4
        top = 12 + 9 * levels - 1
        if address >> top not in (0, (1 << 64 - top) - 1):
            raise NotMapped(f"{address:#x} is no canonical address")
        table = sregs["cr3"] & _ADDRESS_BITS
        for level in range(levels, 0, -1):
            shift = 12 + 9 * (level - 1)
            at = table + 8 * (address >> shift & 511)
            entry = int.from_bytes(read_entry(at, 8), "little")
            if not entry & PRESENT:
                raise NotMapped(f"{address:#x} is not mapped (level {level} of the page tables)")
            if level == 1 or (level <= 3 and entry & LARGE):
                size = 1 << shift
                inside = address & (size - 1)
                # Bit 12 of a large page's entry is the PAT's.
                return (entry & _ADDRESS_BITS & -size) + inside, size - inside
            table = entry & _ADDRESS_BITS
        raise AssertionError("a walk ends at level 1")

    # -- breakpoints --------------------------------------------------------------------------

    def places(self, kind: Watch) -> range:
        return range(self.most_hardware)

    def arm(
        self,
        vcpu: Vcpu,
        *,
        step: bool,
        software: bool,
        hardware: Sequence[Hardware | None],
        peek: Callable[[int, int], bytes],
    ) -> None:
        control = 0
        addresses = [0, 0, 0, 0]
        dr7 = _DR7_FIXED
        for number, each in enumerate(hardware):
            if each is not None:
                control |= _WAYS["hardware"]
                addresses[number] = each.address
                field = _DR7_WATCH[each.kind] | _DR7_LENGTH[each.size] << 2
                dr7 |= 2 << 2 * number | field << 16 + 4 * number
        if step:
            control |= _WAYS["step"] | self._block
        if software:
            control |= _WAYS["software"]
        if control:
            control |= _ENABLE
        wanted = control, (*addresses, 0, 0, 0, dr7)
        if self._armed.get(vcpu.index, (0, ())) != wanted and (
            control or vcpu.index in self._armed
        ):
            vcpu.set_guest_debug(*wanted)
            self._armed[vcpu.index] = wanted

    def caught(self, vcpu: Vcpu, exit: DebugExit, hardware: Sequence[Hardware | None]) -> Caught:
        if exit.exception == _BREAKPOINT_VECTOR:
            return Caught(Cause.SOFTWARE, exit.pc)
        for number, each in enumerate(hardware):
            if each is not None and exit.dr6 & 1 << number:
                return Caught(Cause.HARDWARE, exit.pc, number)
        if exit.dr6 & _DR6_STEP:
            return Caught(Cause.STEP, exit.pc)
        return Caught(Cause.GUEST, exit.pc)

    def pass_on(self, vcpu: Vcpu, exit: DebugExit) -> None:
        breakpoint_ = exit.exception == _BREAKPOINT_VECTOR
        inject = ioctls.KVM_GUESTDBG_INJECT_BP if breakpoint_ else ioctls.KVM_GUESTDBG_INJECT_DB
        control, registers = self._armed.get(vcpu.index, (0, (0,) * 8))
        vcpu.set_guest_debug(control | _ENABLE | inject, registers)
        # The injection is done by that call; the flag would repeat it.
        self._armed[vcpu.index] = control | _ENABLE, registers


_GENERAL_WRITABLE = {*_GENERAL, "rip", "eflags"}
_SPECIAL_WRITABLE = {*_CONTROL, "fs_base", "gs_base"}
_FPU_WRITABLE = {
    "mxcsr", "fctrl", "fstat",
    *(f"st{number}" for number in range(8)), *(f"xmm{number}" for number in range(16)),
}  # fmt: skip


def _fpu_values(fpu: bytes) -> dict[str, int]:
    """The registers that struct kvm_fpu holds."""
    control, status, tags, opcode, instruction, operand = _FPU_CONTROL.unpack_from(
        fpu, _FPU_CONTROL_AT
    )
    # ftwx has a bit for each register that isn't empty; gdb's has two for each, 3 for empty.
    full = sum((0 if tags & 1 << number else 3) << 2 * number for number in range(8))
    values = {
        "fctrl": control, "fstat": status, "ftag": full, "fop": opcode,
        "fioff": instruction & 0xFFFF_FFFF, "fiseg": instruction >> 32,
        "fooff": operand & 0xFFFF_FFFF, "foseg": operand >> 32,
        "mxcsr": int.from_bytes(fpu[_MXCSR_AT : _MXCSR_AT + 4], "little"),
    }  # fmt: skip
    for number in range(8):
        values[f"st{number}"] = int.from_bytes(fpu[16 * number : 16 * number + 10], "little")
    for number in range(16):
        at = _XMM_AT + 16 * number
        values[f"xmm{number}"] = int.from_bytes(fpu[at : at + 16], "little")
    return values


def _with_fpu_values(fpu: bytes, values: dict[str, int]) -> bytes:
    """struct kvm_fpu with some registers replaced."""
    changed = bytearray(fpu)
    places = {"fctrl": (_FPU_CONTROL_AT, 2), "fstat": (_FPU_CONTROL_AT + 2, 2),
              "mxcsr": (_MXCSR_AT, 4)}  # fmt: skip
    places |= {f"st{number}": (16 * number, 10) for number in range(8)}
    places |= {f"xmm{number}": (_XMM_AT + 16 * number, 16) for number in range(16)}
    for name, value in values.items():
        at, size = places[name]
        changed[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(changed)


# -- what this host's KVM can do -------------------------------------------------------------------


def x86_debug(system: System) -> X86Debug:
    """Tries out steps and breakpoints with a micro-guest each. Raises KvmError, HostError."""
    flags = system.check_extension(common.KVM_CAP_SET_GUEST_DEBUG2)
    tried = []
    for way in _WAYS:
        tried += [_works(system, way, "kernel"), _works(system, way, "user")]
    return X86Debug(Abilities(*tried), flags)


def _works(system: System, way: str, mode: Mode) -> bool:
    """Whether KVM_RUN comes back with that way's exit, at the right instruction."""
    from vmm.arch.x86_64 import layout
    from vmm.arch.x86_64.micro_guest import OUT_DONE, MicroGuest

    start = layout.PAYLOAD_GPA
    at = start + 1
    dr7 = _DR7_FIXED | 2
    code = b"\x90\x90"
    if way == "software":
        code = b"\x90\xcc"
    elif way == "watch":
        code = b"\x48\x89\x35\xf9\x0f\0\0\x90"  # mov [rip + 0xff9], rsi: 4 KiB from the start
        at = start + 7  # a data breakpoint comes after its instruction
        dr7 |= _DR7_WATCH[Watch.WRITE] << 16 | _DR7_LENGTH[8] << 18
    watched = start + 0x1000 if way == "watch" else at
    debug_registers = (watched, 0, 0, 0, 0, 0, 0, dr7)
    with MicroGuest(system, code + OUT_DONE, mode) as guest:
        try:
            guest.vcpu.set_guest_debug(_ENABLE | _WAYS[way], debug_registers)
            exit: Exit = guest.run()
        except KvmError:
            return False
        return isinstance(exit, DebugExit) and exit.pc == at
