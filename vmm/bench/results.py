"""A run's results: as JSON, as text, as a page, and two runs side by side."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator
from typing import Any

from vmm.bench.series import Series
from vmm.bench.targets import Verdict, verdicts
from vmm.core.errors import UsageError
from vmm.core.given import read_json

FORMAT = "pyvmm-bench"
VERSION = 1
_MOST_BYTES = 16 << 20
"""A full run's results take less than one MiB."""

TITLES = {
    "accessors": "Access to guest memory",
    "transfers": "From a file to guest memory and back",
    "conversions": "A share and an unshare of touched pages",
    "conversions-memory": "Memory of pages that are shared with their content, both sides",
    "exits": "One exit",
    "disk": "A virtio-blk request, as the bench guest sees it",
    "disk-cpu": "Processor time of the host's side for that request",
    "start-up": "Start-up",
    "memory": "Memory",
    "linux": "A stock kernel",
    "iommu-calls": "A page for a device",
    "iommu": "A disk behind the virtual IOMMU",
}


def as_json(host: dict[str, Any], options: dict[str, Any], series: list[Series]) -> dict[str, Any]:
    """Keys stay; new ones may come."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "host": host,
        "options": options,
        "series": [one.as_json() for one in series],
        "ratios": [
            {
                **verdict.target._asdict(),
                **verdict.ratio._asdict(),
                "reached": verdict.reached,
            }
            for verdict in verdicts(series)
        ],
    }


def load(path: str) -> tuple[dict[str, Any], list[Series]]:
    """Host facts and series of a file that `--json` wrote. Raises UsageError."""
    data = read_json(path, f"--compare {path}", "give a file of --json", most=_MOST_BYTES)
    try:
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError("another format or version")
        series = [
            Series(s["section"], s["case"], s["subject"], s["unit"], list(map(float, s["samples"])))
            for s in data["series"]
        ]
        words = [word for one in series for word in one[:4]]
        if not all(isinstance(word, str) for word in words):
            raise ValueError("a name that is no text")
        if not all(one.samples and all(map(math.isfinite, one.samples)) for one in series):
            raise ValueError("a series without samples that are numbers")
        return dict(data["host"]), series
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(
            f"--compare {path} is no result of pyvmm bench --json ({error!r})"
        ) from error


def number(value: float) -> str:
    """Three digits that mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def sections(series: list[Series]) -> Iterator[tuple[str, list[str], list[list[Series | None]]]]:
    """Title, subjects, and for each case (first column its name) the series of each subject."""
    for section, members in itertools.groupby(series, lambda one: one.section):
        taken = list(members)
        subjects = list(dict.fromkeys(one.subject for one in taken))
        rows = []
        for _, group in itertools.groupby(taken, lambda one: one.case):
            by_subject: dict[str, Series] = {one.subject: one for one in group}
            rows.append([by_subject.get(subject) for subject in subjects])
        yield TITLES.get(section, section), subjects, rows


def _case(row: list[Series | None]) -> Series:
    return next(one for one in row if one is not None)


def _cell(one: Series | None) -> str:
    if one is None:
        return ""
    low, high = one.spread
    return f"{number(one.median)} ({number(low)}..{number(high)})"


def text(host: dict[str, Any], series: list[Series]) -> str:
    """Tables: median and quartiles of each subject in each case."""
    lines = [machine(host)]
    for title, subjects, rows in sections(series):
        unit = _case(rows[0]).unit
        table = [[f"{title}, {unit}", *subjects]]
        table += [[_case(row).case, *map(_cell, row)] for row in rows]
        lines += ["", *_aligned(table)]
    found = verdicts(series)
    if found:
        table = [["speed", "ratio (quartiles)", "wanted", ""]]
        table += [_verdict_cells(verdict) for verdict in found]
        lines += ["", *_aligned(table)]
    return "\n".join(lines)


def machine(host: dict[str, Any]) -> str:
    """Where it was measured, in a line."""
    return (
        f"{host.get('processor')}, {host.get('cpus')} CPUs"
        f"{', itself a virtual machine' if host.get('hypervisor') else ''}, "
        f"Linux {host.get('kernel')}, Python {host.get('python')}, "
        f"disk on {host.get('file_system')}, load {host.get('load', 0):.1f} at the start"
    )


def _verdict_cells(verdict: Verdict) -> list[str]:
    target, ratio = verdict.target, verdict.ratio
    what = f"{target.case}, processor time" if target.section == "disk-cpu" else target.case
    return [
        f"{what}: {target.subject} / {target.against}",
        f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})",
        f">= {target.wanted:.2f}",
        "reached" if verdict.reached else "missed",
    ]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def compared(before: list[Series], after: list[Series]) -> str:
    """Both runs' medians of what both have, and by how much the second is slower or faster."""
    earlier = {(one.section, one.case, one.subject): one for one in before}
    table = [["case", "subject", "before", "after", "change"]]
    for one in after:
        other = earlier.get((one.section, one.case, one.subject))
        if other is None or not other.median:
            continue
        change = (one.median / other.median - 1) * 100
        (low, high), (other_low, other_high) = one.spread, other.spread
        apart = low > other_high or high < other_low
        table.append(
            [
                f"{one.section}: {one.case}",
                one.subject,
                f"{number(other.median)} {one.unit}",
                f"{number(one.median)} {one.unit}",
                f"{change:+.0f} %{'' if apart else ' (quartiles overlap)'}",
            ]
        )
    if len(table) == 1:
        return "the two runs have no case in common"
    return "\n".join(_aligned(table))


_STYLE = """
body { font: 15px sans-serif; margin: 2em; } table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; }
.bar { background: #69c; height: .7em; display: inline-block; }
"""


def page(host: dict[str, Any], series: list[Series]) -> str:
    """The same as one HTML file: each median with a bar, scaled to its case's largest."""
    escape = html.escape
    parts = [f"<!doctype html><title>pyvmm bench</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>pyvmm bench</h1><p>{escape(machine(host))}</p>")
    found = verdicts(series)
    if found:
        parts.append("<h2>Ratios of speeds</h2><table>")
        for verdict in found:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in _verdict_cells(verdict))
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    for title, _, rows in sections(series):
        parts.append(f"<h2>{escape(title)}</h2><table>")
        for row in rows:
            largest = max(one.median for one in row if one is not None) or 1.0
            for place, one in enumerate(filter(None, row)):
                width = 20 * one.median / largest
                parts.append(
                    f"<tr><td>{escape(one.case) if place == 0 else ''}</td>"
                    f"<td>{escape(one.subject)}</td><td>{_cell(one)} {one.unit}</td>"
                    f'<td><span class="bar" style="width:{width:.2f}em"></span></td></tr>'
                )
        parts.append("</table>")
    return "\n".join(parts) + "\n"
