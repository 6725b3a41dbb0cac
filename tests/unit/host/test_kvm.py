"""What the host has to offer, against a KVM that lacks things."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import cast

import pytest

from kvm_bindings import KvmError, ioctls
from kvm_bindings.x86_64 import Vm
from kvm_bindings.x86_64 import ioctls as x86
from tests.support.x86 import X86
from vmm.arch import architecture
from vmm.arch.x86_64.platform import _require_exits
from vmm.core.errors import HostError
from vmm.host.kvm import open_kvm

NEEDED = ["USER_MEMORY", "IRQCHIP", "PIT2", "IRQFD", "IRQFD_RESAMPLE", "IOEVENTFD", "EXT_CPUID",
          "IMMEDIATE_EXIT"]  # fmt: skip


class FakeSystem:
    """/dev/kvm with every capability but `missing`."""

    missing: set[int] = set()
    version = 12
    open_error: OSError | None = None
    closed = 0

    def __init__(self, path: str) -> None:
        if self.open_error is not None:
            raise self.open_error

    def api_version(self) -> int:
        return self.version

    def check_extension(self, capability: int) -> int:
        return 0 if capability in self.missing else 1

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> type[FakeSystem]:
    """The class that stands in for System; set its attributes to take things away."""

    class Fake(FakeSystem):
        pass

    monkeypatch.setattr(X86, "open_system", Fake)
    return Fake


def refusal(path: str = "/dev/kvm") -> str:
    with pytest.raises(HostError) as caught:
        open_kvm(X86, path)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_status == 3
    return text


def test_kvm_with_everything_is_opened(system: type[FakeSystem]) -> None:
    open_kvm(X86)

    assert system.closed == 0


@pytest.mark.parametrize("name", NEEDED)
def test_each_missing_capability_is_named(system: type[FakeSystem], name: str) -> None:
    system.missing = {
        getattr(x86 if hasattr(x86, f"KVM_CAP_{name}") else ioctls, f"KVM_CAP_{name}")
    }

    text = refusal()

    assert text.startswith(f"this host's KVM lacks KVM_CAP_{name};")
    assert "pyvmm lab" in text
    assert system.closed == 1


def test_all_missing_capabilities_are_named_at_once(system: type[FakeSystem]) -> None:
    system.missing = {x86.KVM_CAP_PIT2, ioctls.KVM_CAP_IRQFD}

    assert "KVM_CAP_IRQFD, KVM_CAP_PIT2" in refusal()


def test_another_api_version_is_refused(system: type[FakeSystem]) -> None:
    system.version = 11

    assert "speaks KVM API 11, pyvmm 12" in refusal()
    assert system.closed == 1


def test_failing_ioctl_says_which(
    system: type[FakeSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> int:
        raise KvmError("KVM_GET_API_VERSION", errno.EIO)

    monkeypatch.setattr(system, "api_version", fail)

    assert "KVM_GET_API_VERSION() failed: EIO" in refusal()
    assert system.closed == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), "does not exist.*modprobe.*pyvmm lab"),
        (PermissionError(errno.EACCES, "no"), "permission denied; run as root, or as a member"),
        (OSError(errno.ENODEV, "No such device"), "cannot be opened: No such device; pyvmm lab"),
    ],
)
def test_device_that_cannot_be_opened_says_what_to_do(
    system: type[FakeSystem], error: OSError, message: str
) -> None:
    system.open_error = error

    with pytest.raises(HostError, match=message):
        open_kvm(X86)


def test_missing_device_of_arm64_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"does not exist.*EL1.*on an x86-64 machine") as caught:
        open_kvm(architecture("aarch64"), str(tmp_path / "kvm"))

    assert "modprobe" not in str(caught.value)


def test_missing_device_is_a_host_error(tmp_path: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "kvm"))


def test_device_that_is_no_kvm_is_a_host_error() -> None:
    assert "is not a working KVM: KVM_GET_API_VERSION() failed: ENOTTY" in refusal("/dev/null")


def test_directory_in_the_devices_place_is_a_host_error(tmp_path: Path) -> None:
    assert "cannot be opened: Is a directory" in refusal(str(tmp_path))


# -- what a kernel with private memory needs ------------------------------------------------------


class FakeVm:
    """A VM with capabilities by number."""

    def __init__(self, capabilities: dict[int, int] | None = None) -> None:
        self.capabilities = capabilities or {}

    def check_extension(self, capability: int) -> int:
        return self.capabilities.get(capability, 0)


def vm(fake: FakeVm) -> Vm:
    return cast(Vm, fake)


HYPERCALL_EXITS = {x86.KVM_CAP_EXIT_HYPERCALL: 1 << 12, x86.KVM_CAP_X86_USER_SPACE_MSR: 7}


def test_vm_that_passes_hypercalls_and_msrs_on_will_do() -> None:
    _require_exits(vm(FakeVm(HYPERCALL_EXITS)))


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ({}, r"KVM_CAP_EXIT_HYPERCALL = 0x0, Linux 5.15.*pyvmm lab"),
        ({x86.KVM_CAP_EXIT_HYPERCALL: 1 << 11}, r"KVM_CAP_EXIT_HYPERCALL = 0x800"),
        ({x86.KVM_CAP_EXIT_HYPERCALL: 1 << 12}, r"KVM_CAP_X86_USER_SPACE_MSR.*pyvmm lab"),
    ],
)
def test_vm_that_does_not_is_refused_by_name(capabilities: dict[int, int], message: str) -> None:
    with pytest.raises(HostError, match=message):
        _require_exits(vm(FakeVm(capabilities)))
