"""virtio-iommu's requests, as a driver puts them, and what the devices behind it reach then."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest

from tests.support.iommu import BOTH, DOMAIN, FIRST, IommuRig, map_request, unmap_request
from tests.support.memory import page, pages, pattern
from tests.support.virtio_driver import NEEDS_RESET, Piece
from vmm.core.errors import GuestMemoryError, PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.virtio import iommu
from vmm.devices.virtio.iommu import (
    S_DEVERR,
    S_FAULT,
    S_INVAL,
    S_NOENT,
    S_OK,
    S_RANGE,
    S_UNSUPP,
)
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import READ, WRITE, IommuFault

IOVA = 0x4000_0000
PRIVATE = 20  # page number of a private page
SHARED = 4


@pytest.fixture
def rig() -> Iterator[IommuRig]:
    made = IommuRig()
    yield made
    made.close()


@pytest.fixture
def attached(rig: IommuRig) -> IommuRig:
    assert rig.attach() == S_OK
    return rig


# --- translation -------------------------------------------------------------------------------


def test_device_reads_and_writes_private_pages_that_are_mapped_for_it(attached: IommuRig) -> None:
    attached.fill(PRIVATE, b"the guest's own")
    assert attached.map(IOVA, PRIVATE) == S_OK

    assert attached.device.pread(15, IOVA) == b"the guest's own"
    attached.device.pwrite(b"from the device", IOVA + 100)

    assert attached.private.pread(15, page(PRIVATE) + 100) == b"from the device"
    assert attached.state(PRIVATE) is PageState.LENT


def test_device_reaches_nothing_before_it_is_attached(rig: IommuRig) -> None:
    for address in (0, page(SHARED), IOVA):
        with pytest.raises(IommuFault, match="blk0, which is in no domain"):
            rig.device.pread(16, address)


def test_device_does_not_reach_physical_addresses_even_of_shared_pages(attached: IommuRig) -> None:
    with pytest.raises(IommuFault, match="not mapped"):
        attached.device.pread(16, page(SHARED))


def test_mapped_shared_pages_are_reached_on_their_shared_side(attached: IommuRig) -> None:
    attached.fill(SHARED, b"for all")
    assert attached.map(IOVA, SHARED) == S_OK

    assert attached.device.pread(7, IOVA) == b"for all"
    assert attached.state(SHARED) is PageState.SHARED


@pytest.mark.parametrize(("flags", "refused"), [(READ, WRITE), (WRITE, READ)])
def test_access_against_the_mappings_direction_is_refused(
    attached: IommuRig, flags: int, refused: int
) -> None:
    assert attached.map(IOVA, PRIVATE, flags=flags) == S_OK

    with pytest.raises(IommuFault):
        if refused == WRITE:
            attached.device.pwrite(b"x", IOVA)
        else:
            attached.device.pread(1, IOVA)

    assert attached.content(PRIVATE, 1) == b"\0"
    assert attached.faults() == [(iommu.FAULT_R_MAPPING, 0x100 | refused, FIRST, IOVA)]


def test_access_across_mappings_is_moved_in_order(attached: IommuRig) -> None:
    data = pattern(3 * PAGE_SIZE)
    for number, target in enumerate((40, 22, SHARED)):
        assert attached.map(IOVA + page(number), target) == S_OK

    attached.device.pwrite(data, IOVA)

    assert attached.content(40, PAGE_SIZE) == data[:PAGE_SIZE]
    assert attached.content(22, PAGE_SIZE) == data[PAGE_SIZE : 2 * PAGE_SIZE]
    assert attached.content(SHARED, PAGE_SIZE) == data[2 * PAGE_SIZE :]
    assert attached.device.pread(len(data), IOVA) == data
    assert attached.device.read_many([IOVA + 8190, 4, IOVA, 3]) == data[8190:8194] + data[:3]


def test_access_that_leaves_a_mapping_is_refused_before_a_byte_moves(attached: IommuRig) -> None:
    assert attached.map(IOVA, PRIVATE) == S_OK

    with pytest.raises(IommuFault, match=f"{IOVA + PAGE_SIZE:#x}"):
        attached.device.pwrite(b"x" * 20, IOVA + PAGE_SIZE - 10)

    assert attached.content(PRIVATE, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_two_mappings_of_one_page_lend_it_until_both_are_gone(attached: IommuRig) -> None:
    assert attached.map(IOVA, PRIVATE) == S_OK
    assert attached.map(IOVA + page(9), PRIVATE, 2) == S_OK

    assert attached.unmap(IOVA) == S_OK
    assert (attached.state(PRIVATE), attached.state(PRIVATE + 1)) == (PageState.LENT,) * 2
    assert attached.unmap(IOVA + page(9), 2) == S_OK

    assert attached.memory.bytes_in(PageState.LENT) == 0
    assert attached.state(PRIVATE) is PageState.PRIVATE


# --- nobody else --------------------------------------------------------------------------------


def test_lent_page_is_refused_to_the_host_and_to_other_devices(attached: IommuRig) -> None:
    other, memory = attached.another("net0", 2)
    assert attached.attach(DOMAIN + 1, other.number) == S_OK
    assert attached.map(IOVA, PRIVATE) == S_OK

    with pytest.raises(PrivateAccess, match="lent"):
        attached.memory.pread(1, page(PRIVATE))
    with pytest.raises(IommuFault, match="net0"):
        memory.pread(1, IOVA)
    with pytest.raises(PrivateAccess, match="lent"):
        attached.memory.discard(page(PRIVATE), PAGE_SIZE)


def test_second_endpoint_for_a_domain_is_unsupported(attached: IommuRig) -> None:
    other, _ = attached.another("net0", 2)

    assert attached.attach(DOMAIN, other.number) == S_UNSUPP
    assert other.space is None


# --- unmapping ----------------------------------------------------------------------------------


def test_unmapped_page_is_out_of_reach_and_private_again(attached: IommuRig) -> None:
    assert attached.map(IOVA, PRIVATE) == S_OK
    attached.now = 0.004
    assert attached.unmap(IOVA) == S_OK

    with pytest.raises(IommuFault):
        attached.device.pread(1, IOVA)
    assert attached.state(PRIVATE) is PageState.PRIVATE
    report = attached.lender.as_dict()
    assert (report["maps"], report["unmaps"], report["mappings"]) == (1, 1, 0)
    assert report["lent_us"] == {"4096": 1}


def test_unmap_follows_the_specifications_examples(attached: IommuRig) -> None:
    """5.13.6.6, (1) to (7), with pages in the place of addresses."""

    def mapped(*spans: tuple[int, int]) -> None:
        for first, last in spans:
            assert attached.map(IOVA + page(first), 20 + first, last - first + 1) == S_OK

    def unmap(first: int, last: int) -> tuple[int, int]:
        status = attached.unmap(IOVA + page(first), last - first + 1)
        return status, attached.memory.mapped

    assert unmap(0, 4) == (S_OK, 0)
    mapped((0, 9))
    assert unmap(0, 9) == (S_OK, 0)
    mapped((0, 4), (5, 9))
    assert unmap(0, 9) == (S_OK, 0)
    mapped((0, 9))
    assert unmap(0, 4) == (S_RANGE, 1)
    assert unmap(5, 20) == (S_RANGE, 1)
    assert unmap(0, 9) == (S_OK, 0)
    mapped((0, 4), (5, 9))
    assert unmap(0, 4) == (S_OK, 1)
    assert unmap(0, 9) == (S_OK, 0)
    mapped((0, 4), (10, 14))
    assert unmap(0, 14) == (S_OK, 0)


def test_unmap_that_would_split_the_last_mapping_removes_none(attached: IommuRig) -> None:
    assert attached.map(IOVA, 20) == S_OK
    assert attached.map(IOVA + page(1), 30, 4) == S_OK

    assert attached.unmap(IOVA, 3) == S_RANGE

    assert attached.memory.mapped == 2
    assert attached.device.pread(1, IOVA) == b"\0"


def test_unmap_of_many_mappings_goes_on_in_later_turns(attached: IommuRig) -> None:
    for number in range(1000):
        assert attached.map(IOVA + page(number), 20 + number % 40) == S_OK
    assert attached.memory.mapped == 1000

    assert attached.ask(struct.pack("<B3xIQQI", 4, DOMAIN, 0, (1 << 48) - 1, 0)) == S_OK

    assert attached.memory.mapped == attached.memory.bytes_in(PageState.LENT) == 0


# --- several requests at one kick ---------------------------------------------------------------


def test_requests_of_one_kick_are_carried_out_in_their_order_with_one_read(
    attached: IommuRig,
) -> None:
    machine = attached.machine
    requests = [
        map_request(IOVA, PAGE_SIZE, page(PRIVATE)),
        map_request(IOVA, PAGE_SIZE, page(PRIVATE + 1)),  # is mapped by now
        b"\x09" + bytes(40),  # no such type
        unmap_request(IOVA, PAGE_SIZE),
        map_request(IOVA, PAGE_SIZE, page(PRIVATE + 2)),
    ]
    rooms = [machine.blank(4) for _ in requests]
    for request, room in zip(requests, rooms, strict=True):
        machine.give(iommu.REQUESTS, machine.place(request), room)
    machine.memory.calls.clear()

    machine.kick(iommu.REQUESTS)

    answers = machine.queues[iommu.REQUESTS].collect()
    assert [size for _, size in answers] == [4, 4, 0, 4, 4]
    statuses = [machine.text(room, 1)[0] for room in rooms]
    assert statuses == [S_OK, S_INVAL, 0xCC, S_OK, S_OK]
    assert machine.memory.calls["read_many"] == 2  # ring entries with descriptors, then headers
    assert attached.state(PRIVATE + 2) is PageState.LENT
    assert attached.memory.mapped == 1


def test_request_out_of_reach_stops_the_device_after_those_before_it(attached: IommuRig) -> None:
    machine = attached.machine
    room = machine.blank(4)
    request = machine.place(map_request(IOVA, PAGE_SIZE, page(PRIVATE)))
    machine.give(iommu.REQUESTS, request, room)
    machine.give(iommu.REQUESTS, Piece(1 << 40, 36), machine.blank(4))

    machine.kick(iommu.REQUESTS)

    assert machine.driver.status & NEEDS_RESET
    assert [size for _, size in machine.queues[iommu.REQUESTS].collect()] == [4]
    assert machine.text(room, 1) == b"\0"
    # A device that has stopped lends nothing: its transport has reset it.
    assert attached.memory.bytes_in(PageState.LENT) == 0


# --- the end of a domain ------------------------------------------------------------------------


def test_detach_takes_everything_back(attached: IommuRig) -> None:
    for number in range(20):
        assert attached.map(IOVA + page(number), 20 + number) == S_OK

    assert attached.detach() == S_OK

    assert attached.memory.bytes_in(PageState.LENT) == attached.memory.mapped == 0
    with pytest.raises(IommuFault, match="in no domain"):
        attached.device.pread(1, IOVA)
    assert attached.map(IOVA, 20) == S_NOENT
    assert attached.detach() == S_INVAL


def test_attach_to_another_domain_leaves_the_first(attached: IommuRig) -> None:
    assert attached.map(IOVA, PRIVATE) == S_OK

    assert attached.attach(DOMAIN + 1) == S_OK

    assert attached.state(PRIVATE) is PageState.PRIVATE
    with pytest.raises(IommuFault):
        attached.device.pread(1, IOVA)
    assert attached.map(IOVA, PRIVATE) == S_NOENT
    assert attached.map(IOVA, PRIVATE, domain=DOMAIN + 1) == S_OK
    assert attached.device.pread(1, IOVA) == b"\0"


def test_attach_to_the_same_domain_changes_nothing(attached: IommuRig) -> None:
    assert attached.map(IOVA, PRIVATE) == S_OK
    assert attached.attach() == S_OK
    assert attached.device.pread(1, IOVA) == b"\0"


def test_reset_of_the_iommu_detaches_all(attached: IommuRig) -> None:
    other, memory = attached.another("net0", 2)
    assert attached.attach(DOMAIN + 1, other.number) == S_OK
    assert attached.map(IOVA, PRIVATE, 3) == S_OK
    assert attached.map(IOVA, 40, domain=DOMAIN + 1) == S_OK

    attached.machine.driver.status = 0

    assert attached.memory.bytes_in(PageState.LENT) == attached.memory.mapped == 0
    for each in (attached.device, memory):
        with pytest.raises(IommuFault, match="in no domain"):
            each.pread(1, IOVA)


def test_reset_in_the_middle_of_a_long_unmap_leaves_nothing_lent(attached: IommuRig) -> None:
    for number in range(600):
        assert attached.map(IOVA + page(number), 20 + number % 40) == S_OK
    machine = attached.machine
    request = machine.place(struct.pack("<B3xII8x", iommu.T_DETACH, DOMAIN, FIRST))
    machine.give(iommu.REQUESTS, request, machine.blank(4))
    queue = attached.iommu._queues[iommu.REQUESTS]
    queue.budget._clock = map(float, itertools.count()).__next__  # a turn ends at its first look
    machine.transport.notify(iommu.REQUESTS)
    assert queue.unfinished is not None and attached.memory.mapped

    machine.driver.status = 0

    assert attached.memory.bytes_in(PageState.LENT) == attached.memory.mapped == 0


# --- requests that make no sense ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"endpoint": 0x99}, S_NOENT),
        ({"flags": iommu.ATTACH_F_BYPASS}, S_UNSUPP),
        ({"flags": 2}, S_INVAL),
        ({"reserved": 1}, S_INVAL),
        ({"domain": 0x10000}, S_RANGE),
    ],
)
def test_attach_that_is_refused_attaches_nothing(
    rig: IommuRig, arguments: dict[str, int], status: int
) -> None:
    assert rig.attach(**arguments) == status
    assert rig.endpoint.space is None


@pytest.mark.parametrize(
    ("iova", "size", "gpa", "flags", "status"),
    [
        (IOVA, 4096, page(PRIVATE), 0, S_INVAL),  # for no access at all
        (IOVA, 4096, page(PRIVATE), BOTH | 4, S_INVAL),  # MMIO, which isn't offered
        (IOVA, 4096, page(PRIVATE), BOTH | 1 << 31, S_INVAL),
        (IOVA + 1, 4096, page(PRIVATE), BOTH, S_RANGE),
        (IOVA, 4095, page(PRIVATE), BOTH, S_RANGE),
        (IOVA, 4096, page(PRIVATE) + 512, BOTH, S_RANGE),
        (IOVA, 0, page(PRIVATE), BOTH, S_RANGE),  # the last address before the first
        (1 << 48, 4096, page(PRIVATE), BOTH, S_RANGE),
        ((1 << 64) - 4096, 4096, page(PRIVATE), BOTH, S_RANGE),
        (0, 1 << 64, 0, BOTH, S_RANGE),
        (0xFEE0_0000, 4096, page(PRIVATE), BOTH, S_INVAL),  # where interrupt messages go
        (0xFEDF_F000, 8192, page(PRIVATE), BOTH, S_INVAL),
        (IOVA, 4096, page(64), BOTH, S_FAULT),  # past RAM
        (IOVA, 8192, page(63), BOTH, S_FAULT),
        (IOVA, 4096, (1 << 64) - 4096, BOTH, S_FAULT),
        (1 << 40, 1 << 40, page(PRIVATE), BOTH, S_FAULT),
        (IOVA, 8192, page(15), BOTH, S_INVAL),  # one page shared, one private
    ],
)
def test_map_that_makes_no_sense_changes_nothing(
    attached: IommuRig, iova: int, size: int, gpa: int, flags: int, status: int
) -> None:
    before = attached.memory.states()

    assert attached.map_bytes(iova, size, gpa, flags) == status

    assert attached.memory.states() == before
    assert attached.memory.mapped == 0


def test_map_over_a_mapping_is_invalid(attached: IommuRig) -> None:
    assert attached.map(IOVA + page(2), 20, 4) == S_OK

    for first, count in ((2, 4), (0, 3), (5, 1), (3, 1), (0, 9)):
        assert attached.map(IOVA + page(first), 40, count) == S_INVAL

    assert attached.state(40) is PageState.PRIVATE
    assert attached.map(IOVA + page(6), 40) == attached.map(IOVA + page(1), 41) == S_OK


def test_map_and_unmap_in_a_domain_that_is_not_there(rig: IommuRig) -> None:
    assert rig.map(IOVA, PRIVATE) == S_NOENT
    assert rig.unmap(IOVA) == S_NOENT
    assert rig.attach() == S_OK
    assert rig.unmap(IOVA, reserved=1) == S_INVAL
    assert rig.unmap(IOVA, 0) == S_RANGE


@pytest.mark.parametrize(
    ("data", "room"),
    [
        (b"", 4),
        (b"\0\0\0\0", 4),  # no such type
        (b"\x06" + bytes(40), 4),
        (b"\x03" + bytes(30), 4),  # a MAP that is cut off
        (struct.pack("<B3xIIII", 1, DOMAIN, FIRST, 0, 0), 0),
        (struct.pack("<B3xIIII", 1, DOMAIN, FIRST, 0, 0), 3),  # no room for the status
    ],
)
def test_request_that_cannot_be_parsed_comes_back_unanswered(
    rig: IommuRig, data: bytes, room: int
) -> None:
    used, answer = rig.raw(data, room)

    assert (used, answer) == (0, b"\xcc" * room)
    assert rig.endpoint.space is None
    assert rig.attach() == S_OK  # and the device goes on


def test_request_may_be_longer_than_its_type(rig: IommuRig) -> None:
    assert rig.ask(struct.pack("<B3xIIII", 1, DOMAIN, FIRST, 0, 0) + bytes(40)) == S_OK


def test_detach_of_what_is_not_there(attached: IommuRig) -> None:
    assert attached.detach(endpoint=0x99) == S_NOENT
    assert attached.detach(domain=DOMAIN + 1) == S_INVAL


# --- probe, configuration, events ---------------------------------------------------------------


def test_probe_tells_of_the_window_of_interrupt_messages(rig: IommuRig) -> None:
    used, answer = rig.probe()

    assert used == iommu.PROBE_SIZE + 4
    kind, length, subtype, first, last = struct.unpack_from("<HHB3xQQ", answer)
    assert (kind, length, subtype) == (1, 20, 1)
    assert (first, last) == (0xFEE0_0000, 0xFEEF_FFFF)
    assert answer[24:] == bytes(iommu.PROBE_SIZE - 24 + 4)


def test_probe_of_an_unknown_endpoint_and_without_room(rig: IommuRig) -> None:
    assert rig.probe(0x99)[1][-4] == S_NOENT
    used, answer = rig.probe(room=iommu.PROBE_SIZE)
    assert (used, answer[-4:-3], answer[:-4]) == (
        iommu.PROBE_SIZE,
        bytes((S_INVAL,)),
        b"\xcc" * (iommu.PROBE_SIZE - 4),
    )


def test_configuration_offers_pages_from_4_kib_and_no_bypass(rig: IommuRig) -> None:
    driver = rig.machine.driver
    config = b"".join(
        driver.ports.read(driver.device_config + at, 4).to_bytes(4, "little")
        for at in range(0, 40, 4)
    )

    sizes, first, last, *domains, probe, bypass = struct.unpack("<QQQIIIB3x", config)

    assert sizes == 0xFFFF_FFFF_FFFF_F000
    assert (first, last, domains, probe) == (0, (1 << 48) - 1, [0, 0xFFFF], 64)
    assert bypass == 0
    driver.ports.write(driver.device_config + 36, 1, 1)
    assert driver.ports.read(driver.device_config + 36, 1) == 0
    with pytest.raises(IommuFault):
        rig.device.pread(1, page(SHARED))


def test_faults_reach_the_driver_and_only_so_many_are_kept(attached: IommuRig) -> None:
    for number in range(iommu.MOST_EVENTS + 5):
        with pytest.raises(GuestMemoryError):
            attached.device.pwrite(b"x", IOVA + number)

    assert attached.iommu.statistics.events_dropped == 5
    assert attached.iommu.statistics.faults == iommu.MOST_EVENTS + 5
    assert attached.faults()[0] == (iommu.FAULT_R_MAPPING, 0x102, FIRST, IOVA)


def test_fault_of_an_endpoint_in_no_domain_says_so(rig: IommuRig) -> None:
    with pytest.raises(IommuFault):
        rig.device.pread(1, 0x1234)

    assert rig.faults() == [(iommu.FAULT_R_DOMAIN, 0x101, FIRST, 0x1234)]


def test_event_buffer_that_is_too_small_gets_nothing(attached: IommuRig) -> None:
    with pytest.raises(IommuFault):
        attached.device.pread(1, IOVA)
    machine = attached.machine
    room = machine.blank(23)
    machine.give(iommu.EVENTS, room)
    machine.kick(iommu.EVENTS)

    ((_, used),) = machine.queues[iommu.EVENTS].collect()
    assert (used, machine.text(room, 23)) == (0, b"\xcc" * 23)


# --- pages that are converted -------------------------------------------------------------------


def test_shared_page_that_was_unshared_under_its_mapping_is_out_of_reach(
    attached: IommuRig,
) -> None:
    from tests.support.conversion import unshare

    assert attached.map(IOVA, SHARED) == S_OK
    assert attached.converter.convert(unshare(SHARED, 1)) == 0

    with pytest.raises(IommuFault):
        attached.device.pread(1, IOVA)
    assert attached.unmap(IOVA) == S_OK
    assert attached.state(SHARED) is PageState.PRIVATE


def test_map_of_a_page_that_is_being_converted_is_refused(attached: IommuRig) -> None:
    attached.memory.begin_conversion(pages(PRIVATE, 1), PageState.SHARED)

    assert attached.map(IOVA, PRIVATE) == S_DEVERR

    attached.memory.abandon_conversion()
    assert attached.map(IOVA, PRIVATE) == S_OK
