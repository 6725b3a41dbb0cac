"""arm64 for a debugger: the numbering of registers, what KVM is told, exits told apart."""

from __future__ import annotations

import errno
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import KvmError
from kvm_bindings import ioctls as common
from kvm_bindings.aarch64 import ioctls
from kvm_bindings.aarch64.registers import (
    CORE_REGISTERS,
    EL1_REGISTERS,
    KVM_REG_ARM64_SYSREG,
    SYSTEM_REGISTERS,
    VECTOR_REGISTERS,
)
from kvm_bindings.exits import ArmDebugExit, Exit, InterruptedExit
from vmm.arch.aarch64 import machine_code, micro_guest
from vmm.arch.aarch64.debug import Arm64Debug, arm64_debug
from vmm.arch.debug import Abilities, Caught, Cause, Hardware, NotMapped, Unwritable, Watch
from vmm.core.errors import HostError

NAMES = [register.name for register in Arm64Debug.registers]
IDS = {
    **CORE_REGISTERS,
    **EL1_REGISTERS,
    **VECTOR_REGISTERS,
    **SYSTEM_REGISTERS,
}
EL0, EL1_STACK_OF_EL0, EL1 = 0b0000, 0b0100, 0b0101
ENABLE = common.KVM_GUESTDBG_ENABLE
BREAKPOINTS, WATCHPOINTS = 3, 2
STEP, BREAKPOINT, WATCHPOINT, BRK = 0x32 << 26, 0x30 << 26, 0x34 << 26, 0x3C << 26
PREFIX = "aarch64-linux-gnu-"


class Registers:
    """Registers, and what it is told of debugging."""

    index = 0

    def __init__(self, **values: int) -> None:
        self.values = {register: number for number, register in enumerate(IDS.values())}
        self.values[CORE_REGISTERS["pstate"]] = EL1
        for name, value in values.items():
            self[name] = value
        self.refuses: set[int] = set()
        self.told: list[tuple[Any, ...]] = []

    def __getitem__(self, name: str) -> int:
        return self.values[IDS[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self.values[IDS[name]] = value

    def get_one_reg(self, register: int) -> int:
        return self.values[register]

    def set_one_reg(self, register: int, value: int) -> None:
        if register in self.refuses:
            raise KvmError("KVM_SET_ONE_REG", errno.EINVAL)
        self.values[register] = value

    def set_guest_debug(self, control: int, *registers: Any) -> None:
        self.told.append((control, *registers))


def debug() -> Arm64Debug:
    return Arm64Debug(Abilities(*[True] * 8), BREAKPOINTS, WATCHPOINTS)


def Vcpu(**values: int) -> Any:
    return Registers(**values)


def unreadable(address: int, size: int) -> bytes:
    return b""


# -- registers ------------------------------------------------------------------------------------


def test_description_names_all_registers_in_their_order_with_their_sizes() -> None:
    made = debug()
    tree = ET.fromstring(made.description)

    named = [(reg.get("name"), int(reg.get("bitsize", "0"))) for reg in tree.iter("reg")]

    assert named == [tuple(register) for register in made.registers]
    # gdb's own numbers (gdb/arch/aarch64.h).
    assert NAMES.index("x30") == 30 and NAMES[31:34] == ["sp", "pc", "cpsr"]
    assert (NAMES[34], NAMES[65], NAMES[66:68]) == ("v0", "v31", ["fpsr", "fpcr"])
    assert made.registers[33].bits == 32 and made.registers[34].bits == 128


def test_values_stand_under_their_names() -> None:
    vcpu = Vcpu(x7=0x77, pc=0x4000, v3=3 << 100, fpcr=5, TTBR1_EL1=0x1234, elr_el1=9, sp=6)

    values = dict(zip(NAMES, debug().read_registers(vcpu), strict=True))

    assert (values["x7"], values["pc"], values["cpsr"]) == (0x77, 0x4000, EL1)
    assert (values["v3"], values["fpcr"], values["ttbr1_el1"]) == (3 << 100, 5, 0x1234)
    assert (values["elr_el1"], values["sp_el0"]) == (9, 6)


@pytest.mark.parametrize(("state", "name"), [(EL0, "sp"), (EL1_STACK_OF_EL0, "sp"),
                                             (EL1, "sp_el1")])  # fmt: skip
def test_stack_pointer_is_the_one_in_use(state: int, name: str) -> None:
    vcpu, made = Vcpu(pstate=state, sp=0x10, sp_el1=0x20), debug()

    values = dict(zip(NAMES, made.read_registers(vcpu), strict=True))
    made.write_registers(vcpu, {NAMES.index("sp"): 0x30})

    assert values["sp"] == {"sp": 0x10, "sp_el1": 0x20}[name]
    assert sorted((vcpu["sp"], vcpu["sp_el1"])) == sorted(
        [0x30, {"sp": 0x20, "sp_el1": 0x10}[name]]
    )
    assert vcpu[name] == 0x30


def test_stack_pointer_written_with_the_state_is_the_new_states() -> None:
    vcpu = Vcpu(pstate=EL1, sp=0x10, sp_el1=0x20)

    debug().write_registers(vcpu, {NAMES.index("sp"): 0x30, NAMES.index("cpsr"): EL0})

    assert (vcpu["sp"], vcpu["sp_el1"], vcpu["pstate"]) == (0x30, 0x20, EL0)


def test_all_kinds_of_registers_are_set() -> None:
    vcpu, made = Vcpu(), debug()
    wanted = {"x0": 1, "pc": 0x4000, "v31": 1 << 127, "fpsr": 7, "sctlr_el1": 8, "sp_el0": 9}

    made.write_registers(vcpu, {NAMES.index(name): value for name, value in wanted.items()})

    values = dict(zip(NAMES, made.read_registers(vcpu), strict=True))
    assert {name: values[name] for name in wanted} == wanted
    assert values["x1"] == 1 and values["v30"] == vcpu["v30"]


def test_value_that_kvm_refuses_is_a_sentence_and_the_others_stay_as_they_were() -> None:
    vcpu = Vcpu(x0=1, x1=2)
    vcpu.refuses.add(CORE_REGISTERS["pstate"])

    with pytest.raises(Unwritable, match="cpsr = 0x1f"):
        debug().write_registers(
            vcpu, {NAMES.index("x0"): 8, NAMES.index("x1"): 9, NAMES.index("cpsr"): 0x1F}
        )

    assert (vcpu["x0"], vcpu["x1"], vcpu["pstate"]) == (1, 2, EL1)


@pytest.mark.parametrize(("state", "is_user"), [(EL0, True), (1 << 4, True), (EL1, False),
                                                (EL1_STACK_OF_EL0, False)])  # fmt: skip
def test_user_mode_is_el0(state: int, is_user: bool) -> None:
    assert debug().is_user_mode(Vcpu(pstate=state | 0x3C0)) is is_user


def test_address_is_walked_by_the_vcpus_own_registers() -> None:
    vcpu = Vcpu(SCTLR_EL1=1, TCR_EL1=25 | 25 << 16 | 0b10 << 30, TTBR0_EL1=0x1000,
                TTBR1_EL1=0x2000)  # fmt: skip
    entries = {0x2000: 4 << 30 | 0b01}

    def read(gpa: int, size: int) -> bytes:
        return entries.get(gpa, 0).to_bytes(size, "little")

    assert debug().walk(vcpu, 0xFFFF_FF80_0000_0010, read)[0] == 4 << 30 | 0x10
    with pytest.raises(NotMapped):
        debug().walk(vcpu, 0x10, read)


@pytest.mark.parametrize("name", SYSTEM_REGISTERS)
def test_encoding_of_a_system_register_is_the_assemblers(name: str, tmp_path: Path) -> None:
    if shutil.which(f"{PREFIX}as") is None:
        pytest.skip("no arm64 assembler; install binutils-aarch64-linux-gnu")
    source, object_file, flat = (tmp_path / end for end in ("code.s", "code.o", "code.bin"))
    source.write_text(f"mrs x0, {name}\n")
    subprocess.run([f"{PREFIX}as", "-o", object_file, source], check=True)
    subprocess.run([f"{PREFIX}objcopy", "-O", "binary", object_file, flat], check=True)

    # MRS has op0's low bit, op1, CRn, CRm and op2 in bits 19:5, in the order of an id.
    word = int.from_bytes(flat.read_bytes(), "little")
    encoding = 1 << 15 | (word >> 5 & 0x7FFF)

    assert SYSTEM_REGISTERS[name] & 0xFFFF == encoding
    assert SYSTEM_REGISTERS[name] & 0xFFF_0000 == KVM_REG_ARM64_SYSREG


# -- breakpoints ----------------------------------------------------------------------------------


def test_nothing_is_asked_of_kvm_where_nothing_is_armed() -> None:
    vcpu = Vcpu()

    debug().arm(vcpu, step=False, software=False, hardware=[None] * 5, peek=unreadable)

    assert vcpu.told == []


def test_what_is_armed_is_told_once_and_taken_back() -> None:
    vcpu, made = Vcpu(), debug()
    nothing = ((0, 0),) * BREAKPOINTS, ((0, 0),) * WATCHPOINTS

    for _ in range(2):
        made.arm(vcpu, step=True, software=True, hardware=[None] * 5, peek=unreadable)
    for _ in range(2):
        made.arm(vcpu, step=False, software=False, hardware=[None] * 5, peek=unreadable)

    assert vcpu.told == [
        (ENABLE | common.KVM_GUESTDBG_SINGLESTEP | ioctls.KVM_GUESTDBG_USE_SW_BP, *nothing),
        (0, *nothing),
    ]


@pytest.mark.parametrize(
    ("kind", "address", "size", "control", "value"),
    [
        (Watch.EXECUTE, 0xFFFF_8000_0800_1234, 1, 0x1E7, 0xFFFF_8000_0800_1234),
        (Watch.WRITE, 0x1000, 8, 0x7 | 2 << 3 | 0xFF << 5, 0x1000),
        (Watch.READ, 0x1004, 4, 0x7 | 1 << 3 | 0xF0 << 5, 0x1000),
        (Watch.ACCESS, 0x1007, 1, 0x7 | 3 << 3 | 0x80 << 5, 0x1000),
        (Watch.WRITE, 0x1002, 2, 0x7 | 2 << 3 | 0x0C << 5, 0x1000),
    ],
)
def test_hardware_breakpoint_is_a_pair_of_registers_of_its_kind(
    kind: Watch, address: int, size: int, control: int, value: int
) -> None:
    vcpu, made = Vcpu(), debug()
    place = made.places(kind)[1]
    hardware: list[Hardware | None] = [None] * made.most_hardware
    hardware[place] = Hardware(kind, address, size)

    made.arm(vcpu, step=False, software=False, hardware=hardware, peek=unreadable)

    (told,) = vcpu.told
    assert told[0] == ENABLE | ioctls.KVM_GUESTDBG_USE_HW
    pair = (0, 0), (control, value)
    breakpoints, watchpoints = ((0, 0),) * BREAKPOINTS, ((0, 0),) * WATCHPOINTS
    if kind is Watch.EXECUTE:
        breakpoints = (*pair, (0, 0))
    else:
        watchpoints = pair
    assert told[1:] == (breakpoints, watchpoints)


def test_kinds_have_registers_of_their_own() -> None:
    made = debug()

    assert list(made.places(Watch.EXECUTE)) == [0, 1, 2]
    assert {tuple(made.places(kind)) for kind in (Watch.READ, Watch.WRITE, Watch.ACCESS)} == {
        (3, 4)
    }


@pytest.mark.parametrize(
    ("pc", "exit", "caught"),
    [
        (0x4008, ArmDebugExit(BRK, 0), Caught(Cause.SOFTWARE, 0x4008)),
        (0x4008, ArmDebugExit(STEP | 0x22, 0), Caught(Cause.STEP, 0x4008)),
        (0x4008, ArmDebugExit(BREAKPOINT | 0x22, 0), Caught(Cause.HARDWARE, 0x4008, 1)),
        (0x400C, ArmDebugExit(BREAKPOINT | 0x22, 0), Caught(Cause.GUEST, 0x400C)),
        (0x400C, ArmDebugExit(WATCHPOINT, 0x4008), Caught(Cause.GUEST, 0x400C)),
    ],
)
def test_exits_are_told_apart(pc: int, exit: ArmDebugExit, caught: Caught) -> None:
    hardware = [None, Hardware(Watch.EXECUTE, 0x4008, 1), None, None, None]

    assert debug().caught(Vcpu(pc=pc), exit, hardware) == caught


@pytest.mark.parametrize(
    ("far", "number"),
    [
        (0x2000, 3),
        (0x2003, 3),
        (0x1FF0, 3),  # a pair of registers stored from below
        (0x3007, 4),
        (0x5A00_0000_0000_2000, 3),  # by a tagged pointer
    ],
)
def test_watchpoint_is_the_one_that_the_access_is_nearest_to(far: int, number: int) -> None:
    hardware = [None, None, None, Hardware(Watch.WRITE, 0x2000, 4), Hardware(Watch.READ, 0x3000, 8)]

    caught = debug().caught(Vcpu(pc=0x4000), ArmDebugExit(WATCHPOINT, far), hardware)

    assert caught == Caught(Cause.HARDWARE, 0x4000, number)


# -- steps without interrupts ---------------------------------------------------------------------

IRQ, FIQ = 1 << 7, 1 << 6
NOP = 0xD503_201F


def stepped(vcpu: Any, instruction: int = NOP, **after: int) -> Arm64Debug:
    """A step is made of `vcpu`, whose registers come to be `after`, and has been told of."""
    made = debug()

    def peek(address: int, size: int) -> bytes:
        assert address == vcpu["pc"]
        return instruction.to_bytes(4, "little")[:size]

    made.arm(vcpu, step=True, software=False, hardware=[None] * 5, peek=peek)
    for name, value in after.items():
        vcpu[name] = value
    made.caught(vcpu, ArmDebugExit(STEP, 0), [None] * 5)
    return made


def masks(vcpu: Any) -> int:
    return int(vcpu["pstate"]) & (IRQ | FIQ)


@pytest.mark.parametrize("state", [EL0, EL1, EL1 | FIQ])
def test_step_is_made_with_interrupts_masked_and_they_are_as_before_after_it(state: int) -> None:
    vcpu, made = Vcpu(pc=0x4000, pstate=state), debug()
    step = NOP.to_bytes(4, "little")

    made.arm(vcpu, step=True, software=False, hardware=[None] * 5, peek=lambda *_: step)
    assert vcpu["pstate"] == state | IRQ | FIQ
    vcpu["pc"], vcpu["pstate"] = 0x4004, vcpu["pstate"] | NZCV
    made.caught(vcpu, ArmDebugExit(STEP, 0), [None] * 5)

    assert vcpu["pstate"] == state | NZCV


@pytest.mark.parametrize("state", [EL1 | IRQ, 1 << 4], ids=["masked already", "AArch32"])
def test_state_is_left_alone_where_nothing_is_to_mask(state: int) -> None:
    vcpu = Vcpu(pstate=state)

    debug().arm(vcpu, step=True, software=False, hardware=[None] * 5, peek=lambda *_: bytes(4))

    assert vcpu["pstate"] == state


def test_step_of_code_that_cannot_be_read_takes_interrupts() -> None:
    vcpu = Vcpu()

    debug().arm(vcpu, step=True, software=False, hardware=[None] * 5, peek=unreadable)

    assert masks(vcpu) == 0


@pytest.mark.parametrize(
    "instruction",
    [
        pytest.param(0xD50342DF, id="msr daifset, #2"),
        pytest.param(0xD5034FFF, id="msr daifclr, #15"),
        pytest.param(0xD53B4223, id="mrs x3, daif"),
        pytest.param(0xD51B423E, id="msr daif, x30"),
        pytest.param(0xD69F03E0, id="eret"),
        pytest.param(0xD69F0BFF, id="eretaa"),
        pytest.param(0xD69F0FFF, id="eretab"),
    ],
)
def test_instruction_that_could_find_out_is_stepped_as_it_is(instruction: int) -> None:
    vcpu = Vcpu()

    stepped(vcpu, instruction, pstate=EL1 | IRQ)

    assert masks(vcpu) == IRQ, "it may have masked them itself"


@pytest.mark.parametrize(
    "instruction", [0xD503233F, 0xD5384100, 0xD51B4201, 0xD50041BF, 0xAA1E03E9]
)
def test_other_instructions_are_stepped_without_interrupts(instruction: int) -> None:
    vcpu, made = Vcpu(), debug()
    step = instruction.to_bytes(4, "little")

    made.arm(vcpu, step=True, software=False, hardware=[None] * 5, peek=lambda *_: step)

    assert masks(vcpu) == IRQ | FIQ


@pytest.mark.parametrize("back", [0x4000, 0x4004], ids=["fault", "system call"])
def test_step_into_an_exception_gives_its_handler_what_was_before(back: int) -> None:
    """Else the guest would go on without interrupts for ever."""
    vcpu = Vcpu(pc=0x4000, pstate=EL0, VBAR_EL1=0x8_0800)

    stepped(vcpu, pc=0x8_0C00, pstate=EL1 | DAIF, elr_el1=back, spsr_el1=EL0 | NZCV | IRQ | FIQ)

    assert vcpu["spsr_el1"] == EL0 | NZCV
    assert vcpu["pstate"] == EL1 | DAIF


def test_step_that_was_not_made_leaves_no_mask() -> None:
    vcpu, made = Vcpu(pc=0x4000), debug()
    step = NOP.to_bytes(4, "little")
    made.arm(vcpu, step=True, software=False, hardware=[None] * 5, peek=lambda *_: step)

    values = dict(zip(NAMES, made.read_registers(vcpu), strict=True))
    made.arm(vcpu, step=False, software=False, hardware=[None] * 5, peek=unreadable)

    assert values["cpsr"] == EL1
    assert masks(vcpu) == 0


# -- what is the guest's own ----------------------------------------------------------------------

SPAN, DSSBS = 1 << 23, 1 << 44
PAN, SSBS, NZCV, DIT, DAIF, BTYPE, SS = (
    1 << 22, 1 << 12, 0xF << 28, 1 << 24, 0xF << 6, 3 << 10, 1 << 21,
)  # fmt: skip


@pytest.mark.parametrize(
    ("state", "vector"),
    [(EL0, 0x400), (1 << 4, 0x600), (EL1_STACK_OF_EL0, 0x000), (EL1, 0x200)],
)
def test_breakpoint_instruction_of_the_guests_own_is_taken_as_the_processor_would(
    state: int, vector: int
) -> None:
    before = state | NZCV | DIT | BTYPE | SS | SSBS
    vcpu = Vcpu(pc=0x4008, pstate=before, VBAR_EL1=0x8_0800, SCTLR_EL1=SPAN)

    debug().pass_on(vcpu, ArmDebugExit(BRK | 1 << 25 | 0x800, 0))

    assert (vcpu["ESR_EL1"], vcpu["elr_el1"]) == (BRK | 1 << 25 | 0x800, 0x4008)
    assert vcpu["spsr_el1"] == before
    assert vcpu["pc"] == 0x8_0800 + vector
    assert vcpu["pstate"] == NZCV | DIT | DAIF | EL1


@pytest.mark.parametrize(
    ("before", "sctlr", "after"),
    [(0, 0, PAN), (PAN, SPAN, PAN), (0, SPAN, 0), (0, SPAN | DSSBS, SSBS)],
)
def test_guests_handler_starts_with_the_protections_that_it_has_set(
    before: int, sctlr: int, after: int
) -> None:
    vcpu = Vcpu(pstate=EL0 | before, SCTLR_EL1=sctlr)

    debug().pass_on(vcpu, ArmDebugExit(BRK, 0))

    assert vcpu["pstate"] == DAIF | EL1 | after


@pytest.mark.parametrize("kind", [STEP, BREAKPOINT, WATCHPOINT])
def test_breakpoint_that_is_no_more_is_none_of_the_guests(kind: int) -> None:
    vcpu = Vcpu()
    before = dict(vcpu.values)

    debug().pass_on(vcpu, ArmDebugExit(kind, 0))

    assert vcpu.values == before


# -- what this host's KVM can do ------------------------------------------------------------------


class TriedVcpu(Registers):
    """Runs machine_code.BREAKPOINTS as far as `told` lets it."""

    lacks: set[str] = set()
    hides = False

    def run(self) -> Exit:
        control, breakpoints, watchpoints = self.told[-1]
        at = self["pc"] - micro_guest.CODE_GPA
        if control & common.KVM_GUESTDBG_SINGLESTEP and "step" not in self.lacks:
            return self._stop(4, STEP)
        if any(pair[0] for pair in breakpoints) and "hardware" not in self.lacks:
            return self._stop(4, BREAKPOINT)
        if at == 12:
            if any(pair[0] for pair in watchpoints) and "watch" not in self.lacks:
                return self._stop(12, WATCHPOINT, watchpoints[0][1])
            return InterruptedExit(errno.EINTR)
        if "software" in self.lacks:
            return InterruptedExit(errno.EINTR)
        return self._stop(8, BRK)

    def _stop(self, at: int, syndrome: int, far: int = 0) -> ArmDebugExit:
        self["pc"] = micro_guest.CODE_GPA + at
        self["x2"] = 0 if self.hides else 0x5678
        return ArmDebugExit(syndrome, far)


class TriedGuest:
    """Stands for vmm.arch.aarch64.micro_guest.MicroGuest."""

    made: list[TriedGuest] = []

    def __init__(self, system: Any, code: bytes, *, registers: Any, vm_type: int) -> None:
        assert code == machine_code.assembled(machine_code.BREAKPOINTS)
        self.vm_type = vm_type
        self.vcpu = TriedVcpu(**registers)
        self.made.append(self)

    def run(self) -> Exit:
        return self.vcpu.run()

    def __enter__(self) -> TriedGuest:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class TriedSystem:
    def check_extension(self, capability: int) -> int:
        return {119: BREAKPOINTS, 120: WATCHPOINTS}[capability]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> type[TriedVcpu]:
    monkeypatch.setattr(micro_guest, "MicroGuest", TriedGuest)
    monkeypatch.setattr(TriedVcpu, "lacks", set())
    monkeypatch.setattr(TriedVcpu, "hides", False)
    monkeypatch.setattr(TriedGuest, "made", [])
    return TriedVcpu


def test_all_ways_are_tried_in_both_modes(tried: type[TriedVcpu]) -> None:
    system: Any = TriedSystem()

    made = arm64_debug(system, 1 << 31)

    assert made.abilities == Abilities(*[True] * 8)
    assert made.most_hardware == BREAKPOINTS + WATCHPOINTS
    assert [guest.vm_type for guest in TriedGuest.made] == [1 << 31] * 2
    assert [guest.vcpu["pstate"] & 0xF for guest in TriedGuest.made] == [EL1, EL0]
    assert TriedGuest.made[1].vcpu["SCTLR_EL1"] & 1 == 0


@pytest.mark.parametrize(
    ("way", "words"),
    [("step", "single steps"), ("software", "software breakpoints"),
     ("hardware", "hardware breakpoints"), ("watch", "watchpoints")],
)  # fmt: skip
def test_way_that_kvm_lacks_is_said(tried: type[TriedVcpu], way: str, words: str) -> None:
    tried.lacks = {way}
    system: Any = TriedSystem()

    lacking = arm64_debug(system).abilities.lacking()

    assert lacking == f"{words} in kernel mode or user mode"


def test_registers_that_kvm_hides_are_not_shown_as_zeros(tried: type[TriedVcpu]) -> None:
    tried.hides = True
    system: Any = TriedSystem()

    with pytest.raises(HostError, match="registers to itself"):
        arm64_debug(system, 1 << 31)


def test_processor_without_watchpoints_lacks_them(
    tried: type[TriedVcpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TriedSystem, "check_extension", lambda _, number: number == 119)
    system: Any = TriedSystem()

    assert arm64_debug(system).abilities.lacking() == "watchpoints in kernel mode or user mode"
