"""The page: one HTML file with tables and Pareto plots. It asks no network for anything, and has no
script."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

from vmm.core.output import Output
from vmm.sweeps import chart
from vmm.sweeps.chart import Point
from vmm.sweeps.results import EXPOSED, REFUSED, WAITED, Group, Results, Spread
from vmm.trace.views.units import bytes_text, count_text, time_text

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 16, 44
_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
.front {{ fill: none; stroke: var(--mark); stroke-width: 1.6; }}
.of-all {{ stroke: var(--dim); stroke-width: 1.2; stroke-dasharray: 2 3; }}
td {{ white-space: nowrap; }}
td:first-child {{ white-space: normal; width: auto; }}
.card {{ overflow-x: auto; }}
.mark {{ display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 7px; }}
</style>
</head>
<body>
<main>
"""
_TAIL = "</main>\n</body>\n</html>\n"
_PLOT_NOTE = (
    "To the left the guest waits less, further down the host sees less. Dots are means over "
    "repetitions, bars reach from the least to the most. The line is the Pareto front: of the "
    "policies that grant everything, those that no other beats."
)
_REFUSING_NOTE = (
    " Hollow dots refuse requests or end the guest early, which may keep it from working; the "
    "dotted line is the front with them."
)


def write_page(output: Output, results: Results) -> None:
    """Write it. Raises OutputError."""
    with output.open() as file:
        for piece in page(results):
            file.write(piece)


def page(results: Results) -> Iterator[str]:
    """The whole page, in pieces."""
    groups = results.groups()
    # The style is that of the traces' page.
    style = resources.files("vmm.trace.views").joinpath("page.css").read_text(encoding="utf-8")
    title = html.escape(f"pyvmm sweep: {results.name}")
    yield _HEAD.format(title=title, style=style)
    yield f"<h1>{title}</h1>\n"
    yield _tiles(results, groups)
    colours = chart.colours(groups)
    workloads = list(dict.fromkeys(group.workload_label for group in groups))
    yield '<div class="grid">\n'
    for workload in workloads:
        mine = [group for group in groups if group.workload_label == workload]
        yield _plot_card(workload, mine, colours)
    yield "</div>\n"
    for workload in workloads:
        mine = [group for group in groups if group.workload_label == workload]
        yield _table_card(workload, mine, colours)
    yield from _failures(results)
    yield _TAIL


def _tiles(results: Results, groups: Sequence[Group]) -> str:
    tiles = [
        ("cells", len(results.cells)),
        ("policies and parameters", len({group.policy_label for group in groups})),
        ("workloads", len({group.workload_label for group in groups})),
        ("failed", len(results.failed)),
        ("not run", results.missing),
    ]
    inner = "".join(
        f'<div class="tile"><b>{count_text(value)}</b><span>{label}</span></div>'
        for label, value in tiles
    )
    return f'<div class="tiles">{inner}</div>\n'


def _plot_card(workload: str, groups: Sequence[Group], colours: dict[str, str]) -> str:
    drawn = chart.points(groups)
    names = dict.fromkeys(point.group.policy for point in drawn)
    key = "".join(
        f'<span><i style="background:{colours[name]}"></i>{html.escape(name)}</span>'
        for name in names
    )
    body = plot(drawn, colours) if drawn else "<p>No cell has figures.</p>"
    note = _PLOT_NOTE
    if any(not point.group.counts for point in drawn):
        note += _REFUSING_NOTE
    return (
        f'<section class="card" data-chart="pareto"><h2>{html.escape(workload)}: exposed bytes '
        f'against guest waiting time</h2><p class="note">{note}</p>'
        f'<div class="legend">{key}</div>{body}</section>\n'
    )


def plot(drawn: Sequence[Point], colours: dict[str, str]) -> str:
    """The Pareto plot of one workload, as an SVG element."""
    across = chart.axis([point.x_range for point in drawn], 10)
    upwards = chart.axis([point.y_range for point in drawn], 2)

    def x(value: float) -> float:
        return _LEFT + across.at(value) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - upwards.at(value) * (_HEIGHT - _BOTTOM - _TOP)

    pieces = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in upwards.ticks:
        at = f"{y(value):.1f}"
        pieces.append(
            f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>'
            f'<text x="{_LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{bytes_text(value)}</text>"
        )
    for value in across.ticks:
        at = f"{x(value):.1f}"
        pieces.append(
            f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{time_text(value)}</text>'
        )
    pieces.append(
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">the guest waits'
        f"{' (logarithmic)' if across.is_log else ''}</text>"
        f'<text x="{_LEFT}" y="{_TOP - 4}">exposed to the host on average'
        f"{' (logarithmic)' if upwards.is_log else ''}</text>"
    )
    for of_all in (True, False):
        corners = chart.front_line(drawn, of_all=of_all)
        if len(corners) > 1:
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
            kind = "front of-all" if of_all else "front"
            pieces.append(f'<polyline class="{kind}" points="{path}"/>')
    for point in sorted(drawn, key=lambda point: point.group.on_front):  # these on top
        bars = (
            (x(point.x_range[0]), x(point.x_range[1]), y(point.y), y(point.y)),
            (x(point.x), x(point.x), y(point.y_range[0]), y(point.y_range[1])),
        )
        for x1, x2, y1, y2 in bars:
            if abs(x2 - x1) + abs(y2 - y1) > 1:
                pieces.append(
                    f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" '
                    f'stroke="{colours[point.group.policy]}" opacity="0.6"/>'
                )
        pieces.append(_dot(point, x(point.x), y(point.y), colours))
    return "".join([*pieces, "</svg>"])


def _dot(point: Point, x: float, y: float, colours: dict[str, str]) -> str:
    group = point.group
    colour = colours[group.policy]
    at = f'cx="{x:.1f}" cy="{y:.1f}"'
    fill = colour if group.counts else "none"
    ring = ""
    if group.on_front:
        ring = f'<circle {at} r="8.5" fill="none" stroke="var(--mark)" stroke-width="1.6"/>'
    lines = [
        group.policy_label,
        f"the guest waits {_spread_text(group.figures[WAITED], time_text)}",
        f"exposed {_spread_text(group.figures[EXPOSED], bytes_text)}",
        *([f"{count_text(group.figures[REFUSED].mean)} requests refused"]
          if group.figures[REFUSED].mean else []),
        *group.ended[:1],
    ]  # fmt: skip
    title = html.escape("\n".join(lines))
    return (
        f'<g{_FRONT if group.on_front else ""}>{ring}<circle {at} r="5" fill="{fill}" '
        f'stroke="{colour}" stroke-width="1.6"/><title>{title}</title></g>'
    )


_FRONT = ' data-front="yes"'


def _spread_text(spread: Spread, show: Callable[[float], str]) -> str:
    if spread.least == spread.most:
        return show(spread.mean)
    return f"{show(spread.mean)} ({show(spread.least)} to {show(spread.most)})"


def _table_card(workload: str, groups: Sequence[Group], colours: dict[str, str]) -> str:
    rows = []
    for group in groups:
        cells = [html.escape(group.policy_label)]
        if group.figures:
            cells += [
                _spread_text(group.figures[EXPOSED], bytes_text),
                _spread_text(group.figures[WAITED], time_text),
                count_text(group.figures[REFUSED].mean),
            ]
        else:
            cells += ["-", "-", "-"]
        runs = f"{group.cells - group.failed - group.missing}"
        cells.append(f"{runs}, {group.failed} failed" if group.failed else runs)
        why = "; ".join(
            [*(["on the front"] if group.on_front else []), *group.ended, *group.errors]
        )
        cells.append(html.escape(why))
        mark = f'<i class="mark" style="background:{colours[group.policy]}"></i>'
        inner = "".join(
            f"<td>{mark if not number else ''}{cell}</td>" for number, cell in enumerate(cells)
        )
        rows.append(f"<tr>{inner}</tr>")
    head = "".join(
        f"<th>{word}</th>"
        for word in ("policy", "exposed on average", "the guest waits", "refused", "runs", "")
    )
    return (
        f'<section class="card"><h2>{html.escape(workload)}</h2><table>'
        f"<tr>{head}</tr>{''.join(rows)}</table></section>\n"
    )


def _failures(results: Results) -> Iterator[str]:
    if not results.failed:
        return
    yield '<section class="card"><h2>Failures</h2><ul>'
    shown: dict[tuple[str, str], str] = {}
    for each in results.failed:
        assert each.result is not None
        at = (each.policy_label, each.result.error or "")
        shown.setdefault(at, each.result.log or "")
    for (policy, error), log in shown.items():
        yield f"<li><b>{html.escape(policy)}</b>: {html.escape(error)}"
        if log:
            yield f"<pre>{html.escape(log)}</pre>"
        yield "</li>"
    yield "</ul></section>\n"
