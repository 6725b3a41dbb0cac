"""A back end of vhost-user for tests: it notes what it is told, and answers as the test says."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable

from vmm.devices.vhost_user import messages
from vmm.devices.vhost_user.device import RING_FEATURES, VERSION_1
from vmm.devices.vhost_user.messages import PROTOCOL_F_CONFIG, PROTOCOL_F_MQ

HEADER = struct.Struct("=III")
U64 = struct.Struct("=Q")
REPLY = messages.VERSION | messages.FLAG_REPLY
SECTORS = 2048
FEATURES = VERSION_1 | messages.F_PROTOCOL_FEATURES | RING_FEATURES

Answer = Callable[[bytes], bytes | None]
"""Given the request's payload: the bytes to send, None for nothing at all."""


def reply(request: int, payload: bytes, flags: int = REPLY) -> bytes:
    """An answer's bytes."""
    return HEADER.pack(request, flags, len(payload)) + payload


def disk_config(sectors: int = SECTORS) -> bytes:
    return struct.pack("<Q", sectors).ljust(60, b"\0")


class BackEndDouble:
    """One connection's other side, on a thread that ends with it."""

    def __init__(self, features: int = FEATURES, config: bytes | None = None) -> None:
        self.heard: list[tuple[int, bytes]] = []
        """Requests and their payloads, in their order."""
        self.fds: dict[int, list[int]] = {}
        """Descriptors that came with a request, by its number: all of them."""
        self._changed = threading.Condition()
        given = disk_config() if config is None else config
        number = U64.pack
        self.answers: dict[int, Answer] = {
            messages.GET_FEATURES: lambda _: reply(messages.GET_FEATURES, number(features)),
            messages.GET_PROTOCOL_FEATURES: lambda _: reply(
                messages.GET_PROTOCOL_FEATURES, number(PROTOCOL_F_MQ | PROTOCOL_F_CONFIG)
            ),
            messages.GET_QUEUE_NUM: lambda _: reply(messages.GET_QUEUE_NUM, number(4)),
            messages.GET_CONFIG: lambda payload: reply(messages.GET_CONFIG, payload[:12] + given),
            messages.GET_VRING_BASE: lambda payload: reply(messages.GET_VRING_BASE, payload),
        }
        self.socket, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def connect(self) -> socket.socket:
        """The front end's side of the connection."""
        self._thread.start()
        return self._theirs

    def end(self) -> None:
        """As when the process ends."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._theirs.close()  # nobody has it
        self.socket.close()
        for fd in [fd for fds in self.fds.values() for fd in fds]:
            os.close(fd)
        self.fds.clear()

    def wait_for(self, request: int, count: int = 1) -> list[bytes]:
        """The payloads of that request, once there are so many."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self.payloads(request)) >= count, 10)
        assert done, (messages.NAMES[request], self.heard)
        return self.payloads(request)

    def payloads(self, request: int) -> list[bytes]:
        return [payload for number, payload in self.heard if number == request]

    def _serve(self) -> None:
        while True:
            try:
                header, fds, _, _ = socket.recv_fds(self.socket, HEADER.size, 16)
                if len(header) < HEADER.size:
                    return
                request, _, size = HEADER.unpack(header)
                payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
            except OSError:
                return
            with self._changed:
                self.heard.append((request, payload))
                self.fds.setdefault(request, []).extend(fds)
                self._changed.notify_all()
            answer = self.answers.get(request)
            data = None if answer is None else answer(payload)
            if data:
                with contextlib.suppress(OSError):
                    self.socket.sendall(data)
