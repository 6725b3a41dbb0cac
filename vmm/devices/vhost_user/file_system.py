"""A directory of the host's in the guest, by virtio-fs (virtio 1.2, 5.11): virtiofsd serves it."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

from vmm.devices.vhost_user.device import BackEnd, VhostUserDevice
from vmm.devices.virtio.queue import Chain
from vmm.devices.virtio.segments import gather, scatter, take_front, total

QUEUE_SIZE = 128
TAG_BYTES = 36
_CONFIG = struct.Struct(f"<{TAG_BYTES}sI")  # tag, num_request_queues
_IN_HEADER = struct.Struct("<IIQ")  # struct fuse_in_header: len, opcode, unique, ...
_OUT_HEADER = struct.Struct("<IiQ")  # struct fuse_out_header: len, error, unique


class VhostUserFs(VhostUserDevice):
    """The file system `tag`: a queue for what mustn't wait (FUSE_FORGET), and one for requests."""

    device_id = 26
    pci_class = 0x018000
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(
        self, name: str, path: str, connect: Callable[[], socket.socket], tag: bytes
    ) -> None:
        """Raises BackEndError."""
        self._config = _CONFIG.pack(tag, 1)
        super().__init__(name, path, connect)

    def accept(self, back_end: BackEnd) -> None:
        """Nothing to ask: the tag is this side's, and two queues are the fewest there are."""

    def config(self) -> bytes:
        return self._config

    def refuse(self, chain: Chain) -> int:
        """A reply with an error, where the request has one (FUSE_FORGET has none)."""
        memory = self._memory
        if memory is None or total(chain.writable) < _OUT_HEADER.size:
            return 0
        header, _ = take_front(chain.readable, _IN_HEADER.size)
        _, _, unique = _IN_HEADER.unpack(gather(memory, header))
        reply = _OUT_HEADER.pack(_OUT_HEADER.size, -errno.ENOTCONN, unique)
        return scatter(memory, chain.writable, reply)
