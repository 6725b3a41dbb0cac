"""Lending against conversions, policies and accesses under way."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.conversion import share, unshare
from tests.support.iommu import IommuRig
from tests.support.memory import Background, GatedBacking, page, pages, pattern, told_when_waiting
from tests.support.trace import rows_of, start_recorder
from vmm.conversion.tracing import LendingTrace
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.virtio.iommu import S_DEVERR, S_FAULT, S_NOMEM, S_OK
from vmm.memory import lending
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import AddressSpace, IommuFault, IommuMemory, LendingMemory
from vmm.policy import (
    Allow,
    Decision,
    Defer,
    Deny,
    End,
    Event,
    Kill,
    LendEvent,
    Policy,
    PolicyError,
    PolicyKill,
    View,
)
from vmm.policy.builtin import Audit, LeastPrivilege, Quota
from vmm.trace.reader import Trace

IOVA = 0x4000_0000
PRIVATE = 20


@pytest.fixture
def rig() -> Iterator[IommuRig]:
    made = IommuRig()
    assert made.attach() == S_OK
    yield made
    made.close()


@pytest.fixture
def gated() -> Iterator[IommuRig]:
    """One whose accesses to private memory wait for the test to open a gate."""
    made = IommuRig(private=GatedBacking(page(64)))
    assert made.attach() == S_OK
    yield made
    gate(made).gate.set()
    made.close()


def gate(rig: IommuRig) -> GatedBacking:
    assert isinstance(rig.private, GatedBacking)
    return rig.private


# --- accesses under way -------------------------------------------------------------------------


def test_unmap_waits_for_the_access_that_is_under_way(gated: IommuRig) -> None:
    assert gated.map(IOVA, PRIVATE) == S_OK
    reading = Background(lambda: gated.device.pread(5, IOVA))
    gate(gated).await_arrivals()
    waiting = told_when_waiting(gated.memory)
    unmapping = Background(lambda: gated.unmap(IOVA))
    assert waiting.wait(30)
    assert gated.state(PRIVATE) is PageState.LENT  # not the guest's alone before it is over

    gate(gated).gate.set()

    assert reading.result() == bytes(5)
    assert unmapping.result() == S_OK
    assert gated.state(PRIVATE) is PageState.PRIVATE


def test_access_that_begins_while_an_unmap_waits_is_refused(gated: IommuRig) -> None:
    assert gated.map(IOVA, PRIVATE) == S_OK
    reading = Background(lambda: gated.device.pread(5, IOVA))
    gate(gated).await_arrivals()
    refused: list[BaseException] = []
    wait_for = gated.memory._drained.wait_for

    def meanwhile(predicate: object, timeout: float | None = None) -> bool:
        lock = gated.memory._lock
        lock.release()
        try:
            gated.device.pread(5, IOVA)
        except IommuFault as error:
            refused.append(error)
        finally:
            lock.acquire()
        gate(gated).gate.set()
        return wait_for(predicate, timeout)  # type: ignore[arg-type]

    gated.memory._drained.wait_for = meanwhile  # type: ignore[method-assign,assignment]

    assert gated.unmap(IOVA) == S_OK

    assert len(refused) == 1
    assert reading.result() == bytes(5)


def test_unmap_that_waits_in_vain_leaves_the_mapping() -> None:
    rig = IommuRig(private=GatedBacking(page(64)), timeout=0.0)
    assert rig.attach() == S_OK
    assert rig.map(IOVA, PRIVATE) == S_OK
    reading = Background(lambda: rig.device.pread(5, IOVA))
    gate(rig).await_arrivals()

    assert rig.unmap(IOVA) == S_DEVERR
    assert rig.detach() == S_DEVERR

    assert rig.state(PRIVATE) is PageState.LENT
    gate(rig).gate.set()
    assert reading.result() == bytes(5)
    assert rig.device.pread(5, IOVA) == bytes(5)
    assert rig.unmap(IOVA) == S_OK
    assert rig.state(PRIVATE) is PageState.PRIVATE
    rig.close()


def test_reset_waits_for_the_access_under_way_however_long_it_takes(gated: IommuRig) -> None:
    gated.lender._patience = 0.0
    assert gated.map(IOVA, PRIVATE) == S_OK
    reading = Background(lambda: gated.device.pread(5, IOVA))
    gate(gated).await_arrivals()
    asked = threading.Semaphore(0)
    quiesce = gated.memory.quiesce

    def counted(area: Range, timeout: float) -> bool:
        asked.release()
        return quiesce(area, timeout)

    gated.memory.quiesce = counted  # type: ignore[method-assign]
    resetting = Background(lambda: setattr(gated.machine.driver, "status", 0))
    for _ in range(3):
        assert asked.acquire(timeout=30)
    assert gated.state(PRIVATE) is PageState.LENT

    gate(gated).gate.set()

    assert reading.result() == bytes(5)
    resetting.result()
    assert gated.state(PRIVATE) is PageState.PRIVATE


# --- conversions --------------------------------------------------------------------------------


@pytest.mark.parametrize("request_of", [share, unshare])
def test_conversion_of_a_lent_page_is_busy_and_changes_nothing(
    rig: IommuRig, request_of: object
) -> None:
    assert rig.map(IOVA, PRIVATE) == S_OK
    rig.fill(PRIVATE, b"kept")
    before = rig.memory.states()

    assert rig.converter.convert(request_of(PRIVATE - 1, 3)) == -errno.EBUSY  # type: ignore[operator]

    assert rig.memory.states() == before
    assert rig.scheme.calls == []
    assert rig.device.pread(4, IOVA) == b"kept"
    assert rig.unmap(IOVA) == S_OK
    assert rig.converter.convert(request_of(PRIVATE - 1, 3)) == 0  # type: ignore[operator]


def test_page_is_lent_while_its_neighbour_is_converted(rig: IommuRig) -> None:
    rig.memory.begin_conversion(pages(PRIVATE + 1, 1), PageState.SHARED)

    assert rig.map(IOVA, PRIVATE) == S_OK

    rig.memory.finish_conversion(PageState.SHARED)
    assert [rig.state(n) for n in (PRIVATE, PRIVATE + 1)] == [PageState.LENT, PageState.SHARED]


class PutsOff(Policy):
    def on_unshare(self, event: Event, view: View) -> Decision:
        return Defer(1e9, keep=True)


def test_late_discard_of_a_page_that_is_lent_is_made_first() -> None:
    rig = IommuRig(PutsOff())
    assert rig.attach() == S_OK
    rig.shared.pwrite(b"given up", page(4))
    assert rig.converter.convert(unshare(4, 1)) == 0
    assert rig.state(4) is PageState.DEFERRED

    assert rig.map(IOVA, 4) == S_OK

    assert rig.state(4) is PageState.LENT
    assert rig.shared.pread(8, page(4)) == bytes(8)
    assert rig.unmap(IOVA) == S_OK
    rig.now = 2e9
    rig.converter.settle()  # nothing is owed any more
    assert rig.state(4) is PageState.PRIVATE
    rig.close()


# --- policies -----------------------------------------------------------------------------------


class Watching(Policy):
    def __init__(self, lend: object = None, back: object = None) -> None:
        self.events: list[tuple[str, LendEvent, int]] = []
        self._lend, self._back = lend or Allow(), back or Allow()

    def on_lend(self, event: LendEvent, view: View) -> Decision:
        self.events.append(("lend", event, view.bytes_in(PageState.LENT)))
        return self._lend  # type: ignore[return-value]  # wrong answers are tested, too

    def on_return(self, event: LendEvent, view: View) -> Decision:
        self.events.append(("return", event, view.bytes_in(PageState.LENT)))
        return self._back  # type: ignore[return-value]


def with_policy(policy: Policy) -> IommuRig:
    rig = IommuRig(policy)
    assert rig.attach() == S_OK
    return rig


def test_policy_is_told_of_what_is_lent_and_comes_back() -> None:
    policy = Watching()
    rig = with_policy(policy)

    assert rig.map(IOVA, PRIVATE, 2, lending.WRITE) == S_OK
    assert rig.map(IOVA + page(8), 4) == S_OK  # shared pages are not lent
    assert rig.unmap(IOVA, 2) == S_OK
    assert rig.map(IOVA, PRIVATE) == S_OK
    assert rig.detach() == S_OK

    first = LendEvent("blk0", IOVA, pages(PRIVATE, 2), False, True)
    second = LendEvent("blk0", IOVA, pages(PRIVATE, 1), True, True)
    assert policy.events == [
        ("lend", first, 0),
        ("return", first, page(2)),
        ("lend", second, 0),
        ("return", second._replace(forced=True), 0),
    ]
    rig.close()


def test_denied_page_stays_private_and_out_of_reach() -> None:
    rig = with_policy(Watching(lend=Deny()))

    assert rig.map(IOVA, PRIVATE) == S_FAULT

    assert rig.state(PRIVATE) is PageState.PRIVATE
    with pytest.raises(IommuFault):
        rig.device.pread(1, IOVA)
    assert rig.lender.counts.denied == 1
    rig.close()


def test_denied_return_leaves_the_page_lent_unless_it_is_forced() -> None:
    rig = with_policy(Watching(back=Deny()))
    assert rig.map(IOVA, PRIVATE) == S_OK

    assert rig.unmap(IOVA) == S_DEVERR
    assert rig.device.pread(1, IOVA) == b"\0"
    assert rig.detach() == S_OK

    assert rig.state(PRIVATE) is PageState.PRIVATE
    rig.close()


def test_kill_ends_the_run_and_lends_nothing() -> None:
    rig = with_policy(Watching(lend=Kill("no lending here")))

    with pytest.raises(PolicyKill, match="Watching: no lending here"):
        rig.map(IOVA, PRIVATE)

    assert rig.state(PRIVATE) is PageState.PRIVATE
    rig.close()


def test_answer_that_does_not_fit_is_the_policys_error() -> None:
    rig = with_policy(Watching(lend=Defer(1.0)))

    with pytest.raises(PolicyError, match=r"Watching: on_lend .* Allow\(\), Deny\(\) or Kill"):
        rig.map(IOVA, PRIVATE)

    assert rig.state(PRIVATE) is PageState.PRIVATE
    rig.close()


def test_quota_counts_lent_pages_with_shared_ones() -> None:
    rig = with_policy(Quota(page(16 + 3)))  # 16 pages are shared

    assert rig.map(IOVA, PRIVATE, 2) == S_OK
    assert rig.map(IOVA + page(8), PRIVATE, 2) == S_OK  # the same pages are not counted twice
    assert rig.map(IOVA + page(16), PRIVATE + 2, 2) == S_FAULT
    assert rig.converter.convert(share(40, 2)) == -errno.EACCES
    assert rig.converter.convert(share(40, 1)) == 0
    assert rig.map(IOVA + page(16), PRIVATE + 2) == S_FAULT
    rig.close()


def test_least_privilege_lends_buffers_and_not_memory_at_large() -> None:
    rig = with_policy(LeastPrivilege(largest=page(4)))

    assert rig.map(IOVA, PRIVATE, 4) == S_OK
    assert rig.map(IOVA + page(8), PRIVATE + 4, 5) == S_FAULT
    assert rig.map(IOVA + page(16), 0, 16) == S_OK  # shared pages are not lent

    assert rig.lender.counts.denied == 1
    assert rig.memory.lent_bytes == page(4)
    rig.close()


def test_audit_has_a_line_for_what_is_lent_and_comes_back(tmp_path: Path) -> None:
    policy = Audit(tmp_path / "audit", of=Quota(page(16 + 1)))
    rig = with_policy(policy)

    assert rig.map(IOVA, PRIVATE, 1, lending.WRITE) == S_OK
    assert rig.map(IOVA + page(1), PRIVATE + 1) == S_FAULT
    assert rig.detach() == S_OK
    policy.on_exit(End("poweroff", ""), rig.converter.view)

    *lines, _ = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    told = [
        (each["kind"], each["device"], int(each["iova"], 16), int(each["gpa"], 16), each["bytes"])
        for each in lines
    ]
    first, second = page(PRIVATE), page(PRIVATE + 1)
    assert told == [
        ("lend", "blk0", IOVA, first, PAGE_SIZE),
        ("lend", "blk0", IOVA + page(1), second, PAGE_SIZE),
        ("return", "blk0", IOVA, first, PAGE_SIZE),
    ]
    assert [(each["read"], each["write"], each["forced"]) for each in lines] == [
        (False, True, False), (True, True, False), (False, True, True),
    ]  # fmt: skip
    assert [each["decision"].split("(")[0] for each in lines] == ["Allow", "Deny", "Allow"]
    rig.close()


def test_report_says_how_much_was_lent_and_for_how_long(rig: IommuRig) -> None:
    rig.now = 1.0
    assert rig.map(IOVA, PRIVATE, 3) == S_OK
    rig.now = 3.0
    assert rig.map(IOVA + page(8), 0, 2) == S_OK  # shared pages
    assert rig.map(IOVA + page(16), PRIVATE + 8) == S_OK
    rig.now = 5.0
    assert rig.unmap(IOVA, 3) == S_OK

    told = rig.lender.as_dict()

    assert told["average_lent_bytes"] == (2 * page(3) + 2 * page(4)) // 4
    assert (told["peak_lent_bytes"], told["lent_bytes"]) == (page(4), page(1))
    assert (told["maps"], told["shared_maps"], told["unmaps"]) == (3, 1, 1)
    assert told["lent_us"] == {str(1 << 22): 1}  # 4 s
    assert told["peak_runs"] == 6  # shared, private, lent, private, lent, private
    assert told["lent_bytes_total"] == page(4)


# --- what is recorded ---------------------------------------------------------------------------


def test_trace_has_what_was_lent_refused_and_came_back(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    rig = with_policy(Quota(page(16 + 2)))
    rig.lender._observer = LendingTrace(recorder)
    rig.lender._clock = time.monotonic_ns

    assert rig.map(IOVA, PRIVATE, 2, lending.READ) == S_OK
    assert rig.map(IOVA + page(8), 4) == S_OK  # shared: nothing is lent
    assert rig.map(IOVA + page(16), PRIVATE + 8) == S_FAULT
    assert rig.detach() == S_OK
    recorder.close(complete=True)

    rows = rows_of(tmp_path / "t")
    told = Trace(tmp_path / "t")
    assert [told.name(row["detail"] >> 16) for row in rows] == ["read", "read and write", ""]
    assert [(r["kind"], r["name"], r["gpa"], r["bytes"], r["errno"]) for r in rows] == [
        ("lend", "blk0", page(PRIVATE), page(2), 0),
        ("lend", "blk0", page(PRIVATE + 8), page(1), errno.EACCES),
        ("return", "blk0", page(PRIVATE), page(2), 0),
    ]
    assert rows[0]["time_ns"] == rows[2]["time_ns"]  # when it was lent
    rig.close()


# --- bounds -------------------------------------------------------------------------------------


def test_only_so_many_mappings_are_kept(rig: IommuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "MOST_MAPPINGS", 3)
    for number in range(3):
        assert rig.map(IOVA + page(number), PRIVATE) == S_OK

    assert rig.map(IOVA + page(3), PRIVATE) == S_NOMEM
    assert rig.unmap(IOVA) == S_OK
    assert rig.map(IOVA + page(3), PRIVATE) == S_OK


def test_guest_with_all_mappings_that_it_may_have_costs_megabytes_and_no_more(
    rig: IommuRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "MOST_MAPPINGS", 4096)  # of 32,768: it is quicker
    tracemalloc.start()
    try:
        for number in range(lending.MOST_MAPPINGS):
            # From both ends, the same page and others: what is hard for lists and counts.
            at = number if number % 2 else lending.MOST_MAPPINGS + number
            area = pages(PRIVATE + number % 3 * 2, 1)
            assert rig.lender.lend(rig.endpoint, page(at), area, lending.READ) == 0
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert rig.map(IOVA, PRIVATE) == S_NOMEM
    assert held < 4096 * 700, f"{held} bytes for 4,096 mappings"
    assert rig.memory.lent_bytes == page(3)
    assert rig.detach() == S_OK
    assert (rig.memory.mapped, rig.memory.lent_bytes) == (0, 0)
    assert len(rig.memory._again) == 1


def test_lending_makes_no_more_runs_than_a_guest_may(
    rig: IommuRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmm.memory import guest_memory

    for module in (guest_memory, lending):
        monkeypatch.setattr(module, "MOST_RUNS", 6)
    assert rig.map(IOVA, 20) == rig.map(IOVA + page(1), 22) == S_OK

    assert rig.map(IOVA + page(2), 24) == S_NOMEM
    assert rig.map(IOVA + page(2), 21) == S_OK  # which joins two of them


# --- backings -----------------------------------------------------------------------------------


class Unreachable(MemfdBacking):
    """Stands for a guest_memfd that keeps the host out."""

    access = "none"


def test_backing_that_the_host_cannot_reach_lends_nothing() -> None:
    rig = IommuRig(private=Unreachable(page(64)))
    assert rig.attach() == S_OK

    assert rig.map(IOVA, PRIVATE) == S_FAULT
    assert rig.map(IOVA, 4) == S_OK  # a shared page

    assert rig.lender.as_dict()["lends"] is False
    assert rig.state(PRIVATE) is PageState.PRIVATE
    rig.close()


def test_common_pages_are_lent_from_the_shared_backing() -> None:
    """Both of a guest's aliases show them there (scheme cbit with several vCPUs)."""
    size = page(8)
    shared, private = MemfdBacking(size), MemfdBacking(size)
    memory = LendingMemory((Range(0, size),), shared, private, (Range(0, size),), pages(2, 1))
    rig = IommuRig()
    endpoint = rig.endpoint
    endpoint.space = AddressSpace()
    device = IommuMemory(memory, endpoint)
    memory.map(endpoint.space, IOVA, pages(1, 3), 3, 0)
    data = pattern(3 * PAGE_SIZE)

    device.pwrite(data, IOVA)

    assert private.pread(PAGE_SIZE, page(1)) == data[:PAGE_SIZE]
    assert shared.pread(PAGE_SIZE, page(2)) == data[PAGE_SIZE : 2 * PAGE_SIZE]
    assert private.pread(PAGE_SIZE, page(3)) == data[2 * PAGE_SIZE :]
    assert device.pread(len(data), IOVA) == data
    memory.close()
    rig.close()


def test_transfers_go_from_file_to_lent_pages_and_back(rig: IommuRig) -> None:
    fd = os.memfd_create("file")
    data = pattern(3 * PAGE_SIZE)
    os.pwrite(fd, data, 0)
    for number, target in enumerate((40, 4, 22)):  # private, shared, private
        assert rig.map(IOVA + page(number), target) == S_OK

    assert rig.device.transfer_in(fd, 0, IOVA, len(data)) == len(data)
    assert rig.content(40, PAGE_SIZE) + rig.content(4, PAGE_SIZE) == data[: 2 * PAGE_SIZE]
    assert rig.device.transfer_out(IOVA, len(data), fd, len(data)) == len(data)
    assert os.pread(fd, len(data), len(data)) == data
    assert rig.device.transfer_in(fd, page(5), IOVA, len(data)) == PAGE_SIZE  # the file ends
    with pytest.raises(PrivateAccess):
        rig.memory.transfer_out(page(40), 1, fd, 0)
    os.close(fd)
