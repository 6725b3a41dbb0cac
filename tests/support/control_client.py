"""A client of a control socket, which needs nothing of pyvmm's."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


def ask(path: Path, command: str, *, seconds: float, **more: object) -> dict[str, Any]:
    """One request on a connection of its own; the answer. Raises TimeoutError after that time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(str(path))
        connection.sendall(json.dumps({"command": command, **more}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            answer: dict[str, Any] = json.loads(lines.readline())
    return answer
