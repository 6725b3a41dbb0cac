"""The report of a run: what happened, and how strong the isolation really was."""

from __future__ import annotations

import os
import stat
from typing import Any

from vmm.conversion.accounting import Accounting, Refinements
from vmm.core.errors import UsageError
from vmm.exits.outcome import Outcome
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory, PageState

KERNEL_ENFORCED = (
    "kernel-enforced: the host's kernel refuses every host access to private pages ({how}); "
    "the host's kernel itself is trusted"
)
_HOW = {"SIGBUS": "SIGBUS", "no mapping": "nobody can map them"}
POLICY_ENFORCED = (
    "policy-enforced rehearsal: the VMM refuses every access of its own to private pages, "
    "but the host's kernel would allow it; no protection from a malicious host"
)
NO_ISOLATION = "none: an ordinary VM, all memory is shared with the host"


def isolation_of(private: Backing | None, common_end: int = 0) -> str:
    """The sentence that says how strong the isolation of the private side is."""
    if private is None:
        return NO_ISOLATION
    strength = POLICY_ENFORCED
    if private.host_access == "kernel-refused":
        strength = KERNEL_ENFORCED.format(how=_HOW[private.traits.private_access])
    if common_end:
        strength += (
            f"; the first {common_end >> 10} KiB, where processors start without paging, are one "
            "memory at both aliases, in the shared backing"
        )
    return strength


def _shared_access(memory: GuestMemory, io: dict[str, dict[str, Any]]) -> str:
    """How the host reached shared memory; a disk whose engine maps it is named."""
    mapped = [n for n, counts in io.items() if counts.get("engine", {}).get("name") == "mmap"]
    return memory.shared.access + "".join(f", mapped by {name} (io=mmap)" for name in mapped)


def build_report(
    *,
    scheme: str,
    not_taken: dict[str, str],
    doorbell: str | None,
    memory: GuestMemory,
    outcome: Outcome,
    accounting: Accounting,
    refinements: Refinements,
    io: dict[str, dict[str, Any]],
    exits: dict[str, int],
    ports: dict[int, int],
    wall_seconds: float,
) -> dict[str, Any]:
    """The report as JSON-ready data; keys as the README lists them."""
    residency = memory.residency()
    private = memory.private
    return {
        "scheme": scheme,
        "schemes_not_taken": not_taken,
        "doorbell": doorbell,
        "backings": {
            "private": None if private is None else private.name,
            "shared": memory.shared.name,
        },
        "host_access": {
            "private": None if private is None else private.host_access,
            "launch": None if private is None else private.access,
            "shared": _shared_access(memory, io),
        },
        "isolation": isolation_of(private, memory.common_end),
        "guest": {"exit": outcome.exit, "reason": outcome.reason},
        "conversions": accounting.as_dict(),
        "pages": {
            "ram_bytes": memory.ram_bytes,
            "private_bytes": memory.bytes_in(PageState.PRIVATE),
            "shared_bytes": memory.bytes_in(PageState.SHARED),
            "deferred_bytes": memory.bytes_in(PageState.DEFERRED),
            "common_bytes": memory.common_end,
        },
        "refinements": refinements.as_dict(),
        "residency": {
            **residency._asdict(),
            "other_side_bytes": memory.other_side_bytes(),
        },
        "io": io,
        "exits": dict(sorted(exits.items(), key=lambda item: -item[1])),
        "io_ports": {
            f"{port:#x}": count for port, count in sorted(ports.items(), key=lambda i: -i[1])[:20]
        },
        "wall_s": round(wall_seconds, 3),
    }


class ReportFile:
    """Where the report goes: opened before the run, so that a bad path costs no run."""

    def __init__(self, path: str) -> None:
        """Raises UsageError when `path` can't be written."""
        self._path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(
                f"--report {path} cannot be written: {error.strerror}; give another path"
            ) from None

    def write(self, report: dict[str, Any]) -> None:
        """Replace the file's content. Raises UsageError when the disk is full or the like."""
        import json  # a run ends with it; its start does not wait for it

        data = (json.dumps(report, indent=2) + "\n").encode()
        try:
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.ftruncate(self._fd, 0)
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise UsageError(f"--report {self._path}: writing failed: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._fd)
