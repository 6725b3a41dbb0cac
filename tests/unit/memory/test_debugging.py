"""What a debugger may touch: shared pages as any host access, private ones only in a rehearsal."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vmm.core.errors import AccessDenied, GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.aliased_memory import AliasedMemory
from vmm.memory.backing import Backing
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.debugging import DebugAccess
from vmm.memory.guest_memory import GuestMemory, PageState

RAM = 1 << 20
PRIVATE = 0x8_0000
BIT = 1 << 40
COMMON = Range(0x9_0000, 2 * PAGE_SIZE)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(
        [Range(0, RAM)],
        MemfdBacking(RAM),
        MemfdBacking(RAM),
        [Range(PRIVATE, RAM - PRIVATE)],
        COMMON,
    )
    assert made.private is not None
    made.private.pwrite(b"secret", PRIVATE)
    made.shared.pwrite(b"shared", 0x1000)
    made.shared.pwrite(b"common", COMMON.start)
    yield made
    made.close()


def test_shared_page_is_read_and_written(memory: GuestMemory) -> None:
    access = DebugAccess(memory, BIT)

    access.write(b"S", 0x1000)

    assert access.read(6, 0x1000) == b"Shared"
    assert access.as_dict() == {
        "sees_private": False,
        "served": {"reads": 1, "writes": 1},
        "refused": {"reads": 0, "writes": 0},
        "private_bytes": 0,
    }


@pytest.mark.parametrize("gpa", [PRIVATE | BIT, PRIVATE])
def test_private_page_is_refused_by_either_alias_and_counted(memory: GuestMemory, gpa: int) -> None:
    access = DebugAccess(memory, BIT)

    with pytest.raises(PrivateAccess):
        access.read(6, gpa)
    with pytest.raises(PrivateAccess):
        access.write(b"x", gpa)

    assert access.refused == {"reads": 1, "writes": 1}


def test_private_page_is_served_where_the_user_asked_for_it(memory: GuestMemory) -> None:
    access = DebugAccess(memory, BIT, sees_private=True)

    access.write(b"S", PRIVATE | BIT)

    assert access.read(6, PRIVATE | BIT) == b"Secret"
    assert access.private_bytes == 7


def test_page_mapped_by_the_alias_that_is_not_in_use_is_refused(memory: GuestMemory) -> None:
    """What the guest would see there is neither the page nor zeros that mean something."""
    access = DebugAccess(memory, BIT, sees_private=True)

    with pytest.raises(PrivateAccess, match="as private, and the page is shared"):
        access.read(1, 0x1000 | BIT)
    with pytest.raises(PrivateAccess, match="as shared, and the page is private"):
        access.read(1, PRIVATE)


def test_state_picks_the_side_of_an_address_without_a_bit(memory: GuestMemory) -> None:
    access = DebugAccess(memory, BIT, sees_private=True)

    assert access.read(6, PRIVATE, by_state=True) == b"secret"
    assert access.read(6, 0x1000, by_state=True) == b"shared"


def test_common_page_lies_in_the_shared_backing(memory: GuestMemory) -> None:
    access = DebugAccess(memory, BIT, sees_private=True)

    assert access.read(6, COMMON.start | BIT) == b"common"


@pytest.mark.parametrize("gpa", [RAM, 1 << 50, -PAGE_SIZE])
def test_what_is_no_ram_is_refused(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(UnmappedAccess):
        DebugAccess(memory).read(1, gpa)


@pytest.mark.parametrize("gpa", [0x1000, PRIVATE])
def test_converting_page_is_refused(memory: GuestMemory, gpa: int) -> None:
    access = DebugAccess(memory, sees_private=True)
    memory.begin_conversion(Range(gpa, PAGE_SIZE), PageState.SHARED)

    with pytest.raises(PrivateAccess):
        access.read(1, gpa)

    memory.abandon_conversion()


def test_conversion_waits_for_an_access_to_private_memory(memory: GuestMemory) -> None:
    access = DebugAccess(memory, sees_private=True)
    inside, leave = threading.Event(), threading.Event()
    private = memory.private
    assert private is not None
    pread = private.pread

    def slow(size: int, offset: int) -> bytes:
        inside.set()
        assert leave.wait(10)
        return pread(size, offset)

    private.pread = slow  # type: ignore[method-assign]
    reader = threading.Thread(target=access.read, args=(6, PRIVATE))
    reader.start()
    assert inside.wait(10)
    area = Range(PRIVATE, PAGE_SIZE)
    memory.begin_conversion(area, PageState.SHARED)

    assert not memory.quiesce(area, 0.01)
    leave.set()
    assert memory.quiesce(area, 10)

    reader.join()
    memory.abandon_conversion()


def test_private_memory_that_the_kernel_keeps_is_not_promised(memory: GuestMemory) -> None:
    private = memory.private
    assert private is not None
    private.traits = private.traits._replace(private_access="SIGBUS")

    with pytest.raises(ValueError, match="kernel"):
        DebugAccess(memory, sees_private=True)


def test_policies_are_asked_before_a_page_is_touched(memory: GuestMemory) -> None:
    asked = []

    def announce(area: Range, is_write: bool, named: str | None) -> None:
        asked.append((area, is_write, named))
        raise AccessDenied("no")

    access = DebugAccess(memory, announce=announce)

    with pytest.raises(AccessDenied):
        access.write(b"xx", 0x1000)

    assert asked == [(Range(0x1000, 2), True, None)]
    assert memory.pread(6, 0x1000) == b"shared"


@pytest.fixture
def realm() -> Iterator[AliasedMemory]:
    made = AliasedMemory(
        [Range(0, RAM)], MemfdBacking(RAM), MemfdBacking(RAM),
        [Range(PRIVATE, RAM - PRIVATE)], shared_bit=BIT,
    )  # fmt: skip
    assert made.private is not None
    made.private.pwrite(b"secret", PRIVATE)
    made.shared.pwrite(b"shared", 0x1000)
    yield made
    made.close()


def test_bit_of_shared_addresses_picks_the_side_the_other_way_round(realm: AliasedMemory) -> None:
    access = DebugAccess(realm, sees_private=True)

    access.write(b"S", 0x1000 | BIT)

    assert access.read(6, 0x1000 | BIT) == b"Shared"
    assert access.read(6, PRIVATE) == b"secret"
    assert access.read(6, 0x1000, by_state=True) == b"Shared"
    with pytest.raises(PrivateAccess, match="as private, and the page is shared"):
        access.read(1, 0x1000)
    with pytest.raises(PrivateAccess, match="as shared, and the page is private"):
        access.read(1, PRIVATE | BIT)


def test_realms_private_page_is_refused(realm: AliasedMemory) -> None:
    with pytest.raises(PrivateAccess):
        DebugAccess(realm).read(6, PRIVATE)


# -- code that a processor may have cached --------------------------------------------------------


def forgotten(backing: Backing | None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """Each page that the backing is told to forget, with what is in it by then."""
    assert backing is not None
    seen: list[tuple[int, bytes]] = []
    monkeypatch.setattr(
        backing, "forget_mapping", lambda at, size: seen.append((at, backing.pread(size, at)))
    )
    return seen


@pytest.mark.parametrize("gpa", [0x1000, PRIVATE])
def test_page_is_mapped_anew_after_a_write_where_the_processor_caches_code(
    gpa: int, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing = memory.shared if gpa == 0x1000 else memory.private
    seen = forgotten(backing, monkeypatch)

    DebugAccess(memory, sees_private=True).write(b"code", gpa)
    assert seen == []
    access = DebugAccess(memory, sees_private=True, caches_code=True)
    access.read(4, gpa)
    access.write(b"CODE", gpa)

    assert seen == [(gpa, b"CODE")]


def test_code_that_could_stay_in_a_cache_is_not_written(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KVM maps a guest_memfd's pages by no mapping of ours."""
    assert memory.private is not None
    monkeypatch.setattr(memory.private, "is_guest_memfd", True)
    access = DebugAccess(memory, sees_private=True, caches_code=True)

    with pytest.raises(GuestMemoryError, match="guest_memfd"):
        access.write(b"X", PRIVATE, as_code=True)
    access.write(b"Y", PRIVATE + 1)
    access.write(b"Z", 0x1000, as_code=True)

    assert access.read(3, PRIVATE) == b"sYc"
    assert access.read(1, 0x1000) == b"Z"


def test_access_over_two_pages_is_the_callers_fault(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="more than one page"):
        DebugAccess(memory).read(2, 0x1FFF)
