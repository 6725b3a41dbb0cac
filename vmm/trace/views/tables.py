"""A summary, or several side by side, as tables of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vmm.trace.views.units import bytes_text, count_text, time_text

Summary = dict[str, Any]
NOT_TOLD = "not told"
"""Instead of a number that the host could not count: its guest shares pages without telling it."""


class Row(NamedTuple):
    """`cells`: one for each trace; `change`: of the second against the first, where that is a
    number."""

    label: str
    cells: list[str]
    change: str = ""


class Table(NamedTuple):
    title: str
    rows: list[Row]


class _Lines:
    """Collects the rows of one table: a value is looked up in each of the summaries."""

    def __init__(self, title: str, summaries: Sequence[Summary]) -> None:
        self.table = Table(title, [])
        self._summaries = summaries

    def text(self, label: str, look_up: Callable[[Summary], str]) -> None:
        self.table.rows.append(Row(label, [look_up(summary) for summary in self._summaries]))

    def number(
        self,
        label: str,
        path: str,
        show: Callable[[float], str] = count_text,
        root: Sequence[str] = (),
    ) -> None:
        keys = [*root, *path.split("/")]
        values = [_at(s, keys) if _is_known(s, keys) else None for s in self._summaries]
        if any(values):
            cells = [
                show(value) if value is not None else "-" if _is_known(summary, keys) else NOT_TOLD
                for value, summary in zip(values, self._summaries, strict=True)
            ]
            self.table.rows.append(Row(label, cells, _change(values)))


def _at(summary: Summary, path: Sequence[str]) -> float | None:
    found: Any = summary
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found if isinstance(found, int | float) else None


def _is_known(summary: Summary, keys: Sequence[str]) -> bool:
    """Whether the host had a way to know this number of conversions or states."""
    of_states = keys[0] == "conversions" or (keys[0] == "memory" and keys[1] != "ram_bytes")
    return not of_states or bool(summary["memory"]["told"])


MOST_CHANGES = 12
"""Numbers that lead the comparison of two traces."""
_SAME = 1.1
"""How much larger one number may be than the other and still say nothing new."""


def changes(made: Sequence[Table]) -> list[Row]:
    """What is not the same in two traces: words first, then numbers, the largest change first.
    Nothing for one trace."""
    words: list[Row] = []
    numbers: list[tuple[float, Row]] = []
    for table in made:
        for row in table.rows:
            if len(row.cells) != 2 or row.cells[0] == row.cells[1] or row.label in _OWN:
                continue
            label = row.label if table.title == "run" else f"{table.title}: {row.label.strip()}"
            there = row._replace(label=label)
            if row.change.endswith("x"):
                ratio = float(row.change[:-1])
                if ratio == 0 or max(ratio, 1 / ratio) >= _SAME:
                    numbers.append((abs(math.log(max(ratio, 1e-9))), there))
            elif row.cells[0] == "-" or row.cells[0].startswith("0"):
                numbers.append((math.inf, there))
            else:
                words.append(there)
    numbers.sort(key=lambda each: -each[0])
    return [*words, *(row for _, row in numbers[:MOST_CHANGES])]


_OWN = ("trace", "90 %", "99 %", "longest")
"""What is never the same, and what the number above it says already."""


def _change(values: Sequence[float | None]) -> str:
    if len(values) != 2 or not values[0] or values[1] is None:
        return ""
    return f"{values[1] / values[0]:.3g}x"


def _names(summaries: Sequence[Summary], section: str) -> list[str]:
    """The keys of a section in any of the summaries, the first one's order first."""
    return list(dict.fromkeys(name for summary in summaries for name in summary[section]))


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """All that there is to say; rows that are zero everywhere are left out."""
    return [
        table
        for table in (
            _run(summaries),
            *(_direction(summaries, kind) for kind in ("share", "unshare")),
            _memory(summaries),
            *(_device(summaries, name) for name in _names(summaries, "io")),
            *(_lent(summaries, name) for name in _names(summaries, "lending")),
            _exits(summaries),
        )
        if table.rows
    ]


def _run(summaries: Sequence[Summary]) -> Table:
    lines = _Lines("run", summaries)
    lines.text("trace", lambda s: s["path"])
    lines.text("guest ended with", _ending)
    lines.text("scheme, doorbell", lambda s: _joined(s["run"]["scheme"], s["run"]["doorbell"]))
    lines.text("private, shared side", lambda s: _backings(s["run"]["backings"] or {}))
    lines.text("policies", lambda s: _joined(*(" ".join(p) for p in s["run"]["policies"] or [])))
    lines.number("time", "seconds", lambda seconds: time_text(seconds * 1e9))
    lines.number("events", "events")
    lines.number("torn events left out", "torn_events")
    lines.number("events after the trace was full", "dropped_events")
    lines.number("faults", "faults")
    return lines.table


def _ending(summary: Summary) -> str:
    if not summary["complete"]:
        return "unknown: the run did not end its trace (killed?)"
    guest = summary["guest"] or {}
    return _joined(guest.get("exit"), guest.get("reason"), between=": ")


def _joined(*words: str | None, between: str = ", ") -> str:
    return between.join(word for word in words if word) or "none"


def _backings(backings: dict[str, str | None]) -> str:
    return f"{backings.get('private') or 'none'}, {backings.get('shared') or 'unknown'}"


def _direction(summaries: Sequence[Summary], kind: str) -> Table:
    lines = _Lines(f"{kind} requests", summaries)
    root = ("conversions", kind)
    lines.number("requests", "requests", root=root)
    lines.number("bytes asked for and granted", "bytes", bytes_text, root)
    for key, label in (
        ("denied", "refused by a policy"),
        ("partial", "granted in part"),
        ("failed", "invalid or failed"),
    ):
        lines.number(label, key, root=root)
    for word in ("defer", "convert"):
        lines.number(f"decided: {word}", f"decisions/{word}", root=root)
    _latency(lines, root)
    return lines.table


def _latency(lines: _Lines, root: Sequence[str]) -> None:
    for key, label in (
        ("p50", "latency, median"),
        ("p90", "90 %"),
        ("p99", "99 %"),
        ("max", "longest"),
        ("total", "all together"),
    ):
        lines.number(label, f"latency_ns/{key}", time_text, root)


def _memory(summaries: Sequence[Summary]) -> Table:
    lines = _Lines("memory", summaries)
    root = ("memory",)
    lines.number("guest RAM", "ram_bytes", bytes_text, root)
    if not all(summary["memory"]["told"] for summary in summaries):
        lines.text("shares and states", lambda s: "told" if s["memory"]["told"] else NOT_TOLD)
    lines.number("shared at first", "shared_bytes_first", bytes_text, root)
    lines.number("shared at most", "shared_bytes_peak", bytes_text, root)
    lines.number("shared on average", "shared_bytes_mean", bytes_text, root)
    lines.number("shared at the end", "shared_bytes_last", bytes_text, root)
    lines.number("deferred at most", "deferred_bytes_peak", bytes_text, root)
    lines.number("changes of state", "changes", root=root)
    if any(summary["bounce_buffer"] for summary in summaries):
        lines.text("bounce buffer (swiotlb), inferred", _bounce_buffer)
    return lines.table


def _bounce_buffer(summary: Summary) -> str:
    found = summary["bounce_buffer"]
    return "none seen" if found is None else f"{bytes_text(found['bytes'])} at {found['gpa']:#x}"


def _device(summaries: Sequence[Summary], name: str) -> Table:
    lines = _Lines(f"I/O of {name}", summaries)
    root = ("io", name)
    lines.number("requests", "requests", root=root)
    lines.number("buffers filled for the guest", "to_guest/bytes", bytes_text, root)
    lines.number("buffers read from the guest", "from_guest/bytes", bytes_text, root)
    lines.number("times stopped by bad rings or memory", "stopped", root=root)
    _latency(lines, root)
    return lines.table


def _lent(summaries: Sequence[Summary], name: str) -> Table:
    lines = _Lines(f"private pages lent to {name}", summaries)
    root = ("lending", name)
    lines.number("mappings", "lends/requests", root=root)
    lines.number("their bytes", "lends/bytes", bytes_text, root)
    lines.number("refused by a policy", "refused", root=root)
    lines.number("lent at the same time, at most", "peak_bytes", bytes_text, root)
    lines.number("taken back", "returns", root=root)
    for key, label in (("p50", "lent for, median"), ("p99", "99 %"), ("max", "longest")):
        lines.number(label, f"lent_ns/{key}", time_text, root)
    limits = {
        int(limit)
        for summary in summaries
        for limit in summary["lending"].get(name, {}).get("lent_us", {})
    }
    for limit in sorted(limits):
        lines.number(f"lent for less than {limit} us", f"lent_us/{limit}", root=root)
    return lines.table


def _exits(summaries: Sequence[Summary]) -> Table:
    lines = _Lines("exits", summaries)
    for name in _names(summaries, "exits"):
        lines.number(name, f"exits/{name}/count")
        lines.number("  in user space", f"exits/{name}/spent_ns", time_text)
    for port in _names(summaries, "io_ports"):
        lines.number(f"port {port}", f"io_ports/{port}")
    return lines.table


def refusal_lines(summary: Summary) -> list[str]:
    """One line for each kind of refusal."""
    lines = []
    for found in summary["refusals"]:
        by = found["by"] or "a policy"
        why = {"none": "invalid", "deny": f"refused by {by}", "allow": "failed on the host"}.get(
            found["decision"], f"{found['decision']} by {by}"
        )
        if found["kind"] == "io-refused":
            why = "stopped: bad rings, or memory that is private or not there"
        lines.append(
            f"{count_text(found['count'])} x {found['kind']} ({found['from']}): {why}, "
            f"{found['errno']}, first at {found['first_s']:.3f} s"
        )
    return lines
