"""Results as an SVG picture: a bar for each median, with a line from quartile to quartile."""

from __future__ import annotations

import html
from typing import Any

from vmm.bench.results import machine, number, sections
from vmm.bench.series import Series

_WIDTH, _LEFT, _LONGEST, _ROW = 900, 300, 420, 15
_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")
"""Told apart by people who don't see all colours, too (Paul Tol's bright scheme)."""


def chart(host: dict[str, Any], series: list[Series]) -> str:
    """All cases, each scaled to its largest median; a colour for each subject of a section."""
    parts = [_text(10, 20, machine(host), size=11)]
    y = 34
    for title, subjects, rows in sections(series):
        y += 26
        parts.append(_text(10, y, title, size=15))
        colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(subjects)}
        for row in rows:
            measured = [one for one in row if one is not None]
            y += 8
            largest = max(max(one.median, one.spread[1]) for one in measured) or 1.0
            for place, one in enumerate(measured):
                y += _ROW
                if place == 0:
                    parts.append(_text(10, y, one.case))
                parts += _bar(y, one, _LONGEST / largest, colours[one.subject])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 16}"'
    head += f' viewBox="0 0 {_WIDTH} {y + 16}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _bar(y: int, one: Series, scale: float, colour: str) -> list[str]:
    low, high = (_LEFT + value * scale for value in one.spread)
    label = f"{one.subject}: {number(one.median)} {one.unit}"
    middle = y - 4.5
    return [
        f'<rect x="{_LEFT}" y="{y - 10}" width="{one.median * scale:.1f}" height="11" '
        f'fill="{colour}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="black"/>',
        _text(max(high, _LEFT + one.median * scale) + 6, y - 1, label, size=11),
    ]


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{html.escape(text)}</text>'
