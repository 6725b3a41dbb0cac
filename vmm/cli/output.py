"""Text on stdout: aligned tables, and readers that have seen enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmm.core.errors import OutputError

if TYPE_CHECKING:
    from vmm.trace.views.tables import Row


@contextmanager
def printing() -> Iterator[None]:
    """Around what prints: a closed pipe is no error. Raises OutputError, as for a full disk."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # The interpreter's own flush at exit must not stumble over it.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            raise OutputError(
                f"standard output could not be written: {error.strerror}; make room, or send it "
                "elsewhere"
            ) from error


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
