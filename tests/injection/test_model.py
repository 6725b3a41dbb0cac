"""Conversions by ioctls that this host's KVM doesn't have: on the model, and at the bindings."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvm_bindings import KvmError, Vcpu, owned_fd
from kvm_bindings.guest_memfd import GuestMemfd
from kvm_bindings.vm import Vm
from tests.injection.row import BY_MODEL, EINTR, GUEST, SAME, Row
from tests.injection.table import TABLE
from tests.injection.test_runs import name_of
from tests.support.conversion import share, tally, unshare
from tests.unit.conversion import test_attributes, test_in_place

ROWS = [row for row in TABLE if row.by == BY_MODEL]
CONVERSIONS = [row for row in ROWS if row.path == "conversion" and row.scenario != "pre-fault"]
FOR_EVER = 1 << 20


def cells(rows: list[Row]) -> list[tuple[Row, int]]:
    return [(row, error) for row in rows for error in row.cells]


class Interrupted:
    """The compiled bindings, of which every ioctl fails so many times before it goes well."""

    def __init__(
        self, error: int, times: int, done: Callable[[Any], None] = lambda _: None
    ) -> None:
        self.calls = 0
        self._error, self._times, self._done = error, times, done

    def pyvmm_ioctl_pointer(self, fd: int, request: int, argument: Any) -> int:
        self.calls += 1
        if self.calls <= self._times:
            return -self._error
        self._done(argument)
        return 0


@pytest.mark.parametrize(
    ("row", "error"), [each for each in cells(CONVERSIONS) if each[1] != EINTR], ids=name_of
)
@pytest.mark.parametrize("request_", [share(40, 4), unshare(4, 4)], ids=["share", "unshare"])
def test_conversion_that_kvm_refuses_leaves_everything_as_it_was(
    row: Row, error: int, request_: Any
) -> None:
    """The guest has the errno; states, KVM's attributes and the accounting are what they were."""
    rig: Any = {"attributes": test_attributes, "in-place": test_in_place}[row.scenario].Rig()
    before, attributes = rig.memory.states(), rig.attributes()
    rig.kernel.inject(row.call, error, times=1)

    answer = rig.converter.convert(request_)

    assert row.cells[error] == GUEST
    assert answer == -error
    assert (rig.memory.states(), rig.attributes()) == (before, attributes)
    counts = tally(rig.converter, request_.kind)
    assert (counts["calls"], counts["bytes"], counts["failed"]) == (1, 0, 1)
    assert rig.converter.convert(request_) == 0, "the next one goes well"
    rig.close()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_ioctl_that_is_interrupted_is_repeated(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row.cells[EINTR] == SAME
    interrupted = Interrupted(errno.EINTR, 3, _is_done)
    monkeypatch.setattr(owned_fd, "lib", interrupted)

    _call(row)

    assert interrupted.calls == 4


def _is_done(argument: Any) -> None:
    argument.size = 0  # KVM_PRE_FAULT_MEMORY says so what is left


def _call(row: Row) -> None:
    """Make the row's ioctl, on no fd."""
    if row.scenario == "attributes":
        vm = Vm.__new__(Vm)
        vm.fd = -1
        vm.set_memory_attributes(0, 4096, 0)
    elif row.scenario == "in-place":
        guest_memfd = GuestMemfd.__new__(GuestMemfd)
        guest_memfd.fd = -1
        guest_memfd.set_memory_attributes2(0, 4096, 0)
    else:
        vcpu = Vcpu.__new__(Vcpu)
        vcpu.fd = -1
        vcpu.pre_fault_memory(0, 4096)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOMEM, errno.EIO], ids=name_of)
def test_mapping_ahead_that_never_succeeds_comes_to_an_end(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it is the guest's faults' to do (test_map_ahead.py)."""
    monkeypatch.setattr(owned_fd, "lib", Interrupted(error, FOR_EVER))
    (row,) = [row for row in ROWS if row.scenario == "pre-fault"]

    with pytest.raises(KvmError) as caught:
        _call(row)

    assert caught.value.errno == error
