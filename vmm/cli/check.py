"""`pyvmm check`, and how it shows what it found: the verdict first, then a line for each
capability, with -v all that is known of it; or JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence

from vmm.arch import architecture
from vmm.cli.output import printing
from vmm.cli.parser import width
from vmm.cli.parsers import check_parser as parser
from vmm.core.errors import one_line
from vmm.host.capability import KERNEL_PRIVATE
from vmm.host.check import HostCheck, Job, check_host

_COLOURS = {"yes": "green", "no": "yellow", "broken": "red", "unknown": "dim"}
_STATUS_WIDTH = max(map(len, _COLOURS))
_HOST_ACCESS = {
    "kernel-refused": "the kernel keeps the host out",
    "policy-refused": "a rehearsal: pyvmm keeps out, the kernel would not",
}

_BY_SCHEME = {"pkvm": "the hypervisor keeps the host's processors out, not its devices' DMA"}
"""Instead of the above, where it isn't the host's kernel that keeps the host out."""


def run(arguments: Sequence[str]) -> int:
    """Probe, print, and answer with the exit status."""
    options = parser().parse_args(arguments)
    found = check_host(architecture())
    with printing():
        if options.json:
            print(json.dumps(found.as_json(), indent=2))
        else:
            _print(list(shown(found, options.verbose)))
    return found.exit_status


_LENDS_NOTHING = (
    "cannot lend its pages to devices, as the host reaches none of them; "
    "--private-mem=guest_memfd-mmap or memfd can"
)


def shown(found: HostCheck, verbose: bool) -> Iterator[tuple[str, str]]:
    """Lines of `width()` columns at most: a status, or nothing, and the text after it."""
    for line in verdict(found, verbose):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        yield from (("", part) for part in _wrapped(line, indent))
    yield "", ""
    titles = max((len(one_line(row.capability.title)) for row in found.rows), default=0)
    for row in found.rows:
        title, result = one_line(row.capability.title), one_line(row.finding.result)
        if not verbose:
            yield row.finding.status, f"{title.ljust(titles)}  {result}"
            continue
        yield row.finding.status, f"{title}: {result}"
        about = (
            ("", row.finding.evidence),
            ("good for: ", row.capability.enables),
            ("without it: ", row.advice),
        )
        indent = " " * (_STATUS_WIDTH + 2)
        for label, text in about:
            if text:
                lines = _wrapped(f"{indent}{label}{one_line(text)}", f"{indent}  ")
                yield from (("", line) for line in lines)
    if not verbose:
        yield "", ""
        yield "", "pyvmm check -v: the evidence, and what to do without what is missing"


def _wrapped(text: str, indent: str) -> list[str]:
    rest = text.lstrip(" ")
    return textwrap.wrap(
        rest,
        width(),
        # As an indent: a word that is too long for the line would lose the spaces before it.
        initial_indent=text[: len(text) - len(rest)],
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,  # a path can be copied
    )


def verdict(found: HostCheck, verbose: bool) -> list[str]:
    """Which jobs run; and, below each, why a stronger scheme doesn't serve it."""
    lines = []
    for name, job in found.jobs.items():
        lines.append(job_line(found, job))
        if name == KERNEL_PRIVATE and job.choice:  # --iommu needs a kernel
            lends = "lends private pages to devices" if job.choice.lends else _LENDS_NOTHING
            lines.append(f"  with --iommu: {lends}")
        not_taken = job.choice.not_taken if job.choice and verbose else {}
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


def _print(lines: Sequence[tuple[str, str]]) -> None:
    if not sys.stdout.isatty():
        for status, text in lines:
            print(f"{status.ljust(_STATUS_WIDTH)}  {text}" if status else text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for status, text in lines:
        style = "green" if "can run," in text or text.endswith("can run") else ""
        line = Text(f"{status.ljust(_STATUS_WIDTH)}  ", _COLOURS[status]) if status else Text()
        console.print(line.append(text, "" if status else style), soft_wrap=True)
