"""The rig that every test of this room starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_vcpu import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Handlers over 1 MiB of guest memory whose upper half is private."""
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def ordinary_rig() -> Iterator[Rig]:
    """Handlers of an ordinary VM."""
    made = Rig(private=False)
    yield made
    made.close()
