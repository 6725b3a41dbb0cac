"""The address map: nothing overlaps, sizes add up, constants agree with what guests expect."""

from __future__ import annotations

from itertools import combinations

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.registers import tss_bytes
from vmm.core.ranges import PAGE_SIZE, Range

PORTS = {
    "i8042": Range(layout.I8042_PORT, layout.I8042_PORTS),
    "cmos": Range(layout.CMOS_PORT, layout.CMOS_PORTS),
    "com1": Range(layout.COM1_PORT, layout.COM1_PORTS),
    "doorbell": Range(layout.DOORBELL_PORT, layout.DOORBELL_PORTS),
    "acpi pm": Range(layout.ACPI_PM_PORT, layout.ACPI_PM_PORTS),
    "pci config": Range(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORTS),
    "pci bars": Range(layout.PCI_IO_START, layout.PCI_IO_END - layout.PCI_IO_START),
}

LOW_MEMORY = {
    "gdt": Range(layout.GDT_GPA, 64),
    "tss": Range(layout.TSS_GPA, len(tss_bytes())),
    "boot params": Range(layout.BOOT_PARAMS_GPA, PAGE_SIZE),
    "linux page tables": Range(layout.PAGE_TABLES_GPA, 6 * PAGE_SIZE),
    "command line": Range(layout.CMDLINE_GPA, layout.CMDLINE_MAX),
    "stack": Range(layout.BOOT_STACK_TOP - PAGE_SIZE, PAGE_SIZE),
    "acpi": Range(layout.ACPI_GPA, layout.ACPI_END - layout.ACPI_GPA),
    "payload": Range(layout.PAYLOAD_GPA, layout.PAYLOAD_PRIVATE_START - layout.PAYLOAD_GPA),
}


def test_ports_of_all_devices_do_not_overlap() -> None:
    for (one, a), (other, b) in combinations(PORTS.items(), 2):
        assert not a.overlaps(b), f"{one} {a} overlaps {other} {b}"


def test_low_memory_of_all_users_does_not_overlap() -> None:
    for (one, a), (other, b) in combinations(LOW_MEMORY.items(), 2):
        assert not a.overlaps(b), f"{one} {a} overlaps {other} {b}"


def test_power_off_value_is_slp_typ_5_with_slp_en() -> None:
    assert layout.POWER_OFF_VALUE == 0x3400


def test_ram_ranges_below_the_hole_is_one_run() -> None:
    assert layout.ram_ranges(512 << 20) == [Range(0, 512 << 20)]
    assert layout.ram_ranges(3 << 30) == [Range(0, 3 << 30)]


def test_ram_ranges_above_the_hole_continue_at_4_gib() -> None:
    assert layout.ram_ranges(5 << 30) == [Range(0, 3 << 30), Range(4 << 30, 2 << 30)]


def test_virtio_bars_of_all_slots_stay_in_the_pci_window() -> None:
    window = PORTS["pci bars"]
    bars = [Range(layout.virtio_bar_port(slot), layout.PCI_BAR_SIZE) for slot in range(1, 32)]

    assert bars[0].start == 0xC000
    assert all(window.contains(bar) for bar in bars)
    assert not any(a.overlaps(b) for a, b in combinations(bars, 2))


def test_msix_bars_of_all_slots_stay_in_the_memory_window_which_no_ram_reaches() -> None:
    window = Range(layout.PCI_MEMORY_START, layout.PCI_MEMORY_END - layout.PCI_MEMORY_START)
    bars = [Range(layout.msix_bar_gpa(slot), layout.MSIX_BAR_SIZE) for slot in range(1, 32)]

    assert all(window.contains(bar) for bar in bars)
    assert not any(a.overlaps(b) for a, b in combinations(bars, 2))
    assert window.start >= layout.RAM_HOLE_START
    assert window.end <= layout.IOAPIC_GPA


def test_pci_interrupts_stay_off_the_fixed_devices() -> None:
    fixed = {layout.TIMER_IRQ, layout.COM1_IRQ, layout.RTC_IRQ, layout.SCI_IRQ}

    assert {layout.pci_intx_gsi(slot) for slot in range(32)} == {5, 10, 11}
    assert not fixed & set(layout.PCI_INTX_GSIS)
