"""The bench guest with private memory: where its parts are, and what starts private."""

from __future__ import annotations

from pathlib import Path

import pytest

import firmware
from tests.unit.test_firmware import equ
from vmm.arch import architecture
from vmm.arch.options import GuestOptions
from vmm.arch.x86_64 import bench_guest
from vmm.core.errors import HostError, UsageError
from vmm.core.ranges import Range

DEFINITIONS = Path(firmware.bench_path()).with_name("bench.inc")


def options(memory: int, *, iommu: bool = False) -> GuestOptions:
    return GuestOptions(memory, 1, "", is_private=True, iommu=iommu)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("QUEUE", bench_guest.QUEUE),
        ("IOMMU_QUEUE", bench_guest.IOMMU_QUEUE),
        ("BUFFERS", bench_guest.BUFFERS),
        ("OWN_BUFFERS", bench_guest.OWN_BUFFERS),
    ],
)
def test_places_are_those_of_the_sources(name: str, place: Range) -> None:
    assert place.start == equ(DEFINITIONS, name)
    # A page of page tables is 2 MiB: nothing else is in it.
    assert not place.start % (2 << 20) and not place.size % (2 << 20)


def test_all_but_the_image_starts_private() -> None:
    guest = architecture("x86_64").with_bench_guest().payload_guest(options(256 << 20))

    private = guest.private_ranges([Range(0, 256 << 20)])

    assert private == [Range(bench_guest.QUEUE.start, (256 << 20) - bench_guest.QUEUE.start)]
    assert guest.host_loads_private


def test_too_little_memory_is_refused_with_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"--mem 128M: the bench guest needs 144M or more"):
        architecture("x86_64").with_bench_guest().payload_guest(options(128 << 20))


def test_architecture_without_a_bench_guest_says_so() -> None:
    with pytest.raises(HostError, match="no bench guest for arm64"):
        architecture("aarch64").with_bench_guest()
