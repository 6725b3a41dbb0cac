"""What the device tree says: that it agrees with the layout, and with what bindings demand."""

from __future__ import annotations

import pytest

from tests.support.fdt import Read, read_tree
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.device_tree import Machine, device_tree
from vmm.core.ranges import Range

RAM = Range(layout.RAM_START, 256 << 20)
PCI = f"/pcie@{layout.PCI_ECAM_GPA:x}"
GIC = f"/interrupt-controller@{layout.GIC_DISTRIBUTOR_GPA:x}"


def tree(**others: object) -> Read:
    fields: dict[str, object] = {"ram": RAM, "cpus": 1, "command_line": "console=ttyS0", **others}
    root, reserved = read_tree(device_tree(Machine(**fields)))  # type: ignore[arg-type]
    assert reserved == []
    return root


def all_nodes(node: Read) -> list[Read]:
    return [node, *(found for child in node.children.values() for found in all_nodes(child))]


def test_memory_is_the_whole_of_ram() -> None:
    node = tree().at("/memory@40000000")

    assert node.texts("device_type") == ["memory"]
    assert node.addresses("reg") == [RAM.start, RAM.size]


def test_chosen_has_command_line_console_and_initrd() -> None:
    root = tree(command_line="a=\udcff b", initrd=Range(0x4800_0000, 12345))
    chosen = root.at("/chosen")

    assert chosen.properties["bootargs"] == b"a=\xff b\0"
    assert root.at(chosen.texts("stdout-path")[0]).texts("compatible") == ["ns16550a"]
    assert chosen.addresses("linux,initrd-start") == [0x4800_0000]
    assert chosen.addresses("linux,initrd-end") == [0x4800_0000 + 12345]


def test_chosen_without_an_initrd_names_none() -> None:
    assert "linux,initrd-start" not in tree().at("/chosen").properties


@pytest.mark.parametrize("method", ["hvc", "smc"])
def test_psci_is_called_as_asked(method: str) -> None:
    assert tree(psci_method=method).at("/psci").texts("method") == [method]


def test_processors_have_the_affinities_that_kvm_gives_them() -> None:
    cpus = tree(cpus=18).at("/cpus")

    regs = [node.cells("reg") for node in cpus.children.values()]
    assert regs == [[number] for number in (*range(16), 0x100, 0x101)]
    assert "cpu@101" in cpus.children
    assert all(node.texts("enable-method") == ["psci"] for node in cpus.children.values())


def test_interrupt_controller_has_a_redistributor_for_each_processor() -> None:
    controller = tree(cpus=64).at(GIC)

    distributor, size, redistributors, all_of_them = controller.addresses("reg")
    assert (distributor, size) == (layout.GIC_DISTRIBUTOR_GPA, 0x1_0000)
    assert redistributors + all_of_them <= layout.UART_GPA
    assert all_of_them == 64 * 0x2_0000


def test_messages_go_to_the_frame_in_the_interrupt_controller() -> None:
    root = tree()
    frame = root.at(f"{GIC}/v2m@{layout.V2M_GPA:x}")

    assert frame.addresses("reg") == [layout.V2M_GPA, 0x1000]
    assert root.at(PCI).cells("msi-parent") == frame.cells("phandle")


def test_phandles_are_unique_and_lead_somewhere() -> None:
    root = tree(pool=Range(0x4400_0000, 2 << 20))
    handles = [node.cells("phandle")[0] for node in all_nodes(root) if "phandle" in node.properties]

    assert len(handles) == len(set(handles)) == 4
    assert root.cells("interrupt-parent") == root.at(GIC).cells("phandle")
    clock = root.at(f"/rtc@{layout.RTC_GPA:x}").cells("clocks")
    assert clock == root.at("/clock").cells("phandle")


def test_uart_interrupt_is_an_edge_and_not_a_pci_line() -> None:
    uart = tree().at(f"/serial@{layout.UART_GPA:x}")

    assert uart.cells("interrupts") == [0, layout.UART_SPI, 1]
    assert layout.UART_SPI not in layout.PCI_INTX_SPIS


def test_interrupt_map_agrees_with_the_layout_for_every_slot() -> None:
    bridge = tree().at(PCI)
    mask = bridge.cells("interrupt-map-mask")
    cells = bridge.cells("interrupt-map")
    rows = {tuple(cells[at : at + 4]): cells[at + 4 : at + 10] for at in range(0, len(cells), 10)}

    assert len(rows) * 10 == len(cells)
    for slot in range(32):
        unit = (slot << 11 & mask[0], 0, 0, 1 & mask[3])
        parent, high, low, kind, spi, level = rows[unit]
        assert (parent, high, low, kind, level) == (1, 0, 0, 0, 4)
        assert spi == layout.pci_intx_spi(slot)


def test_pci_window_is_memory_below_ram() -> None:
    bridge = tree().at(PCI)
    kind, *cells = bridge.cells("ranges")
    numbers = [high << 32 | low for high, low in zip(cells[::2], cells[1::2], strict=True)]

    assert kind == 0x0200_0000
    start, at, size = numbers
    assert start == at == layout.PCI_MEMORY_START
    assert start + size <= layout.PCI_ECAM_GPA
    assert bridge.addresses("reg") == [layout.PCI_ECAM_GPA, 1 << 20]
    assert bridge.cells("bus-range") == [0, 0]
    assert "dma-coherent" in bridge.properties


def test_pool_confines_the_devices_behind_the_bridge() -> None:
    root = tree(pool=Range(0x4400_0000, 2 << 20))
    pool = root.at("/reserved-memory/dma@44000000")

    assert pool.texts("compatible") == ["restricted-dma-pool"]
    assert pool.addresses("reg") == [0x4400_0000, 2 << 20]
    assert root.at(PCI).cells("memory-region") == pool.cells("phandle")
    assert root.at("/reserved-memory").properties["ranges"] == b""


def test_no_pool_no_reserved_memory() -> None:
    root = tree()

    assert "reserved-memory" not in root.children
    assert "memory-region" not in root.at(PCI).properties


def test_tree_of_the_largest_machine_fits_its_place() -> None:
    blob = device_tree(
        Machine(
            Range(layout.RAM_START, layout.LARGEST_MEMORY),
            64,
            "x" * (layout.CMDLINE_MAX - 1),
            Range(layout.RAM_START, 1),
            pool=Range(layout.RAM_START, 1),
        )
    )

    assert len(blob) <= layout.TREE_SIZE
