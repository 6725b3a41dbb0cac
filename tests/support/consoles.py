"""A guest's driver for a console device, as Linux' is."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.devices.virtio import console
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice

RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)


class Consoles:
    """A machine with the ports that the test asked for."""

    def __init__(
        self, *specs: str, device: VirtioDevice | None = None, memory: FakeMemory | None = None
    ) -> None:
        self.machine = VirtioMachine(device or open_console(specs), memory)
        self._messages: list[Piece] = []

    def up(self) -> None:
        """The driver with its control buffers, as Linux': device ready, then each port."""
        self.machine.up(size=32)
        self._messages = []
        self._refill()
        self.say(0xFFFF_FFFF, console.DEVICE_READY, 1)

    def _refill(self) -> None:
        while len(self._messages) < 16:
            message = self.machine.blank(80)
            self.machine.give(CONTROL_RX, message)
            self._messages.append(message)
        self.machine.kick(CONTROL_RX)

    def say(self, port: int, event: int, value: int) -> None:
        self.machine.give(CONTROL_TX, self.machine.place(struct.pack("<IHH", port, event, value)))
        self.machine.kick(CONTROL_TX)

    def heard(self) -> list[tuple[int, int, int, bytes]]:
        """What the device has said since the last call: (port, event, value, more)."""
        said = []
        for _, size in self.machine.queues[CONTROL_RX].collect():
            data = self.machine.text(self._messages.pop(0), size)
            said.append((*struct.unpack_from("<IHH", data), data[8:]))
        self._refill()
        return said

    def open(self, port: int) -> None:
        """The driver takes a port, and somebody in the guest opens it."""
        self.say(port, console.PORT_READY, 1)
        self.say(port, console.PORT_OPEN, 1)


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.setblocking(False)
    return client
