"""A disk that another process serves, such as qemu-storage-daemon (virtio 1.2, 5.2)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from vmm.devices.vhost_user import messages
from vmm.devices.vhost_user.channel import BackEndError
from vmm.devices.vhost_user.device import BackEnd, VhostUserDevice
from vmm.devices.virtio.block import (
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_WRITE_ZEROES,
    QUEUE_SIZE,
    S_IOERR,
)
from vmm.devices.virtio.queue import Chain

F_SIZE_MAX, F_TOPOLOGY = 1 << 1, 1 << 10

_CONFIG_SIZE = 60  # struct virtio_blk_config up to write_zeroes_may_unmap
_CAPACITY = struct.Struct("<Q")
_NUM_QUEUES = struct.Struct("<H")
_NUM_QUEUES_AT = 34


class VhostUserBlock(VhostUserDevice):
    """The disk. What it holds, and how large it is, the back end says when it is connected."""

    device_id = 2
    pci_class = 0x018000  # mass storage, other
    wanted_protocol_features = messages.PROTOCOL_F_MQ
    needed_protocol_features = messages.PROTOCOL_F_CONFIG
    passed_features = (
        F_SIZE_MAX | F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ | F_DISCARD
        | F_WRITE_ZEROES
    )  # fmt: skip

    def __init__(
        self, name: str, path: str, connect: Callable[[], socket.socket], queues: int = 1
    ) -> None:
        """`queues`: how many the guest is to have. Raises BackEndError."""
        self._wanted_queues = queues
        self._config = b""
        super().__init__(name, path, connect)
        self.queue_sizes = (QUEUE_SIZE,) * queues
        if queues == 1:
            self.features &= ~F_MQ

    def accept(self, back_end: BackEnd) -> None:
        most = back_end.queues or 1
        if most < self._wanted_queues:
            raise BackEndError(f"it serves {most} queues, queues={self._wanted_queues} are wanted")
        answer = back_end.channel.ask(
            messages.GET_CONFIG,
            messages.config_request(_CONFIG_SIZE),
            size=len(messages.config_request(_CONFIG_SIZE)),
        )
        given = messages.config_of(answer, _CONFIG_SIZE)
        if given is None:
            raise BackEndError("its answer to GET_CONFIG is not what was asked for")
        config = bytearray(given)
        _NUM_QUEUES.pack_into(config, _NUM_QUEUES_AT, self._wanted_queues)
        if self._config and self._config[: _CAPACITY.size] != config[: _CAPACITY.size]:
            (sectors,) = _CAPACITY.unpack_from(config)
            raise BackEndError(f"its disk has {sectors} sectors, the guest knows another size")
        self._config = bytes(config)

    def config(self) -> bytes:
        return self._config

    def refuse(self, chain: Chain) -> int:
        """5.2.6: the status is the last byte that the device may write."""
        if not chain.writable or self._memory is None:
            return 0
        gpa, size = chain.writable[-1]
        self._memory.pwrite(bytes((S_IOERR,)), gpa + size - 1)
        return 1
