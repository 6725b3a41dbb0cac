"""The conversions of a trace as a case, for a C program that repeats them (`--emit-c`)."""

from __future__ import annotations

from vmm.arch.guest_cpu import CODE_SIZE
from vmm.core.errors import UsageError
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.selftest.case import Case, Cell
from vmm.selftest.entries import Combination, combinations
from vmm.trace.layout import Kind as Traced
from vmm.trace.reader import Trace


def cell_of(trace: Trace) -> Combination:
    """Where the trace was taken. Raises UsageError for what the suite has no cell for."""
    scheme, private = trace.facts.get("scheme"), trace.facts.get("backings", {}).get("private")
    for cell in combinations():
        if (cell.scheme, cell.backing) == (scheme, private):
            return cell
    raise UsageError(
        f"--from-trace {trace.path}: no conversions of a host's are in it (scheme {scheme!r}, "
        f"private memory {private!r})"
    )


def case_of(trace: Trace) -> Case:
    """Every request of the guest's that was granted, in their order, on memory laid out as it was;
    addresses lie higher by the C program's own code."""
    states = [(Range(gpa + CODE_SIZE, size), state) for gpa, size, state in trace.facts["states"]]
    ram = _joined([area for area, _ in states if area.size])
    private = [area for area, state in states if state == "private"]
    requests = [
        (Kind.SHARE if kind == Traced.SHARE else Kind.UNSHARE, gpa + CODE_SIZE, size // PAGE_SIZE)
        for kind, gpa, size, number in zip(
            *(trace[name].tolist() for name in ("kind", "gpa", "bytes", "errno")), strict=True
        )
        if kind in (Traced.SHARE, Traced.UNSHARE) and number == 0 and size
    ]

    def run(cell: Cell) -> None:
        rig = cell.rig(ram=ram, private=private)
        for kind, gpa, pages in requests:
            rig.request(kind, gpa, pages)

    return Case("trace.conversions", f"{len(requests)} conversions of {trace.path.name}", run)


def _joined(areas: list[Range]) -> list[Range]:
    """Neighbours as one, in order."""
    joined: list[Range] = []
    for area in sorted(areas, key=lambda each: each.start):
        if joined and joined[-1].end == area.start:
            joined[-1] = Range(joined[-1].start, area.end - joined[-1].start)
        else:
            joined.append(area)
    return joined
