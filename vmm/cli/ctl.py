"""`pyvmm ctl PATH COMMAND`: one command to a running pyvmm's --control socket, its answer back."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from vmm.cli.output import printing
from vmm.core.errors import UsageError, tell
from vmm.core.near import did_you_mean
from vmm.core.suboptions import byte_size

USAGE = """\
usage: pyvmm ctl PATH status | pause | resume | dump-state | quit
       pyvmm ctl PATH convert share|unshare GPA SIZE
       pyvmm ctl PATH devices
       pyvmm ctl PATH device restart NAME
       pyvmm ctl PATH dump FILE [--with-private]
       pyvmm ctl PATH snapshot DIR [--with-private] [--then-quit]
       pyvmm ctl PATH follow

Asks the pyvmm that was started with --control PATH, and prints its answer as JSON. A refusal's
answer has the reason in "error". GPA is an address, as in 0x1000; SIZE is in bytes, or has a unit,
as in 64K or 2M. "device restart" starts a device's process anew, as of --disk FILE,process, or
has the back end that runs at vhost-user=SOCKET now take over; NAME is in "devices". "follow" prints
a line of JSON for each event, until the run or Ctrl-C ends it; a slow reader loses some and is told
how many.
"dump" makes an ELF core file of the shared memory and the processors, for gdb, crash and drgn.
"snapshot" makes a folder that pyvmm --restore DIR goes on from; --then-quit ends the run, so that
its disks stay as they are. Both stop the guest meanwhile, and with --with-private private memory is
in there, too, of a rehearsal.
exit status: 0 done, 1 refused, 2 bad usage, or nobody there
"""
_PATIENCE = 60.0  # seconds: a conversion may wait for device I/O
_LONG_PATIENCE = 3600.0  # and all of memory may go to a slow disk
COMMANDS = (
    "status", "pause", "resume", "dump-state", "convert", "devices", "device", "dump", "snapshot",
    "follow", "quit",
)  # fmt: skip


def run(words: Sequence[str]) -> int:
    """The exit status. Raises UsageError where nobody listens, and for bad usage."""
    if words and words[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    path, request = _request(words)
    if request["command"] in ("dump", "snapshot"):
        return _save(path, request)
    with _connected(path) as connection, connection.makefile("rb") as lines:
        with contextlib.suppress(ConnectionError):  # it has ended, or is about to say why not
            connection.sendall(json.dumps(request).encode() + b"\n")
        answer = _answer(path, lines)
        if answer.get("ok") is not True or request["command"] != "follow":
            with printing():
                print(json.dumps(answer, indent=2))
            return 0 if answer.get("ok") is True else 1
        connection.settimeout(None)
        return _follow(path, lines)


def _save(path: str, request: dict[str, Any]) -> int:
    """`dump` and `snapshot`, of which this process has the most to do."""
    from vmm.cli import ctl_saving  # the other commands do without

    with _connected(path, _LONG_PATIENCE) as connection, connection.makefile("rb") as lines:

        def ask(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
            with contextlib.suppress(ConnectionError):
                ctl_saving.send_files(connection, json.dumps(request).encode() + b"\n", files)
            return _answer(path, lines, _LONG_PATIENCE)

        def make() -> dict[str, Any]:
            if request["command"] == "dump":
                return ctl_saving.dump(ask, request["to"], with_private=request["--with-private"])
            return ctl_saving.snapshot(
                ask,
                request["to"],
                with_private=request["--with-private"],
                then_quit=request["--then-quit"],
            )

        answer = ctl_saving.carried_out(make)
    with printing():
        print(json.dumps(answer, indent=2))
    return 0 if answer.get("ok") is True else 1


def _saving_request(command: str, rest: list[str]) -> dict[str, Any]:
    known = ("--with-private", "--then-quit")[: 2 if command == "snapshot" else 1]
    names = [word for word in rest if word not in known]
    if len(names) != 1 or not names[0] or names[0].startswith("--"):
        what = " ".join(("DIR" if command == "snapshot" else "FILE", *(f"[{w}]" for w in known)))
        raise UsageError(
            f"ctl {command} takes {what}, not {' '.join(rest) or 'nothing'}; see pyvmm ctl --help"
        )
    return {"command": command, "to": names[0], **{word: word in rest for word in known}}


def _next_line(lines: BinaryIO) -> bytes:
    with contextlib.suppress(ConnectionError):  # not those of our own output
        return lines.readline()
    return b""


def _follow(path: str, lines: BinaryIO) -> int:
    """Print events to the run's end, or until nobody wants more."""
    last = b""
    with printing(), contextlib.suppress(KeyboardInterrupt):
        while line := _next_line(lines):
            last = line
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        if not last.startswith(b'{"event": "ended"'):
            tell(f"ctl {path}: the run has gone without saying how it ended; was it killed?")
            return 1
    return 0


def _request(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    match list(words):
        case [path, "convert", kind, gpa, size]:
            number = byte_size(size)  # hexadecimal is the other end's to read
            return path, {
                "command": "convert", "kind": kind, "gpa": gpa,
                "size": size if number is None else number,
            }  # fmt: skip
        case [_, "convert", *rest]:
            raise UsageError(
                f"ctl convert takes share|unshare GPA SIZE, not {' '.join(rest) or 'nothing'}; "
                "see pyvmm ctl --help"
            )
        case [path, "device", "restart", name]:
            return path, {"command": "restart-device", "device": name}
        case [_, "device", *rest]:
            raise UsageError(
                f"ctl device takes restart NAME, not {' '.join(rest) or 'nothing'}; "
                "see pyvmm ctl --help"
            )
        case [path, ("dump" | "snapshot") as command, *rest]:
            return path, _saving_request(command, rest)
        case [path, command] if command in COMMANDS:
            return path, {"command": command}
        case [_, command, *rest]:
            if command in COMMANDS:
                raise UsageError(f"ctl {command} takes no {' '.join(rest)}; see pyvmm ctl --help")
            remedy = did_you_mean(command, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
            raise UsageError(f"ctl has no command {command}; {remedy}; see pyvmm ctl --help")
    raise UsageError("pyvmm ctl needs PATH and a command; see pyvmm ctl --help")


@contextmanager
def _connected(path: str, patience: float = _PATIENCE) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience)
        try:
            connection.connect(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"ctl {path}: {reason}; give the PATH of a running pyvmm's --control"
            ) from None
        yield connection


def _answer(path: str, lines: BinaryIO, patience: float = _PATIENCE) -> dict[str, Any]:
    try:
        line = lines.readline()
    except TimeoutError:
        raise UsageError(
            f"ctl {path}: no answer within {patience:g} s; is that a running pyvmm's --control?"
        ) from None
    except ConnectionError:
        line = b""
    if not line.endswith(b"\n"):
        raise UsageError(f"ctl {path}: no answer; the run has ended")
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UsageError(
            f"ctl {path}: the answer is no JSON object; give the PATH of a running pyvmm's "
            "--control"
        )
    return answer
