"""`pyvmm check`, and how it shows what it found: a table on a terminal, aligned lines elsewhere,
JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vmm.arch import architecture
from vmm.cli.output import printing
from vmm.cli.parser import Parser
from vmm.core.errors import one_line
from vmm.host.capability import KERNEL_PRIVATE
from vmm.host.check import HostCheck, Job, check_host

_COLOURS = {"yes": "green", "no": "yellow", "broken": "red", "unknown": "dim"}
_HEADINGS = ("status", "capability", "result", "evidence", "enables", "what to do")
_HOST_ACCESS = {
    "kernel-refused": "the kernel keeps the host out",
    "policy-refused": "a rehearsal: pyvmm keeps out, the kernel would not",
}

_BY_SCHEME = {"pkvm": "the hypervisor keeps the host's processors out, not its devices' DMA"}
"""Instead of the above, where it isn't the host's kernel that keeps the host out."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = Parser(
        prog="pyvmm check",
        description="Probes what this host can do: one line for each capability, with evidence, "
        "what it enables and what to do without it, then which jobs can run.",
        epilog="exit status: 0 a stock kernel with --private-mem can run here, 2 bad usage, "
        "3 it cannot",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, whose keys are stable")
    parser.add_argument("--debug", action="store_true", help="show a traceback for errors")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Probe, print, and answer with the exit status."""
    options = parser().parse_args(arguments)
    found = check_host(architecture())
    with printing():
        if options.json:
            print(json.dumps(found.as_json(), indent=2))
        elif sys.stdout.isatty():
            _print_table(found)
        else:
            print("\n".join(plain_lines(found)))
    return found.exit_status


_LENDS_NOTHING = (
    "cannot lend its pages to devices, as the host reaches none of them; "
    "--private-mem=guest_memfd-mmap or memfd can"
)


def _cells(found: HostCheck) -> list[tuple[str, ...]]:
    return [
        tuple(
            map(
                one_line,
                (
                    row.finding.status,
                    row.capability.title,
                    row.finding.result,
                    row.finding.evidence,
                    row.capability.enables,
                    row.advice,
                ),
            )
        )
        for row in found.rows
    ]


def plain_lines(found: HostCheck) -> list[str]:
    """One aligned line for each capability, then one for each job."""
    cells = [_HEADINGS, *_cells(found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return [*lines, "", *closing_lines(found)]


def closing_lines(found: HostCheck) -> list[str]:
    """Which jobs run, and below each why a stronger scheme doesn't serve it."""
    lines = []
    for name, job in found.jobs.items():
        lines.append(job_line(found, job))
        if name == KERNEL_PRIVATE and job.choice:  # --iommu needs a kernel
            lends = "lends private pages to devices" if job.choice.lends else _LENDS_NOTHING
            lines.append(f"  with --iommu: {lends}")
        not_taken = job.choice.not_taken if job.choice else {}
        lines += [f"  not scheme {scheme}: {one_line(why)}" for scheme, why in not_taken.items()]
    return lines


def job_line(found: HostCheck, job: Job) -> str:
    """Whether a job can run here, and why not or how."""
    if job.can_run:
        if job.choice is None:
            return f"{job.title}: can run"
        scheme, backing, host_access, *_ = job.choice
        strength = _BY_SCHEME.get(scheme) or _HOST_ACCESS[host_access]
        return f"{job.title}: can run, private pages in {backing} ({strength}), scheme {scheme}"
    reasons = [
        f"{row.capability.title}: {row.finding.result}"
        for row in found.rows
        if row.capability.key in job.missing and row.finding.status != "unknown"
    ]
    return f"{job.title}: cannot run here ({'; '.join(reasons)}); {found.lab} can run it"


def _print_table(found: HostCheck) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold", no_wrap=heading == "status")
    for row in _cells(found):
        status, *rest = row
        table.add_row(Text(status, style=_COLOURS[status]), *map(Text, rest))
    console = Console(highlight=False)
    console.print(table)
    for line in closing_lines(found):
        style = "dim" if line.startswith(" ") else "green" if "can run," in line else ""
        console.print(Text(line, style=style), soft_wrap=True)
