"""A guest's script on the model, under pyvmm's own run loop and handlers."""

from __future__ import annotations

import errno
from collections import deque
from typing import cast

from kvm_bindings.x86_64 import Vcpu
from kvm_bindings.x86_64 import ioctls as x86
from tests.support.fake_kvm import FakeKernel, FakeVm
from tests.support.fake_kvm.vcpu import FakeVcpu, Hypercall, In, Instruction, Load, Out, Store
from tests.support.fake_platform import FakePlatform
from tests.support.x86 import exit_handlers
from vmm.arch.x86_64 import layout
from vmm.core.ranges import PAGE_SIZE
from vmm.exits.outcome import FAILED, Outcome
from vmm.memory.guest_memory import PageState
from vmm.selftest.entries import Combination
from vmm.selftest.rig import RAM_GPA, Rig

SHARED, PRIVATE = 0, 16
ALL_ONES = (1 << 64) - 1


def run(rig: Rig, *script: Instruction) -> tuple[list[int], list[Outcome]]:
    """Exit after exit through the handlers, to the script's end (HLT); what the guest saw."""
    outcomes: list[Outcome] = []
    handlers = exit_handlers(rig.memory, rig.converter, outcomes.append)
    vcpu: FakeVcpu = cast(FakeVm, rig.vm).vcpus[0]
    vcpu.script = deque(script)
    while not outcomes:
        exit = vcpu.run()
        _, handle = handlers.table[type(exit)]
        handle(cast(Vcpu, vcpu), exit)
    return vcpu.results, outcomes


def rig() -> Rig:
    made = Rig(
        FakePlatform(FakeKernel.sw_protected()), Combination("attributes", "guest_memfd-plain")
    )
    made.vm.enable_cap(x86.KVM_CAP_EXIT_HYPERCALL, 1 << 12)
    return made


def hypercall(gpa: int, pages: int, attributes: int) -> Hypercall:
    return Hypercall(12, (gpa, pages, attributes, 0))


def test_hypercall_shares_pages_and_the_guest_finds_zeros() -> None:
    with rig() as made:
        seen, outcomes = run(
            made,
            Store(RAM_GPA, 77),
            hypercall(RAM_GPA, 2, SHARED),
            Load(RAM_GPA),
            Store(RAM_GPA, 78),
            Load(RAM_GPA),
        )

        assert seen == [0, 0, 78]
        assert [outcome.exit for outcome in outcomes] == [FAILED]  # HLT, with nobody to wake it
        assert made.memory.bytes_in(PageState.SHARED) == 2 * PAGE_SIZE
        assert made.host_read(0) == 78


def test_hypercall_that_kvm_refuses_never_reaches_the_handlers() -> None:
    with rig() as made:
        seen, _ = run(
            made,
            hypercall(RAM_GPA + 8, 1, SHARED),
            hypercall(RAM_GPA, 0, SHARED),
            hypercall(RAM_GPA, ALL_ONES, SHARED),
            Hypercall(77, (0, 0, 0, 0)),
        )

        assert seen == [ALL_ONES + 1 - number for number in (22, 22, 22, 1000)]
        assert made.converter.accounting.share.calls == 0


def test_hypercall_past_ram_is_pyvmms_to_refuse() -> None:
    with rig() as made:
        seen, _ = run(made, hypercall(RAM_GPA, 1 << 30, PRIVATE))

        assert seen == [ALL_ONES + 1 - errno.EINVAL]


def test_port_doorbell_of_the_model_converts() -> None:
    with rig() as made:
        port = layout.DOORBELL_PORT
        seen, _ = run(
            made,
            Out(port, 4, RAM_GPA >> 12),
            Out(port + 4, 4, 1),
            Out(port + 8, 4, 1),
            In(port + 12, 4),
            In(port + 8, 4),
        )

        assert seen == [0, int.from_bytes(b"VMMB", "little")]
        assert made.memory.bytes_in(PageState.SHARED) == PAGE_SIZE


def test_access_without_memory_is_mmio_and_reads_all_ones() -> None:
    with rig() as made:
        seen, _ = run(made, Load(RAM_GPA + (1 << 30)))

        assert seen == [ALL_ONES]


def test_injected_error_of_an_ioctl_reaches_the_guest() -> None:
    with rig() as made:
        cast(FakeVm, made.vm).kernel.inject("KVM_SET_MEMORY_ATTRIBUTES", errno.ENOMEM)

        seen, _ = run(made, hypercall(RAM_GPA, 1, SHARED), hypercall(RAM_GPA, 1, SHARED))

        assert seen == [ALL_ONES + 1 - errno.ENOMEM, 0]
