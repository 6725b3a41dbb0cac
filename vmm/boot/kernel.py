"""Kernel and initrd on their way into guest memory: from fd to fd, and where there is room.

What a kernel is made of, and the rest of a boot, is its architecture's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.boot.errors import ImageError
from vmm.boot.source import PathOrFd, Source, open_source
from vmm.core.lean_typing import TYPE_CHECKING, Protocol
from vmm.core.ranges import Range, page_align_down, page_align_up

if TYPE_CHECKING:
    from vmm.boot.decompress import Decompression

MIB = 1 << 20


class Memory(Protocol):
    """What loading needs of guest memory before the guest starts."""

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        """Move up to `size` bytes of the file to `gpa`; returns how many, short only at EOF."""
        ...


class KernelFile:
    """A kernel's file, whose payload may be being uncompressed beside us."""

    def __init__(self, path_or_fd: PathOrFd) -> None:
        """Raises ImageError for what can't be opened."""
        self.source = open_source(path_or_fd, "kernel")
        self._decompression: Decompression | None = None
        self._handed_over = False

    def uncompress(self, offset: int, length: int, limit: int) -> None:
        """Begin with the payload at `offset`; `limit` bounds what it may come to (all bytes).

        Raises ImageError for a compression that is unknown.
        """
        from vmm.boot.decompress import Decompression  # a bare kernel does without

        self._decompression = Decompression(self.source, offset, length, limit)

    def finish(self) -> Source:
        """The kernel's own bytes, which the caller closes. Raises ImageError for bad ones."""
        source = self.source
        if self._decompression is not None:
            fd, size = self._decompression.finish()
            source = Source(fd, size, f"{source.name} (uncompressed)")
            self.source.close()
        self._handed_over = True
        return source

    def close(self) -> None:
        """Give up what isn't finished; any number of times, and no harm after `finish`."""
        if self._decompression is not None:
            self._decompression.close()
        if not self._handed_over:
            self.source.close()


def transfer_exactly(source: Source, memory: Memory, offset: int, gpa: int, size: int) -> None:
    """`size` bytes from the file to guest memory, or ImageError where the file is short."""
    done = 0
    while done < size:
        try:
            moved = memory.transfer_in(source.fd, offset + done, gpa + done, size - done)
        except OSError as exc:
            raise source.error(
                f"moving {size - done} bytes at file offset {offset + done} to guest memory "
                f"{gpa + done:#x} failed: {exc.strerror}",
                "check the disk that holds it",
            ) from exc
        if moved <= 0:
            raise source.error(
                f"the file ended at byte {offset + done} while it was loaded",
                "do not change it while it is booted",
            )
        done += moved


def place_initrd(
    source: Source, ram: Range, limit: int, occupied: Sequence[Range] = (), besides: int = 0
) -> Range:
    """The highest page-aligned range for an initrd; ImageError where none is left.

    In `ram`, below `limit` (exclusive: a bzImage's initrd_addr_max + 1), off `occupied`, which
    holds at least the kernel's memory. The size is the file's. `besides`: bytes that the guest
    needs as well, for the advice in the error.
    """
    top = page_align_down(min(ram.end, limit))
    while True:
        start = page_align_down(top - source.size)
        if start < ram.start:
            raise _no_room(source, ram, limit, occupied, besides)
        place = Range(start, source.size)
        # Its last page is the initrd's alone: nothing of ours may share it.
        pages = Range(start, page_align_up(source.size))
        blockers = [span for span in occupied if span.size and span.overlaps(pages)]
        if not blockers:
            return place
        top = page_align_down(min(span.start for span in blockers))


def _no_room(
    source: Source, ram: Range, limit: int, occupied: Sequence[Range], besides: int
) -> ImageError:
    end = max((span.end for span in occupied), default=ram.start)
    needed = -(-(end - ram.start + page_align_up(source.size) + besides) // MIB)
    problem = (
        f"its {source.size} bytes do not fit in guest RAM {ram} below {limit:#x} beside the kernel"
    )
    if ram.start + needed * MIB <= limit:
        return source.error(problem, f"use --mem {needed}M or more")
    return source.error(problem, "make it smaller, this kernel takes no initrd above that address")
