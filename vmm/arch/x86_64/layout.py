"""The one page of x86-64 addresses: guest-physical memory, I/O ports, interrupts.

All numbers are bytes or port numbers; none carries the C-bit. Whoever needs an address takes it
from here, so that an overlap can be seen (and is tested) in one place.
"""

from __future__ import annotations

from vmm.core.ranges import Range

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FOUR_GIB = 4 * GIB

# --- guest-physical memory, in address order -----------------------------------------------------

GDT_GPA = 0x500  # first bytes past the real-mode interrupt table and BIOS data area
TSS_GPA = 0x600  # a TSS with an I/O permission map, 8.2 KiB: see registers.tss_bytes
BOOT_PARAMS_GPA = 0x7000  # the zero page; the embedded payload finds its info page here instead
PAGE_TABLES_GPA = 0x9000  # PML4, PDPT, then page directories, growing upward
CMDLINE_GPA = 0x20000  # clear of the page tables of the largest guest that boots Linux
CMDLINE_MAX = 2048  # bytes with the closing NUL, Linux' COMMAND_LINE_SIZE
PAYLOAD_TABLES_END = 0x9E000  # the payload has no command line: its tables may fill low memory
TRAMPOLINE = Range(0x90000, 0x8000)
"""All low RAM that a private guest with several processors is told of: common memory, in which
Linux starts them. Its trampoline takes 28 KiB (6.1 to 7.3: 0x6264 bytes, in whole pages); one page
is to spare, since a Linux that finds no place panics. It keeps clear of the first 64 KiB, and of
what lies from 0x9f000 to 1 MiB."""
BOOT_STACK_TOP = 0x9F000  # a page of stack nobody should need: entry code sets its own
LOW_RAM_END = 0x9FC00  # where a PC's extended BIOS data area starts
LOW_RAM = Range(0, LOW_RAM_END)
EBDA_END = 0xA0000  # described as reserved, so that no kernel hands out the old VGA window
ACPI_GPA = 0xE0000  # where the BIOS scan for "RSD PTR " looks, so acpi_rsdp is found twice
ACPI_END = 0x100000  # e820 type 3: Linux maps those encrypted under SEV, reserved ones not
HIGH_RAM_START = 0x100000  # RAM from here on is one run up to the hole below 4 GiB
PAYLOAD_GPA = 0x100000  # the embedded payload is linked here
PAYLOAD_PRIVATE_START = 0x200000  # the payload's first private byte; all below starts shared

# A strict guest's launch area: all that starts shared, below where kernels are linked. Its first
# part is copied by the loader into private memory; offsets are those of firmware's loader.inc.
LAUNCH_GPA = 0x400000
LAUNCH_END = 0x600000  # one large page, so that page tables can name it apart from all else
LAUNCH_HEADER_GPA = LAUNCH_GPA + 0x3000
LAUNCH_STAGE_ONE_TABLES_GPA = LAUNCH_GPA + 0x4000
LAUNCH_TABLES_GPA = LAUNCH_GPA + 0x9000  # with these the guest goes on
LAUNCH_COPY_SIZE = 0x11000
LAUNCH_WINDOW_GPA = LAUNCH_GPA + 0x100000
LAUNCH_WINDOW_SIZE = 0x100000
LAUNCH_SHARED_OFFSET = 1 << 39  # VA - GPA of shared memory: the second entry of the PML4

LARGEST_MEMORY = 1 << 38  # the C-bit is bit 38 where the processor has that many address bits
RAM_HOLE_START = 0xC000_0000  # RAM stops here: the last GiB below 4 GiB belongs to devices
RAM_HOLE_END = FOUR_GIB  # and goes on here
PCI_MEMORY_START = 0xE000_0000  # the PCI root's memory window, up to the IOAPIC
PCI_MEMORY_END = 0xFEC0_0000
IOAPIC_GPA = 0xFEC0_0000  # fixed by KVM's in-kernel irqchip
LAPIC_GPA = 0xFEE0_0000  # the reset value of IA32_APIC_BASE
IDENTITY_MAP_GPA = 0xFFFB_C000  # one page for KVM (Intel without unrestricted guest)
TSS_ADDRESS_GPA = 0xFFFB_D000  # three pages for KVM's real-mode TSS, right behind it

# --- I/O ports -----------------------------------------------------------------------------------

I8042_PORT = 0x60  # 0x60 data, 0x61 system control port B, 0x64 status/command
I8042_PORTS = 5
CMOS_PORT = 0x70  # 0x70 index, 0x71 data
CMOS_PORTS = 2
COM1_PORT = 0x3F8  # what console=ttyS0 means
COM1_PORTS = 8
DOORBELL_PORT = 0x500  # share/unshare by port write, for hosts whose hypercalls don't work
DOORBELL_PORTS = 0x20
LOADER_PORT = 0x520  # what a strict guest's loader asks through
LOADER_PORTS = 0x0C
ACPI_PM_PORT = 0x600  # event block, control, timer and reset register: one device
ACPI_PM_PORTS = 0x10
PM1A_EVT_PORT = 0x600  # 4 bytes: status, enable
PM1A_CNT_PORT = 0x604  # 2 bytes; SLP_EN here is power-off
PM_TMR_PORT = 0x608  # 4 bytes, 3.579545 MHz
RESET_PORT = 0x60C  # writing RESET_VALUE reboots
RESET_VALUE = 1
PCI_CONFIG_PORT = 0xCF8  # configuration mechanism #1: address, then data at 0xcfc
PCI_CONFIG_PORTS = 8
PCI_IO_START = 0xC000  # the PCI root's I/O window: nothing else lives above it
PCI_IO_END = 0x10000
PCI_BAR_SIZE = 0x100  # one BAR per virtio function holds all of its registers
MSIX_BAR_SIZE = 0x1000  # and one in memory its MSI-X table

# --- interrupts (GSI numbers) --------------------------------------------------------------------

TIMER_IRQ = 0  # the PIT's line; on IOAPIC pin 0, where KVM's default routing puts it
COM1_IRQ = 4
RTC_IRQ = 8
SCI_IRQ = 9  # ACPI's own interrupt
FIRST_MESSAGE_GSI = 24  # past the IOAPIC's pins: names for messages, which no guest sees
PCI_INTX_GSIS = (5, 10, 11)  # below 16, so that they work through the 8259 pair (acpi=off) too

S5_SLEEP_TYPE = 5  # SLP_TYP of soft-off in PM1a control and in the DSDT's \_S5
SLEEP_ENABLE = 1 << 13  # SLP_EN
POWER_OFF_VALUE = S5_SLEEP_TYPE << 10 | SLEEP_ENABLE  # written to PM1A_CNT_PORT: power off


def ram_ranges(size: int) -> list[Range]:
    """Where `size` bytes of RAM lie: from 0 up to the hole, the rest from 4 GiB."""
    ranges = [Range(0, min(size, RAM_HOLE_START))]
    if size > RAM_HOLE_START:
        ranges.append(Range(RAM_HOLE_END, size - RAM_HOLE_START))
    return ranges


def pci_intx_gsi(device: int) -> int:
    """The GSI of INTA of the PCI device with this number on bus 0."""
    return PCI_INTX_GSIS[device % len(PCI_INTX_GSIS)]


def msix_bar_gpa(device: int) -> int:
    """Where the memory BAR with the MSI-X table of the function in this PCI slot starts out."""
    return PCI_MEMORY_START + (device - 1) * MSIX_BAR_SIZE


def interrupt_pins() -> list[tuple[int, int, int]]:
    """What GSIs below FIRST_MESSAGE_GSI lead to, as (gsi, irqchip, pin): KVM's own default, the
    same line on the IOAPIC (irqchip 2) and on one of the two 8259s (0 and 1)."""
    pins = [(gsi, 2, gsi) for gsi in range(FIRST_MESSAGE_GSI)]
    return pins + [(gsi, gsi // 8, gsi % 8) for gsi in range(16)]


def virtio_bar_port(device: int) -> int:
    """Where the I/O BAR of the virtio function in this PCI slot (1..31) starts out."""
    return PCI_IO_START + (device - 1) * PCI_BAR_SIZE
