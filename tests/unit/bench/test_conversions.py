"""What a conversion costs in memory where the pages' content comes along, on the model of KVM."""

from __future__ import annotations

import pytest

from tests.fuzz.kernel_replay import experimental
from tests.support.fake_platform import FakePlatform
from vmm.bench.conversions import memory_held
from vmm.core.ranges import PAGE_SIZE
from vmm.selftest.entries import Combination
from vmm.selftest.rig import Rig


@pytest.mark.parametrize(
    ("scheme", "backing", "sides"),
    [("cbit", "memfd", 2), ("in-place", "guest_memfd-in-place", 1)],
)
def test_two_sides_hold_the_content_twice_and_one_once(
    scheme: str, backing: str, sides: int
) -> None:
    platform = FakePlatform(experimental())
    with Rig(platform, Combination(scheme, backing), pages=8, vcpus=0) as rig:
        peak, after = memory_held(rig, rig.gpa(0), 4)

        assert peak == sides * 4 * PAGE_SIZE
        assert after == 4 * PAGE_SIZE
        assert sum(rig.memory.residency()) == 0
