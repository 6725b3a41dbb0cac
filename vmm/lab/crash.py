"""A crash of the lab machine's own kernel, as its console tells it."""

from __future__ import annotations

import re

# printed by arch/x86/mm/fault.c, lib/bug.c, arch/x86/kernel/traps.c, kernel/panic.c and watchdog.c
_FIRST = re.compile(
    rb"BUG: |kernel BUG at |Oops: |Internal error: |Unable to handle kernel |Kernel panic - not "
    rb"|general protection fault|watchdog: BUG: soft lockup|rcu: INFO: rcu_\w+ .*stall"
    rb"|INFO: task \S+ blocked for more than"
)
_STAMP = re.compile(r"^\[ *\d+\.\d+\](\[.*?\])? ")
_TELLING = re.compile(
    r"BUG: |kernel BUG at |Oops: |Internal error: |Unable to handle|panic|protection fault|lockup"
    r"|stall|blocked for|^RIP: |^pc : | ?[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+"
)
_LINES = 8


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
