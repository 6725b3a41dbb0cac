"""Where Linux will put the bounce buffer (swiotlb) of a guest with memory encryption.

It is the largest thing that such a kernel writes while it boots: the kernel zeroes it as private
memory, then shares it. Knowing roughly where it will be lets the host map it in one go.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.core.ranges import Range, page_align_down

_SMALLEST, _LARGEST = 64 << 20, 1 << 30
_STRUCT_PAGE_SHARE = 64  # struct page: 64 bytes for each page of 4096
_SUNDRIES = 6 << 20  # page tables, per-CPU areas and the like, measured with Linux 6.1 to 7.3


def bounce_buffer_size(ram_bytes: int) -> int:
    """Bytes: 6% of memory, 64 MiB at least, 1 GiB at most.

    Source: mem_encrypt_setup_arch() in arch/x86/mm/mem_encrypt_amd.c (sev_setup_arch() before
    Linux 6.6), where the command line has no swiotlb=.
    """
    return min(max(ram_bytes * 6 // 100, _SMALLEST), _LARGEST)


def room_needed(ram_bytes: int) -> int:
    """Bytes for the bounce buffer and what else Linux allocates before it knows what it has: with
    less it halves the buffer, and then panics."""
    return bounce_buffer_size(ram_bytes) + _SUNDRIES + ram_bytes // _STRUCT_PAGE_SHARE


def early_allocations(ram: Sequence[Range], initrd_bytes: int) -> Range | None:
    """The top of RAM below 4 GiB: bounce buffer, and what Linux allocates before it.

    memblock allocates downwards: initrd (we put it on top), struct pages (of all memory, above
    4 GiB where there is some), sundries, then the bounce buffer, which must lie below 4 GiB.
    An estimate, for prefaulting only: nothing breaks where it is wrong. None where that would be
    more than half of low memory: such a guest may well have no bounce buffer.
    """
    low = ram[0]
    total = sum(area.size for area in ram)
    size = bounce_buffer_size(total) + initrd_bytes + _SUNDRIES
    if len(ram) == 1:
        size += total // _STRUCT_PAGE_SHARE
    if size > low.size // 2:
        return None
    start = page_align_down(low.end - size)
    return Range(start, low.end - start)
