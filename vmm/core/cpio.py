"""An initramfs archive: cpio in the "newc" format, written by us.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(slots=True)
class CpioWriter:
    """Collects entries; bytes come out the same for the same entries, whenever it is run."""

    _parts: list[bytes] = field(default_factory=list)
    _next_inode: int = 1
    _directories: set[str] = field(default_factory=set)

    def directory(self, name: str, mode: int = 0o755) -> None:
        """A directory, after those above it; one that is there already stays as it is."""
        name = name.strip("/")
        if not name or name in self._directories:
            return
        self._parents_of(name)
        self._directories.add(name)
        self._entry(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        name = name.strip("/")
        self._parents_of(name)
        self._entry(name, stat.S_IFREG | mode, content)

    def symlink(self, name: str, target: str) -> None:
        name = name.strip("/")
        self._parents_of(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        name = name.strip("/")
        self._parents_of(name)
        self._entry(name, stat.S_IFCHR | mode, b"", (major, minor))

    def finish(self) -> bytes:
        """The whole archive, padded to 512 bytes as cpio does."""
        self._entry(_TRAILER, 0, b"", inode=0)
        archive = b"".join(self._parts)
        return archive + bytes(-len(archive) % 512)

    def _parents_of(self, name: str) -> None:
        if "/" in name:
            self.directory(name.rsplit("/", 1)[0])

    def _entry(
        self,
        name: str,
        mode: int,
        content: bytes,
        device: tuple[int, int] = (0, 0),
        inode: int | None = None,
    ) -> None:
        if inode is None:
            inode = self._next_inode
            self._next_inode += 1
        raw_name = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize chk
        numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(raw_name), 0)
        header = _MAGIC + b"".join(b"%08X" % n for n in numbers)
        self._parts += [_padded(header + raw_name), _padded(content)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
