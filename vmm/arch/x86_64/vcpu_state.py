"""A vCPU's state, and the state that KVM keeps of a PC's chips, taken out and put back.

The order in which things are put back matters: CPUID (made with the vCPU) says what registers
there are, the APIC base which of the APIC's registers, the APIC's timer mode whether its deadline
(an MSR) means anything.
Source: Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import time

from kvm_bindings import KvmError
from kvm_bindings.x86_64 import Vcpu, Vm, ioctls
from vmm.core.lean_typing import TYPE_CHECKING, Any
from vmm.core.saved import NotSaved, Saved, State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_U64 = (1 << 64) - 1
_MOST_MSRS = 4096
_LARGEST_XSAVE = 1 << 20
_MOST_SECONDS = 10 * 365 * 86400
"""How long a guest's clocks are put forward at most."""

MSR_TSC = 0x10
_MSRS_LAST = (0x6E0,)  # IA32_TSC_DEADLINE: it starts the timer
_WALL_CLOCKS = (0x11, 0x4B56_4D00)
"""MSR_KVM_WALL_CLOCK: a write has KVM write the time of the machine's start into guest memory."""
_NOT_LISTED = (
    *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF, *range(0x400, 0x480),
)  # fmt: skip
"""MTRRs and machine check banks, which are state, too, and which KVM's list leaves out."""
_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)
_NEEDED = (
    (ioctls.KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    (ioctls.KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    (ioctls.KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    (ioctls.KVM_CAP_XCRS, "KVM_CAP_XCRS"),
    (ioctls.KVM_CAP_PIT_STATE2, "KVM_CAP_PIT_STATE2"),
    (ioctls.KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK"),
)


class ChipState:
    """Saves and restores what KVM keeps of one VM: its vCPUs, interrupt controllers and clocks.

    On one thread, while no vCPU is in the guest or has an exit to complete.
    """

    def __init__(self, vm: Vm, vcpus: Sequence[Vcpu], msr_indices: Callable[[], list[int]]) -> None:
        """`msr_indices` says which MSRs are to be kept."""
        self._vm = vm
        self._vcpus = vcpus
        self._listed = msr_indices

    def state(self) -> State:
        """Raises NotSaved where this KVM can't give all of it; KvmError."""
        for capability, name in _NEEDED:
            if not self._vm.check_extension(capability):
                raise NotSaved(f"this host's KVM can't save a guest: it has no {name}")
        indices = self._msr_indices()
        # The clocks close to one another, so that they agree about the time.
        return {
            "realtime_ns": time.time_ns(),
            "kvmclock_ns": self._vm.get_clock(),
            "vcpus": [self._vcpu(vcpu, indices) for vcpu in self._vcpus],
            "irqchips": [self._vm.get_irqchip(n).hex() for n in range(ioctls.KVM_IRQCHIPS)],
            "pit": self._vm.get_pit2().hex(),
        }

    def _msr_indices(self) -> list[int]:
        listed = self._listed()
        return [*listed, *(index for index in _NOT_LISTED if index not in listed)]

    def _vcpu(self, vcpu: Vcpu, indices: list[int]) -> State:
        has_sregs2 = bool(self._vm.check_extension(ioctls.KVM_CAP_SREGS2))
        msrs = vcpu.get_msrs(indices)
        return {
            "tsc_khz": vcpu.tsc_khz(),
            "msrs": [[index, value] for index, value in msrs.items()],
            # First of the rest: it lets the APIC take INIT and SIPI that are under way.
            "mp_state": vcpu.get_mp_state(),
            "regs": vcpu.get_regs(),
            "sregs": (vcpu.save_sregs2() if has_sregs2 else vcpu.save_sregs()).hex(),
            "xcrs": vcpu.get_xcrs().hex(),
            "xsave": vcpu.get_xsave(self._xsave_size()).hex(),
            "debugregs": vcpu.get_debugregs().hex(),
            "lapic": vcpu.get_lapic().hex(),
            "events": vcpu.get_vcpu_events().hex(),
        }

    def _xsave_size(self) -> int:
        """0 where KVM_GET_XSAVE does."""
        return min(self._vm.check_extension(ioctls.KVM_CAP_XSAVE2), _LARGEST_XSAVE)

    def restore(self, saved: Saved) -> int:
        """Put all of it back; the nanoseconds that have gone by since, which the guest's clocks
        are put forward by. Raises BadState, also for what KVM refuses."""
        gone_by = time.time_ns() - saved.number("realtime_ns", 1 << 63)
        gone_by = min(max(gone_by, 0), _MOST_SECONDS * 1_000_000_000)
        clock = saved.number("kvmclock_ns", 1 << 63)
        try:
            chips = self._chips(saved)
            pit = saved.bytes("pit", 112)
            inners = saved.each("vcpus", len(self._vcpus))
            for vcpu, inner in zip(self._vcpus, inners, strict=True):
                self._restore_vcpu(vcpu, inner, gone_by)
                inner.finish()
            for chip in chips:
                self._vm.set_irqchip(chip)
            self._vm.set_pit2(pit)
            self._vm.set_clock(min(clock + gone_by, 1 << 63))
            for vcpu in self._vcpus:
                vcpu.kvmclock_ctrl()  # else watchdogs take the time for a lock-up
        except KvmError as error:
            raise saved.bad(f"this host's KVM refuses it: {error}") from error
        saved.finish()
        return gone_by

    def _chips(self, saved: Saved) -> list[bytes]:
        rows = saved.rows("irqchips", ioctls.KVM_IRQCHIPS)
        held = Saved({str(at): row for at, row in enumerate(rows)}, f"{saved.where}.irqchips")
        chips = [held.bytes(str(at), 520) for at in range(ioctls.KVM_IRQCHIPS)]
        for at, chip in enumerate(chips):
            if int.from_bytes(chip[:4], "little") != at:
                raise held.bad(f"{at} is another chip's")
        return chips

    def _restore_vcpu(self, vcpu: Vcpu, saved: Saved, gone_by: int) -> None:
        frequency = saved.number("tsc_khz", 1 << 31)
        self._restore_frequency(vcpu, saved, frequency)
        vcpu.set_mp_state(saved.number("mp_state", 16))
        regs = saved.inner("regs")
        vcpu.set_regs({name: regs.number(name, _U64) for name in _REGISTERS})
        regs.finish()
        if self._vm.check_extension(ioctls.KVM_CAP_SREGS2):
            vcpu.restore_sregs2(saved.bytes("sregs", 320))
        else:
            vcpu.restore_sregs(saved.bytes("sregs", 312))
        vcpu.set_xcrs(saved.bytes("xcrs", 392))
        size = self._xsave_size()
        vcpu.set_xsave(saved.bytes("xsave", max(size, 4096)), size)
        vcpu.set_debugregs(saved.bytes("debugregs", 128))
        vcpu.set_lapic(saved.bytes("lapic", 1024))
        self._restore_msrs(vcpu, saved, gone_by * frequency // 1_000_000)
        vcpu.set_vcpu_events(saved.bytes("events", 64))

    def _restore_frequency(self, vcpu: Vcpu, saved: Saved, frequency: int) -> None:
        """A guest measures its time stamp counter once."""
        if frequency and frequency != vcpu.tsc_khz():
            try:
                vcpu.set_tsc_khz(frequency)
            except KvmError as error:
                raise saved.bad(
                    f"its guest's time stamp counter has {frequency} kHz, this host's "
                    f"{vcpu.tsc_khz()}, and can't be scaled: {error}"
                ) from error

    def _restore_msrs(self, vcpu: Vcpu, saved: Saved, ticks: int) -> None:
        """Those that differ from what the vCPU has: KVM lists some that it doesn't let anybody
        set. The time stamp counter goes on by `ticks`."""
        wanted = {row[0]: row[1] for row in saved.numbers("msrs", 2, _MOST_MSRS, _U64)}
        if MSR_TSC in wanted:
            wanted[MSR_TSC] = wanted[MSR_TSC] + ticks & _U64
        for index in _WALL_CLOCKS:
            wanted.pop(index, None)
        known = set(self._msr_indices())
        unknown = [index for index in wanted if index not in known]
        if unknown:
            raise saved.bad(f"MSR {unknown[0]:#x} is none that this host's KVM keeps")
        there = vcpu.get_msrs(wanted)
        differing = [index for index, value in wanted.items() if there.get(index) != value]
        differing.sort(key=lambda index: (index in _MSRS_LAST, index != MSR_TSC))
        if differing:
            vcpu.set_msrs({index: wanted[index] for index in differing})


_KERNEL_GS_BASE = 0xC000_0102


def core_registers(vcpu: Vcpu) -> dict[str, Any]:
    """See Platform.core_vcpus."""
    return {
        "regs": vcpu.get_regs(),
        "sregs": {name: _numbers(value) for name, value in vcpu.get_sregs().items()},
        "fpu": vcpu.get_xsave()[:512].hex(),
        "kernel_gs_base": vcpu.get_msrs([_KERNEL_GS_BASE]).get(_KERNEL_GS_BASE, 0),
    }


def _numbers(value: int | dict[str, int]) -> int | dict[str, int]:
    """A register without padding that is an array."""
    if isinstance(value, int):
        return value
    return {name: part for name, part in value.items() if isinstance(part, int)}
