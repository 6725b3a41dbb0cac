"""Reads cpio archives in the "newc" format, for tests of what is written."""

from __future__ import annotations


class Entry:
    """One entry as the kernel's unpacker sees it."""

    def __init__(self, archive: bytes, at: int) -> None:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        self.inode, self.mode, self.links, self.size = fields[0], fields[1], fields[4], fields[6]
        self.device = (fields[9], fields[10])
        name_size = fields[11]
        raw = archive[at + 110 : at + 110 + name_size]
        assert raw.endswith(b"\0")
        self.name = raw[:-1].decode()
        start = at + (110 + name_size + 3) // 4 * 4
        self.content = archive[start : start + self.size]
        self.next = start + (self.size + 3) // 4 * 4


def entries(archive: bytes) -> list[Entry]:
    found: list[Entry] = []
    at = 0
    while not found or found[-1].name != "TRAILER!!!":
        found.append(Entry(archive, at))
        at = found[-1].next
    assert not archive[at:].strip(b"\0")
    return found[:-1]
