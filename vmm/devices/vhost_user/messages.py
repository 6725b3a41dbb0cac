"""The messages of vhost-user that this front end uses, as bytes (vhost-user.rst, "Message types").

struct { u32 request, flags, size; u8 payload[size]; }, all in the machine's byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmm.core.lean_typing import NamedTuple

VERSION = 1
FLAG_REPLY = 1 << 2
_VERSION_MASK = 3

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
GET_CONFIG = 24

NAMES = {
    GET_FEATURES: "GET_FEATURES",
    SET_FEATURES: "SET_FEATURES",
    SET_OWNER: "SET_OWNER",
    SET_MEM_TABLE: "SET_MEM_TABLE",
    SET_VRING_NUM: "SET_VRING_NUM",
    SET_VRING_ADDR: "SET_VRING_ADDR",
    SET_VRING_BASE: "SET_VRING_BASE",
    GET_VRING_BASE: "GET_VRING_BASE",
    SET_VRING_KICK: "SET_VRING_KICK",
    SET_VRING_CALL: "SET_VRING_CALL",
    GET_PROTOCOL_FEATURES: "GET_PROTOCOL_FEATURES",
    SET_PROTOCOL_FEATURES: "SET_PROTOCOL_FEATURES",
    GET_QUEUE_NUM: "GET_QUEUE_NUM",
    SET_VRING_ENABLE: "SET_VRING_ENABLE",
    GET_CONFIG: "GET_CONFIG",
}

F_PROTOCOL_FEATURES = 1 << 30
"""Among the virtio features: that there are protocol features."""
PROTOCOL_F_MQ = 1 << 0
PROTOCOL_F_CONFIG = 1 << 9

MOST_REGIONS = 8
"""VHOST_MEMORY_MAX_NREGIONS: each has a descriptor in the message."""

HEADER = struct.Struct("=III")
U64 = struct.Struct("=Q")
STATE = struct.Struct("=II")
_ADDRESSES = struct.Struct("=IIQQQQ")
_MEMORY = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_CONFIG = struct.Struct("=III")


class Region(NamedTuple):
    """A part of guest memory that the back end may map: bytes, and where they are."""

    guest_address: int
    size: int
    user_address: int
    """What the front end calls that place in its messages; no address of this process."""
    offset: int
    """In the file."""


def message(request: int, payload: bytes = b"") -> bytes:
    """A request of the front end's."""
    return HEADER.pack(request, VERSION, len(payload)) + payload


def vring_state(index: int, number: int) -> bytes:
    """The payload that says one number of a queue: its size, where it begins, whether it is on."""
    return STATE.pack(index, number)


def vring_addresses(index: int, descriptors: int, used: int, available: int) -> bytes:
    """SET_VRING_ADDR's payload; the rings' places are user addresses."""
    return _ADDRESSES.pack(index, 0, descriptors, used, available, 0)


def memory_table(regions: Sequence[Region]) -> bytes:
    """SET_MEM_TABLE's payload; a descriptor for each region goes with it."""
    return _MEMORY.pack(len(regions), 0) + b"".join(_REGION.pack(*each) for each in regions)


def config_request(size: int) -> bytes:
    """GET_CONFIG's payload: room for so many bytes of the device's configuration."""
    return _CONFIG.pack(0, size, 0) + bytes(size)


def config_of(payload: bytes, size: int) -> bytes | None:
    """The configuration in the answer; None where it isn't what was asked for."""
    if len(payload) != _CONFIG.size + size:
        return None
    offset, given, _ = _CONFIG.unpack_from(payload)
    return payload[_CONFIG.size :] if (offset, given) == (0, size) else None


def reply_size(header: bytes, request: int) -> int | None:
    """How long the payload of an answer to `request` is; None where that is no such answer."""
    number, flags, size = HEADER.unpack(header)
    is_reply = number == request and flags & FLAG_REPLY and flags & _VERSION_MASK == VERSION
    return int(size) if is_reply else None
