"""What a run was seen to call, held against the table and the reasons for what isn't in it."""

from __future__ import annotations

from collections.abc import Iterable

from tests.injection.reasons import REASONS, words
from tests.injection.recording import END, NOWHERE, RUNNING, START, Call
from tests.injection.row import BY_PROGRAM, Row
from tests.injection.table import TABLE

_KINDS_OF = {
    "disk": "disk, to the mapping|disk, from the mapping|disk, io=mmap|disk, discard|disk, zeroes|"
    "disk's first bytes|disk, to that mapping|disk, from that mapping|disk, its size|"
    "disk, its lock|disk, read ahead",
    "shared memory": "rings|guest memory|guest memory, saved|guest memory, restored|"
    "shared memory, to the files",
    "guest_memfd": "guest_memfd, in place",
    "VM": "VM, remap|VM, attributes|VM, a message",
    "vCPU": "vCPU, once|vCPU, the debugger leaves|vCPU, tried",
    "/dev/fuse": "/dev/fuse, for good",
    "loop": "a caller|a device's",
    "trace": "trace's first file",
    "socket": "socket, hung up|passt|tap, a socket in its place|a host's program|a guest's call|"
    "its socket|the spawner|back end|socket to listen on|gdb's socket",
    "saved": "its memory's file, by the run|core file, by the run|core file|core file's headers|"
    "snapshot's files|its state|its folder|what was written of it",
    "snapshot": "a snapshot's state|a snapshot's memory|a snapshot that is restored|"
    "state, restored|memory, restored|its name",
    "folder": "the folder around it",
    "socket's path": "a socket's path",
    "FIFO": "file, FIFO",
    "terminal": "user's terminal|user's terminal, given back",
}
_KIND_OF = {each: kind for kind, names in _KINDS_OF.items() for each in names.split("|")}
"""What the table's objects are called in a recording, where they are several of a kind."""

_NOTHINGS = words(
    "socket socketpair clone clone3 seccomp prctl landlock_create_ruleset memfd_create eventfd2 "
    "pipe2 epoll_create1 cachestat madvise wait4 process_vm_readv process_vm_writev"
)
"""Calls without a descriptor or a path, or that strace shows none of."""


def _of_the_row(row: Row) -> set[Call]:
    name = "splice" if row.call.startswith("splice-") else row.call
    on = NOWHERE if name in _NOTHINGS else _KIND_OF.get(row.on, row.on)
    if name in ("landlock_add_rule", "landlock_restrict_self"):
        on = "ruleset"
    phases: tuple[str, ...] = (RUNNING, END)
    if row.path in ("start", "restore"):
        phases = (START,)
    if row.by == BY_PROGRAM or row.path == "device process":  # which begins before the guest
        phases = (START, RUNNING, END)
    return {Call(phase, name, on) for phase in phases}


def known() -> set[Call]:
    """What the table has."""
    return {call for row in TABLE for call in _of_the_row(row)}


def unknown(made: Iterable[Call]) -> set[Call]:
    """Calls that have neither a row nor a reason."""
    rows = known()
    return {
        call
        for call in made
        if call not in rows and not any(reason.covers(call) for reason in REASONS)
    }
