"""The devices a guest cannot find by itself: PCI root, serial port, clock, reserved ports."""

from __future__ import annotations

from collections.abc import Mapping

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.acpi.aml import (
    ZERO,
    bus_numbers,
    device,
    eisa_id,
    integer,
    io,
    io_window,
    irq,
    memory_window,
    name,
    package,
    resources,
    scope,
)

ANY_FUNCTION = 0xFFFF  # low half of a _PRT address: the entry is for the whole device
PIN_INTA = 0


def dsdt_body(pci_interrupts: Mapping[int, int]) -> bytes:
    """The AML of the DSDT; `pci_interrupts` maps device numbers on bus 0 to the GSI of INTA."""
    return _soft_off() + scope(
        "\\_SB_",
        _pci_root(pci_interrupts),
        _com1(),
        _clock(),
        _system_ports(),
    )


def _soft_off() -> bytes:
    """\\_S5: the SLP_TYP values that power off (PM1a, PM1b, two reserved)."""
    sleep_type = integer(layout.S5_SLEEP_TYPE)
    return name("\\_S5_", package([sleep_type, sleep_type, ZERO, ZERO]))


def _pci_root(interrupts: Mapping[int, int]) -> bytes:
    """Bus 0 behind ports 0xcf8-0xcff. Interrupts are wired to GSIs, without link devices."""
    routes = [
        package([integer(number << 16 | ANY_FUNCTION), integer(PIN_INTA), ZERO, integer(gsi)])
        for number, gsi in sorted(interrupts.items())
    ]
    return device(
        "PCI0",
        name("_HID", eisa_id("PNP0A03")),
        name("_UID", ZERO),
        name("_BBN", ZERO),
        name(
            "_CRS",
            resources(
                bus_numbers(0, 0),
                io(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORTS),
                io_window(layout.PCI_IO_START, layout.PCI_IO_END - 1),
                memory_window(layout.PCI_MEMORY_START, layout.PCI_MEMORY_END - 1),
            ),
        ),
        name("_PRT", package(routes)),
    )


def _com1() -> bytes:
    return device(
        "COM1",
        name("_HID", eisa_id("PNP0501")),
        name("_UID", integer(1)),
        name("_CRS", resources(io(layout.COM1_PORT, layout.COM1_PORTS), irq(layout.COM1_IRQ))),
    )


def _clock() -> bytes:
    return device(
        "RTC_",
        name("_HID", eisa_id("PNP0B00")),
        name("_CRS", resources(io(layout.CMOS_PORT, layout.CMOS_PORTS), irq(layout.RTC_IRQ))),
    )


def _system_ports() -> bytes:
    """Ports no driver claims, named so that the guest places nothing there."""
    return device(
        "SYSR",
        name("_HID", eisa_id("PNP0C02")),
        name("_UID", integer(1)),
        name(
            "_CRS",
            resources(
                io(layout.DOORBELL_PORT, layout.DOORBELL_PORTS),
                io(layout.ACPI_PM_PORT, layout.ACPI_PM_PORTS),
            ),
        ),
    )
