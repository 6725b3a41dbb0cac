"""Text on stdout: aligned tables, and readers that have seen enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.trace.views.tables import Row


@contextmanager
def printing() -> Iterator[None]:
    """Around what prints: a closed pipe is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter's own flush at exit must not stumble over it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aligned(rows: Sequence[Row], label_width: int = 0) -> list[str]:
    """Labels, cells and changes in columns."""
    if not rows:
        return []
    label_width = max(label_width, *(len(row.label) + 2 for row in rows))
    widths = [max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row.cells, widths, strict=True)]
        lines.append("  ".join([f"  {row.label}".ljust(label_width + 2), *cells, row.change]))
    return [line.rstrip() for line in lines]
