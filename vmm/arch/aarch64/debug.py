"""arm64 for a debugger: registers as gdb numbers them, the guest's page tables, KVM's breakpoints.

Registers are named and numbered by gdb's standard features org.gnu.gdb.aarch64.core and .fpu (gdb
manual, "AArch64 Features"); system registers are a feature of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from kvm_bindings import KvmError
from kvm_bindings import ioctls as common
from kvm_bindings.aarch64 import System, Vcpu, ioctls
from kvm_bindings.aarch64.registers import (
    CORE_REGISTERS,
    EL1_REGISTERS,
    SYSTEM_REGISTERS,
    VECTOR_REGISTERS,
)
from kvm_bindings.exits import ArmDebugExit, Exit
from vmm.arch.aarch64 import stage1
from vmm.arch.debug import Abilities, Caught, Cause, Hardware, Register, Unwritable, Watch
from vmm.core.errors import HostError
from vmm.core.ranges import PAGE_SIZE

_GENERAL = tuple(f"x{number}" for number in range(31))
_SYSTEM = tuple(SYSTEM_REGISTERS)

_PROGRAM = {
    **{name: CORE_REGISTERS[name] for name in _GENERAL},
    "sp_el0": CORE_REGISTERS["sp"],
    "pc": CORE_REGISTERS["pc"],
    "cpsr": CORE_REGISTERS["pstate"],
    **EL1_REGISTERS,
}
_IDS = {
    **_PROGRAM,
    **VECTOR_REGISTERS,
    **{name.lower(): register for name, register in SYSTEM_REGISTERS.items()},
}
"""KVM's ids by gdb's names; `sp` is one of two of them."""

# PSTATE as SPSR_ELx has it (Arm ARM C5.2, SPSR_EL1).
_MODE, _AARCH32 = 0xF, 1 << 4
_EL0, _EL1_OWN_STACK = 0b0000, 0b0101  # EL0t, EL1h
_FLAGS_KEPT = (
    0xF << 28 | 1 << 24 | 1 << 22
)  # NZCV, DIT, PAN: as they were in an exception's handler
_MASKED = 0xF << 6  # D, A, I, F
_IRQ, _MASKS = 1 << 7, 0b11 << 6  # I; I and F
_PAN, _SSBS = 1 << 22, 1 << 12
_KEEPS_PAN, _SETS_SSBS = 1 << 23, 1 << 44  # SCTLR_EL1.SPAN and .DSSBS

# Exception classes (ESR_EL2.EC), of exceptions from the guest.
_BREAKPOINT, _STEP, _WATCHPOINT, _BRK = 0x30, 0x32, 0x34, 0x3C
_BKPT32 = 0x38

# DBGBCR<n>_EL1 and DBGWCR<n>_EL1 (Arm ARM D19.3): on, in EL1 and EL0, for these bytes.
_ON = 1 << 0 | 0b11 << 1
_WHOLE_INSTRUCTION = 0xF << 5
_ACCESSES = {Watch.READ: 1 << 3, Watch.WRITE: 2 << 3, Watch.ACCESS: 3 << 3}
_UNTAGGED = (1 << 56) - 1

_LEFT_IN_X2 = 0x5678  # by machine_code.BREAKPOINTS

_ENABLE = common.KVM_GUESTDBG_ENABLE
_Pairs = tuple[tuple[int, int], ...]

_FLAGS = {
    "SP": (0, 0), "EL": (2, 3), "nRW": (4, 4), "F": (6, 6), "I": (7, 7), "A": (8, 8), "D": (9, 9),
    "BTYPE": (10, 11), "SSBS": (12, 12), "IL": (20, 20), "SS": (21, 21), "PAN": (22, 22),
    "UAO": (23, 23), "DIT": (24, 24), "TCO": (25, 25), "V": (28, 28), "C": (29, 29), "Z": (30, 30),
    "N": (31, 31),
}  # fmt: skip
_VECTORS = (
    '<vector id="v2d" type="ieee_double" count="2"/><vector id="v2u" type="uint64" count="2"/>'
    '<vector id="v4f" type="ieee_single" count="4"/><vector id="v4u" type="uint32" count="4"/>'
    '<vector id="v8u" type="uint16" count="8"/><vector id="v16u" type="uint8" count="16"/>'
    '<union id="vector128"><field name="v2_double" type="v2d"/><field name="v2_int64" type="v2u"/>'
    '<field name="v4_float" type="v4f"/><field name="v4_int32" type="v4u"/>'
    '<field name="v8_int16" type="v8u"/><field name="v16_int8" type="v16u"/>'
    '<field name="uint128" type="uint128"/></union>'
)


def _description() -> tuple[str, list[Register]]:
    """The target description, and the same as a list."""
    registers: list[Register] = []
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>aarch64</architecture>",
    ]

    def feature(name: str, types: str, *groups: tuple[Sequence[str], int, str]) -> None:
        group = ' group="system"' if name.startswith("org.pyvmm") else ""
        lines.append(f'<feature name="{name}">{types}')
        for names, bits, kind in groups:
            for each in names:
                lines.append(f'<reg name="{each}" bitsize="{bits}" type="{kind}"{group}/>')
                registers.append(Register(each, bits))
        lines.append("</feature>")

    fields = "".join(
        f'<field name="{name}" start="{first}" end="{last}"/>'
        for name, (first, last) in _FLAGS.items()
    )
    feature(
        "org.gnu.gdb.aarch64.core",
        f'<flags id="cpsr_flags" size="4">{fields}</flags>',
        (_GENERAL, 64, "int64"),
        (("sp",), 64, "data_ptr"),
        (("pc",), 64, "code_ptr"),
        (("cpsr",), 32, "cpsr_flags"),
    )
    feature(
        "org.gnu.gdb.aarch64.fpu",
        _VECTORS,
        ([f"v{number}" for number in range(32)], 128, "vector128"),
        (("fpsr", "fpcr"), 32, "int"),
    )
    feature(
        "org.pyvmm.aarch64.system",
        "",
        (("sp_el0", "sp_el1"), 64, "data_ptr"),
        (("elr_el1",), 64, "code_ptr"),
        (("spsr_el1", *(name.lower() for name in _SYSTEM)), 64, "int64"),
    )
    lines.append("</target>")
    return "\n".join(lines), registers


class Arm64Debug:
    """See vmm.arch.debug.GuestDebug. Knows KVM through the vCPUs that it is given."""

    description: str
    registers: Sequence[Register]
    description, registers = _description()
    breakpoint_instruction = b"\x00\x00\x20\xd4"  # brk #0
    watches: Container[Watch] = frozenset(Watch)
    caches_code = True

    def __init__(self, abilities: Abilities, breakpoints: int, watchpoints: int) -> None:
        """The numbers are KVM_CAP_GUEST_DEBUG_HW_BPS and _WPS."""
        self.abilities = abilities
        self.most_hardware = breakpoints + watchpoints
        self._breakpoints = breakpoints
        self._armed: dict[int, tuple[int, _Pairs, _Pairs]] = {}
        self._held: dict[int, tuple[int, int]] = {}
        """vCPUs whose interrupts are held off: program counter and state of before."""

    # -- registers ----------------------------------------------------------------------------

    def read_registers(self, vcpu: Vcpu) -> list[int]:
        self._let_interrupts(vcpu)
        values = {name: vcpu.get_one_reg(register) for name, register in _IDS.items()}
        values["sp"] = values[_stack(values["cpsr"])]
        return [values[name] & ((1 << bits) - 1) for name, bits in self.registers]

    def write_registers(self, vcpu: Vcpu, values: dict[int, int]) -> None:
        before = self.read_registers(vcpu)
        changed = {
            self.registers[number].name: value
            for number, value in values.items()
            if value != before[number]
        }
        if "sp" in changed:
            state = changed.get("cpsr", vcpu.get_one_reg(CORE_REGISTERS["pstate"]))
            changed.setdefault(_stack(state), changed.pop("sp"))
        done: list[tuple[int, int]] = []
        for name, value in changed.items():
            register = _IDS[name]
            try:
                old = vcpu.get_one_reg(register)
                vcpu.set_one_reg(register, value)
            except KvmError as error:
                for each, was in reversed(done):
                    vcpu.set_one_reg(each, was)
                raise Unwritable(f"KVM refuses {name} = {value:#x}: {error}") from None
            done.append((register, old))

    def is_user_mode(self, vcpu: Vcpu) -> bool:
        return _mode(vcpu.get_one_reg(CORE_REGISTERS["pstate"])) == _EL0

    # -- page tables --------------------------------------------------------------------------

    def walk(
        self, vcpu: Vcpu, address: int, read_entry: Callable[[int, int], bytes]
    ) -> tuple[int, int]:
        names = ("SCTLR_EL1", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1")
        regime = stage1.Regime(*(vcpu.get_one_reg(SYSTEM_REGISTERS[name]) for name in names))
        return stage1.walk(regime, address, read_entry)

    # -- breakpoints --------------------------------------------------------------------------

    def places(self, kind: Watch) -> range:
        if kind is Watch.EXECUTE:
            return range(self._breakpoints)
        return range(self._breakpoints, self.most_hardware)

    def arm(
        self,
        vcpu: Vcpu,
        *,
        step: bool,
        software: bool,
        hardware: Sequence[Hardware | None],
        peek: Callable[[int, int], bytes],
    ) -> None:
        self._let_interrupts(vcpu)
        if step:
            self._hold_interrupts(vcpu, peek)
        pairs = tuple(_registers_of(each) for each in hardware)
        control = 0
        if any(each is not None for each in hardware):
            control |= ioctls.KVM_GUESTDBG_USE_HW
        if step:
            control |= common.KVM_GUESTDBG_SINGLESTEP
        if software:
            control |= ioctls.KVM_GUESTDBG_USE_SW_BP
        if control:
            control |= _ENABLE
        wanted = control, pairs[: self._breakpoints], pairs[self._breakpoints :]
        if self._armed.get(vcpu.index, (0, (), ())) != wanted and (
            control or vcpu.index in self._armed
        ):
            vcpu.set_guest_debug(*wanted)
            self._armed[vcpu.index] = wanted

    def _hold_interrupts(self, vcpu: Vcpu, peek: Callable[[int, int], bytes]) -> None:
        """KVM has no way to for a step, and the timer's interrupt is nearly always due when a guest
        has stood still: each step would end in its handler. So the step is made with interrupts
        masked, unless its instruction could find that out, or can't be read."""
        state = vcpu.get_one_reg(CORE_REGISTERS["pstate"])
        if state & (_AARCH32 | _IRQ):
            return
        pc = vcpu.get_one_reg(CORE_REGISTERS["pc"])
        instruction = peek(pc, 4)
        if len(instruction) < 4 or _sees_masks(int.from_bytes(instruction, "little")):
            return
        vcpu.set_one_reg(CORE_REGISTERS["pstate"], state | _MASKS)
        self._held[vcpu.index] = pc, state

    def _let_interrupts(self, vcpu: Vcpu) -> None:
        """The end of `_hold_interrupts`, whether the step has been made or not."""
        held = self._held.pop(vcpu.index, None)
        if held is None:
            return
        get, put = vcpu.get_one_reg, vcpu.set_one_reg
        pc, before = held
        state = get(CORE_REGISTERS["pstate"])
        # It may have been an exception, whose handler masks them and returns to what was before.
        vector = get(SYSTEM_REGISTERS["VBAR_EL1"]) + _vector(before)
        is_entered = get(CORE_REGISTERS["pc"]) == vector and state & _MASKED == _MASKED
        if is_entered and get(EL1_REGISTERS["elr_el1"]) in (pc, pc + 4):
            saved = get(EL1_REGISTERS["spsr_el1"])
            put(EL1_REGISTERS["spsr_el1"], saved & ~_MASKS | before & _MASKS)
        else:
            put(CORE_REGISTERS["pstate"], state & ~_MASKS | before & _MASKS)

    def caught(self, vcpu: Vcpu, exit: ArmDebugExit, hardware: Sequence[Hardware | None]) -> Caught:
        self._let_interrupts(vcpu)
        pc = vcpu.get_one_reg(CORE_REGISTERS["pc"])
        kind = exit.syndrome >> 26 & 0x3F
        if kind == _STEP:
            return Caught(Cause.STEP, pc)
        if kind == _BRK:
            return Caught(Cause.SOFTWARE, pc)
        number = None
        if kind == _BREAKPOINT:
            number = next((n for n, each in self._set(hardware, Watch.EXECUTE)
                           if each.address == pc), None)  # fmt: skip
        elif kind == _WATCHPOINT:
            number = self._nearest(exit.far, hardware)
        if number is None:
            return Caught(Cause.GUEST, pc)
        return Caught(Cause.HARDWARE, pc, number)

    def _set(self, hardware: Sequence[Hardware | None], kind: Watch) -> list[tuple[int, Hardware]]:
        """The breakpoints in the registers for that kind, with their numbers."""
        found = ((number, hardware[number]) for number in self.places(kind))
        return [(number, each) for number, each in found if each is not None]

    def _nearest(self, far: int, hardware: Sequence[Hardware | None]) -> int | None:
        """The watchpoint that an access to `far` has met. The access may begin before what is
        watched, or have no more than its block named (Arm ARM D2.10.5)."""

        def distance(each: Hardware) -> int:
            start = each.address & _UNTAGGED
            at = far & _UNTAGGED
            return max(start - at, at - (start + each.size - 1), 0)

        watched = self._set(hardware, Watch.ACCESS)
        return min(watched, key=lambda each: distance(each[1]))[0] if watched else None

    def pass_on(self, vcpu: Vcpu, exit: ArmDebugExit) -> None:
        """KVM has no way to, so that this takes the exception to EL1 as the processor would (Arm
        ARM D1.3.2, AArch64.TakeException).

        Breakpoint instructions alone are the guest's: while KVM has its debug registers for us, no
        other debug exception of its own can happen, and what is left are ours that are no more.
        """
        if exit.syndrome >> 26 & 0x3F not in (_BRK, _BKPT32):
            return
        get, put, system = vcpu.get_one_reg, vcpu.set_one_reg, SYSTEM_REGISTERS
        pc, state = get(CORE_REGISTERS["pc"]), get(CORE_REGISTERS["pstate"])
        sctlr = get(system["SCTLR_EL1"])
        entered = state & _FLAGS_KEPT | _MASKED | _EL1_OWN_STACK
        if not sctlr & _KEEPS_PAN:
            entered |= _PAN
        if sctlr & _SETS_SSBS:
            entered |= _SSBS
        put(system["ESR_EL1"], exit.syndrome)
        put(EL1_REGISTERS["elr_el1"], pc)
        put(EL1_REGISTERS["spsr_el1"], state)
        put(CORE_REGISTERS["pc"], get(system["VBAR_EL1"]) + _vector(state))
        put(CORE_REGISTERS["pstate"], entered)


def _mode(state: int) -> int:
    """EL and stack pointer; those of AArch32's user mode are EL0t's."""
    return state & _MODE


def _stack(state: int) -> str:
    """Whose register `sp` is."""
    return "sp_el1" if _mode(state) == _EL1_OWN_STACK else "sp_el0"


def _vector(state: int) -> int:
    """Of a synchronous exception taken to EL1 from there (Arm ARM D1.3.1, table of vectors)."""
    if _mode(state) == _EL0:
        return 0x600 if state & _AARCH32 else 0x400
    return 0x200 if _mode(state) == _EL1_OWN_STACK else 0x000


def _sees_masks(instruction: int) -> bool:
    """Whether it reads or writes PSTATE's masks of interrupts (Arm ARM C6.2: MSR of DAIFSet,
    DAIFClr and DAIF, MRS of DAIF, the three kinds of ERET)."""
    return (
        instruction & 0xFFFF_F0DF == 0xD503_40DF
        or instruction & 0xFFDF_FFE0 == 0xD51B_4220
        or instruction in (0xD69F_03E0, 0xD69F_0BFF, 0xD69F_0FFF)
    )


def _registers_of(each: Hardware | None) -> tuple[int, int]:
    """A control register and a value register."""
    if each is None:
        return 0, 0
    if each.kind is Watch.EXECUTE:
        return _ON | _WHOLE_INSTRUCTION, each.address
    offset = each.address % 8
    return _ON | _ACCESSES[each.kind] | ((1 << each.size) - 1 << offset) << 5, each.address - offset


# -- what this host's KVM can do -------------------------------------------------------------------


def arm64_debug(system: System, vm_type: int = 0) -> Arm64Debug:
    """Tries out steps and breakpoints with a micro-guest of that type in either mode. Raises
    KvmError, HostError."""
    breakpoints = system.check_extension(ioctls.KVM_CAP_GUEST_DEBUG_HW_BPS)
    watchpoints = system.check_extension(ioctls.KVM_CAP_GUEST_DEBUG_HW_WPS)
    tried = [
        _works(system, vm_type, breakpoints, watchpoints, state) for state in (_EL1_OWN_STACK, _EL0)
    ]
    able = Abilities(*(works for pair in zip(*tried, strict=True) for works in pair))
    return Arm64Debug(able, breakpoints, watchpoints)


def _works(
    system: System, vm_type: int, breakpoints: int, watchpoints: int, state: int
) -> list[bool]:
    """Whether KVM_RUN comes back for a step, a breakpoint instruction, a hardware breakpoint and
    a watchpoint, each at the right instruction, in the mode that `state` is.

    Raises HostError where the registers that KVM shows are not the guest's.
    """
    from vmm.arch.aarch64.machine_code import BREAKPOINTS, assembled
    from vmm.arch.aarch64.micro_guest import CODE_GPA, MicroGuest
    from vmm.arch.aarch64.page_tables import SCTLR

    first, second, brk, store = range(CODE_GPA, CODE_GPA + 16, 4)
    data = CODE_GPA + PAGE_SIZE
    debug = Arm64Debug(Abilities(*[True] * 8), breakpoints, watchpoints)
    nothing: list[Hardware | None] = [None] * debug.most_hardware
    registers = {"x0": data, "pstate": _MASKED | state}
    code = assembled(BREAKPOINTS)
    with MicroGuest(system, code, registers=registers, vm_type=vm_type) as guest:
        vcpu = guest.vcpu
        if state == _EL0:  # no page table has to let it in where there is none
            vcpu.set_one_reg(SYSTEM_REGISTERS["SCTLR_EL1"], SCTLR & ~stage1.MMU_ON)

        def meets(cause: Cause, start: int, end: int, hardware: Hardware | None = None) -> bool:
            """From one instruction to the other."""
            armed = list(nothing)
            if hardware is not None:
                places = debug.places(hardware.kind)
                if not places:
                    return False
                armed[places[0]] = hardware
            vcpu.set_one_reg(CORE_REGISTERS["pc"], start)
            try:
                debug.arm(
                    vcpu,
                    step=cause is Cause.STEP,
                    software=cause is Cause.SOFTWARE,
                    hardware=armed,
                    peek=lambda address, size: b"",
                )
                exit: Exit = guest.run()
            except KvmError:
                return False
            if not isinstance(exit, ArmDebugExit):
                return False
            return debug.caught(vcpu, exit, armed)[:2] == (cause, end)

        steps = meets(Cause.STEP, first, second)
        software = meets(Cause.SOFTWARE, first, brk)
        if (steps or software) and vcpu.get_one_reg(CORE_REGISTERS["x2"]) != _LEFT_IN_X2:
            raise HostError(
                "--gdb: this host's KVM keeps such a guest's registers to itself, and shows others "
                "instead; run without it"
            )
        return [
            steps,
            software,
            meets(Cause.HARDWARE, first, second, Hardware(Watch.EXECUTE, second, 1)),
            meets(Cause.HARDWARE, store, store, Hardware(Watch.WRITE, data, 8)),
        ]
