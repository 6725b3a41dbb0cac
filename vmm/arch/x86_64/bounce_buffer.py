"""Where Linux will put what it writes first: page descriptors, and the bounce buffer (swiotlb) of
a guest with memory encryption.

The bounce buffer is the largest thing that such a kernel writes while it boots: the kernel zeroes
it as private memory, then shares it. Knowing roughly where it will be lets the host map it in one
go.
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


def early_allocations(
    ram: Sequence[Range], initrd_bytes: int, *, bounces: bool = True
) -> Range | None:
    """The top of RAM below 4 GiB: bounce buffer, and what Linux allocates before it.

    memblock allocates downwards: initrd (we put it on top), struct pages (of all memory, above
    4 GiB where there is some), sundries, then the bounce buffer, which must lie below 4 GiB. A
    guest that doesn't bounce (`bounces`) has none.
    An estimate, for prefaulting only: nothing breaks where it is wrong. None where that would be
    more than half of low memory (such a guest may well have no bounce buffer), or is above it.
    """
    low = ram[0]
    total = sum(area.size for area in ram)
    if not bounces and len(ram) > 1:
        return None
    size = initrd_bytes + _SUNDRIES
    if bounces:
        size += bounce_buffer_size(total)
    if len(ram) == 1:
        size += total // _STRUCT_PAGE_SHARE
    if size > low.size // 2:
        return None
    start = page_align_down(low.end - size)
    return Range(start, low.end - start)
