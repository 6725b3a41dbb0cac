"""A real tap interface, in a network namespace of this process's own."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import socket
import struct
import subprocess
import sys

from vmm.core.errors import HostError
from vmm.devices.virtio.net import HEADER_SIZE
from vmm.devices.virtio.net_backend import Tap

NAME = "pyvmm0"
FRAME = bytes.fromhex("020000000009 020000000001 88b5")  # an EtherType for experiments
_CLONE_NEWNET = 0x4000_0000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_RTM_DELLINK, _NLM_F_REQUEST, _NLM_F_ACK = 17, 1, 4
_EVERYTHING = 0x0003  # ETH_P_ALL
_OUTGOING = 4  # PACKET_OUTGOING
_inside = False


def enter() -> None:
    """Leave the host's network for good. Raises OSError."""
    global _inside
    libc = ctypes.CDLL(None, use_errno=True)
    if not _inside and libc.unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare(CLONE_NEWNET): {os.strerror(number)}")
    _inside = True
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as file:
        file.write("1")  # it would say hello by itself


@functools.cache
def obstacle() -> str:
    """Why there can be none here; empty where there can."""
    command = [sys.executable, "-m", "tests.injection.taps"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


class Network:
    """The host's side of a tap that is up: what it sends, and what comes from it."""

    def __init__(self) -> None:
        ethernet = socket.htons(_EVERYTHING)  # bind does that by itself
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, ethernet)
        ask = struct.pack("16sh22x", NAME.encode(), 0)
        flags = struct.unpack_from("16xh", fcntl.ioctl(self._socket, _SIOCGIFFLAGS, ask))[0]
        up = struct.pack("16sh22x", NAME.encode(), flags | _IFF_UP)
        fcntl.ioctl(self._socket, _SIOCSIFFLAGS, up)
        self._socket.bind((NAME, _EVERYTHING))
        self._socket.setblocking(False)

    def send(self, payload: bytes) -> None:
        self._socket.sendmsg([FRAME + payload])

    def came(self) -> list[bytes]:
        """Payloads of frames from the tap's owner."""
        payloads: list[bytes] = []
        while True:
            try:
                frame, _, _, (_, _, kind, _, _) = self._socket.recvmsg(2048)
            except BlockingIOError:
                return payloads
            if kind != _OUTGOING and frame.startswith(FRAME):
                payloads.append(frame[len(FRAME) :])

    def close(self) -> None:
        self._socket.close()


def delete() -> None:
    """Take the interface away, from whoever has it open."""
    about = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(NAME), 0, 0)
    head = struct.pack("=IHHII", 16 + len(about), _RTM_DELLINK, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        link.sendmsg([head + about])
        answer = link.recvmsg(4096)[0]
    code = -struct.unpack_from("=i", answer, 16)[0]
    if code:
        raise OSError(code, os.strerror(code))


if __name__ == "__main__":
    try:
        enter()
        Tap(NAME).close()
    except (OSError, HostError) as error:
        sys.exit(str(error))

__all__ = ["FRAME", "HEADER_SIZE", "NAME", "Network", "Tap", "delete", "enter", "obstacle"]
