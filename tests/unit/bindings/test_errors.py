"""KvmError: a sentence with the operation, its arguments, the errno and what would work."""

from __future__ import annotations

import errno
import os

import pytest

from kvm_bindings import KvmError, Vm, ioctls
from kvm_bindings.errors import fail


def test_text_has_operation_arguments_errno_name_and_hint() -> None:
    error = KvmError("KVM_THING", errno.ENOSPC, "gpa=0x1000", "use less")

    assert str(error) == "KVM_THING(gpa=0x1000) failed: ENOSPC (No space left on device); use less"


def test_text_without_hint_ends_with_the_reason() -> None:
    assert str(KvmError("KVM_RUN", errno.EIO)) == "KVM_RUN() failed: EIO (Input/output error)"


def test_text_of_an_unnamed_errno_has_its_number() -> None:
    assert "failed: 4000 (" in str(KvmError("KVM_THING", 4000))


def test_fail_turns_a_negative_result_into_an_oserror_with_that_errno() -> None:
    with pytest.raises(OSError, match="KVM_THING") as raised:
        fail("KVM_THING", -errno.EPERM)

    assert raised.value.errno == errno.EPERM


def test_failed_ioctl_on_something_that_is_no_vm_says_which_arguments() -> None:
    vm = Vm(os.memfd_create("no vm"), 4096)

    with vm, pytest.raises(KvmError) as raised:
        vm.set_user_memory_region(3, 0x1000, 0x2000, 0x7F00_0000_0000, 1)

    assert str(raised.value) == (
        "KVM_SET_USER_MEMORY_REGION(slot=3, gpa=0x1000, size=0x2000, hva=0x7f0000000000, "
        "flags=0x1) failed: ENOTTY (Inappropriate ioctl for device)"
    )


@pytest.mark.parametrize("supported", [0, 1 << 2])
def test_memory_attributes_refused_for_want_of_the_capability_hint_at_another_scheme(
    supported: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vm, "_pointer", lambda self, request, argument: -errno.ENOTTY)
    monkeypatch.setattr(Vm, "check_extension", lambda self, capability: supported)

    with pytest.raises(KvmError) as raised:
        Vm(-1, 4096).set_memory_attributes(0x100000, 0x2000, ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE)

    assert str(raised.value) == (
        "KVM_SET_MEMORY_ATTRIBUTES(gpa=0x100000, size=0x2000, attributes=0x8) failed: ENOTTY "
        "(Inappropriate ioctl for device); this VM type has no such memory attributes "
        f"(KVM_CAP_MEMORY_ATTRIBUTES = {supported:#x}), use --scheme cbit"
    )


@pytest.mark.parametrize("attributes", [0, ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE])
def test_memory_attributes_refused_for_another_reason_give_no_such_hint(
    attributes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vm, "_pointer", lambda self, request, argument: -errno.EINVAL)
    monkeypatch.setattr(Vm, "check_extension", lambda self, capability: 8)

    with pytest.raises(KvmError) as raised:
        Vm(-1, 4096).set_memory_attributes(1, 0x2000, attributes)

    assert raised.value.hint == ""
