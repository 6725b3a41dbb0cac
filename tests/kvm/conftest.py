"""What tests on this machine's KVM share: the open device, or a skip that says what is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm_bindings import KvmError, ioctls
from kvm_bindings.x86_64 import System
from vmm.arch import architecture
from vmm.core.errors import HostError
from vmm.exits.run_loop import install_kick_handler
from vmm.host.kvm import open_kvm


@pytest.fixture(scope="session")
def kvm() -> Iterator[System]:
    """An open /dev/kvm that can make a VM."""
    try:
        system = System()
    except OSError as error:
        pytest.skip(
            f"/dev/kvm: {error.strerror}; run on a machine with KVM as root or in the group that "
            "owns the device (tests/lab needs neither)"
        )
    with system:
        try:
            system.create_vm().close()
        except KvmError as error:
            pytest.skip(
                f"/dev/kvm makes no VMs: {error}; run where KVM works (tests/lab needs none)"
            )
        install_kick_handler()
        yield system


@pytest.fixture(scope="session")
def guest_memfd_flags(kvm: System) -> int:
    """KVM_CAP_GUEST_MEMFD_FLAGS of a default VM, with MMAP among them."""
    with kvm.create_vm() as vm:
        flags = vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS)
    if not flags & ioctls.GUEST_MEMFD_FLAG_MMAP:
        pytest.skip(
            f"KVM_CAP_GUEST_MEMFD_FLAGS = {flags:#x}: no guest_memfd that can be mapped; "
            "Linux 6.18 or later has it"
        )
    return flags


@pytest.fixture
def usable_kvm(kvm: System) -> None:
    """Skips a test when KVM lacks what a run of the command needs."""
    try:
        open_kvm(architecture()).close()
    except HostError as error:
        pytest.skip(f"needs a usable /dev/kvm: {error}")
