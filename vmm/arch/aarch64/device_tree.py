"""The device tree: what the guest learns about its machine.

Each node follows its binding in Linux' Documentation/devicetree/bindings, named beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.fdt import Node, cells64, flatten
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import Range

# Phandles: how one node refers to another.
GIC, V2M, CLOCK, POOL = 1, 2, 3, 4

SPI, PPI = 0, 1  # the first of the GIC's three interrupt cells
EDGE_RISING, LEVEL_HIGH = 1, 4  # the last one

UART_CLOCK_HZ = 1_843_200  # a PC's; the line is infinitely fast, whatever the divisor
RTC_CLOCK_HZ = 24_000_000  # the PL031's bus clock, which only has to exist

_PCI_MEMORY_SPACE = 0x0200_0000  # 32-bit memory, not prefetchable (IEEE 1275 PCI, 2.2.1.1)
_INTX_PINS = 4


class Machine(NamedTuple):
    """What is not the same for every guest."""

    ram: Range
    cpus: int
    command_line: str
    initrd: Range | None = None
    psci_method: str = "hvc"
    """How the guest calls PSCI: "hvc", or "smc" as realms do."""
    pool: Range | None = None
    """Memory that PCI devices' drivers are confined to, if any."""


def device_tree(machine: Machine) -> bytes:
    """The blob for `machine`. Raises ValueError for a command line with a NUL byte."""
    root = Node(
        "",
        {
            "compatible": "linux,dummy-virt",
            "#address-cells": 2,
            "#size-cells": 2,
            "interrupt-parent": GIC,
            # Otherwise Linux would map rings uncached, and the host sees the caches only.
            "dma-coherent": None,
        },
    )
    _chosen(root, machine)
    ram = machine.ram
    root.add(
        f"memory@{ram.start:x}", {"device_type": "memory", "reg": cells64(ram.start, ram.size)}
    )
    if machine.pool is not None:
        _pool(root, machine.pool)
    _processors(root, machine)
    _interrupt_controller(root, machine.cpus)
    _timer(root)
    _uart(root)
    _rtc(root)
    _pci(root, confined=machine.pool is not None)
    return flatten(root)


def _chosen(root: Node, machine: Machine) -> None:
    """chosen.yaml (dt-schema)."""
    chosen = root.add("chosen", {"bootargs": machine.command_line})
    chosen.properties["stdout-path"] = f"/serial@{layout.UART_GPA:x}"
    if machine.initrd is not None:
        chosen.properties["linux,initrd-start"] = cells64(machine.initrd.start)
        chosen.properties["linux,initrd-end"] = cells64(machine.initrd.end)


def _pool(root: Node, pool: Range) -> None:
    """reserved-memory/shared-dma-pool.yaml (dt-schema): restricted-dma-pool."""
    reserved = root.add("reserved-memory", {"#address-cells": 2, "#size-cells": 2, "ranges": None})
    reserved.add(
        f"dma@{pool.start:x}",
        {
            "compatible": "restricted-dma-pool",
            "reg": cells64(pool.start, pool.size),
            "phandle": POOL,
        },
    )


def _processors(root: Node, machine: Machine) -> None:
    """arm/cpus.yaml, arm/psci.yaml."""
    root.add(
        "psci",
        {"compatible": ("arm,psci-1.0", "arm,psci-0.2"), "method": machine.psci_method},
    )
    processors = root.add("cpus", {"#address-cells": 1, "#size-cells": 0})
    for index in range(machine.cpus):
        affinity = layout.mpidr(index)
        processors.add(
            f"cpu@{affinity:x}",
            {
                "device_type": "cpu",
                "compatible": "arm,armv8",
                "reg": affinity,
                "enable-method": "psci",
            },
        )


def _interrupt_controller(root: Node, cpus: int) -> None:
    """interrupt-controller/arm,gic-v3.yaml and arm,gic.yaml (v2m)."""
    controller = root.add(
        f"interrupt-controller@{layout.GIC_DISTRIBUTOR_GPA:x}",
        {
            "compatible": "arm,gic-v3",
            "interrupt-controller": None,
            "#interrupt-cells": 3,
            "#address-cells": 2,
            "#size-cells": 2,
            "ranges": None,
            "reg": cells64(
                layout.GIC_DISTRIBUTOR_GPA,
                layout.GIC_DISTRIBUTOR_SIZE,
                layout.GIC_REDISTRIBUTORS_GPA,
                layout.GIC_REDISTRIBUTOR_SIZE * cpus,
            ),
            "phandle": GIC,
        },
    )
    controller.add(
        f"v2m@{layout.V2M_GPA:x}",
        {
            "compatible": "arm,gic-v2m-frame",
            "msi-controller": None,
            "reg": cells64(layout.V2M_GPA, layout.V2M_SIZE),
            "phandle": V2M,
        },
    )


def _timer(root: Node) -> None:
    """timer/arm,arch_timer.yaml."""
    timers = (
        layout.TIMER_SECURE_PPI,
        layout.TIMER_PHYSICAL_PPI,
        layout.TIMER_VIRTUAL_PPI,
        layout.TIMER_HYPERVISOR_PPI,
    )
    root.add(
        "timer",
        {
            "compatible": "arm,armv8-timer",
            "interrupts": [cell for ppi in timers for cell in (PPI, ppi, LEVEL_HIGH)],
            "always-on": None,
        },
    )


def _uart(root: Node) -> None:
    """serial/8250.yaml."""
    root.add(
        f"serial@{layout.UART_GPA:x}",
        {
            "compatible": "ns16550a",
            "reg": cells64(layout.UART_GPA, layout.UART_SIZE),
            "clock-frequency": UART_CLOCK_HZ,
            # It sends pulses, which a level-triggered line would lose or hold for ever.
            "interrupts": (SPI, layout.UART_SPI, EDGE_RISING),
        },
    )


def _rtc(root: Node) -> None:
    """rtc/arm,pl031.yaml. Without an interrupt, since no alarm is ever raised."""
    root.add(
        "clock",
        {
            "compatible": "fixed-clock",
            "#clock-cells": 0,
            "clock-frequency": RTC_CLOCK_HZ,
            "phandle": CLOCK,
        },
    )
    root.add(
        f"rtc@{layout.RTC_GPA:x}",
        {
            "compatible": ("arm,pl031", "arm,primecell"),
            "reg": cells64(layout.RTC_GPA, layout.RTC_SIZE),
            "clocks": CLOCK,
            "clock-names": "apb_pclk",
        },
    )


def _pci(root: Node, *, confined: bool) -> None:
    """pci/host-generic-pci.yaml."""
    window = layout.PCI_MEMORY_START
    size = layout.PCI_MEMORY_END - layout.PCI_MEMORY_START
    bridge = root.add(
        f"pcie@{layout.PCI_ECAM_GPA:x}",
        {
            "compatible": "pci-host-ecam-generic",
            "device_type": "pci",
            "reg": cells64(layout.PCI_ECAM_GPA, layout.PCI_ECAM_SIZE),
            "bus-range": (0, 0),
            "#address-cells": 3,
            "#size-cells": 2,
            "ranges": _cells(_PCI_MEMORY_SPACE) + cells64(window, window, size),
            "#interrupt-cells": 1,
            # Devices take the four lines in turn: two bits of the device's number, and the pin.
            "interrupt-map-mask": (3 << 11, 0, 0, 7),
            "interrupt-map": list(_interrupt_map()),
            "msi-parent": V2M,
            "dma-coherent": None,
        },
    )
    if confined:
        # On the bridge: Linux takes it for all devices behind it (of_dma_configure).
        bridge.properties["memory-region"] = POOL


def _interrupt_map() -> Iterator[int]:
    """Rows of (device << 11, 0, 0, pin, GIC, 0, 0, SPI, number, level): the GIC has two address
    cells, which are zero."""
    lines = len(layout.PCI_INTX_SPIS)
    for device in range(lines):
        for pin in range(1, _INTX_PINS + 1):
            spi = layout.PCI_INTX_SPIS[(device + pin - 1) % lines]
            yield from (device << 11, 0, 0, pin, GIC, 0, 0, SPI, spi, LEVEL_HIGH)


def _cells(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)
