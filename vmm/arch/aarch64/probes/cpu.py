"""What a vCPU does: run at EL1, hand its calls to user space, and what an exit costs."""

from __future__ import annotations

from kvm_bindings import KvmError
from kvm_bindings.aarch64 import System, ioctls
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from kvm_bindings.exits import HypercallExit
from vmm.arch.aarch64 import rsi
from vmm.arch.aarch64.machine_code import DONE, SMC, assembled
from vmm.arch.aarch64.micro_guest import MicroGuest
from vmm.host.probes import latency
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.micro_guest import seen

_ANSWER = 0x5A5A
_LATENCY_SECONDS = 10.0  # an emulated machine takes milliseconds for each
_SMC_FLAG = 1 << 0  # KVM_HYPERCALL_EXIT_SMC

KVM_CAP_EXIT_HYPERCALL = 201
MEM_SHARE_MASK = 1 << 3 | 1 << 4
"""The calls MEM_SHARE and MEM_UNSHARE, as patches of 2024 number them for KVM_CAP_EXIT_HYPERCALL
("KVM: arm64: Allow userspace to receive SHARE and UNSHARE notifications"); in no kernel yet."""


def guests(system: System) -> Finding:
    """Whether an ordinary VM runs code at EL1 with the MMU on."""
    with MicroGuest(system, assembled(DONE)) as guest:
        exit = guest.run()
        said = guest.word(exit)
    if said is None:
        return broken("don't run", f"a guest at EL1 with the MMU on: {seen(exit)}")
    return yes("run", "a guest at EL1 with the MMU on stored to a register in memory")


def forwarded_calls(system: System) -> Finding:
    """Whether a guest's SMC calls can be had in user space, and the answer arrives."""
    call = f"an SMC with function {rsi.ABI_VERSION:#x}"
    registers = {"x0": rsi.ABI_VERSION}
    with MicroGuest(system, assembled(SMC), registers=registers) as guest:
        try:
            guest.vm.filter_smccc(
                rsi.FIRST_FUNCTION, rsi.FUNCTIONS, ioctls.KVM_SMCCC_FILTER_FWD_TO_USER
            )
        except KvmError as error:
            return no("not offered", str(error))
        exit = guest.run()
        if not isinstance(exit, HypercallExit) or exit.number != rsi.ABI_VERSION:
            return broken("don't exit", f"{call}: {seen(exit)}")
        by_smc = bool(exit.flags & _SMC_FLAG)
        guest.vcpu.set_one_reg(CORE_REGISTERS["x0"], _ANSWER)
        exit = guest.run()
        said = guest.word(exit)
    if said != _ANSWER or not by_smc:
        return broken("answers get lost", f"{call}: then {seen(exit)}, {said=}, {by_smc=}")
    return yes("exit to user space", f"{call} exited, the guest got the answer")


def exit_latency(system: System) -> Finding:
    """What a store to a register in memory costs from guest to here and back, in this process."""
    with MicroGuest(system, assembled(DONE), seconds=_LATENCY_SECONDS) as guest, guest.watched():
        return latency.exit_latency(
            lambda: guest.word(guest.next_exit()) is not None, "stores to a register"
        )
