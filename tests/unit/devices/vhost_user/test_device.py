"""A disk that a back end serves, from the guest's side and from the back end's."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.back_end import FEATURES, BackEndDouble, disk_config
from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.unit.devices.vhost_user.rig import USER, Rig, Successors, requests
from vmm.core.errors import PyvmmError
from vmm.core.ranges import Range
from vmm.core.saved import NotSaved
from vmm.devices.vhost_user import channel, messages
from vmm.devices.vhost_user.block import VhostUserBlock
from vmm.devices.vhost_user.channel import BackEndError
from vmm.devices.vhost_user.device import VERSION_1, user_address
from vmm.devices.vhost_user.messages import Region
from vmm.devices.virtio.block import F_FLUSH, F_MQ, F_RO, S_IOERR
from vmm.devices.virtio.queue import QueueError

ACCESS_PLATFORM = 1 << 33
STATE = struct.Struct("=II").pack


@pytest.fixture
def back_end() -> Iterator[BackEndDouble]:
    double = BackEndDouble(FEATURES | F_FLUSH | F_RO | 1 << 11)
    yield double
    double.end()


@pytest.fixture
def later() -> Iterator[BackEndDouble]:
    double = BackEndDouble(FEATURES | F_FLUSH | F_RO)
    yield double
    double.end()


@pytest.fixture
def rig(back_end: BackEndDouble, later: BackEndDouble) -> Iterator[Rig]:
    made = Rig(VhostUserBlock("blk0", "/the/socket", Successors(back_end, later)))
    yield made
    made.close()


def request(rig: Rig) -> tuple[int, Piece]:
    """A read of a sector, offered; its head and its status byte."""
    header, data, status = (
        rig.machine.place(bytes(16)),
        rig.machine.blank(512),
        rig.machine.blank(1),
    )
    return rig.machine.give(0, header, data, status), status


def take(rig: Rig, *heads: int) -> None:
    """What a back end does with requests: return them."""
    queue, memory = rig.machine.queues[0], rig.machine.memory
    index = queue.used_index()
    for head in heads:
        memory.poke(struct.pack("<II", head, 1), queue.used + 4 + 8 * (index % queue.size))
        index += 1
    memory.poke(struct.pack("<H", index), queue.used + 2)


def restarted(rig: Rig) -> None:
    """Restart, and wait for the thread that greets the next back end."""
    rig.device.restart()
    for thread in threading.enumerate():
        if thread.name == "vhost-user restart":
            thread.join(10)
    rig.machine.settle()


# --- what the guest gets to see ---


def test_guest_is_offered_what_both_sides_can(rig: Rig) -> None:
    rig.machine.driver.enable()
    offered = rig.machine.driver.offered_features()

    assert offered & (F_FLUSH | F_RO) == F_FLUSH | F_RO
    assert not offered & (1 << 11 | F_MQ | messages.F_PROTOCOL_FEATURES)


def test_guest_is_offered_no_features_of_rings_that_the_back_end_lacks() -> None:
    double = BackEndDouble(VERSION_1 | messages.F_PROTOCOL_FEATURES)
    rig = Rig(VhostUserBlock("blk0", "/the/socket", double.connect))
    rig.machine.driver.enable()

    assert rig.machine.driver.offered_features() == VERSION_1 | ACCESS_PLATFORM
    rig.close()
    double.end()


def test_config_is_the_back_ends_with_as_many_queues_as_the_guest_has() -> None:
    config = bytearray(disk_config())
    struct.pack_into("<H", config, 34, 7)
    double = BackEndDouble(FEATURES | F_MQ, bytes(config))
    device = VhostUserBlock("blk0", "/the/socket", double.connect, 2)

    struct.pack_into("<H", config, 34, 2)
    assert device.config() == bytes(config)
    assert len(device.queue_sizes) == 2
    assert device.features & F_MQ
    device.close()
    double.end()


@pytest.mark.parametrize("answer", [b"", bytes(12), STATE(0, 59) + bytes(64), STATE(4, 60)])
def test_a_config_that_was_not_asked_for_is_refused(answer: bytes) -> None:
    double = BackEndDouble()
    header = struct.pack("=III", messages.GET_CONFIG, 5, len(answer))
    double.answers[messages.GET_CONFIG] = lambda _: header + answer

    with pytest.raises(BackEndError, match="GET_CONFIG"):
        VhostUserBlock("blk0", "/the/socket", double.connect)
    double.end()


def test_a_config_of_another_place_is_refused() -> None:
    double = BackEndDouble()
    body = struct.pack("=III", 4, 60, 0) + bytes(60)
    header = struct.pack("=III", messages.GET_CONFIG, 5, len(body))
    double.answers[messages.GET_CONFIG] = lambda _: header + body

    with pytest.raises(BackEndError, match="not what was asked for"):
        VhostUserBlock("blk0", "/the/socket", double.connect)
    double.end()


def test_more_queues_than_the_back_end_has_are_refused(back_end: BackEndDouble) -> None:
    with pytest.raises(BackEndError, match="serves 4 queues, queues=5 are wanted"):
        VhostUserBlock("blk0", "/the/socket", back_end.connect, 5)


# --- memory and rings go to the back end ---


def test_back_end_has_nothing_before_the_driver_is_up(rig: Rig, back_end: BackEndDouble) -> None:
    back_end.wait_for(messages.GET_CONFIG)

    assert "SET_MEM_TABLE" not in requests(back_end)
    assert rig.device.as_dict()["memory_bytes"] == 0
    assert rig.device.as_dict()["since_s"] is None


def test_driver_up_hands_memory_and_rings_over(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()

    back_end.wait_for(messages.SET_VRING_ENABLE)
    queue = rig.machine.queues[0]
    (features,) = struct.unpack("=Q", back_end.payloads(messages.SET_FEATURES)[0])
    assert not features & ACCESS_PLATFORM
    assert features & (VERSION_1 | messages.F_PROTOCOL_FEATURES | F_FLUSH) == (
        VERSION_1 | messages.F_PROTOCOL_FEATURES | F_FLUSH
    )
    table = struct.pack("=IIQQQQ", 1, 0, 0, rig.machine.memory.size, USER, 0)
    assert back_end.payloads(messages.SET_MEM_TABLE) == [table]
    assert back_end.payloads(messages.SET_VRING_NUM) == [STATE(0, 16)]
    assert back_end.payloads(messages.SET_VRING_BASE) == [STATE(0, 0)]
    desc, used, avail = USER + queue.desc, USER + queue.used, USER + queue.avail
    assert back_end.payloads(messages.SET_VRING_ADDR) == [
        struct.pack("=IIQQQQ", 0, 0, desc, used, avail, 0)
    ]
    assert back_end.payloads(messages.SET_VRING_ENABLE) == [STATE(0, 1)]
    same = {
        messages.SET_MEM_TABLE: rig.machine.memory._fd,
        messages.SET_VRING_KICK: rig.kicks[0],
        messages.SET_VRING_CALL: rig.calls[0],
    }
    for number, ours in same.items():
        (theirs,) = back_end.fds[number]
        assert os.path.sameopenfile(theirs, ours)
    assert rig.connected == "+"


def test_report_says_what_was_given_and_that_states_are_not_enforced(rig: Rig) -> None:
    rig.machine.up()

    said = rig.device.as_dict()
    assert said["memory_bytes"] == rig.machine.memory.size
    assert said["regions"] == [[0, rig.machine.memory.size]]
    assert said["since_s"] >= 0
    assert said["page_states"].startswith("not enforced")
    assert (said["connected"], said["lost"], said["restarts"]) == (True, 0, 0)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_rings_in_private_pages_are_refused_and_nothing_is_handed_over(
    rig: Rig, back_end: BackEndDouble, part: str
) -> None:
    driver, memory = rig.machine.driver, rig.machine.memory
    places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000}
    memory.private.append(Range(places[part], 0x1000))
    driver.enable()
    driver.negotiate(driver.offered_features())
    driver.set_queue(0, places["desc"], places["avail"], places["used"], 16)

    driver.start()

    assert driver.status & NEEDS_RESET
    assert rig.device.statistics.refused == 1
    assert "SET_MEM_TABLE" not in requests(back_end)
    assert rig.connected == ""


def test_rings_outside_of_memory_are_refused(rig: Rig, back_end: BackEndDouble) -> None:
    driver, size = rig.machine.driver, rig.machine.memory.size
    driver.enable()
    driver.negotiate(driver.offered_features())
    driver.set_queue(0, size - 0x80, 0x2000, 0x3000, 16)

    driver.start()

    assert driver.status & NEEDS_RESET
    assert "SET_MEM_TABLE" not in requests(back_end)


def test_user_address_is_of_the_region_that_holds_the_ring() -> None:
    regions = [Region(0, 0x1000, USER, 0), Region(0x3000, 0x1000, USER + 0x3000, 0x3000)]

    assert user_address(regions, 0x3010) == USER + 0x3010
    with pytest.raises(QueueError, match="no memory that a back end may map"):
        user_address(regions, 0x1000)


# --- while it runs ---


def test_a_call_interrupts_the_guest(rig: Rig) -> None:
    rig.machine.up()
    os.eventfd_write(rig.calls[0], 1)

    rig.machine.settle()

    assert rig.machine.driver.isr() == 1


def test_a_notify_is_not_looked_at_while_a_back_end_is_there(rig: Rig) -> None:
    rig.machine.up()
    rig.kick()

    rig.machine.settle()

    assert os.eventfd_read(rig.kicks[0]) == 1


def test_reset_takes_the_rings_back(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    os.eventfd_write(rig.calls[0], 1)

    rig.machine.driver.status = 0

    assert requests(back_end)[-2:] == ["SET_VRING_ENABLE", "GET_VRING_BASE"]
    assert back_end.payloads(messages.SET_VRING_ENABLE)[-1] == STATE(0, 0)
    assert rig.connected == "+-"
    rig.machine.settle()
    assert rig.machine.driver.isr() == 0


def test_a_second_driver_has_its_rings_handed_over_anew(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    rig.machine.up()

    back_end.wait_for(messages.SET_VRING_ENABLE, 3)
    assert len(back_end.payloads(messages.SET_MEM_TABLE)) == 2
    assert rig.connected == "+-+"


# --- a back end that is gone, or isn't what it should be ---


def test_what_a_back_end_leaves_is_answered_with_errors(
    rig: Rig, back_end: BackEndDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    rig.machine.up()
    first, _ = request(rig)
    second, status = request(rig)
    take(rig, first)
    rig.machine.queues[0].collect()

    back_end.end()
    rig.machine.settle()

    assert rig.machine.queues[0].collect() == [(second, 1)]
    assert rig.machine.text(status, 1) == bytes([S_IOERR])
    assert rig.machine.driver.isr() == 1
    assert rig.device.statistics.errors == 1
    assert rig.connected == "+-"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "blk0 has lost its back end at /the/socket" in said[0]
    assert "pyvmm ctl PATH device restart blk0" in said[0]


def test_what_comes_after_is_answered_with_errors(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    back_end.end()
    rig.machine.settle()
    head, status = request(rig)

    rig.kick()
    rig.machine.settle()

    assert rig.machine.queues[0].collect() == [(head, 1)]
    assert rig.machine.text(status, 1) == bytes([S_IOERR])


def test_status_is_the_last_byte_of_a_piece_that_has_the_data_too(
    rig: Rig, back_end: BackEndDouble
) -> None:
    rig.machine.up()
    both = rig.machine.blank(513)
    rig.machine.give(0, rig.machine.place(bytes(16)), both)

    back_end.end()
    rig.machine.settle()

    assert rig.machine.text(both, 513) == b"\xcc" * 512 + bytes([S_IOERR])


def test_unasked_words_end_the_connection(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    back_end.socket.send(b"hello")

    rig.machine.settle()

    assert rig.device.as_dict()["lost"] == 1
    assert not rig.device.as_dict()["connected"]


def test_a_flood_of_words_is_heard_once(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    back_end.socket.send(bytes(1 << 16))

    rig.machine.settle()

    assert rig.device.as_dict()["lost"] == 1


def test_a_back_end_that_goes_before_the_driver_comes_leaves_a_disk_that_fails(
    rig: Rig, back_end: BackEndDouble
) -> None:
    back_end.end()
    rig.machine.up()
    head, _ = request(rig)

    rig.kick()
    rig.machine.settle()

    assert not rig.machine.driver.status & NEEDS_RESET
    assert rig.machine.queues[0].collect() == [(head, 1)]


def test_silence_at_a_reset_costs_the_back_end_its_place(
    rig: Rig, back_end: BackEndDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel.Channel.begin, "__defaults__", (0.05,))
    back_end.answers[messages.GET_VRING_BASE] = lambda _: None
    rig.machine.up()

    rig.machine.driver.status = 0

    assert rig.machine.driver.status == 0
    assert rig.device.as_dict()["lost"] == 1


def test_indexes_that_cannot_be_need_a_reset(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    queue = rig.machine.queues[0]
    rig.machine.memory.poke(struct.pack("<H", 1000), queue.used + 2)
    back_end.end()

    rig.machine.settle()

    assert rig.machine.driver.status & NEEDS_RESET
    assert rig.device.statistics.errors == 1


def test_rings_that_do_not_say_what_is_left_need_a_reset(
    rig: Rig, back_end: BackEndDouble, capfd: pytest.CaptureFixture[str]
) -> None:
    rig.machine.up()
    heads = [request(rig)[0] for _ in range(3)]
    take(rig, heads[2], heads[2])  # twice
    back_end.end()

    rig.machine.settle()

    assert rig.machine.driver.status & NEEDS_RESET
    assert "serves no request until its driver resets it" in capfd.readouterr().err


def test_rings_that_became_private_need_a_reset(rig: Rig, back_end: BackEndDouble) -> None:
    rig.machine.up()
    rig.machine.memory.private.append(Range(0, 0x10000))
    back_end.end()

    rig.machine.settle()

    assert rig.machine.driver.status & NEEDS_RESET
    assert rig.device.statistics.refused == 1


# --- another back end ---


def test_a_restart_goes_on_where_the_guest_is(
    rig: Rig, back_end: BackEndDouble, later: BackEndDouble
) -> None:
    rig.machine.up()
    take(rig, request(rig)[0])
    request(rig)
    back_end.end()
    rig.machine.settle()

    restarted(rig)

    later.wait_for(messages.SET_VRING_ENABLE)
    assert later.payloads(messages.SET_VRING_BASE) == [STATE(0, 2)]
    assert rig.device.as_dict() == {
        **rig.device.as_dict(), "connected": True, "lost": 1, "restarts": 1,
    }  # fmt: skip
    os.eventfd_write(rig.calls[0], 1)
    rig.machine.driver.isr()
    rig.machine.settle()
    assert rig.machine.driver.isr() == 1


def test_a_restart_answers_what_was_left_before(
    rig: Rig, back_end: BackEndDouble, later: BackEndDouble
) -> None:
    """A driver that came when there was no back end, and has not notified yet."""
    back_end.end()
    rig.machine.up()
    head, status = request(rig)

    restarted(rig)

    assert rig.machine.queues[0].collect() == [(head, 1)]
    assert rig.machine.text(status, 1) == bytes([S_IOERR])
    assert later.wait_for(messages.SET_VRING_BASE) == [STATE(0, 1)]


def test_a_restart_without_a_driver_waits_for_it(
    rig: Rig, back_end: BackEndDouble, later: BackEndDouble
) -> None:
    back_end.end()
    rig.machine.settle()
    restarted(rig)

    rig.machine.up()

    later.wait_for(messages.SET_VRING_ENABLE)
    assert rig.device.as_dict()["restarts"] == 1


def test_a_restart_is_refused_while_a_back_end_is_there(rig: Rig) -> None:
    with pytest.raises(PyvmmError, match="its back end at /the/socket is connected"):
        rig.device.restart()


@pytest.mark.parametrize(
    ("successor", "words"),
    [
        ((FEATURES | F_FLUSH | F_RO, disk_config(5)), "5 sectors, the guest knows"),
        ((FEATURES | F_FLUSH, disk_config()), "lacks the features 0x20, which the guest"),
        (None, "Connection refused"),
    ],
)
def test_a_restart_by_who_is_not_the_same_leaves_all_as_it_is(
    back_end: BackEndDouble,
    successor: tuple[int, bytes] | None,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    doubles = [] if successor is None else [BackEndDouble(*successor)]
    rig = Rig(VhostUserBlock("blk0", "/the/socket", Successors(back_end, *doubles)))
    rig.machine.up()
    back_end.end()
    rig.machine.settle()
    capfd.readouterr()

    restarted(rig)

    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert not rig.device.as_dict()["connected"]
    head, _ = request(rig)
    rig.kick()
    rig.machine.settle()
    assert rig.machine.queues[0].collect()[-1] == (head, 1)
    rig.close()
    for double in doubles:
        double.end()


def test_device_that_another_program_serves_is_not_saved(rig: Rig) -> None:
    with pytest.raises(NotSaved, match="blk0 is served by another program"):
        rig.device.state()
