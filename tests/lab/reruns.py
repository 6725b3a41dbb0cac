"""Faults of the lab's emulator, after which a test is tried once more.

Each was seen a few times in hundreds of machines. A processor of QEMU's stands still, and all that
is in the machine with it; or it runs an instruction that was no longer in memory. The lab tells
both from a guest, a kernel and a pyvmm that hang or crash, which fail. pytest's summary counts
"rerun".
"""

from __future__ import annotations

import pytest

from vmm.lab.crash import StaleInstruction
from vmm.lab.heartbeat import MachineStandsStill

again_after_an_emulators_fault = pytest.mark.flaky(
    reruns=1, only_rerun=[MachineStandsStill.__name__, StaleInstruction.__name__]
)
