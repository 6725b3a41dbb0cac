"""A policy that, asked for the first time, tries what a sandbox should refuse, and says how each
attempt ended: one JSON object on stderr, by name "ok" or the errno's name.

Run as a policy of the command; also the list of attempts for programs in a sandbox of their own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping

from vmm.policy import Allow, Decision, Event, Policy, View

_LIBC = ctypes.CDLL(None, use_errno=True)
_PTRACE = {"x86_64": 101, "aarch64": 117}[os.uname().machine]
_PTRACE_ATTACH = 16
_TIOCSTI = 0x5412


def _system_call(*words: int) -> int:
    result: int = _LIBC.syscall(*words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def _open_files(wanted: str) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if wanted in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
        except OSError:
            continue  # the listing's own
    if not found:
        raise LookupError(f"no {wanted} is open")
    return found


def _map(wanted: str, flags: int) -> None:
    for fd in _open_files(wanted):
        mmap.mmap(fd, 4096, flags=flags).close()


def _open_again(wanted: str) -> None:
    for fd in _open_files(wanted):
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))


def _executable_memory() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def _pipe() -> None:
    for fd in os.pipe():
        os.close(fd)


def _limit() -> None:
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
    except ValueError:  # what Python makes of EPERM
        raise PermissionError(errno.EPERM, "") from None


def _thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


ATTEMPTS: dict[str, Callable[[], object]] = {
    "read a file": lambda: open("/etc/passwd").close(),
    "read a file here": lambda: open("secret.txt").close(),
    "write a file here": lambda: open("new.txt", "w").close(),
    "write a file in /tmp": lambda: open("/tmp/pyvmm-new.txt", "w").close(),
    "remove a file": lambda: os.unlink("secret.txt"),
    "rename a file": lambda: os.rename("secret.txt", "other.txt"),
    "list a folder": lambda: os.listdir("/etc"),
    "fork": _fork,
    "exec": lambda: os.execv("/nowhere", ["nowhere"]),
    "spawn": lambda: subprocess.run(["/bin/true"], check=True),
    "TCP socket": lambda: socket.socket().close(),
    "Unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "ptrace": lambda: _system_call(_PTRACE, _PTRACE_ATTACH, 0, 0, 0),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "map the disk": lambda: _map("disk.img", mmap.MAP_SHARED),
    "map the disk privately": lambda: _map("disk.img", mmap.MAP_PRIVATE),
    "map guest memory": lambda: _map("memfd:pyvmm", mmap.MAP_SHARED),
    "copy a descriptor": lambda: os.close(os.dup(_open_files("disk.img")[0])),
    "open the disk again": lambda: open(f"/proc/self/fd/{_open_files('disk.img')[0]}").close(),
    "open guest memory again": lambda: _open_again("memfd:pyvmm"),
    "executable memory": _executable_memory,
    "new memfd": lambda: os.close(os.memfd_create("new")),
    "type on the terminal": lambda: fcntl.ioctl(2, _TIOCSTI, b"x"),
    "raise a limit": _limit,
    "change root": lambda: os.chroot("/nowhere"),
    "become another user": lambda: os.setuid(os.getuid()),
    # What has to go on working.
    "a thread": _thread,
    "a module of Python's": lambda: __import__("xml.dom.minidom"),
    "a compiled module": lambda: __import__("_elementtree"),
    "a pipe": _pipe,
    "time": lambda: __import__("time").localtime(),
    "random": lambda: os.urandom(8),
    "allowed file": lambda: open("allowed/file.txt", "w").close(),
}


def attempt_all(attempts: Mapping[str, Callable[[], object]] = ATTEMPTS) -> dict[str, str]:
    """How each attempt ended."""
    ended = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            ended[name] = "ok"
        except OSError as error:
            ended[name] = errno.errorcode[error.errno or 0]
        except LookupError:
            ended[name] = "not there"
    return ended


class Hostile(Policy):
    """Allows everything, after its attempts."""

    def __init__(self) -> None:
        self._asked = False

    def on_share(self, event: Event, view: View) -> Decision:
        if not self._asked:
            self._asked = True
            print("attempts:" + json.dumps(attempt_all()), file=sys.stderr, flush=True)
        return Allow()
