"""virtio-vsock's packets (virtio 1.2, 5.10.6).

struct virtio_vsock_hdr: le64 src_cid, dst_cid; le32 src_port, dst_port, len; le16 type, op;
le32 flags, buf_alloc, fwd_cnt
"""

from __future__ import annotations

import struct
from enum import IntEnum

from vmm.core.lean_typing import NamedTuple, Self

HOST_CID = 2
TYPE_STREAM = 1


class Op(IntEnum):
    """Operations of packets."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2  # the sender of the packet won't any more

_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = _HEADER.size
COUNTER = 1 << 32  # credit counters wrap


class Header(NamedTuple):
    """One packet's header."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def pack(self) -> bytes:
        return _HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_HEADER.unpack(data))
