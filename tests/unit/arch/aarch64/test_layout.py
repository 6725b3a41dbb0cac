"""The address map: nothing overlaps, sizes add up, constants agree with what KVM demands."""

from __future__ import annotations

from itertools import combinations

import pytest

from kvm_bindings.aarch64 import ioctls
from vmm.arch.aarch64 import layout
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.machine.config import MAX_CPUS

REGISTERS = {
    "distributor": Range(layout.GIC_DISTRIBUTOR_GPA, layout.GIC_DISTRIBUTOR_SIZE),
    "v2m": Range(layout.V2M_GPA, layout.V2M_SIZE),
    "redistributors": Range(
        layout.GIC_REDISTRIBUTORS_GPA, MAX_CPUS * layout.GIC_REDISTRIBUTOR_SIZE
    ),
    "uart": Range(layout.UART_GPA, layout.UART_SIZE),
    "rtc": Range(layout.RTC_GPA, layout.RTC_SIZE),
    "doorbell": Range(layout.DOORBELL_GPA, layout.DOORBELL_SIZE),
    "pci memory": Range(layout.PCI_MEMORY_START, layout.PCI_MEMORY_END - layout.PCI_MEMORY_START),
    "pci configuration": Range(layout.PCI_ECAM_GPA, layout.PCI_ECAM_SIZE),
    "ram": Range(layout.RAM_START, layout.LARGEST_MEMORY),
}


def test_areas_of_all_users_do_not_overlap() -> None:
    for (one, a), (other, b) in combinations(REGISTERS.items(), 2):
        assert not a.overlaps(b), f"{one} {a} overlaps {other} {b}"


def test_sizes_are_those_of_kvm() -> None:
    assert layout.GIC_DISTRIBUTOR_SIZE == ioctls.KVM_VGIC_V3_DIST_SIZE
    assert layout.GIC_REDISTRIBUTOR_SIZE == ioctls.KVM_VGIC_V3_REDIST_SIZE


def test_ram_of_the_largest_guest_stays_below_the_bit_of_shared_addresses() -> None:
    assert layout.ram_ranges(layout.LARGEST_MEMORY)[-1].end <= 1 << layout.REALM_SHARED_BIT


def test_bars_of_all_slots_stay_in_the_window() -> None:
    starts = [
        gpa
        for slot in range(1, 32)
        for gpa in (layout.virtio_bar_gpa(slot), layout.msix_bar_gpa(slot))
    ]

    bars = [Range(start, PAGE_SIZE) for start in starts]
    assert all(REGISTERS["pci memory"].contains(bar) for bar in bars)
    assert not any(a.overlaps(b) for a, b in combinations(bars, 2))


def test_interrupts_of_lines_and_messages_are_apart_and_kvm_has_them() -> None:
    lines = {layout.UART_SPI, *layout.PCI_INTX_SPIS}
    messages = range(layout.FIRST_MESSAGE_SPI, layout.FIRST_MESSAGE_SPI + layout.MESSAGE_SPIS)

    assert len(lines) == 5 and max(lines) < messages[0]
    assert messages[-1] + layout.FIRST_SPI_INTID + 1 == layout.INTERRUPTS
    assert layout.INTERRUPTS % 32 == 0 and 64 <= layout.INTERRUPTS <= 1024
    assert messages[-1] < layout.FIRST_MESSAGE_GSI


@pytest.mark.parametrize("size", [4 << 20, (16 << 20) + PAGE_SIZE, 512 << 20, 255 << 30])
def test_pool_and_tree_of_any_guest_lie_in_ram_apart(size: int) -> None:
    (ram,) = layout.ram_ranges(size)
    tree, pool = layout.tree_place(ram), layout.pool_place(ram)

    assert ram.contains(tree) and not tree.overlaps(pool)
    assert pool.start % layout.POOL_SIZE == 0
    if size > 8 << 20:
        assert ram.contains(pool)


def test_affinities_of_all_vcpus_are_different() -> None:
    assert len({layout.mpidr(vcpu) for vcpu in range(MAX_CPUS)}) == MAX_CPUS
    assert layout.mpidr(16) == 0x100
