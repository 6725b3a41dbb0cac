"""What a lab machine's console says of a crash of its kernel."""

from __future__ import annotations

import pytest

from vmm.core.errors import GuestFailure
from vmm.lab.crash import StaleInstruction, crash_error, first_lines

# as Linux 7.3 prints one, shortened
OOPS = b"""\
pyvmm-lab: running\r
[   12.1] BUG: kernel NULL pointer dereference, address: 0000000000000000\r
[   12.2] #PF: supervisor write access in kernel mode\r
[   12.3] PGD 0 P4D 0\r
[   12.4] Oops: Oops: 0002 [#1] SMP NOPTI\r
[   12.5] CPU: 0 UID: 0 PID: 84 Comm: pyvmm Tainted: G           OE\r
[   12.6] RIP: 0010:kvm_vm_ioctl+0x1b/0x9c0 [kvm]\r
[   12.7] RSP: 0018:ffffc900004b3e48 EFLAGS: 00010246\r
[   12.8] Call Trace:\r
[   12.9]  <TASK>\r
[   13.0]  __x64_sys_ioctl+0x94/0xc0\r
[   13.1]  do_syscall_64+0x82/0x190\r
[   13.2] Kernel panic - not syncing: Fatal exception\r
"""


def test_oops_is_told_by_its_reason_place_and_callers() -> None:
    told = first_lines(OOPS)

    assert told == (
        "BUG: kernel NULL pointer dereference, address: 0000000000000000"
        " | Oops: Oops: 0002 [#1] SMP NOPTI | RIP: 0010:kvm_vm_ioctl+0x1b/0x9c0 [kvm]"
        " | __x64_sys_ioctl+0x94/0xc0 | do_syscall_64+0x82/0x190"
        " | Kernel panic - not syncing: Fatal exception"
    )


@pytest.mark.parametrize(
    "line",
    [
        b"[    1.0] kernel BUG at virt/kvm/kvm_main.c:7!",
        b"[    1.0] Kernel panic - not syncing: Attempted to kill init!",
        b"[   77.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [pyvmm:84]",
        b"[    1.0] Oops: general protection fault, probably for non-canonical address",
        b"[   77.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        b"[  200.0] INFO: task python3:84 blocked for more than 120 seconds.",
    ],
)
def test_each_kind_of_crash_is_seen(line: bytes) -> None:
    told = first_lines(b"fine so far\n" + line + b"\n")

    assert told is not None
    assert told == line.decode().split("] ", 1)[1]


@pytest.mark.parametrize("log", [b"", b"pyvmm-lab: running\n", b"[ 1.0] kvm: a BUGGY guest\n"])
def test_console_without_a_crash_tells_none(log: bytes) -> None:
    assert first_lines(log) is None


def test_endless_trace_is_cut() -> None:
    lines = b"".join(b"[ 1.0]  f%d+0x1/0x2\n" % number for number in range(100_000))

    told = first_lines(b"[ 1.0] BUG: all of it\n" + lines)

    assert told is not None
    assert len(told) < 500


@pytest.mark.parametrize("line", [b"Oops: int3: 0000 [#1] SMP NOPTI", b"int3: 0000 [#1] SMP NOPTI"])
def test_breakpoint_that_the_kernel_has_removed_is_the_emulators_fault(line: bytes) -> None:
    log = b"[ 1.0] %s\r\n[ 1.0] RIP: 0010:finish_task_switch.isra.0+0xd2/0x3e0\r\n" % line

    error = crash_error(first_lines(log) or "")

    assert isinstance(error, StaleInstruction)
    assert "run it again: " in str(error)
    assert str(error).endswith("| RIP: 0010:finish_task_switch.isra.0+0xd2/0x3e0")


def test_crash_after_which_a_breakpoint_is_met_is_the_kernels_own() -> None:
    log = OOPS + b"[ 13.1] Oops: int3: 0000 [#2] SMP NOPTI\r\n"

    error = crash_error(first_lines(log) or "")

    assert type(error) is GuestFailure
    assert str(error).startswith("the lab machine's kernel crashed: BUG: kernel NULL pointer")
