"""What `--net` connects a network card to: a tap interface, or a passt process.

tap: Documentation/networking/tuntap.rst of Linux; if_tun.h. passt: one stream socket; each frame
behind its length as a 32-bit big-endian number (passt(1), QEMU's `-netdev stream`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import socket
import struct

from vmm.core.errors import HostError, UsageError
from vmm.core.suboptions import Suboptions
from vmm.devices.virtio.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_HOST_TSO4,
    F_HOST_TSO6,
    HEADER_SIZE,
    LARGEST_FRAME,
    MAC_BYTES,
    NetBackend,
    VirtioNet,
    may_be_mac,
)

SYNTAX = "tap=NAME[,mac=MAC][,process] or passt=SOCKET[,mac=MAC][,process]"

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_IFNAMSIZ = 16

_LENGTH = struct.Struct(">I")
_NO_HEADER = bytes(HEADER_SIZE)
_CHUNK = 256 << 10


class Tap:
    """A tap interface; made by this process if it isn't there, and gone with it then."""

    is_stream = False
    features = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_GUEST_TSO4 | F_GUEST_TSO6

    def __init__(self, name: str, device: str = "/dev/net/tun") -> None:
        """Raises UsageError (a name that can't be), HostError (no tap here)."""
        encoded = os.fsencode(name)
        if len(encoded) >= _IFNAMSIZ or not re.fullmatch(rb"[!-~]+", encoded) or b"/" in encoded:
            raise UsageError(
                f"--net tap={name}: not the name of an interface; use 1 to 15 letters and digits"
            )
        try:
            self.fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"--net tap={name}: {device} cannot be opened: {error.strerror}; "
                "load the kernel's tun module, or use --net passt=SOCKET"
            ) from error
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", encoded, flags))
            fcntl.ioctl(self.fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
        except OSError as error:
            os.close(self.fd)
            raise HostError(
                f"--net tap={name}: the interface cannot be used: {error.strerror}; make it for "
                f"your user with: ip tuntap add {name} mode tap user $USER vnet_hdr"
            ) from error

    def set_offloads(self, features: int) -> None:
        offloads = 0
        if features & F_GUEST_CSUM:
            offloads |= _TUN_F_CSUM
            offloads |= _TUN_F_TSO4 if features & F_GUEST_TSO4 else 0
            offloads |= _TUN_F_TSO6 if features & F_GUEST_TSO6 else 0
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, offloads)

    def receive(self) -> bytes | None:
        try:
            return os.read(self.fd, HEADER_SIZE + LARGEST_FRAME)
        except BlockingIOError:
            return None

    def send(self, frame: bytes) -> bool:
        try:
            os.write(self.fd, frame)
        except BlockingIOError:
            return False
        return True

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.fd)


class Passt:
    """A passt process behind a socket: a network for users without privileges."""

    is_stream = True
    features = 0

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.fd = connection.fileno()
        self._received = bytearray()
        self._unsent = b""

    def set_offloads(self, features: int) -> None:
        del features  # none are offered

    def receive(self) -> bytes | None:
        while True:
            frame = self._cut_frame()
            if frame is not None:
                return frame
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return None
            if not data:
                raise OSError(errno.ECONNRESET, "passt has closed the connection")
            self._received += data

    def _cut_frame(self) -> bytes | None:
        held = self._received
        if len(held) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(held)
        if size > LARGEST_FRAME:
            raise OSError(errno.EPROTO, f"passt announces a frame of {size} bytes")
        end = _LENGTH.size + size
        if len(held) < end:
            return None
        frame = _NO_HEADER + bytes(held[_LENGTH.size : end])
        del held[:end]
        return frame

    def send(self, frame: bytes) -> bool:
        if self._unsent and not self.flush():
            return False
        self._unsent = _LENGTH.pack(len(frame) - HEADER_SIZE) + frame[HEADER_SIZE:]
        self.flush()
        return True

    def flush(self) -> bool:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            self._unsent = self._unsent[sent:]
        return True

    def close(self) -> None:
        self._socket.close()


def open_net(text: str) -> VirtioNet:
    """The network card that `--net TEXT` asks for. Raises UsageError and HostError."""
    words = Suboptions("--net", text, SYNTAX)
    kind = words.one_of(("tap", "passt"))
    where = words.take(kind)
    assert where is not None
    given = _parse_mac(words)
    # Locally administered (bit 1), unicast (bit 0 clear): nobody else's.
    mac = given or b"\x02" + secrets.token_bytes(MAC_BYTES - 1)
    apart = words.flag("process")
    words.finish()
    backend: NetBackend = Tap(where) if kind == "tap" else _connect_passt(where)
    device = VirtioNet(backend, mac, mac_given=given is not None)
    device.wants_process = apart
    return device


def _parse_mac(words: Suboptions) -> bytes | None:
    text = words.take("mac")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise words.error(f"mac={text} is no address such as 02:00:00:00:00:01")
    mac = bytes.fromhex(text.replace(":", ""))
    if not may_be_mac(mac):
        raise words.error(f"mac={text} is a multicast or empty address, which no card may have")
    return mac


def _connect_passt(path: str) -> Passt:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except (OSError, ValueError) as error:
        connection.close()
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise UsageError(
            f"--net passt={path}: no passt to connect to: {reason}; start one with: "
            f"passt --socket {path}"
        ) from error
    return Passt(connection)
