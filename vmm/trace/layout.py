"""What a trace holds: one row for each event, kept as columns. Said once, for writer and reader.

A row in memory, little-endian, is struct { u64 time_ns, gpa, bytes, latency_ns; u32 detail;
u16 errno; u8 vcpu, kind, decision; }, padded to 48 bytes so that each field is a strided view.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

FORMAT = "pyvmm-trace"
VERSION = 1
SIDECAR = "trace.json"

ROW = struct.Struct("<QQQQIHBBB7x")


class Column(NamedTuple):
    """`offset` in a row, `code` of struct and memoryview, `dtype` as numpy names it."""

    name: str
    code: Literal["Q", "I", "H", "B"]
    size: int
    offset: int
    dtype: str


COLUMNS = (
    Column("time_ns", "Q", 8, 0, "uint64"),  # when it began, since the trace's start
    Column("gpa", "Q", 8, 8, "uint64"),  # for exits: the port, MSR or address
    Column("bytes", "Q", 8, 16, "uint64"),
    Column("latency_ns", "Q", 8, 24, "uint64"),  # until it was done or answered
    Column("detail", "I", 4, 32, "uint32"),  # a name's number (low half), see Kind
    Column("errno", "H", 2, 36, "uint16"),  # the answer: 0, an errno, or NO_ANSWER
    Column("vcpu", "B", 1, 38, "uint8"),  # or HOST
    Column("kind", "B", 1, 39, "uint8"),
    Column("decision", "B", 1, 40, "uint8"),  # of the policies, for SHARE and UNSHARE
)

HOST = 0xFF
"""The `vcpu` of what the host does by itself."""
NO_ANSWER = 0xFFFF
"""The `errno` of a request that never got an answer: a policy ended the run, or broke."""
LARGEST = (1 << 64) - 1
"""Guests ask for ranges of any length: what does not fit 64 bits is cut to this."""


class Kind:
    """What happened; plain numbers, as rows are packed on hot paths.

    In brackets: the high half of `detail`; the low half is a name's number.
    """

    SHARE = 1
    """The guest's request, as it put it: name = doorbell [name of the policy whose word it was]."""
    UNSHARE = 2
    STATE = 3
    """Pages that are in another state now, converting for `latency_ns` before: name = state."""
    FAULT = 4
    """An access that KVM could not serve: name = side."""
    IO_IN = 5
    """A request whose data goes to the guest: name = device [queue]; `gpa` is its first buffer."""
    IO_OUT = 6
    IO_REFUSED = 7
    """A device was stopped: broken rings, or memory that is private or not there."""
    EXIT = 8
    """An exit handled in user space: name = reason."""
    LEND = 9
    """Private pages that the guest's IOMMU maps for a device: name = device [DIRECTIONS]."""
    RETURN = 10
    """Pages of such a mapping that come back; it was there for `latency_ns`: name = device."""


KIND_NAMES: dict[int, str] = {
    Kind.SHARE: "share",
    Kind.UNSHARE: "unshare",
    Kind.STATE: "state",
    Kind.FAULT: "fault",
    Kind.IO_IN: "io-in",
    Kind.IO_OUT: "io-out",
    Kind.IO_REFUSED: "io-refused",
    Kind.EXIT: "exit",
    Kind.LEND: "lend",
    Kind.RETURN: "return",
}

DIRECTIONS = ("", "read", "write", "read and write")
"""What a device may do with pages that are lent to it, by VIRTIO_IOMMU_MAP_F_READ (1), _WRITE."""

DECISIONS = ("none", "allow", "deny", "partial", "defer", "convert", "kill")
"""`decision` is an index into this; none: the request was invalid, no policy was asked."""


def decision_name(number: int) -> str:
    """What a row's `decision` says; rows may be damaged."""
    return DECISIONS[number] if number < len(DECISIONS) else f"#{number}"


MOST_NAMES = 1 << 16
MOST_ROWS = 1 << 24
"""A trace ends there (656 MiB on disk): no guest fills the disk with it. Nor are more read."""
MOST_SIDECAR = 8 << 20
"""Bytes of the sidecar that are read."""
MOST_NAME_BYTES = 1 << 20
"""Of all names together; a character takes up to six bytes in the sidecar."""
MOST_MEMORY = 1 << 39
"""Where guest memory ends at the latest: twice what the largest guest has."""
MOST_TIME = 1 << 62
"""Nanoseconds, 146 years."""
