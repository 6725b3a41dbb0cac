"""Disks whose process is the test's, or a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.device_process import ByHand, DiskRig
from vmm.devices.process.spawner import Spawner


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[DiskRig]:
    """Up, with a process that the test plays."""
    rig = DiskRig(tmp_path, ByHand())
    rig.up_by_hand()
    yield rig
    rig.close()


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., DiskRig]]:
    """Disks with a real process, which is in no sandbox."""
    made: list[DiskRig] = []

    def make(options: str = "", **how: bool) -> DiskRig:
        rig = DiskRig(tmp_path, Spawner(None), options, **how)
        made.append(rig)
        rig.machine.up()
        return rig

    yield make
    for rig in made:
        rig.close()
