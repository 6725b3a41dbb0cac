"""The one page of arm64 addresses: guest-physical memory and interrupts.

All numbers are bytes; none carries the bit that marks shared addresses of a realm. Whoever needs
an address takes it from here, so that an overlap can be seen (and is tested) in one place.
"""

from __future__ import annotations

from vmm.core.ranges import PAGE_SIZE, Range, page_align_down

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# --- guest-physical memory, in address order: registers below 1 GiB, RAM above ------------------

GIC_DISTRIBUTOR_GPA = 0x0800_0000  # emulated by KVM
GIC_DISTRIBUTOR_SIZE = 0x1_0000
V2M_GPA = 0x0802_0000  # GICv2m frame: where interrupt messages go
V2M_SIZE = PAGE_SIZE
GIC_REDISTRIBUTORS_GPA = 0x080A_0000  # emulated by KVM, one behind the other
GIC_REDISTRIBUTOR_SIZE = 0x2_0000  # for each vCPU; 64 of them end at 0x088a_0000
UART_GPA = 0x0900_0000  # a 16550 with byte registers, what console=ttyS0 means
UART_SIZE = PAGE_SIZE
RTC_GPA = 0x0901_0000  # PL031
RTC_SIZE = PAGE_SIZE
DOORBELL_GPA = 0x0902_0000  # share/unshare by register writes, for the embedded payload
DOORBELL_SIZE = PAGE_SIZE
PCI_MEMORY_START = 0x1000_0000  # the PCI root's memory window
PCI_MEMORY_END = 0x3EFF_0000
PCI_ECAM_GPA = 0x3F00_0000  # PCI configuration space, 4 KiB per function, bus 0 only
PCI_ECAM_SIZE = MIB
RAM_START = 0x4000_0000  # RAM is one run from here on

IPA_BITS = 40  # what KVM_CREATE_VM gives for type 0
REALM_SHARED_BIT = IPA_BITS - 1
"""The address bit of a realm's shared pages (RMM: the upper half of the IPA space)."""
LARGEST_MEMORY = 255 * GIB
"""RAM ends at 256 GiB, well below REALM_SHARED_BIT, under every scheme."""

# --- inside RAM ----------------------------------------------------------------------------------

KERNEL_ALIGNMENT = 2 * MIB  # booting.rst: text_offset counts from a 2 MiB aligned base
TREE_SIZE = 64 * KIB  # the device tree's place at the end of RAM; Linux takes 2 MiB at most
POOL_SIZE = 2 * MIB
"""The restricted DMA pool of a protected guest: all that it shares for PCI devices. Each of its
pages is given to the hypervisor when the guest shares it, which takes milliseconds."""
INITRD_WINDOW = 32 * GIB  # booting.rst: kernel and initrd in one window of that size
PAYLOAD_INFO_GPA = RAM_START  # a page that tells the embedded payload about its machine
PAYLOAD_GPA = RAM_START + MIB  # it is linked here
PAYLOAD_PRIVATE_START = RAM_START + 2 * MIB  # its first private byte; all below starts shared
CMDLINE_MAX = 2048  # bytes with the closing NUL, Linux' COMMAND_LINE_SIZE

# --- interrupts ----------------------------------------------------------------------------------
# SPI numbers; an interrupt's INTID is 32 more. A GSI is an SPI's number, by KVM's default routing.

FIRST_SPI_INTID = 32
UART_SPI = 1  # edge-triggered: the UART sends pulses
PCI_INTX_SPIS = (4, 5, 6, 7)  # level-triggered, devices take turns
FIRST_MESSAGE_SPI = 32
MESSAGE_SPIS = 448
INTERRUPTS = FIRST_SPI_INTID + FIRST_MESSAGE_SPI + MESSAGE_SPIS  # KVM takes 64 to 1024, by 32
FIRST_MESSAGE_GSI = INTERRUPTS - FIRST_SPI_INTID  # past the SPIs: names for messages

# PPI numbers of the architected timers, as KVM wires them (arm_timer.h): INTID less 16.
TIMER_SECURE_PPI, TIMER_PHYSICAL_PPI, TIMER_VIRTUAL_PPI, TIMER_HYPERVISOR_PPI = 13, 14, 11, 10


def ram_ranges(size: int) -> list[Range]:
    """Where `size` bytes of RAM lie."""
    return [Range(RAM_START, size)]


def tree_place(ram: Range) -> Range:
    """Where the device tree goes: the end of RAM, off everything that Linux starts with."""
    return Range(page_align_down(ram.end - TREE_SIZE), TREE_SIZE)


def pool_place(ram: Range) -> Range:
    """Where a restricted DMA pool goes, if there is one: below the device tree, aligned so that
    KVM can map it in one block."""
    return Range((tree_place(ram).start - POOL_SIZE) & ~(POOL_SIZE - 1), POOL_SIZE)


def bounce_slots(ram_bytes: int) -> int:
    """How many slots of 2 KiB (swiotlb=) a realm's bounce buffer gets: 6% of RAM as x86's has,
    between 4 and 64 MiB.

    Linux 7.3 of its own accord took 256 KiB in guests of 128 and 256 MiB, in which a disk's request
    of 254 pages never finds room: it fails, with "swiotlb buffer is full".
    """
    return min(max(ram_bytes * 6 // 100, 4 * MIB), 64 * MIB) // (2 * KIB)


def pci_intx_spi(device: int) -> int:
    """The SPI of INTA of the PCI device with this number on bus 0."""
    return PCI_INTX_SPIS[device % len(PCI_INTX_SPIS)]


def virtio_bar_gpa(device: int) -> int:
    """Where the memory BAR with the registers of the function in this PCI slot starts out."""
    return PCI_MEMORY_START + (device - 1) * 2 * PAGE_SIZE


def msix_bar_gpa(device: int) -> int:
    """Where the memory BAR with its MSI-X table starts out."""
    return virtio_bar_gpa(device) + PAGE_SIZE


def mpidr(vcpu: int) -> int:
    """The affinity fields of MPIDR_EL1 that KVM gives the vCPU with this id (sys_regs.c,
    reset_mpidr): 16 to a cluster, so that a GIC can send interrupts to all of it at once."""
    return vcpu & 0xF | (vcpu >> 4 & 0xFF) << 8


def interrupt_pins() -> list[tuple[int, int, int]]:
    """What GSIs below FIRST_MESSAGE_GSI lead to, as (gsi, irqchip, pin): the lines in use."""
    return [(spi, 0, spi) for spi in (UART_SPI, *PCI_INTX_SPIS)]
