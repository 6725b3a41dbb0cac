"""A guest that moves BARs and rewrites MSI-X entries at random: what KVM is asked for by it.

PYVMM_FUZZ=N makes it N times as long.
"""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fuzz.oracles import Resources
from tests.fuzz.storm import Guest

STEPS = 4000


@pytest.mark.parametrize("refuses", [False, True], ids=["kvm-has-room", "kvm-refuses"])
def test_storm_costs_kvm_no_more_than_the_guest_has_accesses(
    refuses: bool, fuzz_seed: int, fuzz_factor: int, tmp_path: Path
) -> None:
    rng = random.Random(f"storm {refuses} {fuzz_seed}")
    resources = Resources()
    with ExitStack() as stack:
        guest = Guest(rng, tmp_path, stack)
        fds = len(os.listdir("/proc/self/fd"))
        guest.kvm.refuses = refuses
        try:
            for _ in range(STEPS * fuzz_factor):
                guest.access()
                guest.check()
        except Exception as error:
            again = f"PYVMM_FUZZ_SEED={fuzz_seed} PYVMM_FUZZ={fuzz_factor}"
            raise AssertionError(f"{again}: {error!r}") from error
        assert len(os.listdir("/proc/self/fd")) <= fds + guest.vectors
        # A storm that changes nothing tests nothing.
        assert min(guest.kvm.calls.values()) > 0, guest.kvm.calls
    resources.assert_given_back()
