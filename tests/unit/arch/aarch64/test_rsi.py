"""The calls of a realm: what they come to, for honest guests and others."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import guest_memory
from vmm.arch.aarch64 import layout, rsi
from vmm.arch.aarch64.monitor import RealmMonitor
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Deny, Policy

RAM = Range(layout.RAM_START, 64 * PAGE_SIZE)
BASE = RAM.start
WORDS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(lambda page, bit: page * PAGE_SIZE | bit << 39, st.integers(0, 2**30), st.booleans()),
    st.builds(lambda page: BASE + page * PAGE_SIZE, st.integers(-2, 66)),
)
UNLISTED = (errno.EPERM, errno.ENOMEM, errno.EBUSY, errno.EAGAIN, errno.EIO)


class Refuse(Policy):
    """Says no to every share."""

    def on_share(self, event: Any, view: Any) -> Deny:
        return Deny(errno.EPERM)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory(RAM, ram=(RAM,)) as made:
        yield made


def monitor(memory: GuestMemory, *policies: Policy) -> RealmMonitor:
    """Over a converter whose scheme has nothing to do, as with two addresses."""
    return RealmMonitor(memory, Converter(memory, CbitScheme(39), *policies))


# -- encodings ------------------------------------------------------------------------------------


def test_request_to_set_a_state_names_its_range_and_direction() -> None:
    top = BASE + 3 * PAGE_SIZE

    share = rsi.decode_state_set(BASE, top, rsi.EMPTY, 1)
    unshare = rsi.decode_state_set(BASE, top, rsi.RAM, 0)

    assert share == ConversionRequest(Kind.SHARE, BASE, 3, 1, "rsi")
    assert unshare == ConversionRequest(Kind.UNSHARE, BASE, 3, 0, "rsi")


@pytest.mark.parametrize(
    ("base", "top", "ripas"),
    [
        (BASE, BASE, rsi.EMPTY),
        (BASE + PAGE_SIZE, BASE, rsi.EMPTY),
        (BASE + 1, BASE + PAGE_SIZE, rsi.EMPTY),
        (BASE, BASE + 1, rsi.EMPTY),
        (BASE, BASE + PAGE_SIZE, 2),
        (BASE, BASE + PAGE_SIZE, rsi.DEV),
        (BASE, BASE + PAGE_SIZE, 2**64 - 1),
    ],
)
def test_request_without_a_meaning_has_none(base: int, top: int, ripas: int) -> None:
    assert rsi.decode_state_set(base, top, ripas, 0) is None


@pytest.mark.parametrize("number", UNLISTED)
def test_answer_to_a_refusal_is_reject_and_nothing_done(number: int) -> None:
    assert rsi.state_set_answer(BASE, BASE + PAGE_SIZE, -number) == (rsi.SUCCESS, BASE, rsi.REJECT)


# -- the monitor ----------------------------------------------------------------------------------


def test_version_is_1_0(memory: GuestMemory) -> None:
    answer = monitor(memory).answer(rsi.ABI_VERSION, 0x1_0000, 0, 0, 0)

    assert answer == (rsi.SUCCESS, 0x1_0000, 0x1_0000)


def test_configuration_is_written_to_the_private_page(memory: GuestMemory) -> None:
    assert memory.private is not None
    memory.private.pwrite(b"\xff" * PAGE_SIZE, BASE)

    answer = monitor(memory).answer(rsi.REALM_CONFIG, BASE, 0, 0, 0)

    assert answer == (rsi.SUCCESS,)
    page = memory.private.pread(PAGE_SIZE, BASE)
    assert struct.unpack_from("<Q", page)[0] == 40
    assert not any(page[8:])


@pytest.mark.parametrize(
    "gpa", [0, BASE + 8, BASE - PAGE_SIZE, RAM.end, BASE | 1 << 39, 2**64 - PAGE_SIZE]
)
def test_configuration_page_that_is_no_page_of_ram_is_refused(
    memory: GuestMemory, gpa: int
) -> None:
    assert monitor(memory).answer(rsi.REALM_CONFIG, gpa, 0, 0, 0) == (rsi.ERROR_INPUT,)
    assert memory.private is not None
    assert memory.private.resident_bytes(RAM.start, RAM.size) == 0


def test_configuration_page_that_is_shared_is_refused_and_not_written(memory: GuestMemory) -> None:
    asked = monitor(memory)
    asked.answer(rsi.IPA_STATE_SET, BASE, BASE + PAGE_SIZE, rsi.EMPTY, 0)

    assert asked.answer(rsi.REALM_CONFIG, BASE, 0, 0, 0) == (rsi.ERROR_INPUT,)
    assert memory.private is not None
    assert memory.private.resident_bytes(RAM.start, RAM.size) == 0


def test_configuration_page_that_is_shared_meanwhile_leaves_nothing_private(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, private = monitor(memory), memory.private
    assert private is not None
    write = private.pwrite

    def write_late(data: bytes, gpa: int) -> None:
        asked.answer(rsi.IPA_STATE_SET, BASE, BASE + PAGE_SIZE, rsi.EMPTY, 1)
        write(data, gpa)

    monkeypatch.setattr(private, "pwrite", write_late)

    assert asked.answer(rsi.REALM_CONFIG, BASE, 0, 0, 0) == (rsi.ERROR_INPUT,)
    assert private.resident_bytes(RAM.start, RAM.size) == 0


def test_share_and_unshare_change_the_pages_states(memory: GuestMemory) -> None:
    asked = monitor(memory)
    area = Range(BASE + 2 * PAGE_SIZE, 3 * PAGE_SIZE)

    shared = asked.answer(rsi.IPA_STATE_SET, area.start, area.end, rsi.EMPTY, 0)
    states = memory.states(area)
    private = asked.answer(rsi.IPA_STATE_SET, area.start, area.end, rsi.RAM, 0)

    assert shared == private == (rsi.SUCCESS, area.end, rsi.ACCEPT)
    assert states == [(area, PageState.SHARED)]
    assert memory.states(area) == [(area, PageState.PRIVATE)]


def test_share_that_a_policy_denies_is_rejected(memory: GuestMemory) -> None:
    answer = monitor(memory, Refuse()).answer(
        rsi.IPA_STATE_SET, BASE, BASE + PAGE_SIZE, rsi.EMPTY, 0
    )

    assert answer == (rsi.SUCCESS, BASE, rsi.REJECT)
    assert memory.bytes_in(PageState.SHARED) == 0


@pytest.mark.parametrize(
    ("base", "top"),
    [
        (RAM.end - PAGE_SIZE, RAM.end + PAGE_SIZE),
        (0, BASE + PAGE_SIZE),
        (BASE | 1 << 39, BASE + PAGE_SIZE | 1 << 39),
        (2**64 - 2 * PAGE_SIZE, 2**64 - PAGE_SIZE),
    ],
)
def test_range_that_is_not_ram_is_an_error_of_input(
    memory: GuestMemory, base: int, top: int
) -> None:
    answer = monitor(memory).answer(rsi.IPA_STATE_SET, base, top, rsi.EMPTY, 0)

    assert (answer[0], answer[2]) == (rsi.ERROR_INPUT, rsi.REJECT)
    assert memory.bytes_in(PageState.SHARED) == 0


def test_state_of_registers_is_a_trusted_devices_up_to_ram(memory: GuestMemory) -> None:
    answer = monitor(memory).answer(rsi.IPA_STATE_GET, layout.UART_GPA, BASE + PAGE_SIZE, 0, 0)

    assert answer == (rsi.SUCCESS, BASE, rsi.DEV)


def test_state_of_ram_is_told_run_by_run(memory: GuestMemory) -> None:
    asked = monitor(memory)
    middle = BASE + 4 * PAGE_SIZE
    asked.answer(rsi.IPA_STATE_SET, BASE, middle, rsi.EMPTY, 0)

    first = asked.answer(rsi.IPA_STATE_GET, BASE, RAM.end, 0, 0)
    second = asked.answer(rsi.IPA_STATE_GET, middle, RAM.end, 0, 0)

    assert first == (rsi.SUCCESS, middle, rsi.EMPTY)
    assert second == (rsi.SUCCESS, RAM.end, rsi.RAM)


def test_call_that_nobody_knows_is_not_supported(memory: GuestMemory) -> None:
    for function in (0xC400_0192, 0xC400_0194, 0xC400_019F, 0, 2**64 - 1):
        assert monitor(memory).answer(function, 1, 2, 3, 0) == (2**64 - 1,)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(range(0xC400_0190, 0xC400_01A0)), WORDS, WORDS, WORDS), max_size=8
    )
)
def test_calls_of_any_kind_are_answered_in_64_bits(
    calls: list[tuple[int, int, int, int]],
) -> None:
    with guest_memory(RAM, ram=(RAM,)) as memory:
        asked = monitor(memory)
        for function, x1, x2, x3 in calls:
            answer = asked.answer(function, x1, x2, x3, 0)
            assert 1 <= len(answer) <= 4
            assert all(0 <= value < 1 << 64 for value in answer)
        assert sum(memory.bytes_in(state) for state in PageState) == RAM.size
