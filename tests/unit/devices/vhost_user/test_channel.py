"""The connection to a back end: what it may answer, and that nobody waits for it for long."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.support.back_end import FEATURES, REPLY, BackEndDouble, reply
from vmm.devices.vhost_user import messages
from vmm.devices.vhost_user.channel import BackEndError, Channel
from vmm.devices.vhost_user.device import VERSION_1, greet
from vmm.devices.vhost_user.messages import PROTOCOL_F_CONFIG, PROTOCOL_F_MQ

NUMBER = struct.Struct("=Q").pack


@pytest.fixture
def back_end() -> Iterator[BackEndDouble]:
    double = BackEndDouble()
    yield double
    double.end()


def connected(back_end: BackEndDouble, patience: float = 10) -> Channel:
    made = Channel(back_end.connect())
    made.begin(patience)
    return made


def test_greeting_agrees_on_what_both_sides_can(back_end: BackEndDouble) -> None:
    link = connected(back_end)

    found = greet(link, PROTOCOL_F_MQ, PROTOCOL_F_CONFIG)

    back_end.wait_for(messages.GET_QUEUE_NUM)
    assert (found.features, found.queues) == (FEATURES, 4)
    assert back_end.payloads(messages.SET_PROTOCOL_FEATURES) == [
        NUMBER(PROTOCOL_F_MQ | PROTOCOL_F_CONFIG)
    ]
    assert [number for number, _ in back_end.heard][-2:] == [
        messages.SET_OWNER,
        messages.GET_QUEUE_NUM,
    ]
    link.close()


def test_greeting_asks_a_back_end_without_protocol_features_for_none(
    back_end: BackEndDouble,
) -> None:
    back_end.answers[messages.GET_FEATURES] = lambda _: reply(
        messages.GET_FEATURES, NUMBER(VERSION_1)
    )
    link = connected(back_end)

    found = greet(link, PROTOCOL_F_MQ, 0)

    back_end.wait_for(messages.SET_OWNER)
    assert found.queues == 0
    assert [number for number, _ in back_end.heard] == [messages.GET_FEATURES, messages.SET_OWNER]
    link.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(messages.SET_OWNER, NUMBER(1)), "answered GET_FEATURES with something else"),
        (reply(messages.GET_FEATURES, NUMBER(1), flags=1), "with something else"),
        (reply(messages.GET_FEATURES, NUMBER(1), flags=REPLY ^ 3), "with something else"),
        (reply(messages.GET_FEATURES, bytes(4)), "with 4 bytes, 8 bytes were due"),
        (
            struct.pack("=III", messages.GET_FEATURES, REPLY, 1 << 31),
            "with 2147483648 bytes, 8 bytes were due",
        ),
        (reply(messages.GET_FEATURES, NUMBER(0)), "those of legacy virtio"),
    ],
)
def test_greeting_refuses_a_wrong_answer(
    back_end: BackEndDouble, answer: bytes, words: str
) -> None:
    back_end.answers[messages.GET_FEATURES] = lambda _: answer
    link = connected(back_end)

    with pytest.raises(BackEndError, match=words):
        greet(link, 0, 0)
    link.close()


def test_greeting_refuses_a_back_end_without_what_is_needed(back_end: BackEndDouble) -> None:
    back_end.answers[messages.GET_PROTOCOL_FEATURES] = lambda _: reply(
        messages.GET_PROTOCOL_FEATURES, NUMBER(PROTOCOL_F_MQ)
    )
    link = connected(back_end)

    with pytest.raises(BackEndError, match="lacks the protocol features 0x200"):
        greet(link, PROTOCOL_F_MQ, PROTOCOL_F_CONFIG)
    link.close()


@pytest.mark.parametrize("start", [b"", reply(messages.GET_FEATURES, NUMBER(1))[:13]])
def test_silence_is_an_error_when_the_patience_is_over(
    back_end: BackEndDouble, start: bytes
) -> None:
    back_end.answers[messages.GET_FEATURES] = lambda _: start
    link = connected(back_end, patience=0.05)

    with pytest.raises(BackEndError, match="did not answer GET_FEATURES in time"):
        link.number(messages.GET_FEATURES)
    link.close()


def test_patience_is_for_all_questions_together(
    back_end: BackEndDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back end that answers each in the last moment is not waited for again and again."""
    link = connected(back_end, patience=10)
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    link.begin(10)
    link.number(messages.GET_FEATURES)
    now[0] += 11
    back_end.answers[messages.GET_QUEUE_NUM] = lambda _: None

    with pytest.raises(BackEndError, match="did not answer GET_QUEUE_NUM in time"):
        link.number(messages.GET_QUEUE_NUM)
    link.close()


def test_a_question_to_who_has_gone_is_an_error(back_end: BackEndDouble) -> None:
    def leave(payload: bytes) -> None:
        back_end.socket.shutdown(socket.SHUT_RDWR)

    back_end.answers[messages.GET_FEATURES] = leave
    link = connected(back_end)

    with pytest.raises(BackEndError, match="closed the connection when it was asked"):
        link.number(messages.GET_FEATURES)
    with pytest.raises(BackEndError, match="let go of the connection"):
        link.send(messages.SET_OWNER)
    link.close()


def test_who_takes_nothing_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    link = Channel(ours)
    link.begin(0.05)

    with pytest.raises(BackEndError, match="took no SET_MEM_TABLE in time"):
        for _ in range(100):
            link.send(messages.SET_MEM_TABLE, bytes(1 << 20))
    link.close()
    theirs.close()


def test_descriptors_that_come_with_an_answer_are_never_received() -> None:
    ours, theirs = socket.socketpair()
    link = Channel(ours)
    link.begin(10)
    answer = reply(messages.GET_FEATURES, NUMBER(VERSION_1))
    null = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(theirs, [answer], [null] * 100)
    before = len(os.listdir("/proc/self/fd"))

    value = link.number(messages.GET_FEATURES)

    assert value == VERSION_1
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(null)
    link.close()
    theirs.close()


def test_silent_means_neither_a_word_nor_the_end() -> None:
    ours, theirs = socket.socketpair()
    link = Channel(ours)

    assert link.is_silent()
    theirs.send(b"?")
    assert not link.is_silent()
    assert link.is_silent()
    theirs.close()
    assert not link.is_silent()
    link.close()


def test_a_close_is_heard_though_another_process_has_the_socket_open() -> None:
    ours, theirs = socket.socketpair()
    other = ours.dup()

    Channel(ours).close()

    assert theirs.recv(1) == b""
    other.close()
    theirs.close()
