"""The doorbell's registers: what ringing asks for, what is read back, and no input raises."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.core.events import ConversionRequest, Kind
from vmm.devices.bus import PortDevice
from vmm.devices.doorbell import DoorbellActions, doorbell

ID = 0x424D4D56


class Asked:
    """Notes what ringing comes to, and answers it with `answer`."""

    def __init__(self, *, conversions: bool = True) -> None:
        self.requests: list[ConversionRequest] = []
        self.checks: list[tuple[int, int]] = []
        self.failures: list[int] = []
        self.answer = 0
        actions = DoorbellActions(
            self.convert if conversions else None, self.check, self.failures.append
        )
        self.banks = doorbell(2, "port", actions).banks

    def convert(self, request: ConversionRequest) -> int:
        self.requests.append(request)
        return self.answer

    def check(self, gpa: int, size: int) -> int:
        self.checks.append((gpa, size))
        return self.answer


def ring(bank: PortDevice, command: int, frame: int, pages: int) -> int:
    """What a guest does: two latches, then the command register; the result that it reads."""
    bank.write(0x00, 4, frame)
    bank.write(0x04, 4, pages)
    bank.write(0x08, 4, command)
    return bank.read(0x0C, 4)


def u32(result: int) -> int:
    return result & 0xFFFF_FFFF


@pytest.mark.parametrize(("command", "kind"), [(1, Kind.SHARE), (2, Kind.UNSHARE)])
def test_doorbell_conversion_command_makes_a_request(command: int, kind: Kind) -> None:
    asked = Asked()

    assert ring(asked.banks[0], command, 0x200, 3) == 0

    assert asked.requests == [ConversionRequest(kind, 0x20_0000, 3, 0, "port")]


def test_doorbell_largest_numbers_do_not_wrap() -> None:
    asked = Asked()

    ring(asked.banks[0], 1, 0xFFFF_FFFF, 0xFFFF_FFFF)

    wanted = ConversionRequest(Kind.SHARE, 0xFFFF_FFFF << 12, 0xFFFF_FFFF, 0, "port")
    assert asked.requests == [wanted]


def test_doorbell_host_check_counts_bytes() -> None:
    asked = Asked()

    ring(asked.banks[0], 3, 0x300, 2)

    assert asked.checks == [(0x30_0000, 0x2000)]


@pytest.mark.parametrize("command", [1, 2, 3])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_doorbell_answer_is_read_back_as_twos_complement(command: int, number: int) -> None:
    asked = Asked()
    asked.answer = -number

    assert ring(asked.banks[0], command, 0, 1) == u32(-number)


def test_doorbell_command_that_raises_does_not_read_as_success() -> None:
    asked = Asked()
    ring(asked.banks[0], 1, 0, 1)

    def raising(request: ConversionRequest) -> int:
        raise RuntimeError

    actions = DoorbellActions(raising, asked.check, asked.failures.append)
    bank = doorbell(1, "port", actions).banks[0]
    with pytest.raises(RuntimeError):
        ring(bank, 1, 0, 1)

    assert bank.read(0x0C, 4) == u32(-errno.EIO)


@pytest.mark.parametrize("command", [0, 4, 0xFFFF_FFFF])
def test_doorbell_unknown_command_answers_enosys(command: int) -> None:
    asked = Asked()

    assert ring(asked.banks[0], command, 1, 1) == u32(-errno.ENOSYS)
    assert not asked.requests
    assert not asked.checks


def test_doorbell_registers_read_back() -> None:
    bank = Asked().banks[0]
    ring(bank, 0, 0x1234, 7)

    assert bank.read(0x00, 4) == 0x1234
    assert bank.read(0x04, 4) == 7
    assert bank.read(0x08, 4) == ID


def test_doorbell_banks_of_two_vcpus_are_apart() -> None:
    asked = Asked()
    first, second = asked.banks
    first.write(0x00, 4, 0x111)
    second.write(0x00, 4, 0x222)
    first.write(0x04, 4, 1)
    second.write(0x04, 4, 2)
    first.write(0x08, 4, 1)
    asked.answer = -errno.EPERM
    second.write(0x08, 4, 2)

    assert asked.requests == [
        ConversionRequest(Kind.SHARE, 0x111000, 1, 0, "port"),
        ConversionRequest(Kind.UNSHARE, 0x222000, 2, 1, "port"),
    ]
    assert (first.read(0x0C, 4), second.read(0x0C, 4)) == (0, u32(-errno.EPERM))


def test_doorbell_failure_register_reports_nonzero_codes_only() -> None:
    asked = Asked()

    asked.banks[1].write(0x10, 4, 0)
    asked.banks[1].write(0x10, 4, 77)

    assert asked.failures == [77]


def test_doorbell_without_conversions_takes_only_failures() -> None:
    asked = Asked(conversions=False)
    bank = asked.banks[0]

    assert ring(bank, 1, 1, 1) == bank.read(0x08, 4) == 0xFFFF_FFFF
    bank.write(0x10, 4, 5)

    assert asked.requests == []
    assert asked.failures == [5]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0x1F),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, 2**64 - 1),
        ),
        max_size=20,
    )
)
def test_doorbell_hostile_accesses_answer_in_range(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    bank = Asked().banks[0]
    for is_write, offset, size, value in accesses:
        if is_write:
            bank.write(offset, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= bank.read(offset, size) < 1 << 8 * size
