"""The other end of a guest's network card: a tap interface and a TCP server, in the lab only."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from vmm.core.errors import HostError
from vmm.devices.virtio.net_backend import Tap

INTERFACE, MAC = "bench0", "02:00:00:00:00:02"
HOST, GUEST = "192.0.2.1", "192.0.2.2"
TRANSFER = 8 << 20
_TUNSETPERSIST = 0x400454CB  # if_tun.h
_IN_LAB = "PYVMM_LAB_DISKS"  # the lab sets it for whatever it runs


class Peer(NamedTuple):
    """Ports of HOST: one gives TRANSFER bytes, one takes bytes and answers with their number."""

    gives: int
    takes: int


def _give(link: socket.socket) -> None:
    link.sendall(bytes(TRANSFER))
    link.shutdown(socket.SHUT_WR)


def _take(link: socket.socket) -> None:
    buffer = bytearray(1 << 18)
    taken = 0
    while count := link.recv_into(buffer):
        taken += count
    link.sendall(b"%d\n" % taken)


@contextmanager
def peer() -> Iterator[Peer]:
    """A tap interface that outlives the monitors that use it, and the server behind it.

    Raises HostError outside the lab, where nobody's network is touched, and where the kernel has
    no tap.
    """
    if _IN_LAB not in os.environ:
        raise HostError("interfaces are made in the lab only (pyvmm lab bench ...)")
    with ExitStack() as opened:
        _persist(True)
        opened.callback(_persist, False)
        for words in (["addr", "add", f"{HOST}/24", "dev"], ["link", "set", "up", "dev"]):
            subprocess.run(["ip", *words, INTERFACE], check=True)
        yield opened.enter_context(serving(HOST))


@contextmanager
def serving(address: str) -> Iterator[Peer]:
    """The server alone, on ports that are free."""
    with ExitStack() as opened:
        ports = []
        for exchange in (_give, _take):
            listener = opened.enter_context(socket.create_server((address, 0)))
            opened.callback(listener.shutdown, socket.SHUT_RDWR)
            threading.Thread(target=_serve, args=(listener, exchange), daemon=True).start()
            ports.append(listener.getsockname()[1])
        yield Peer(*ports)


def _serve(listener: socket.socket, exchange: Callable[[socket.socket], None]) -> None:
    """One guest after the other, until the listener is shut down."""
    while True:
        try:
            link, _ = listener.accept()
        except OSError:
            return
        with link, suppress(OSError):
            exchange(link)


def _persist(stays: bool) -> None:
    tap = Tap(INTERFACE)
    try:
        fcntl.ioctl(tap.fd, _TUNSETPERSIST, int(stays))
    finally:
        tap.close()
