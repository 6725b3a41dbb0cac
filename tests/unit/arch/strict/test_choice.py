"""When a Linux guest loads itself, and what is said when it doesn't."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.support.x86 import X86
from vmm.arch.x86_64.guests import LinuxGuest
from vmm.arch.x86_64.probes import strict
from vmm.core.errors import HostError, UsageError

SYSTEM: Any = None
READS = "KVM here has to read the guest's instructions, first at cpuid (InternalErrorExit)"


class Linux(LinuxGuest):
    """One without a kernel, which `unfit` keeps from loading itself."""

    def __init__(self, unfit: str | None = None) -> None:
        self._unfit = unfit

    @property
    def unfit_to_load_itself(self) -> str | None:
        return self._unfit


@pytest.fixture
def obstacle(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the host's micro-guest finds; at first nothing."""
    found: list[str | None] = [None]
    monkeypatch.setattr(strict, "strict_obstacle", lambda system: found[0])
    return found


@pytest.mark.parametrize("by_name", [True, False])
def test_guest_loads_itself_where_host_and_guest_can(
    by_name: bool, obstacle: list[str | None], capfd: pytest.CaptureFixture[str]
) -> None:
    guest = Linux()

    strict.choose_loading(SYSTEM, guest, by_name=by_name)

    assert guest.loads_itself and not guest.host_loads_private
    assert capfd.readouterr().err == ""


def test_auto_falls_back_with_one_line_that_says_why(
    obstacle: list[str | None], capfd: pytest.CaptureFixture[str]
) -> None:
    obstacle[0] = READS
    guest = Linux()

    strict.choose_loading(SYSTEM, guest, by_name=False)

    assert guest.host_loads_private and not guest.loads_itself
    assert capfd.readouterr().err == (
        "pyvmm: private memory is a rehearsal here, not kept from the host by its kernel: "
        f"{READS}\n"
    )


def test_strict_by_name_on_a_host_that_cannot_is_status_3(obstacle: list[str | None]) -> None:
    obstacle[0] = READS

    with pytest.raises(HostError, match=r"--private-mem=guest_memfd: KVM here .*guest_memfd-mmap"):
        strict.choose_loading(SYSTEM, Linux(), by_name=True)


def test_strict_by_name_of_a_guest_that_cannot_is_status_2(obstacle: list[str | None]) -> None:
    with pytest.raises(UsageError, match="--private-mem=guest_memfd: --iommu lends; leave that"):
        strict.choose_loading(SYSTEM, Linux("--iommu lends"), by_name=True)


def test_auto_for_a_guest_that_cannot_rehearses_without_asking_the_host(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(strict, "strict_obstacle")
    guest = Linux("--iommu lends")

    strict.choose_loading(SYSTEM, guest, by_name=False)

    assert not guest.loads_itself
    assert capfd.readouterr().err.endswith("by its kernel: --iommu lends\n")


@pytest.mark.parametrize(
    ("private_memory", "scheme", "asked"),
    [
        ("auto", "auto", True),
        ("auto", "cbit", True),
        ("guest_memfd", "auto", True),
        ("guest_memfd-mmap", "auto", False),
        ("memfd", "cbit", False),
    ],
)
def test_who_names_another_backing_is_not_asked(
    private_memory: str, scheme: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(
        strict, "choose_loading", lambda system, guest, *, by_name: calls.append(by_name)
    )

    X86.choose_loading(SYSTEM, cast(Any, Linux()), private_memory, scheme)

    assert calls == ([private_memory != "auto"] if asked else [])
