"""Child processes that must not outlive this one, whichever way it ends."""

from __future__ import annotations

import sys

# prctl(PR_SET_PDEATHSIG = 1, SIGKILL = 9), then the command itself.
_WRAPPER = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
)


def tied(command: list[str]) -> list[str]:
    """The words that start `command` (by its path) so that it ends with its parent."""
    return [sys.executable, "-I", "-S", "-c", _WRAPPER, *command]
