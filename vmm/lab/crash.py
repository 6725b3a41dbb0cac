"""A crash of the lab machine's own kernel, as its console tells it."""

from __future__ import annotations

import re

from vmm.core.errors import GuestFailure

# printed by arch/x86/mm/fault.c, lib/bug.c, arch/x86/kernel/traps.c, kernel/panic.c and watchdog.c
_FIRST = re.compile(
    rb"BUG: |kernel BUG at |Oops: |Internal error: |Unable to handle kernel |Kernel panic - not "
    rb"|general protection fault|int3: |watchdog: BUG: soft lockup|rcu: INFO: rcu_\w+ .*stall"
    rb"|INFO: task \S+ blocked for more than"
)
_STAMP = re.compile(r"^\[ *\d+\.\d+\](\[.*?\])? ")
_TELLING = re.compile(
    r"BUG: |kernel BUG at |Oops: |int3: |Internal error: |Unable to handle|panic|protection fault"
    r"|lockup|stall|blocked for|^RIP: |^pc : | ?[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+"
)
_LINES = 8
# printed by arch/x86/kernel/traps.c
_STALE = re.compile(r"\bint3: ")


class StaleInstruction(GuestFailure):
    """The lab machine's emulator ran an instruction that was no longer in memory (exit status 1).

    Linux patches its own code: it puts a breakpoint there first, waits until each processor has
    seen that, and takes it away at the end. A breakpoint met after that is no fault of the kernel.
    QEMU's TCG with several processors runs one now and then, once in many hundreds of boots: see
    "qemu-x86_64 booting with 8.0.0 stil see int3", linux-kernel, July 2023.
    """


def crash_error(crash: str) -> GuestFailure:
    """The error for a crash that `first_lines` has told."""
    if _STALE.search(crash.split(" | ", 1)[0]):
        return StaleInstruction(
            "the lab machine's kernel crashed at a breakpoint that it had removed already, as "
            f"happens now and then under QEMU with several processors; run it again: {crash}"
        )
    return GuestFailure(f"the lab machine's kernel crashed: {crash}")


def first_lines(log: bytes) -> str | None:
    """The beginning of the first trace on the console, in one line; None when there is none."""
    found = _FIRST.search(log)
    if found is None:
        return None
    start = log.rfind(b"\n", 0, found.start()) + 1
    lines = [
        _STAMP.sub("", line.strip()).strip()
        for line in log[start : start + 8192].decode(errors="replace").split("\n")
    ]
    telling = [line for line in lines if _TELLING.search(line)]
    return " | ".join(telling[:_LINES])
