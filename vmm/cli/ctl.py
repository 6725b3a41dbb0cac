"""`pyvmm ctl PATH COMMAND`: one command to a running pyvmm's --control socket, its answer back."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

from vmm.core.errors import UsageError

USAGE = """\
usage: pyvmm ctl PATH status | pause | resume | dump-state | quit
       pyvmm ctl PATH convert share|unshare GPA SIZE

Asks the pyvmm that was started with --control PATH, and prints its answer as JSON.
GPA and SIZE are bytes, as in 0x1000. Exit status: 0 done, 1 refused, 2 bad usage, or nobody there.
"""
_PATIENCE = 60.0  # seconds: a conversion may wait for device I/O


def run(words: Sequence[str]) -> int:
    """The exit status. Raises UsageError where nobody listens, and for bad usage."""
    if words and words[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    path, request = _request(words)
    answer = _ask(path, request)
    print(json.dumps(answer, indent=2))
    return 0 if answer.get("ok") is True else 1


def _request(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    match list(words):
        case [path, "convert", kind, gpa, size]:
            return path, {"command": "convert", "kind": kind, "gpa": gpa, "size": size}
        case [path, command] if command != "convert":
            return path, {"command": command}
    raise UsageError("pyvmm ctl needs PATH and a command; see pyvmm ctl --help")


def _ask(path: str, request: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE)
        try:
            connection.connect(path)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"ctl {path}: {reason}; give the PATH of a running pyvmm's --control"
            ) from None
    if not line.endswith(b"\n"):
        raise UsageError(f"ctl {path}: no answer; the run has ended")
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer
