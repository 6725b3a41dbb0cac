"""One stream between a guest's vsock port and a Unix socket of the host, with its credit.

Credit (virtio 1.2, 5.10.6.3): each side says how large its buffer is and how much it has taken
out of it; the other one never has more on the way.
"""

from __future__ import annotations

import contextlib
import socket

from vmm.core.lean_typing import NamedTuple
from vmm.devices.virtio.vsock_packet import (
    COUNTER,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Header,
    Op,
)

BUFFER = 256 << 10
"""What the guest may send before the host's program has read it, in bytes."""
# Unasked, the guest hears that there is room again only when there is a good piece of it.
_TELL_FROM = BUFFER // 4


class Outgoing(NamedTuple):
    """A packet for the guest, less its addresses."""

    op: Op
    flags: int = 0
    data: bytes = b""


class Broken(Exception):
    """The connection is over: the guest broke its rules, or the host's side is gone."""


class Connection:
    """An end of a stream: `link` is the host program's socket, non-blocking and ours."""

    def __init__(self, link: socket.socket, guest_port: int, host_port: int) -> None:
        self.link = link
        self.fd = link.fileno()
        self.guest_port = guest_port
        self.host_port = host_port
        self.established = False
        self.answers: list[Op] = []
        """Operations that the guest is to be told, before any data."""
        self._unsent = bytearray()  # from the guest, not yet taken by the host's program
        self._forwarded = 0  # what it has taken: our fwd_cnt
        self._told_forwarded = 0
        self._peer_buffer = 0
        self._peer_forwarded = 0
        self._sent = 0
        self._host_ended = False  # the host's program sends no more
        self._told_end = False
        self._guest_ended = False  # the guest sends no more
        self._guest_gone = False  # nor does it take any more
        self._told_host = False
        self.in_loop = (False, False)
        """What the loop waits for: (readable, writable)."""

    # --- what the guest says ---

    def credit(self, header: Header) -> None:
        """Every packet carries the guest's credit."""
        self._peer_buffer = header.buf_alloc
        self._peer_forwarded = header.fwd_cnt

    def receive(self, data: bytes) -> None:
        """Data for the host's program. Raises Broken when there may be none, or too much."""
        if not self.established or self._guest_ended:
            raise Broken("data where none may come")
        if len(self._unsent) + len(data) > BUFFER:
            raise Broken("more data than there is credit for")
        self._unsent += data
        self.flush()

    def shut(self, flags: int) -> None:
        """Op.SHUTDOWN. Raises Broken."""
        if flags & SHUTDOWN_SEND:
            self._guest_ended = True
        if flags & SHUTDOWN_RECEIVE:
            self._host_ended = self._told_end = self._guest_gone = True
        self.flush()

    # --- the host's side ---

    def flush(self) -> None:
        """Hand over what the host's program takes now. Raises Broken."""
        try:
            while self._unsent:
                taken = self.link.send(self._unsent, socket.MSG_NOSIGNAL)
                del self._unsent[:taken]
                self._forwarded = (self._forwarded + taken) % COUNTER
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(str(error)) from error
        if self._guest_ended and not self._told_host:
            self._told_host = True
            with contextlib.suppress(OSError):
                self.link.shutdown(socket.SHUT_WR)

    @property
    def over(self) -> bool:
        """Whether the guest has closed its end, and all that came from it has been taken."""
        return self._guest_ended and self._guest_gone and not self._unsent

    @property
    def owed(self) -> bool:
        """Whether the guest has closed its end, and something that came from it wasn't taken."""
        return self._guest_ended and self._guest_gone and bool(self._unsent)

    @property
    def waiting(self) -> int:
        """Bytes from the guest that the host's program has not taken."""
        return len(self._unsent)

    @property
    def forwarded(self) -> int:
        return self._forwarded

    @property
    def room(self) -> int:
        """How many bytes the guest takes."""
        on_the_way = (self._sent - self._peer_forwarded) % COUNTER
        return max(self._peer_buffer - on_the_way, 0)

    def next(self, most: int) -> Outgoing | None:
        """The next packet for the guest with `most` bytes of data, None when there is none.

        Raises Broken.
        """
        if self.answers:
            return Outgoing(self.answers.pop(0))
        size = min(most, self.room)
        if self.established and not self._host_ended and size > 0:
            try:
                data = self.link.recv(size)
            except BlockingIOError:
                data = None
            except OSError as error:
                raise Broken(str(error)) from error
            if data:
                self._sent = (self._sent + len(data)) % COUNTER
                self._told_forwarded = self._forwarded  # each packet says it
                return Outgoing(Op.RW, 0, data)
            self._host_ended = data is not None
        if self._host_ended and not self._told_end:
            self._told_end = True
            return Outgoing(Op.SHUTDOWN, SHUTDOWN_SEND)
        if (self._forwarded - self._told_forwarded) % COUNTER >= _TELL_FROM:
            self._told_forwarded = self._forwarded
            return Outgoing(Op.CREDIT_UPDATE)
        return None

    def wants(self) -> tuple[bool, bool]:
        """What to wait for at the link: (readable, writable)."""
        readable = self.established and not self._host_ended and self.room > 0
        return readable, bool(self._unsent)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.link.close()
