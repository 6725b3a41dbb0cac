"""A machine with one device that a back end serves, and wires that no KVM is behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from tests.support.back_end import BackEndDouble
from tests.support.virtio_machine import MEMORY, VirtioMachine
from vmm.devices.vhost_user import messages
from vmm.devices.vhost_user.device import VhostUserDevice, Wires
from vmm.devices.vhost_user.messages import Region

USER = 1 << 40


class Rig:
    """`connected` is how often the wires were joined and taken apart, "+" and "-"."""

    def __init__(self, device: VhostUserDevice) -> None:
        self.device = device
        queues = len(device.queue_sizes)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(queues)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(queues)]
        self.connected = ""
        self.machine = VirtioMachine(device)
        device.wire(
            Wires(
                self.machine.memory._fd,
                [Region(0, MEMORY, USER, 0)],
                self.kicks,
                self.calls,
                lambda: self._note("+"),
                lambda: self._note("-"),
            )
        )

    def _note(self, word: str) -> None:
        self.connected += word

    def kick(self, queue: int = 0) -> None:
        """What KVM does when the guest notifies."""
        os.eventfd_write(self.kicks[queue], 1)

    def close(self) -> None:
        self.machine.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)


class Successors:
    """What `connect` gives: one back end after the other."""

    def __init__(self, *doubles: BackEndDouble) -> None:
        self._left = list(doubles)

    def __call__(self) -> socket.socket:
        if not self._left:
            raise ConnectionRefusedError(111, "Connection refused")
        return self._left.pop(0).connect()


def requests(double: BackEndDouble) -> list[str]:
    """What a back end was told, by name."""
    return [messages.NAMES[number] for number, _ in double.heard]


Wait = Callable[[Callable[[], bool]], None]
