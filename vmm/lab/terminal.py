"""Whether the host's end of the console is a terminal, and how large it is."""

from __future__ import annotations

import os
import sys


def interactive() -> bool:
    """Whether both ends of the console are a terminal."""
    try:
        return os.isatty(sys.stdin.fileno()) and os.isatty(sys.stdout.fileno())
    except (AttributeError, ValueError, OSError):
        return False  # closed, or replaced by something that is no file


def size() -> tuple[int, int]:
    """Rows and columns."""
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    return rows or 24, columns or 80
