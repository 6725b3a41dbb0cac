"""The page: one HTML file with its data, style and script inside. It asks no network for anything.

The script draws what vmm.trace.views.charts works out; page.js says what it takes.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmm.core.output import Output
from vmm.trace.reader import Trace
from vmm.trace.states import STATES, bytes_over_time, initial_states, state_rows
from vmm.trace.summary import duration_ns
from vmm.trace.views import charts
from vmm.trace.views.tables import Summary, changes, refusal_lines, tables

_HERE = Path(__file__).parent


def write_page(output: Output, traces: Sequence[Trace], summaries: Sequence[Summary]) -> None:
    """Write the page for one trace, or for two side by side. Raises OutputError."""
    content = page(traces, summaries)
    with output.open() as file:
        file.write(content)


def page(traces: Sequence[Trace], summaries: Sequence[Summary]) -> str:
    """The whole page."""
    made = tables(summaries)
    data = {
        "states": list(STATES),
        "traces": [
            _trace_data(trace, summary) for trace, summary in zip(traces, summaries, strict=True)
        ],
        "tables": [
            {"title": table.title, "rows": [row._asdict() for row in table.rows]} for table in made
        ],
        "changes": [row._asdict() for row in changes(made)],
    }
    names = " and ".join(os.path.basename(os.path.normpath(trace.path)) for trace in traces)
    parts = {
        "title": html.escape(f"pyvmm trace: {names}"),
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "script": (_HERE / "page.js").read_text(encoding="utf-8"),
        # In a script element only "<" could end the data early.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (_HERE / "page.html").read_text(encoding="utf-8")
    before, _, rest = template.partition("@@")
    pieces = [before]
    while rest:
        name, _, rest = rest.partition("@@")
        text, _, rest = rest.partition("@@")
        pieces += [parts[name], text]
    return "".join(pieces)


def _trace_data(trace: Trace, summary: Summary) -> dict[str, Any]:
    """What the charts of one trace need. Times in microseconds, which is enough on a screen."""
    rows, initial, until = state_rows(trace), initial_states(trace), duration_ns(trace)
    drawn = charts.rectangles(rows, initial, until)
    longest = charts.longest_conversions(rows)
    times, shared = charts.points(bytes_over_time(rows, initial), until)
    decided = charts.decided_requests(trace)
    decided["rows"][0] = [time // 1000 for time in decided["rows"][0]]
    return {
        "summary": summary,
        "refusals": refusal_lines(summary),
        "until": until // 1000,
        "ram": charts.ram_ranges(trace),
        "blockBytes": drawn.block_bytes,
        "rects": [
            (drawn.start // 1000).tolist(),
            (drawn.end // 1000).tolist(),
            drawn.first.tolist(),
            drawn.blocks.tolist(),
            drawn.state.tolist(),
        ],
        "converting": [
            (rows.began[longest] // 1000).tolist(),
            (rows.end[longest] // 1000).tolist(),
            rows.gpa[longest].tolist(),
            rows.bytes[longest].tolist(),
        ],
        "decided": decided,
        "shared": [[time // 1000 for time in times], shared],
        "latency": charts.latency_histogram(trace),
        "io": charts.io_over_time(trace, until),
        "exits": charts.exits_over_time(trace, until),
    }
