"""The host's KVM as a platform."""

from __future__ import annotations

import functools

import pytest

from kvm_bindings.x86_64 import System
from tests.kvm.conftest import kvm
from vmm.arch import architecture
from vmm.selftest.entries import Combination
from vmm.selftest.platform import KvmPlatform
from vmm.selftest.runner import lacking

__all__ = ["kvm"]


@pytest.fixture(scope="session")
def platform(kvm: System) -> KvmPlatform:
    return KvmPlatform(architecture(), kvm)


@functools.cache
def why_lacking(platform: KvmPlatform, combination: Combination) -> str | None:
    """Asked once for each cell."""
    return lacking(platform, combination)
