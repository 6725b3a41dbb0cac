"""Every virtio device with whoever attacks it from both ends, and a host whose calls fail."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvm_bindings import datapath, mapped
from tests.fuzz.drawing import Choices
from tests.fuzz.hostile_driver import HostileDriver
from vmm.devices.virtio import own
from vmm.devices.virtio.balloon_control import open_balloon
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.budget import Budget
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.net import VirtioNet
from vmm.devices.virtio.net_backend import Passt
from vmm.devices.virtio.rng import VirtioRng
from vmm.devices.virtio.vsock import open_vsock
from vmm.devices.virtio.vsock_packet import Header

SECTORS = 64


class Attacked(ABC):
    """A device, how to speak to it from both ends, and what has come out at the host's end."""

    inputs: frozenset[int] = frozenset()
    sizes: tuple[int, ...] = (1, 8, 16, 64, 300, 2000, 4096, 6000)
    """Of buffers that do no harm."""
    tail = 0
    """Bytes that the device writes at a request's end."""
    engine: str | None = None
    """What moves bytes between the device's file and guest memory."""

    def __init__(self) -> None:
        self.leaked = b""

    @abstractmethod
    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        """The device, with files in `folder`; `stack` ends what it needs besides."""

    def request(self, rng: random.Random) -> bytes:
        return rng.randbytes(rng.choice((1, 8, 100)))

    def host(self, rng: random.Random) -> None:  # noqa: B027  # many have no such end
        """Do something at the host's end."""

    def came_out(self) -> bytes:
        """All that the device has given to the host."""
        return self.leaked


class Disk(Attacked):
    queues = 1
    sizes = (512, 512, 1024, 4096)
    tail = 1

    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        self._fd = os.memfd_create("disk")
        os.truncate(self._fd, 512 * SECTORS)

        def punch(fd: int, offset: int, size: int) -> None:
            assert fd == self._fd and offset >= 0 and offset + size <= 512 * SECTORS
            os.pwrite(fd, bytes(size), offset)

        return VirtioBlock(
            DiskFile(self._fd, "disk", SECTORS, False, b"serial", queues=self.queues), punch
        )

    def request(self, rng: random.Random) -> bytes:
        kind = rng.choice((0, 0, 1, 1, 4, 8, 11, 13, 99, 0xFFFF_FFFF))
        sector = rng.choice((0, 1, 8, SECTORS - 1, SECTORS, 1 << 55, (1 << 64) - 1))
        header = struct.pack("<IIQ", kind, 0, sector)
        if kind in (11, 13):
            header += struct.pack("<QII", sector, rng.choice((0, 1, 8, 0xFFFF_FFFF)), 0)
        return header

    def came_out(self) -> bytes:
        assert os.fstat(self._fd).st_size == 512 * SECTORS
        return os.pread(self._fd, 512 * SECTORS, 0)


class DiskByMapping(Disk):
    """Private pages, and all past RAM's end, are a mistake away from being the kernel's buffer."""

    engine = "hva"


class DiskOfQueues(Disk):
    queues = 4


class RandomNumbers(Attacked):
    inputs = frozenset({0})

    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        return VirtioRng()


class Network(Attacked):
    inputs = frozenset({0})

    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        ours, self._far = socket.socketpair()
        self._far.setblocking(False)
        stack.callback(self._far.close)
        return VirtioNet(Passt(ours), b"\2\0\0\0\0\1")

    def request(self, rng: random.Random) -> bytes:
        return bytes(12) + rng.randbytes(rng.choice((0, 14, 60, 1514)))

    def host(self, rng: random.Random) -> None:  # many have no such end
        self._drain()
        with contextlib.suppress(OSError):
            if rng.random() < 0.9:
                size = rng.choice((0, 1, 60, 1514, 9000))
                self._far.send(struct.pack(">I", size) + rng.randbytes(size))
            elif rng.random() < 0.02:
                self._far.send(rng.randbytes(50))  # no frames: passt has gone mad

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._far.recv(1 << 20):
                self.leaked += data

    def came_out(self) -> bytes:
        self._drain()
        return self.leaked


class Sockets(Attacked):
    """What devices with Unix sockets have in common: programs that come, talk and go."""

    path: Path

    def __init__(self) -> None:
        super().__init__()
        self._clients: list[socket.socket] = []

    def greeting(self, rng: random.Random) -> bytes:
        return b""

    def host(self, rng: random.Random) -> None:  # many have no such end
        kind = rng.random()
        if kind < 0.2 and len(self._clients) < 5:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(0)
            try:
                client.connect(str(self.path))
                client.send(self.greeting(rng))
            except OSError:
                client.close()
                return
            self._clients.append(client)
        elif kind < 0.3 and self._clients:
            self._clients.pop(rng.randrange(len(self._clients))).close()
        elif self._clients:
            client = rng.choice(self._clients)
            with contextlib.suppress(OSError):
                if rng.random() < 0.1:
                    client.shutdown(socket.SHUT_WR)
                client.send(rng.randbytes(rng.choice((1, 100, 5000))))
        self.came_out()

    def came_out(self) -> bytes:
        for client in self._clients:
            with contextlib.suppress(OSError):
                while data := client.recv(1 << 16):
                    self.leaked += data
        return self.leaked


class Consoles(Sockets):
    inputs = frozenset({0, 2, 4, 6})

    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        self.path = folder / "c"
        self._file = folder / "out"
        return open_console(
            [f"file={self._file}", f"socket={self.path},name=port", f"socket={folder / 'd'}"]
        )

    def request(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            port = rng.choice((0, 1, 1, 2, 3, 0xFFFF_FFFF))
            return struct.pack("<IHH", port, rng.randrange(9), rng.choice((0, 1, 1, 0xFFFF)))
        return rng.randbytes(rng.choice((1, 7, 100, 3000)))

    def came_out(self) -> bytes:
        return super().came_out() + self._file.read_bytes()


class Vsock(Sockets):
    inputs = frozenset({0, 2})

    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        self.path = folder / "v"
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(f"{self.path}_1")
        self._listener.listen()
        self._listener.setblocking(False)
        return open_vsock(f"path={self.path}")

    def greeting(self, rng: random.Random) -> bytes:
        return rng.choice((b"CONNECT 1\n", b"CONNECT 2\nhello", b"CONN", b"x" * 50))

    def host(self, rng: random.Random) -> None:  # many have no such end
        with contextlib.suppress(OSError):
            link, _ = self._listener.accept()
            link.setblocking(False)
            self._clients.append(link)
        super().host(rng)

    def request(self, rng: random.Random) -> bytes:
        data = rng.randbytes(rng.choice((0, 0, 10, 2000)))
        length = len(data) if rng.random() < 0.95 else rng.getrandbits(32)
        host_port = rng.choice((1, 1, 1, 1, 2, (1 << 30) + 1, (1 << 30) + 2, rng.getrandbits(32)))
        return (
            Header(
                3 if rng.random() < 0.95 else 9, 2 if rng.random() < 0.95 else 5,
                rng.choice((1, 1, 1, 2)), host_port, length, rng.choice((1, 1, 1, 1, 2)),
                rng.choice((1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 99)), rng.choice((0, 1, 2, 3)),
                rng.choice((0, 1, 4096, 65536, 0xFFFF_FFFF)), rng.choice((0, 5, 0xFFFF_FFFF)),
            ).pack()
            + data
        )  # fmt: skip


class Balloon(Sockets):
    inputs = frozenset({3, 4})

    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        self.path = folder / "b"
        return open_balloon(f"size=64K,control={self.path}", 64 << 12)

    def greeting(self, rng: random.Random) -> bytes:
        return rng.choice((b"stats\n", b"size 1M\n", b"size 9G\n", b"si", b"\xff\n", b"\n"))

    def request(self, rng: random.Random) -> bytes:
        # Never the rings' own pages: giving those up ends every talk at once.
        pages = [rng.randrange(28, 60) for _ in range(rng.choice((0, 1, 5)))]
        if rng.random() < 0.05:
            pages.append(rng.getrandbits(32))
        return struct.pack(f"<{len(pages)}I", *pages) + (b"x" if rng.random() < 0.02 else b"")


class _Echo(own.VirtioDevice):
    """A device of the user's own: it answers with what it was asked, and holds it to a bound."""

    device_id = 42
    queue_sizes = (16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.asked = b""

    def answer(self, queue: int, request: bytes, room: int) -> bytes:
        assert len(request) <= own.MOST_BYTES and 0 <= room <= own.MOST_BYTES
        self.asked = request
        return (bytes([queue]) + request)[:room]


class OwnDevice(Attacked):
    def device(self, folder: Path, stack: ExitStack) -> VirtioDevice:
        self._echo = _Echo()
        return self._echo

    def came_out(self) -> bytes:
        return self._echo.asked


DEVICES: dict[str, Callable[[], Attacked]] = {
    "blk": Disk, "blk-hva": DiskByMapping, "blk-mq": DiskOfQueues, "rng": RandomNumbers,
    "net": Network, "console": Consoles, "vsock": Vsock, "balloon": Balloon, "own": OwnDevice,
}  # fmt: skip


# --- a host's time ---


class Clock:
    """Time that passes by being looked at, so that a turn is as long on every machine, and the
    same input does the same each time."""

    def __init__(self, step: float) -> None:
        """Each look is so many seconds after the one before."""
        self._step = step
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self._step
        return self._now


QUICK, SLOW = 0.0001, 0.001
"""Hosts on which a turn is over after thirty looks, and after three."""


# --- a host that fails ---

# No EINTR: Python's own calls are repeated by Python (PEP 475), fdops' by fdops.
_NUMBERS = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EPIPE, errno.EMFILE)

_OS_CALLS = (
    "pread", "pwrite", "read", "write", "preadv", "pwritev", "splice", "fdatasync", "getrandom",
)  # fmt: skip
_DATAPATH_CALLS = ("pread_many", "pwrite_many", "move_many")
_MAPPED_CALLS = ("move_in", "move_out")
_SOCKET_CALLS = ("send", "recv", "accept", "connect")
# What fails as a whole or not at all.
_WHOLE = (
    *("fdatasync", "preadv", "pwritev", "accept", "connect"), *_DATAPATH_CALLS, *_MAPPED_CALLS,
)  # fmt: skip


class FailingHost:
    """The system calls of the data path; `on` makes some of them fail or stop half way."""

    def __init__(self, rng: random.Random, stack: ExitStack) -> None:
        """The calls are what they were when `stack` ends."""
        self.on = False
        self.failed = 0
        self._rng = rng
        for owner, names in (
            (os, _OS_CALLS),
            (datapath, _DATAPATH_CALLS),
            (mapped, _MAPPED_CALLS),
            (socket.socket, _SOCKET_CALLS),
        ):
            for name in names:
                stack.enter_context(
                    patch.object(owner, name, self._failing(getattr(owner, name), name))
                )

    def _failing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            # A host that fails at everything for good is none that anything could be done on.
            over = isinstance(self._rng, Choices) and self._rng.spent
            if self.on and not over and self._rng.random() < 0.03:
                self.failed += 1
                if self._rng.random() < 0.7 or name in _WHOLE:
                    # A page that the kernel can't have is EFAULT where a mapping is the buffer.
                    more = (errno.EFAULT,) * 3 if name in _MAPPED_CALLS else ()
                    number = self._rng.choice(_NUMBERS + more)
                    raise OSError(number, os.strerror(number))
                arguments = self._shortened(name, arguments)
            return call(*arguments, **keywords)

        return wrapped

    def _shortened(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Fewer bytes than were asked for: a short read or write."""
        words = list(arguments)
        at = {"splice": 2, "getrandom": 0}.get(name, 1)
        if at < len(words):
            what = words[at]
            words[at] = max(what // 2, 1) if isinstance(what, int) else memoryview(what)[:1]
        return tuple(words)


def _surprised(error: Exception) -> Exception:
    """A mistake of the device's own, which costs a guest that device and us nothing: say so."""
    raise AssertionError(f"a fault of the device's own: {error!r}") from error


@contextlib.contextmanager
def attacked(
    name: str, rng: random.Random, folder: Path, step: float = QUICK
) -> Iterator[tuple[Attacked, HostileDriver]]:
    clock = Clock(step)
    with ExitStack() as stack:
        stack.enter_context(patch("time.monotonic", clock))
        stack.enter_context(patch.object(Budget.__init__, "__defaults__", (clock,)))
        target = DEVICES[name]()
        driver = HostileDriver(
            target.device(folder, stack),
            rng,
            request=target.request,
            host=target.host,
            inputs=target.inputs,
            sizes=target.sizes,
            tail=target.tail,
            engine=target.engine,
        )
        driver.machine.transport._unexpected = _surprised  # type: ignore[method-assign]
        try:
            yield target, driver
        finally:
            driver.machine.close()
            for client in getattr(target, "_clients", ()):
                client.close()
