"""In programs: calls fail within a block, by the rules of the environment (see shim.c)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

from tests.injection.injecting import FIRST, arm
from tests.injection.recording import BEGIN, END_OF_IT

SIZE = 1 << 16
_rule = 0
"""Which of the environment's rules is meant."""
_ARMED = ctypes.c_int.in_dll(ctypes.CDLL(None), "pyvmm_shim_armed")


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Within the block calls fail as the environment says (see shim.c)."""
    os.path.exists(BEGIN)  # who records the calls sees it
    _ARMED.value = _rule + 2
    try:
        yield
    finally:
        _ARMED.value = 0
        os.path.exists(END_OF_IT)


@contextlib.contextmanager
def failing_everywhere() -> Iterator[None]:
    """As `failing`, and in all processes that were started here."""
    counts = os.open(os.environ["PYVMM_INJECT_COUNTS"], os.O_WRONLY | os.O_CLOEXEC)
    try:
        arm(counts, FIRST + _rule)
        os.path.exists(BEGIN)
        yield
    finally:
        os.path.exists(END_OF_IT)
        arm(counts, 0)
        os.close(counts)


def pattern(size: int) -> bytes:
    return bytes(range(1, 252)) * (size // 251) + bytes(range(1, 1 + size % 251))


def line_of(caller: socket.socket) -> bool:
    """Whether a whole line comes; False where the other side hangs up."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            piece = os.read(caller.fileno(), 4096)
            if not piece:
                return False
            data += piece
    except ConnectionResetError:
        return False
    return True


def next_rule() -> None:
    """Another program: the next of the environment's rules is meant."""
    global _rule
    _rule += 1
