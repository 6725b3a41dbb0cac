"""Reads flattened device trees (Devicetree Specification 0.4, chapter 5), for tests of what is
written: strict, and sharing no code with the writer."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field


@dataclass
class Read:
    """A node: properties' bytes by name, children by name."""

    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, Read] = field(default_factory=dict)

    def at(self, path: str) -> Read:
        """The node at a path like /cpus/cpu@0."""
        node = self
        for name in filter(None, path.split("/")):
            node = node.children[name]
        return node

    def cells(self, name: str) -> list[int]:
        """A property's value as 32-bit numbers."""
        data = self.properties[name]
        assert len(data) % 4 == 0
        return list(struct.unpack(f">{len(data) // 4}I", data))

    def addresses(self, name: str) -> list[int]:
        """A property's value as 64-bit numbers."""
        data = self.properties[name]
        return list(struct.unpack(f">{len(data) // 8}Q", data))

    def texts(self, name: str) -> list[str]:
        """A property's value as strings, each of which ends with a NUL."""
        data = self.properties[name]
        assert data.endswith(b"\0")
        return data[:-1].decode("utf-8", "surrogateescape").split("\0")


def read_tree(blob: bytes) -> tuple[Read, list[tuple[int, int]]]:
    """(root, memory reservations). AssertionError for anything that isn't as specified."""
    magic, total, tree_at, strings_at, reserved_at, version, last, cpu, strings_size, tree_size = (
        struct.unpack_from(">10I", blob)
    )
    assert (magic, total, version, last, cpu) == (0xD00DFEED, len(blob), 17, 16, 0)
    assert reserved_at % 8 == tree_at % 4 == 0
    assert tree_at + tree_size <= strings_at and strings_at + strings_size <= total
    reservations = []
    while (entry := struct.unpack_from(">QQ", blob, reserved_at)) != (0, 0):
        reservations.append(entry)
        reserved_at += 16
    assert reserved_at + 16 <= tree_at
    tree = blob[tree_at : tree_at + tree_size]
    strings = blob[strings_at : strings_at + strings_size]
    root, end = _node(tree, 0, strings)
    assert struct.unpack_from(">I", tree, end) == (9,) and end + 4 == len(tree)
    assert list(root) == [""]
    return root[""], reservations


def _node(tree: bytes, at: int, strings: bytes) -> tuple[dict[str, Read], int]:
    assert struct.unpack_from(">I", tree, at) == (1,)
    name, at = _string(tree, at + 4)
    at = _aligned(tree, at)
    node = Read()
    while True:
        (token,) = struct.unpack_from(">I", tree, at)
        if token == 3:
            assert not node.children, "properties come first"
            length, offset = struct.unpack_from(">II", tree, at + 4)
            key = _string(strings, offset)[0]
            assert key not in node.properties
            node.properties[key] = tree[at + 12 : at + 12 + length]
            assert len(node.properties[key]) == length
            at = _aligned(tree, at + 12 + length)
        elif token == 1:
            child, at = _node(tree, at, strings)
            assert not child.keys() & node.children.keys()
            node.children.update(child)
        else:
            assert token == 2
            return {name: node}, at + 4


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\0", at)
    return data[at:end].decode("utf-8", "surrogateescape"), end + 1


def _aligned(data: bytes, at: int) -> int:
    end = at + -at % 4
    assert not any(data[at:end])
    return end
