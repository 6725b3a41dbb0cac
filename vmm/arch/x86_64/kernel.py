"""A kernel image opened, checked and uncompressed: segments, an entry, the memory they need."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, closing
from types import TracebackType

from vmm.arch.x86_64.bzimage import SetupHeader, is_bzimage, parse_setup_header
from vmm.arch.x86_64.elf import ElfImage, Segment, is_elf, parse_elf
from vmm.boot.identify import PREFIX, describe
from vmm.boot.kernel import MIB, KernelFile, Memory, transfer_exactly
from vmm.boot.source import DEFAULT_LIMIT, PathOrFd, Source
from vmm.core.lean_typing import Enum, NamedTuple
from vmm.core.ranges import Range, page_align_up


class Kind(Enum):
    """The images that can be booted."""

    BZIMAGE = "bzImage"
    ELF = "elf"


def identify(source: Source) -> Kind:
    """Which bootable kind the file is; ImageError that names it where it is none."""
    prefix = source.prefix(PREFIX)
    if is_elf(prefix):
        return Kind.ELF
    if is_bzimage(prefix):
        return Kind.BZIMAGE
    raise source.error(*describe(source, prefix, "x86-64", "give an x86-64 bzImage or ELF vmlinux"))


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

    def check_fits(
        self, ram: Iterable[Range], reserved: Iterable[Range] = (), besides: int = 0
    ) -> None:
        """ImageError unless the kernel's memory lies in one range of `ram`, off `reserved`.

        `besides`: bytes that the guest needs as well, for the advice in the error.
        """
        ranges = list(ram)
        if not any(span.contains(self.memory) for span in ranges):
            largest = max((span.end for span in ranges), default=0)
            raise self.source.error(
                f"the kernel needs guest memory at {self.memory}, RAM ends at {largest:#x}",
                f"use --mem {-(-(self.memory_end + besides) // MIB)}M or more"
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


class OpenedKernel:
    """A kernel whose headers are checked, and whose payload is being decompressed beside us."""

    def __init__(self, path_or_fd: PathOrFd, limit: int = DEFAULT_LIMIT) -> None:
        """Opens the file; `limit` bounds the uncompressed size in bytes.

        Raises ImageError for what is recognisably not a bootable x86-64 kernel.
        """
        self._file = KernelFile(path_or_fd)
        self._header: SetupHeader | None = None
        with ExitStack() as opened:
            opened.callback(self._file.close)
            self._kind = identify(self._file.source)
            if self._kind is not Kind.ELF:
                self._header = header = parse_setup_header(self._file.source)
                # The kernel unpacks itself inside init_size bytes: its payload can't be larger.
                limit = min(limit, header.init_size)
                self._file.uncompress(header.payload_start, header.payload_length, limit)
            opened.pop_all()

    def finish(self) -> KernelImage:
        """The checked image, which the caller closes. Raises ImageError for a bad one."""
        with ExitStack() as opened:
            source = opened.enter_context(closing(self._file.finish()))
            image = KernelImage(self._kind, source, parse_elf(source), self._header)
            opened.pop_all()
        return image

    def close(self) -> None:
        """Give up what isn't finished; any number of times, and no harm after `finish`."""
        self._file.close()


def load_kernel_image(path_or_fd: PathOrFd, limit: int = DEFAULT_LIMIT) -> KernelImage:
    """Open, check and uncompress a kernel in one go; the caller closes the result.

    Raises ImageError for whatever is not a bootable x86-64 kernel.
    """
    with closing(OpenedKernel(path_or_fd, limit)) as opened:  # which lets go of what is finished
        return opened.finish()
