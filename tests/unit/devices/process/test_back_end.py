"""The loop of a device's process by itself."""

from __future__ import annotations

import os
import socket

from vmm.devices.process.back_end import BackEnd
from vmm.devices.virtio.rng import VirtioRng


def test_fd_that_is_to_be_watched_later_is_not_looked_at_before() -> None:
    ours, pyvmm = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    early, late = os.pipe(), os.pipe()
    for _, write_end in (early, late):
        os.write(write_end, b"x")
    seen: list[str] = []
    device = VirtioRng()
    back_end = BackEnd(device, ours, [])

    def first() -> None:
        seen.append("first")
        device.watch(early[0], first)
        device.watch(late[0], last, readable=True, after=0.001)

    def last() -> None:
        seen.append("last")
        pyvmm.close()  # which ends the loop

    device.watch(late[0], last, readable=True)
    device.watch(late[0], last, readable=True, after=3600)
    device.watch(early[0], first, readable=True)

    back_end.run(0, 0)

    ours.close()
    for fd in (*early, *late):
        os.close(fd)
    assert seen == ["first", "last"]
