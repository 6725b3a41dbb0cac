"""A guest's driver for a vsock device, packet by packet."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.vsock import RX, TX, open_vsock
from vmm.devices.virtio.vsock_packet import HEADER_SIZE, TYPE_STREAM, Header, Op

CID, PORT, HOST_PORT = 42, 1234, 5678
CREDIT = 1 << 16


class Guest:
    """The guest's side: packets out of and into buffers that are always there."""

    def __init__(
        self,
        path: Path,
        rx_size: int = 4096,
        device: VirtioDevice | None = None,
        memory: FakeMemory | None = None,
    ) -> None:
        self.path = path
        self.machine = VirtioMachine(device or open_vsock(f"path={path},cid={CID}"), memory)
        self._rx_size = rx_size
        self._buffers: dict[int, Piece] = {}
        self.forwarded = 0
        self._out = Piece(0xC0000, 0)

    def up(self) -> None:
        self.machine.up()
        self._buffers = {}
        for _ in range(8):
            piece = self.machine.blank(self._rx_size)
            self._buffers[self.machine.give(RX, piece)] = piece
        self.machine.kick(RX)

    def say(
        self,
        op: int,
        data: bytes = b"",
        *,
        port: int = PORT,
        host_port: int = HOST_PORT,
        flags: int = 0,
        **fields: int,
    ) -> None:
        header = Header(
            CID, 2, port, host_port, len(data), TYPE_STREAM, op, flags, CREDIT, self.forwarded
        )._replace(**fields)
        self.machine.memory.poke(header.pack() + data, self._out.gpa)
        self.machine.give(TX, Piece(self._out.gpa, HEADER_SIZE), Piece(
            self._out.gpa + HEADER_SIZE, len(data)))  # fmt: skip
        self.machine.kick(TX)

    def heard(self) -> list[tuple[Header, bytes]]:
        """Packets that have come, their buffers given back."""
        packets = []
        while elements := self.machine.queues[RX].collect():
            for head, size in elements:
                piece = self._buffers.pop(head)
                data = self.machine.text(piece, size)
                packets.append((Header.unpack(data[:HEADER_SIZE]), data[HEADER_SIZE:]))
                self._buffers[self.machine.give(RX, piece)] = piece
            self.machine.kick(RX)
        return packets

    def ops(self) -> list[int]:
        return [header.op for header, _ in self.heard()]

    def called_by(self, client: socket.socket, port: int = PORT) -> int:
        """A program of the host connects to the guest, which accepts; the host's port."""
        client.sendall(b"CONNECT %d\n" % port)
        self.machine.settle()
        ((header, _),) = self.heard()
        assert (header.op, header.dst_port) == (Op.REQUEST, port)
        self.say(Op.RESPONSE, port=port, host_port=header.src_port)
        assert client.recv(100) == b"OK %d\n" % header.src_port
        return header.src_port


def dial(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.setblocking(False)
    return client
