"""Tests on this machine's own KVM; where there is none they are skipped, saying why."""

from __future__ import annotations

import pytest

from vmm.core.errors import HostError
from vmm.machine.host import open_kvm


@pytest.fixture(autouse=True)
def _usable_kvm() -> None:
    """Skips a test when /dev/kvm is missing, closed to this user, or lacks what a run needs."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs a usable /dev/kvm: {error}")
