"""Connections that a device's process can't make: the process that starts it has paths still, makes
them, and gives it the socket.

Landlock has no say over connect(2) to a Unix socket's path, and a filter of system calls doesn't
see the path. So a device's process may not connect at all. It asks for a number, a u32 in a packet
of a SOCK_SEQPACKET pair, and gets a u32, an error's number or 0, with the socket. What a number
leads to was fixed before the guest ran.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from array import array
from collections.abc import Callable
from struct import Struct

from vmm.core.lean_typing import NamedTuple

_NUMBER = Struct("=I")
Dial = Callable[[int], socket.socket]


class Dialing(NamedTuple):
    """How a device's connections are made."""

    dial: Dial
    """By the process that starts it: connects to what a number leads to, without blocking. Raises
    OSError."""
    dial_by: Callable[[Dial], None]
    """In the device's process: has the device ask for them."""


def asked(channel: socket.socket, number: int) -> socket.socket:
    """The connection to what that number leads to, made by the other side. Raises OSError."""
    channel.send(_NUMBER.pack(number))
    try:
        words, fds, _, _ = socket.recv_fds(channel, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        channel.close()  # the answer comes yet, and is not the next question's
        raise
    if not fds:
        code = _NUMBER.unpack(words)[0] if words else errno.ECONNREFUSED
        raise OSError(code, os.strerror(code))
    # All that it would ask the kernel for is said, which a device's process may not ask.
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fds[0])
    link.setblocking(False)
    return link


def answered(channel: socket.socket, dial: Dial) -> bool:
    """Answer the next question, if there is one; False where there will be none: the process has
    ended, asks something else, or doesn't take its answers."""
    try:
        question = channel.recv(_NUMBER.size + 1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if len(question) != _NUMBER.size:
        return False
    with contextlib.ExitStack() as opened:
        fds: list[int] = []
        code = 0
        try:
            link = opened.enter_context(dial(*_NUMBER.unpack(question)))
            fds.append(link.fileno())
        except OSError as error:
            code = error.errno or errno.ECONNREFUSED
        try:
            # Not socket.send_fds, which makes nothing of its flags, and would wait.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            channel.sendmsg([_NUMBER.pack(code)], rights, socket.MSG_DONTWAIT)
        except OSError:
            return False
    return True
