"""The fixed ACPI tables of the machine, placed and linked: RSDP, XSDT, FADT, FACS, MADT, DSDT.

ACPI 6.5, chapter 5. Section numbers in comments are of that edition.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.acpi.dsdt import dsdt_body
from vmm.core.errors import UsageError
from vmm.core.lean_typing import NamedTuple

RSDP_GPA = layout.ACPI_GPA

OEM_ID, OEM_TABLE_ID, CREATOR_ID, REVISION = b"PYVMM ", b"PYVMMTBL", b"PYVM", 1
HEADER_SIZE = 36
ALIGNMENT = 64  # the FACS wants it; the others don't mind

XSDT_REVISION, FADT_REVISION, MADT_REVISION, DSDT_REVISION = 1, 6, 5, 2
FADT_SIZE, FADT_MINOR = 276, 3

# 5.2.9.3, IA-PC boot flags: devices on fixed ports, no VGA, and by its absence no 8042.
BOOT_LEGACY_DEVICES, BOOT_NO_VGA = 1 << 0, 1 << 2
# 5.2.9, fixed feature flags
WBINVD, PROC_C1, SLP_BUTTON = 1 << 0, 1 << 2, 1 << 5
FIX_RTC, TMR_VAL_EXT, RESET_REG_SUP = 1 << 6, 1 << 8, 1 << 10
NO_C2, NO_C3 = 101, 1001  # latencies past 100 and 1000 microseconds: the state does not exist
ENTERPRISE_SERVER = 4

# 5.2.12, MADT
PCAT_COMPAT = 1 << 0  # a pair of 8259s is there too
LOCAL_APIC, IO_APIC, INTERRUPT_OVERRIDE, LOCAL_APIC_NMI = 0, 1, 2, 4
LOCAL_X2APIC, LOCAL_X2APIC_NMI = 9, 10
CPU_ENABLED = 1 << 0
MAX_XAPIC_ID = 254  # 255 is broadcast
CONFORMING, LEVEL_HIGH, LEVEL_LOW = 0x0, 0xD, 0xF
NMI_PIN = 1  # LINT1
ISA_IRQS = 16


class GenericAddress(NamedTuple):
    """Generic Address Structure (5.2.3.2) of a register in I/O space; the all-zero one is none."""

    port: int
    size: int

    def pack(self) -> bytes:
        io_space, access = 1, self.size.bit_length()  # access size: 1 byte, 2 word, 3 dword
        return struct.pack("<BBBBQ", io_space, 8 * self.size, 0, access, self.port)


def checksummed(data: bytes, at: int) -> bytes:
    """`data` with the byte at `at` chosen so that all bytes add up to 0 modulo 256."""
    table = bytearray(data)
    table[at] = 0
    table[at] = -sum(table) & 0xFF
    return bytes(table)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table (5.2.6): the common header, then `body`."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        *(signature, HEADER_SIZE + len(body), revision, 0),
        *(OEM_ID, OEM_TABLE_ID, REVISION, CREATOR_ID, REVISION),
    )
    return checksummed(header + body, 9)


def rsdp(xsdt_gpa: int) -> bytes:
    """Root System Description Pointer (5.2.5.3), without an RSDT."""
    data = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt_gpa, 0)
    # Two sums: one over the first 20 bytes (ACPI 1.0), then one over all of them.
    return checksummed(checksummed(data[:20], 8) + data[20:], 32)


def facs() -> bytes:
    """Firmware ACPI Control Structure (5.2.10): nothing but its presence, which drivers expect."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def fadt(facs_gpa: int, dsdt_gpa: int) -> bytes:
    """Fixed ACPI Description Table (5.2.9): where the registers of `AcpiPm` are.

    SMI_CMD is 0: there is no legacy mode to switch from. The power button is fixed hardware, the
    sleep button declared as a control-method device, of which there is none; the RTC cannot wake
    the machine.
    """
    data = bytearray(FADT_SIZE - HEADER_SIZE)

    def put(offset: int, layout_code: str, *values: int | bytes) -> None:
        struct.pack_into("<" + layout_code, data, offset - HEADER_SIZE, *values)

    put(36, "II", facs_gpa, dsdt_gpa)
    put(45, "BH", ENTERPRISE_SERVER, layout.SCI_IRQ)
    put(56, "I", layout.PM1A_EVT_PORT)
    put(64, "I", layout.PM1A_CNT_PORT)
    put(76, "I", layout.PM_TMR_PORT)
    put(88, "BBBB", 4, 2, 0, 4)  # lengths of PM1 event, PM1 control, PM2 control, PM timer
    put(96, "HH", NO_C2, NO_C3)
    put(108, "B", 0x32)  # the clock's century register
    put(109, "H", BOOT_LEGACY_DEVICES | BOOT_NO_VGA)
    features = WBINVD | PROC_C1 | SLP_BUTTON  # without PWR_BUTTON: the fixed one is there
    put(112, "I", features | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP)
    put(116, "12sB", GenericAddress(layout.RESET_PORT, 1).pack(), layout.RESET_VALUE)
    put(131, "B", FADT_MINOR)
    put(140, "Q", dsdt_gpa)
    put(148, "12s", GenericAddress(layout.PM1A_EVT_PORT, 4).pack())
    put(172, "12s", GenericAddress(layout.PM1A_CNT_PORT, 2).pack())
    put(208, "12s", GenericAddress(layout.PM_TMR_PORT, 4).pack())
    put(268, "8s", b"pyvmm")
    return table(b"FACP", FADT_REVISION, bytes(data))


def madt(cpus: int, pci_gsis: Iterable[int], *, ioapic: bool = True) -> bytes:
    """Multiple APIC Description Table (5.2.12): processors by APIC id, IOAPIC, ISA overrides.

    Without the IOAPIC, whose registers are in memory, interrupts go through the pair of 8259s.
    No override for the timer: PCs wire it to IOAPIC pin 2, KVM's default routing to pin 0.
    """
    entries = [struct.pack("<II", layout.LAPIC_GPA, PCAT_COMPAT)]
    for cpu in range(cpus):
        if cpu <= MAX_XAPIC_ID:
            entries.append(struct.pack("<BBBBI", LOCAL_APIC, 8, cpu, cpu, CPU_ENABLED))
        else:
            entries.append(struct.pack("<BBHIII", LOCAL_X2APIC, 16, 0, cpu, CPU_ENABLED, cpu))
    if ioapic:
        entries.append(struct.pack("<BBBBII", IO_APIC, 12, 0, 0, layout.IOAPIC_GPA, 0))
    entries.append(_override(layout.SCI_IRQ, layout.SCI_IRQ, LEVEL_HIGH))
    # Below 16 an interrupt is ISA's, edge-triggered, unless said otherwise; PCI's are level, low.
    isa_gsis = sorted({gsi for gsi in pci_gsis if gsi < ISA_IRQS})
    entries += [_override(gsi, gsi, LEVEL_LOW) for gsi in isa_gsis]
    entries.append(struct.pack("<BBBHB", LOCAL_APIC_NMI, 6, 0xFF, CONFORMING, NMI_PIN))
    if cpus > MAX_XAPIC_ID + 1:
        everybody = 0xFFFF_FFFF
        entries.append(
            struct.pack("<BBHIB3x", LOCAL_X2APIC_NMI, 12, CONFORMING, everybody, NMI_PIN)
        )
    return table(b"APIC", MADT_REVISION, b"".join(entries))


def _override(irq: int, gsi: int, flags: int) -> bytes:
    isa_bus = 0
    return struct.pack("<BBBBIH", INTERRUPT_OVERRIDE, 10, isa_bus, irq, gsi, flags)


class _Placement:
    """Tables one after the other from `RSDP_GPA` + one alignment unit on."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self._next = RSDP_GPA + ALIGNMENT

    def put(self, data: bytes) -> int:
        gpa = self._next
        self._next = gpa + len(data) + ALIGNMENT - 1 & -ALIGNMENT
        if self._next > layout.ACPI_END:
            raise UsageError(
                f"ACPI tables end at {self._next:#x}, past {layout.ACPI_END:#x}: "
                "use fewer processors (--cpus)"
            )
        self.writes.append((gpa, data))
        return gpa


def acpi_tables(
    cpus: int,
    pci_interrupts: Mapping[int, int],
    others: Iterable[bytes] = (),
    *,
    ioapic: bool = True,
) -> list[tuple[int, bytes]]:
    """All tables as (gpa, bytes), the RSDP first, at RSDP_GPA.

    `pci_interrupts` maps PCI device numbers on bus 0 to the GSI of their INTA. `others` are whole
    tables that a machine has besides. `ioapic`: see `madt`.
    """
    placement = _Placement()
    dsdt = placement.put(table(b"DSDT", DSDT_REVISION, dsdt_body(pci_interrupts)))
    control = placement.put(facs())
    described = [
        placement.put(fadt(control, dsdt)),
        placement.put(madt(cpus, pci_interrupts.values(), ioapic=ioapic)),
        *map(placement.put, others),
    ]
    xsdt = placement.put(
        table(b"XSDT", XSDT_REVISION, struct.pack(f"<{len(described)}Q", *described))
    )
    return [(RSDP_GPA, rsdp(xsdt)), *placement.writes]
