"""What is mapped before the guest runs, and what is left to do where KVM can't map ahead."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from kvm_bindings import KvmError
from tests.support.memory import guest_memory, page, pages, pattern
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.core.ranges import PAGE_SIZE
from vmm.machine.guest_vm import GuestVm
from vmm.memory.guest_memory import GuestMemory

C_BIT = 38
OFFERED, NOT_OFFERED = 1, 0


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, of which those from the fourth on are private."""
    with guest_memory(pages(4, 60)) as made:
        yield made


def vm_with(memory: GuestMemory, offered: int, refuses: bool = False) -> tuple[GuestVm, list[int]]:
    """As much of one as mapping ahead takes, and the addresses that KVM is asked to map."""
    asked: list[int] = []

    def pre_fault_memory(gpa: int, size: int) -> None:
        if refuses:
            raise KvmError("KVM_PRE_FAULT_MEMORY", errno.EOPNOTSUPP)
        asked.append(gpa)

    vm = GuestVm.__new__(GuestVm)
    parts = {
        "memory": memory,
        "scheme": CbitScheme(C_BIT),
        "kvm": SimpleNamespace(check_extension=lambda number: offered),
        "platform": SimpleNamespace(vcpus=[SimpleNamespace(pre_fault_memory=pre_fault_memory)]),
    }
    for name, part in parts.items():
        setattr(vm, name, part)
    return vm, asked


def private_pages(memory: GuestMemory) -> set[int]:
    assert memory.private is not None
    private = memory.private
    return {n for n in range(64) if private.resident_bytes(page(n), PAGE_SIZE)}


def test_each_side_is_mapped_at_its_own_address(memory: GuestMemory) -> None:
    vm, asked = vm_with(memory, OFFERED)

    vm.map_ahead([pages(2, 4)])

    assert asked == [page(2), page(4) | 1 << C_BIT]
    assert private_pages(memory) == set()


@pytest.mark.parametrize(("offered", "refuses"), [(NOT_OFFERED, False), (OFFERED, True)])
def test_private_memory_is_there_where_kvm_cannot_map_it(
    offered: int, refuses: bool, memory: GuestMemory
) -> None:
    vm, asked = vm_with(memory, offered, refuses)

    vm.map_ahead([pages(2, 4), pages(10, 1)])

    assert asked == []
    assert private_pages(memory) == {4, 5, 10}
    assert memory.shared.resident_bytes() == 0


def test_memory_that_is_there_already_keeps_its_content(memory: GuestMemory) -> None:
    vm, _ = vm_with(memory, NOT_OFFERED)
    assert memory.private is not None
    memory.private.pwrite(pattern(PAGE_SIZE), page(5))

    vm.map_ahead([pages(4, 3)])

    assert memory.private.pread(PAGE_SIZE, page(5)) == pattern(PAGE_SIZE)
