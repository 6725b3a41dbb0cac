"""Writes flattened device trees: nodes and properties in, the blob's bytes out.

Devicetree Specification 0.4, chapter 5. Numbers are big endian. The blob is of version 17, which
everybody reads since 2007.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from vmm.core.ranges import Range

MAGIC = 0xD00D_FEED
VERSION, LAST_COMPATIBLE_VERSION = 17, 16
BEGIN_NODE, END_NODE, PROPERTY, END = 1, 2, 3, 9
HEADER = struct.Struct(">10I")
"""magic, totalsize, off_dt_struct, off_dt_strings, off_mem_rsvmap, version, last_comp_version,
boot_cpuid_phys, size_dt_strings, size_dt_struct."""
RESERVATION = struct.Struct(">QQ")

_TOKEN = struct.Struct(">I")

Value = bytes | str | int | Sequence[str] | Sequence[int] | None
"""Bytes as they are; text; a cell; several of either; None for a property without a value."""


def cells64(*numbers: int) -> bytes:
    """Numbers of two cells each, as addresses and sizes are here."""
    return struct.pack(f">{len(numbers)}Q", *numbers)


def encode(value: Value) -> bytes:
    """A property's value as it stands in the blob. Raises ValueError for text with a NUL byte,
    struct.error for a cell that doesn't fit into 32 bits."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return _TOKEN.pack(value)
    return b"".join(_text(item) if isinstance(item, str) else _TOKEN.pack(item) for item in value)


class Node:
    """A node: its properties in order, then its children."""

    def __init__(self, name: str = "", properties: Mapping[str, Value] | None = None) -> None:
        """`name` with its unit address; the root's is empty."""
        self.name = name
        self.properties: dict[str, Value] = dict(properties or {})
        self.children: list[Node] = []

    def add(self, name: str, properties: Mapping[str, Value] | None = None) -> Node:
        """A new child, behind the others."""
        child = Node(name, properties)
        self.children.append(child)
        return child


def flatten(root: Node, reserved: Iterable[Range] = ()) -> bytes:
    """The blob. `reserved` are ranges that the guest must not use for anything of its own."""
    strings = _Strings()
    tree = b"".join(_tokens(root, strings)) + _TOKEN.pack(END)
    entries = [RESERVATION.pack(area.start, area.size) for area in reserved]
    reservations = b"".join(entries) + RESERVATION.pack(0, 0)
    start = HEADER.size  # 40, a multiple of the 8 that the reservations want
    tree_at = start + len(reservations)
    strings_at = tree_at + len(tree)
    header = HEADER.pack(
        MAGIC,
        strings_at + len(strings.data),
        tree_at,
        strings_at,
        start,
        VERSION,
        LAST_COMPATIBLE_VERSION,
        0,
        len(strings.data),
        len(tree),
    )
    return header + reservations + tree + bytes(strings.data)


class _Strings:
    """The block of property names, each in it once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._offsets: dict[str, int] = {}

    def offset(self, name: str) -> int:
        if name not in self._offsets:
            self._offsets[name] = len(self.data)
            self.data += _text(name)
        return self._offsets[name]


def _tokens(node: Node, strings: _Strings) -> Iterable[bytes]:
    yield _TOKEN.pack(BEGIN_NODE) + _padded(_text(node.name))
    for name, value in node.properties.items():
        data = encode(value)
        yield struct.pack(">III", PROPERTY, len(data), strings.offset(name)) + _padded(data)
    for child in node.children:
        yield from _tokens(child, strings)
    yield _TOKEN.pack(END_NODE)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ValueError(f"{text!r} contains a NUL byte")
    return data + b"\0"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
