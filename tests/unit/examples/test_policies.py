"""The example policies over real guest memory, with a clock that the test moves."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.support.conversion import RecordingScheme
from tests.support.memory import guest_memory, page, pages
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.examples.by_doorbell import ByDoorbell
from vmm.examples.device_allowance import DeviceAllowance
from vmm.examples.exposure_log import ExposureLog
from vmm.examples.in_pieces import InPieces
from vmm.examples.join_blocks import JoinBlocks
from vmm.examples.learned_ranges import LearnedRanges
from vmm.examples.lockdown import Lockdown
from vmm.examples.quarantine import Quarantine
from vmm.examples.time_window import TimeWindow
from vmm.examples.two_phase import TwoPhase
from vmm.examples.vcpu_back_off import VcpuBackOff
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Deny, End, IoEvent, Policy, PolicyKill, View

EACCES, EAGAIN, EBUSY = -errno.EACCES, -errno.EAGAIN, -errno.EBUSY


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, 32..63 private."""
    with guest_memory(pages(32, 32)) as made:
        yield made


class Run:
    """A converter under one policy; `now` is its clock."""

    def __init__(self, memory: GuestMemory, policy: Policy) -> None:
        self.now = 100.0
        self.memory = memory
        self.scheme = RecordingScheme(memory)
        self.converter = Converter(memory, self.scheme, policy, clock=lambda: self.now)
        self.converter.hooks.boot(self.converter.view)

    def share(self, first: int, count: int = 1, vcpu: int = 0, doorbell: str = "port") -> int:
        request = ConversionRequest(Kind.SHARE, page(first), count, vcpu, doorbell)
        return self.converter.convert(request)

    def unshare(self, first: int, count: int = 1, doorbell: str = "port") -> int:
        return self.converter.convert(
            ConversionRequest(Kind.UNSHARE, page(first), count, 0, doorbell)
        )

    def end(self) -> None:
        self.converter.hooks.exit(End("poweroff", ""), self.converter.view)

    def pages_in(self, state: PageState) -> int:
        return self.memory.bytes_in(state) // page(1)


def test_time_window_lets_shares_through_while_it_is_open(memory: GuestMemory) -> None:
    run = Run(memory, TimeWindow(every=10, open=2))

    answers = []
    for run.now in (100.0, 101.9, 102.0, 109.9, 110.0):
        answers.append(run.share(40))

    assert answers == [0, 0, EAGAIN, EAGAIN, 0]
    run.now = 105.0
    assert run.unshare(40) == 0


@pytest.mark.parametrize(("every", "open"), [(1, 2), (1, 0), (-1, -2)])
def test_time_window_that_is_none_is_refused(every: float, open: float) -> None:
    with pytest.raises(ValueError, match="use 0 < open <= every"):
        TimeWindow(every, open)


def test_learned_ranges_are_all_that_a_later_run_may_share(
    memory: GuestMemory, tmp_path: Path
) -> None:
    file = tmp_path / "ranges.json"
    first = Run(memory, LearnedRanges(file, learn=True))
    assert [first.share(40, 2), first.share(42), first.share(50)] == [0, 0, 0]
    first.end()
    assert first.unshare(32, 32) == 0

    then = Run(memory, LearnedRanges(file))

    assert json.loads(file.read_text()) == [[40, 3], [50, 1]]
    assert [then.share(41, 2), then.share(50), then.share(42, 2)] == [0, 0, EACCES]


def test_vcpu_back_off_slows_the_noisy_one_and_no_other(memory: GuestMemory) -> None:
    run = Run(memory, VcpuBackOff(free=3, first=0.1))
    answers = [run.share(40) for _ in range(3)]

    assert [*answers, run.share(41), run.share(41, vcpu=1)] == [0, 0, 0, EBUSY, 0]
    run.now += 0.11
    assert [run.share(41), run.share(42)] == [0, EBUSY]
    run.now += 0.11  # not enough now: it has doubled
    assert run.share(42) == EBUSY
    run.now += 1.0
    assert [run.share(42), run.share(43), run.share(44)] == [0, 0, 0]


def test_join_blocks_converts_a_block_when_all_of_it_is_private(memory: GuestMemory) -> None:
    run = Run(memory, JoinBlocks(block=page(4)))

    assert [run.unshare(number) for number in (4, 6, 7)] == [0, 0, 0]
    assert run.pages_in(PageState.DEFERRED) == 3
    assert run.unshare(5) == 0

    assert run.pages_in(PageState.DEFERRED) == 0
    assert run.scheme.calls[-1] == f"apply unshare {pages(4, 4)}"


def test_join_blocks_gives_a_page_back_that_is_shared_before(memory: GuestMemory) -> None:
    run = Run(memory, JoinBlocks(block=page(4)))
    run.unshare(4)

    assert run.share(4) == 0
    assert run.pages_in(PageState.DEFERRED) == 0


def test_join_blocks_does_not_wait_where_ram_ends(memory: GuestMemory) -> None:
    run = Run(memory, JoinBlocks(block=page(128)))

    assert run.unshare(4) == 0

    assert run.pages_in(PageState.DEFERRED) == 0


def test_quarantine_has_pages_rest_that_were_shared(memory: GuestMemory) -> None:
    run = Run(memory, Quarantine(seconds=2))
    assert run.unshare(30, 4) == 0  # two of them were private before

    answers = [run.share(31, 2), run.share(32), run.share(29)]
    run.now += 2

    assert [*answers, run.share(31, 2)] == [EAGAIN, 0, 0, 0]


def test_exposure_log_has_a_line_for_each_request(memory: GuestMemory, tmp_path: Path) -> None:
    file = tmp_path / "exposure.jsonl"
    run = Run(memory, ExposureLog(file))
    run.share(40, 2)
    run.now += 1.5
    run.unshare(40)
    run.end()

    lines = [json.loads(line) for line in file.read_text().splitlines()]

    assert lines == [
        {"s": 0, "what": "share", "bytes": page(2), "shared": page(32)},
        {"s": 1.5, "what": "unshare", "bytes": page(1), "shared": page(34)},
        {"s": 1.5, "what": "end: poweroff", "bytes": 0, "shared": page(33)},
    ]


def test_lockdown_lets_a_booted_guest_share_what_it_had_shared(memory: GuestMemory) -> None:
    run = Run(memory, Lockdown(seconds=5))
    assert [run.share(40, 4), run.unshare(40, 4)] == [0, 0]
    run.now += 5

    assert [run.share(41, 2), run.share(43, 2), run.share(44)] == [0, EACCES, EACCES]


def test_lockdown_may_end_the_run(memory: GuestMemory) -> None:
    run = Run(memory, Lockdown(seconds=5, kill=True))
    run.now += 5

    with pytest.raises(PolicyKill, match="was not shared in the boot"):
        run.share(40)


def test_by_doorbell_closes_the_other_doors_and_counts(
    memory: GuestMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(memory, ByDoorbell("hypercall"))

    answers = [run.share(40, doorbell="hypercall"), run.share(41), run.unshare(0, doorbell="port")]
    run.end()

    assert answers == [0, EACCES, EACCES]
    assert capsys.readouterr().err == "1 requests by hypercall\n2 requests by port\n"


def test_by_doorbell_knows_all_doors() -> None:
    with pytest.raises(ValueError, match="there is no bell"):
        ByDoorbell("port,bell")


def test_two_phase_holds_a_guest_to_its_boots_peak(memory: GuestMemory) -> None:
    run = Run(memory, TwoPhase(seconds=5, slack=page(1)))
    assert [run.share(40, 4), run.unshare(40, 4)] == [0, 0]
    run.now += 5

    answers = [run.share(50, 4), run.share(54), run.share(55), run.share(50, 4)]

    assert answers == [0, 0, EACCES, 0]


def test_two_phase_counts_what_starts_shared(memory: GuestMemory) -> None:
    run = Run(memory, TwoPhase(seconds=5, slack=page(1)))
    run.now += 5

    assert [run.share(0, 4), run.share(40), run.share(41)] == [0, 0, EACCES]


def test_in_pieces_grants_a_share_piece_by_piece(memory: GuestMemory) -> None:
    run = Run(memory, InPieces(piece=page(4)))

    seen = []
    for _ in range(4):
        answer = run.share(30, 12)
        seen.append((answer, run.pages_in(PageState.SHARED)))

    assert seen == [(EAGAIN, 36), (EAGAIN, 40), (0, 42), (0, 42)]


def test_in_pieces_counts_new_pages_alone(memory: GuestMemory) -> None:
    run = Run(memory, InPieces(piece=page(4)))
    run.share(36, 2)

    assert [run.share(34, 6), run.share(39, 1)] == [0, 0]
    run.share(45)
    assert run.share(42, 10) == EAGAIN
    states = [(area, state) for area, state in run.memory.states(pages(42, 10))]
    assert states == [(pages(42, 5), PageState.SHARED), (pages(47, 5), PageState.PRIVATE)]


def test_device_allowance_stops_a_device_that_reads_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = DeviceAllowance(read=page(2))
    view = cast(View, None)

    def touch(device: str, count: int, is_write: bool) -> object:
        return policy.on_io(IoEvent(device, pages(0, count), is_write, "descriptor"), view)

    answers = [touch("blk0", 2, False), touch("blk0", 9, True), touch("net0", 1, False)]

    assert answers == [Allow(), Allow(), Allow()]
    assert touch("blk0", 1, False) == Deny()
    policy.on_exit(End("poweroff", ""), view)
    assert "blk0 read 8192 bytes" in capsys.readouterr().err
