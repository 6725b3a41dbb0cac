"""Rule 4: whatever step says no, the guest gets an error and everything is as it was."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvm_bindings import KvmError
from tests.support.conversion import (
    Answering,
    RecordingScheme,
    share,
    snapshot,
    tally,
    unshare,
)
from tests.support.memory import (
    Background,
    BrokenPunch,
    GatedBacking,
    guest_memory,
    page,
    pages,
    pattern,
)
from vmm.conversion.transaction import Converter
from vmm.core.errors import HostError, PrivateAccess, PyvmmError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Allow, Deny, Policy, PolicyError
from vmm.policy.protocol import BrokenOff

SIZE = page(64)

# 32..63 start private: both requests change a part of their range only.
REQUESTS = [share(28, 8), unshare(28, 8), share(40, 4), unshare(4, 4)]
each_request = pytest.mark.parametrize(
    "request_", REQUESTS, ids=lambda r: f"{r.kind.value}-{r.gpa:#x}"
)


@contextmanager
def filled(shared: MemfdBacking, private: MemfdBacking) -> Iterator[GuestMemory]:
    with guest_memory(pages(32, 32), shared=shared, private_backing=private) as memory:
        memory.pwrite(pattern(page(32)), 0)
        private.pwrite(pattern(page(32)), page(32))
        yield memory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with filled(MemfdBacking(SIZE), MemfdBacking(SIZE)) as made:
        yield made


@pytest.fixture
def unpunchable() -> Iterator[GuestMemory]:
    with filled(BrokenPunch(SIZE), BrokenPunch(SIZE)) as made:
        yield made


# The policy says no, or breaks.


@each_request
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY])
def test_denial_reaches_the_guest_and_changes_nothing(
    memory: GuestMemory, request_: ConversionRequest, number: int
) -> None:
    scheme = RecordingScheme(memory)
    converter = Converter(memory, scheme, Answering(Deny(number)))
    before = snapshot(memory, scheme)

    answer = converter.convert(request_)

    assert answer == -number
    assert snapshot(memory, scheme) == before
    assert scheme.calls == []
    expected = {"calls": 1, "bytes": 0, "denied": 1, "failed": 0}
    assert tally(converter, request_.kind) == expected


@pytest.mark.parametrize("number", [0, -13, 4096, 1.5])
def test_denial_without_a_proper_errno_cannot_be_made(number: float) -> None:
    """-0 would tell the guest that its page is converted."""
    with pytest.raises(ValueError, match="errno"):
        Deny(number)  # type: ignore[arg-type]


@each_request
@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("of the policy"), FileNotFoundError(2, "its log"), HostError("made up")],
    ids=lambda error: type(error).__name__,
)
def test_exception_in_a_policy_ends_the_run_and_changes_nothing(
    memory: GuestMemory, request_: ConversionRequest, error: Exception
) -> None:
    """Not the guest's fault: an answer of -ENOENT for the policy's log file would hide it."""
    scheme = RecordingScheme(memory)
    converter = Converter(memory, scheme, Answering(error))
    before = snapshot(memory, scheme)

    with pytest.raises(PolicyError, match=f"policy Answering.*{type(error).__name__}") as raised:
        converter.convert(request_)

    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)
    assert snapshot(memory, scheme) == before
    assert tally(converter, request_.kind)["failed"] == 1


@pytest.mark.parametrize("answer", [None, True, False, 0, -1, "yes", Deny, Allow])
def test_answer_that_is_no_decision_is_no_permission(memory: GuestMemory, answer: object) -> None:
    scheme = RecordingScheme(memory)
    converter = Converter(memory, scheme, Answering(answer))
    before = snapshot(memory, scheme)

    with pytest.raises(PolicyError, match=r"return Allow\(\) or Deny\(\)"):
        converter.convert(share(40, 1))

    assert snapshot(memory, scheme) == before


def test_signal_that_breaks_a_policy_off_is_not_dressed_up(memory: GuestMemory) -> None:
    converter = Converter(memory, RecordingScheme(memory), Answering(BrokenOff()))

    with pytest.raises(BrokenOff):
        converter.convert(share(40, 1))


# A step of the mechanism fails.


@each_request
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINVAL, errno.EAGAIN])
def test_kvms_no_reaches_the_guest_and_changes_nothing(
    memory: GuestMemory, request_: ConversionRequest, number: int
) -> None:
    scheme = RecordingScheme(memory)

    def refuse(area: Range, kind: Kind) -> None:
        raise KvmError("KVM_SET_MEMORY_ATTRIBUTES", number)

    scheme.before_apply = refuse
    converter = Converter(memory, scheme, Policy())
    before = snapshot(memory, scheme)

    answer = converter.convert(request_)

    assert answer == -number
    assert snapshot(memory, scheme) == before
    assert [call.split()[0] for call in scheme.calls] == ["apply"], "what failed is not reverted"
    assert tally(converter, request_.kind) == {"calls": 1, "bytes": 0, "denied": 0, "failed": 1}


@each_request
def test_failed_discard_takes_the_scheme_back_first_and_only_where_it_changed(
    unpunchable: GuestMemory, request_: ConversionRequest
) -> None:
    memory = unpunchable
    scheme = RecordingScheme(memory)
    converter = Converter(memory, scheme, Policy())
    before = snapshot(memory, scheme)

    answer = converter.convert(request_)

    assert answer == -errno.ENOMEM
    assert snapshot(memory, scheme) == before
    reverts = [call for call in scheme.calls if call.startswith("revert")]
    assert reverts
    # The host must not get the pages back while KVM still gives the guest the other side.
    assert all(call.endswith("converting") for call in reverts)
    assert tally(converter, request_.kind)["failed"] == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "io"), OSError("no number at all")])
def test_failed_discard_answers_an_errno_whatever_the_error(error: OSError) -> None:
    with filled(BrokenPunch(SIZE, error), BrokenPunch(SIZE, error)) as memory:
        converter = Converter(memory, RecordingScheme(memory), Policy())

        assert converter.convert(share(40, 1)) == -errno.EIO


def test_failed_revert_ends_the_run_with_the_pages_given_back(unpunchable: GuestMemory) -> None:
    """KVM and the VMM disagree about a page then: nothing that the guest is told would be true."""
    memory = unpunchable
    scheme = RecordingScheme(memory)
    scheme.fail_revert = True
    converter = Converter(memory, scheme, Policy())
    states = memory.states()

    with pytest.raises(HostError, match=r"share of \[0x28000, 0x2c000\).*cannot be taken back"):
        converter.convert(share(40, 4))

    assert memory.states() == states
    assert tally(converter, Kind.SHARE)["failed"] == 1


def test_bug_in_a_step_is_not_swallowed_and_changes_nothing(memory: GuestMemory) -> None:
    scheme = RecordingScheme(memory)

    def stumble(area: Range, kind: Kind) -> None:
        raise ZeroDivisionError

    scheme.before_apply = stumble
    converter = Converter(memory, scheme, Policy())
    before = snapshot(memory, scheme)

    with pytest.raises(ZeroDivisionError):
        converter.convert(unshare(0, 8))

    assert snapshot(memory, scheme) == before


def test_conversion_after_a_failed_one_works(memory: GuestMemory) -> None:
    scheme = RecordingScheme(memory)
    converter = Converter(memory, scheme, Answering(ZeroDivisionError()))
    with pytest.raises(PyvmmError):
        converter.convert(share(40, 1))

    again = Converter(memory, scheme, Policy())
    assert converter._asking.locked() is False
    assert again.convert(share(40, 1)) == 0


# Accesses that do not end in time.


@pytest.mark.parametrize("request_", [unshare(0, 8), unshare(4, 40)], ids=["shared", "mixed"])
def test_access_that_does_not_end_is_ebusy_and_everything_is_as_before(
    request_: ConversionRequest,
) -> None:
    gated = GatedBacking(SIZE)
    with filled(gated, MemfdBacking(SIZE)) as memory:
        scheme = RecordingScheme(memory)
        converter = Converter(memory, scheme, Policy(), quiesce_timeout=0)
        access = Background(lambda: memory.pread(1, page(6)))
        gated.await_arrivals()
        states, residency = memory.states(), memory.residency()

        answer = converter.convert(request_)

        assert answer == -errno.EBUSY
        assert (memory.states(), memory.residency()) == (states, residency)
        assert scheme.calls == []
        assert tally(converter, Kind.UNSHARE) == {
            "calls": 1, "bytes": 0, "denied": 0, "failed": 1,
        }  # fmt: skip
        gated.gate.set()
        assert access.result() == pattern(page(32))[page(6) : page(6) + 1]
        assert converter.convert(request_) == 0, "the access is over"


# Who comes first: the access or the conversion.


def test_conversion_waits_for_the_access_under_way_and_the_access_ends_well() -> None:
    gated = GatedBacking(SIZE)
    with filled(gated, MemfdBacking(SIZE)) as memory:
        scheme = RecordingScheme(memory)
        converter = Converter(memory, scheme, Policy(), quiesce_timeout=30)
        order: list[str] = []
        scheme.before_apply = lambda area, kind: order.append("applied")

        leave = memory._leave

        def leaving() -> None:
            order.append("access over")
            leave()

        memory._leave = leaving  # type: ignore[method-assign]
        access = Background(lambda: memory.pread(page(1), page(6)))
        gated.await_arrivals()
        conversion = Background(lambda: converter.convert(unshare(0, 8)))
        gated.gate.set()

        assert conversion.result() == 0
        assert access.result() == pattern(page(32))[page(6) : page(7)]
        assert order == ["access over", "applied"]


def test_access_while_a_conversion_is_applied_is_refused(memory: GuestMemory) -> None:
    scheme = RecordingScheme(memory)
    refused: list[str] = []

    def try_to_read(area: Range, kind: Kind) -> None:
        with pytest.raises(PrivateAccess) as raised:
            memory.pread(1, area.start)
        refused.append(str(raised.value))

    scheme.before_apply = try_to_read

    Converter(memory, scheme, Policy()).convert(share(40, 1))

    assert refused == ["host access to 1 bytes at 0x28000: [0x28000, 0x28001) is converting"]
    assert memory.pread(1, page(40)) == b"\0"
