"""A kernel image opened, checked and uncompressed, and its way into guest memory.

Architecture-neutral from the outside: segments, an entry and the memory that they need. Where the
rest of a boot goes (boot_params, page tables, command line) is the architecture's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm.boot.bzimage import SetupHeader, parse_setup_header
from vmm.boot.elf import ElfImage, Segment, parse_elf
from vmm.boot.errors import ImageError
from vmm.boot.identify import Kind, identify
from vmm.boot.source import DEFAULT_LIMIT, PathOrFd, Source, open_source
from vmm.core.ranges import Range, page_align_down, page_align_up

if TYPE_CHECKING:
    from vmm.boot.decompress import Decompression

MIB = 1 << 20


class Memory(Protocol):
    """What loading needs of guest memory before the guest starts."""

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        """Move up to `size` bytes of the file to `gpa`; returns how many, short only at EOF."""
        ...


class KernelImage(NamedTuple):
    """A kernel ready to be loaded; close it (it is a context manager) once it is in memory.

    `source` is the uncompressed ELF: the file itself, or a memfd that a bzImage's payload was
    decompressed to. `setup_header` is None for a bare ELF.
    """

    kind: Kind
    source: Source
    elf: ElfImage
    setup_header: SetupHeader | None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def source_fd(self) -> int:
        return self.source.fd

    @property
    def entry(self) -> int:
        """The guest-physical address of the first instruction."""
        return self.elf.entry

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.elf.segments

    @property
    def memory(self) -> Range:
        """The guest-physical range that must be RAM and belongs to the kernel while it starts."""
        return Range(self.elf.memory_start, self.memory_end - self.elf.memory_start)

    @property
    def memory_end(self) -> int:
        """The first address past what the kernel uses before it knows the memory map.

        A bzImage's init_size also counts what its segments don't show: brk, early page tables.
        """
        end = self.elf.memory_end
        if self.setup_header is not None:
            header = self.setup_header
            end = max(end, header.pref_address + header.init_size)
        return page_align_up(end)

    def check_fits(self, ram: Iterable[Range], reserved: Iterable[Range] = ()) -> None:
        """ImageError unless the kernel's memory lies in one range of `ram`, off `reserved`."""
        ranges = list(ram)
        if not any(span.contains(self.memory) for span in ranges):
            largest = max((span.end for span in ranges), default=0)
            raise self.source.error(
                f"the kernel needs guest memory at {self.memory}, RAM ends at {largest:#x}",
                f"use --mem {-(-self.memory_end // MIB)}M or more"
                if self.memory_end > largest
                else "give a kernel that is linked to run in RAM",
            )
        for span in reserved:
            for segment in self.segments:
                if segment.memory.overlaps(span):
                    raise self.source.error(
                        f"its segment at {segment.memory} overlaps {span}, which the boot needs",
                        "give a kernel linked to a higher physical address (Linux: 16 MiB)",
                    )

    def load(self, memory: Memory) -> None:
        """Move every segment's file bytes to its place, from fd to guest memory.

        What lies past them (bss) is *not* written: fresh guest memory is zero. Loading again into
        memory that a guest has used needs that memory discarded first.
        """
        for segment in self.segments:
            transfer_exactly(self.source, memory, segment.offset, segment.paddr, segment.filesz)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> KernelImage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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


class OpenedKernel:
    """A kernel whose headers are checked, and whose payload is being decompressed beside us."""

    def __init__(self, path_or_fd: PathOrFd, limit: int = DEFAULT_LIMIT) -> None:
        """Opens the file; `limit` bounds the uncompressed size in bytes.

        Raises ImageError for what is recognisably not a bootable x86-64 kernel.
        """
        self._source = open_source(path_or_fd, "kernel")
        self._header: SetupHeader | None = None
        self._decompression: Decompression | None = None
        self._handed_over = False
        try:
            self._kind = identify(self._source)
            if self._kind is Kind.ELF:
                return
            from vmm.boot.decompress import Decompression  # a bare ELF does without

            self._header = parse_setup_header(self._source)
            # The kernel unpacks itself inside init_size bytes, so its payload can't be larger.
            self._decompression = Decompression(
                self._source,
                self._header.payload_start,
                self._header.payload_length,
                min(limit, self._header.init_size),
            )
        except BaseException:
            self._source.close()
            raise

    def finish(self) -> KernelImage:
        """The checked image, which the caller closes. Raises ImageError for a bad one."""
        source = self._source
        if self._decompression is not None:
            fd, size = self._decompression.finish()
            source = Source(fd, size, f"{source.name} (uncompressed)")
            self._source.close()
        self._handed_over = True
        try:
            return KernelImage(self._kind, source, parse_elf(source), self._header)
        except BaseException:
            source.close()
            raise

    def close(self) -> None:
        """Give up what isn't finished; any number of times, and no harm after `finish`."""
        if self._decompression is not None:
            self._decompression.close()
        if not self._handed_over:
            self._source.close()


def load_kernel_image(path_or_fd: PathOrFd, limit: int = DEFAULT_LIMIT) -> KernelImage:
    """Open, check and uncompress a kernel in one go; the caller closes the result.

    Raises ImageError for whatever is not a bootable x86-64 kernel.
    """
    opened = OpenedKernel(path_or_fd, limit)
    try:
        return opened.finish()
    except BaseException:
        opened.close()
        raise


def load_initrd(
    path_or_fd: PathOrFd, memory: Memory, ram: Range, limit: int, occupied: Sequence[Range] = ()
) -> Range:
    """Put an initrd as high as possible in `ram`, below `limit`, off `occupied`; returns its place.

    The start is page-aligned, the size is the file's. `limit` is exclusive (a bzImage's
    initrd_addr_max + 1); `occupied` holds at least the kernel's memory.
    """
    with open_source(path_or_fd, "initrd") as source:
        place = place_initrd(source, ram, limit, occupied)
        transfer_exactly(source, memory, 0, place.start, place.size)
        return place


def place_initrd(source: Source, ram: Range, limit: int, occupied: Sequence[Range] = ()) -> Range:
    """The highest page-aligned range that `load_initrd` may use; ImageError where none is left."""
    top = page_align_down(min(ram.end, limit))
    while True:
        start = page_align_down(top - source.size)
        if start < ram.start:
            raise _no_room(source, ram, limit, occupied)
        place = Range(start, source.size)
        # Its last page is the initrd's alone: nothing of ours may share it.
        pages = Range(start, page_align_up(source.size))
        blockers = [span for span in occupied if span.size and span.overlaps(pages)]
        if not blockers:
            return place
        top = page_align_down(min(span.start for span in blockers))


def _no_room(source: Source, ram: Range, limit: int, occupied: Sequence[Range]) -> ImageError:
    end = max((span.end for span in occupied), default=ram.start)
    needed = -(-(end + page_align_up(source.size)) // MIB)
    problem = (
        f"its {source.size} bytes do not fit in guest RAM {ram} below {limit:#x} beside the kernel"
    )
    if needed * MIB <= limit:
        return source.error(problem, f"use --mem {needed}M or more")
    return source.error(problem, "make it smaller, this kernel takes no initrd above that address")
