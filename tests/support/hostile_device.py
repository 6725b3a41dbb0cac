"""`pyvmm` whose disks' processes, when they first have something to do, try what they may not, and
write how each attempt ended to the start of their disk: JSON, by name "ok" or the errno's name.
A vsock's process does so when it starts, and tells the program that listens on PATH_7; a console's
writes it to its first port's file, and has a socket as its second one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import runpy
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from tests.support.hostile_policy import _PTRACE, _PTRACE_ATTACH, _system_call, attempt_all
from vmm.core.unix_listener import UnixListener
from vmm.devices.process.back_end import BackEnd
from vmm.devices.process.front_end import ProcessDevice
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.console_backend import OutputFile, SocketServer
from vmm.devices.virtio.vsock import VirtioVsock, dial

ROOM = 4096
_KVM_GET_API_VERSION = 0xAE00
_PIDFD_GETFD = 438
_process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_done: list[bool] = []


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _thread() -> None:
    try:
        threading.Thread(target=lambda: None).start()
    except RuntimeError:  # what Python makes of EPERM
        raise PermissionError(errno.EPERM, "") from None


def _limit() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
    except ValueError:
        raise PermissionError(errno.EPERM, "") from None


def _read_process(pid: int) -> None:
    piece = ctypes.create_string_buffer(8)
    here = _Iovec(ctypes.addressof(piece), 8)
    if _process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(here), 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "")


def _attempts(fd: int, pyvmm: int) -> dict[str, Callable[[], object]]:
    parent = os.getppid()
    return {
        "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "write a file": lambda: os.open("new.txt", os.O_WRONLY | os.O_CREAT),
        "list a folder": lambda: os.listdir("/"),
        "look at a file": lambda: os.stat("/etc/passwd"),
        "remove a file": lambda: os.unlink("secret.txt"),
        "link a file": lambda: os.link("secret.txt", "other.txt"),
        "pyvmm's memory": lambda: os.open(f"/proc/{pyvmm}/mem", os.O_RDWR),
        "pyvmm's descriptors": lambda: os.listdir(f"/proc/{pyvmm}/fd"),
        **{
            f"pyvmm's descriptor {number}": lambda number=number: os.open(  # type: ignore[misc]
                f"/proc/{pyvmm}/fd/{number}", os.O_RDWR
            )
            for number in range(3, 12)
        },
        "a descriptor of pyvmm's": lambda: _system_call(_PIDFD_GETFD, 3, 5, 0),
        "the spawner's memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDWR),
        "own descriptors": lambda: os.listdir("/proc/self/fd"),
        "the disk again": lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
        "fork": _fork,
        "exec": lambda: os.execv("/nowhere", ["nowhere"]),
        "spawn": lambda: subprocess.run(["/bin/true"], check=True),
        "a thread": _thread,
        "TCP": lambda: socket.socket(socket.AF_INET),
        "a Unix socket": lambda: socket.socket(socket.AF_UNIX),
        "a pair of sockets": socket.socketpair,
        "ptrace": lambda: _system_call(_PTRACE, _PTRACE_ATTACH, 0, 0, 0),
        "read pyvmm": lambda: _read_process(pyvmm),
        "signal pyvmm": lambda: os.kill(pyvmm, 0),
        "signal the spawner": lambda: os.kill(parent, 0),
        "map the disk": lambda: mmap.mmap(fd, 4096),
        "map the disk privately": lambda: mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE),
        "executable memory": lambda: mmap.mmap(-1, 4096, prot=7),
        "a memfd": lambda: os.memfd_create("new"),
        "copy a descriptor": lambda: os.dup(fd),
        "KVM": lambda: fcntl.ioctl(fd, _KVM_GET_API_VERSION),
        "cut the disk": lambda: os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_END)),
        "a limit": _limit,
        "another user": lambda: os.setuid(os.getuid()),
        # What has to work.
        "read the disk": lambda: os.pread(fd, 512, 0),
        "write the disk": lambda: os.pwrite(fd, bytes(ROOM), 0),
        "sync the disk": lambda: os.fdatasync(fd),
        "memory": lambda: mmap.mmap(-1, 4096).close(),
        "time": time.monotonic,
        "random": lambda: os.urandom(8),
    }


MUST_WORK = {"read the disk", "write the disk", "sync the disk", "memory", "time", "random"}


PORT = 7
"""Where a vsock's process tells how its attempts ended."""
TAKES_CALLERS = {"a caller", "no file"}


def _socket_attempts(listener: UnixListener, pyvmm: int) -> dict[str, Callable[[], object]]:
    """As a disk's process; and what there is to try with sockets."""
    common = _attempts(listener.fd, pyvmm)
    own = listener._socket

    def call() -> None:
        """Itself, by what it takes callers at: another process may, and it may not."""
        own.connect(listener.path)

    def take() -> None:
        assert listener.accept() is None

    return {
        **{name: what for name, what in common.items() if not name.endswith("the disk")},
        "connect": call,
        "connect elsewhere": lambda: own.connect("elsewhere"),
        "bind": lambda: own.bind("bound"),
        "listen": own.listen,
        "a port's program by hand": lambda: dial(listener.path, PORT),
        "a caller": take,
        "no file": lambda: os.close(os.eventfd(0)),
    }


def main() -> None:
    process, pyvmm = VirtioBlock.process, os.getpid()

    def hostile(device: VirtioBlock, queue: int) -> bool:
        if not _done:
            _done.append(True)
            fd = device._disk.fd
            told = json.dumps(attempt_all(_attempts(fd, pyvmm))).encode()
            os.pwrite(fd, told.ljust(ROOM), 0)
        return process(device, queue)

    run, start = BackEnd.run, ProcessDevice.start

    def hostile_run(back_end: BackEnd, confined: int, landlock: int) -> None:
        device = back_end._device
        if isinstance(device, VirtioVsock):
            told = json.dumps(attempt_all(_socket_attempts(device.listener, pyvmm))).encode()
            with device.dial(PORT) as link:
                link.sendall(told)
        elif isinstance(device, VirtioConsole):
            file, server = (port.backend for port in device._ports)
            assert isinstance(file, OutputFile) and isinstance(server, SocketServer)
            attempts = _socket_attempts(server._listener, pyvmm)
            attempts["be given a socket"] = lambda: server._listener._socket.recvmsg(1)
            os.write(file.fd, json.dumps(attempt_all(attempts)).encode())
        run(back_end, confined, landlock)

    def start_and_wait(device: ProcessDevice) -> None:
        """For its first word: the guest may be done before it has tried all."""
        start(device)
        assert device._socket is not None
        select.select([device._socket], [], [])

    VirtioBlock.process = hostile  # type: ignore[method-assign, assignment]
    BackEnd.run = hostile_run  # type: ignore[method-assign, assignment]
    ProcessDevice.start = start_and_wait  # type: ignore[method-assign, assignment]
    sys.argv[0] = "pyvmm"
    runpy.run_module("vmm", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
