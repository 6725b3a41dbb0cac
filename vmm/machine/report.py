"""The report of a run: what happened, and how strong the isolation really was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from vmm.conversion.accounting import Accounting, Refinements
from vmm.conversion.matrix import TO_SHARE
from vmm.core.errors import OutputError, tell
from vmm.core.lean_typing import TYPE_CHECKING, Any, cast
from vmm.core.output import Output
from vmm.core.ranges import NOWHERE, Range
from vmm.exits.outcome import Outcome
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory, PageState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.machine.report_keys import (
        Conversions,
        DeviceCounts,
        Observed,
        Pages,
        Report,
        Residency,
    )
    from vmm.machine.report_keys import Refinements as Refined

KERNEL_ENFORCED = (
    "kernel-enforced: the host's kernel refuses every host access to private pages ({how}); "
    "the host's kernel itself is trusted"
)
_HOW = {"SIGBUS": "SIGBUS", "no mapping": "nobody can map them"}
POLICY_ENFORCED = (
    "policy-enforced rehearsal: the VMM refuses every access of its own to private pages, "
    "but the host's kernel would allow it; no protection from a malicious host"
)
PKVM_ENFORCED = (
    "kernel-enforced (pKVM): the hypervisor keeps the host's processors, its kernel included, away "
    "from private pages (EFAULT, SIGSEGV); not its devices (no IOMMU: DMA, as of O_DIRECT, reaches "
    "them), and the host chooses what the guest starts with"
)
_REALM = "; the guest takes the VMM for the monitor of an Arm CCA realm, which it is not"
TOLD, OBSERVED = "told", "observed, not told"
"""The report's `states`: whether the host knows each page's state, or can only try."""
_MOST_OLD = 1000
NO_ISOLATION = "none: an ordinary VM, all memory is shared with the host"


def isolation_of(private: Backing | None, common: Range = NOWHERE, scheme: str = "") -> str:
    """The sentence that says how strong the isolation of the private side is."""
    if private is None:
        return NO_ISOLATION
    if scheme == "pkvm":
        return PKVM_ENFORCED
    strength = POLICY_ENFORCED
    if private.host_access == "kernel-refused":
        strength = KERNEL_ENFORCED.format(how=_HOW[private.traits.private_access])
    if not type(private).__module__.startswith("vmm.memory."):
        strength += f"; by the word of a backing of the user's own ({type(private).__name__})"
    if scheme == "realm":
        strength += _REALM
    if common.size:
        strength += (
            f"; the {common.size >> 10} KiB at {common.start:#x}, where processors start without "
            "paging, are one memory at both aliases, in the shared backing"
        )
    return strength


def _shared_access(memory: GuestMemory, io: dict[str, dict[str, Any]]) -> str:
    """How the host reached shared memory; a disk whose engine maps it is named, and one that gave
    KVM's mapping to the kernel for a buffer."""
    words = memory.shared.access
    for name, counts in io.items():
        engine = counts.get("engine", {"name": "", "bytes": {}})
        if engine["name"] == "mmap":
            words += f", mapped by {name} (io=mmap)"
        elif engine["bytes"].get("hva"):
            words += f", the mapping as the kernel's buffer by {name} (io={engine['name']})"
    return words


def _pages(memory: GuestMemory) -> Pages:
    """RAM by state; under a scheme that doesn't tell, what trying some pages has shown."""
    if memory.told:
        pages: Pages = {
            "ram_bytes": memory.ram_bytes,
            "private_bytes": memory.bytes_in(PageState.PRIVATE),
            "shared_bytes": memory.bytes_in(PageState.SHARED),
            "deferred_bytes": memory.bytes_in(PageState.DEFERRED),
            "common_bytes": memory.common.size,
        }
        if lent := memory.bytes_in(PageState.LENT):
            pages["lent_bytes"] = lent
        return pages
    from vmm.memory.observed_memory import ObservedMemory

    assert isinstance(memory, ObservedMemory)
    return {
        "ram_bytes": memory.ram_bytes,
        "private_bytes": None,
        "shared_bytes": None,
        "deferred_bytes": None,
        "common_bytes": 0,
        "observed": cast("Observed", memory.observe()._asdict()),
    }


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
) -> Report:
    """The report as JSON-ready data; keys as vmm/docs/reference/report.md lists them."""
    residency = memory.accounted()  # first: to look at pages makes some
    told = memory.told
    if told:
        residency["other_side_bytes"] = memory.other_side_bytes()
    private = memory.private if told else memory.shared
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
            "launch": None if private is None else private.access if told else "pread/pwrite",
            "shared": _shared_access(memory, io),
        },
        "isolation": isolation_of(private, memory.common, scheme),
        "states": TOLD if told else OBSERVED,
        "guest": {"exit": outcome.exit, "reason": outcome.reason},
        "conversions": cast("Conversions", accounting.as_dict()) if told else None,
        "pages": _pages(memory),
        "refinements": cast("Refined", refinements.as_dict()) if told else None,
        "residency": cast("Residency", residency),
        "io": cast("dict[str, DeviceCounts]", io),
        "exits": dict(sorted(exits.items(), key=lambda item: -item[1])),
        "io_ports": {
            f"{port:#x}": count for port, count in sorted(ports.items(), key=lambda i: -i[1])[:20]
        },
        "wall_s": round(wall_seconds, 3),
    }


def unshared(scheme: str, device: str) -> str:
    """The sentence for a device that found what it was to use private, under a scheme whose host
    is not told of shares."""
    return f"{device} stopped, the guest hasn't shared what it was to use: {TO_SHARE[scheme]}"


class ReportFile:
    """Where the report goes: looked at before the run, so that a bad path costs no run.

    What the file was is out of the way while a guest runs, so that a crash leaves no report, and
    not an earlier run's; it is gone for good only when the new one is there.
    """

    def __init__(self, path: str) -> None:
        """Raises UsageError when `path` can't be written."""
        self._output = Output(f"--report {path}", path)
        self._former: str | None = None
        self.through: Callable[[bytes], None] | None = None
        """What has `replace` done in another process; raises OutputError."""

    @property
    def is_replaced(self) -> bool:
        """Whether the file is replaced at the end, and not written in place."""
        return self._output.file is not None

    def begin(self) -> None:
        """A guest is about to run: move an earlier report aside, to FILE.old or the like."""
        file = self._output.file
        if file is None:
            return
        for number in range(1, _MOST_OLD):
            former = f"{file}.old" if number == 1 else f"{file}.old{number}"
            try:
                os.link(file, former)
                os.unlink(file)
            except FileExistsError:
                continue  # not ours to replace
            except FileNotFoundError:
                return
            except OSError as error:
                tell(f"--report {file}: the earlier one stays there meanwhile: {error.strerror}")
                return
            self._former = former
            return

    def write(self, report: Mapping[str, object]) -> None:
        """Write the file whole. Where that fails the user is told, and the run is what it was."""
        import json  # a run ends with it; its start does not wait for it

        text = (json.dumps(report, indent=2) + "\n").encode()
        message = os.fsencode(self._former or "") + b"\0" + text
        try:
            (self.through or self.replace)(message)
        except OutputError as error:
            kept = "" if self._former is None else f"; an earlier one is {self._former}"
            tell(f"{error}{kept}")
            return
        self._former = None

    def replace(self, message: bytes) -> None:
        """Write the file, and remove the earlier one: `message` is that one's path, a zero byte
        and the new content. Raises OutputError."""
        former, _, text = message.partition(b"\0")
        self._output.write(text)
        if former:
            with contextlib.suppress(OSError):
                os.unlink(former)

    def close(self) -> None:
        self._output.close()
