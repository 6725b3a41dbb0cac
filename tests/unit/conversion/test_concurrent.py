"""Overlapping conversions from four vCPUs while devices do I/O: the books still balance.

The private side starts full and is never refilled, the shared side is only filled through
GuestMemory: any page found on the wrong side was written by an access that came too late.
"""

from __future__ import annotations

import os
import random
import threading
from functools import partial

import pytest

from tests.support.conversion import RecordingScheme, share, unshare
from tests.support.memory import Background, data_pages, guest_memory, page, pages, pattern
from vmm.conversion.transaction import Converter
from vmm.core.errors import PrivateAccess
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Event, Policy, View

TOTAL = 96
VCPUS, ROUNDS = 4, 300


def page_numbers(view: View | GuestMemory, state: PageState) -> set[int]:
    areas = [area for area, held in view.states() if held is state]
    return {number for area in areas for number in range(area.start >> 12, area.end >> 12)}


class Inspector(Policy):
    """Looks for pages on the wrong side before each conversion, when no other is under way."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.strays: list[str] = []

    def on_share(self, event: Event, view: View) -> Allow:
        assert self._memory.private is not None
        private = page_numbers(view, PageState.PRIVATE)
        shared = page_numbers(view, PageState.SHARED)
        for side, wrong in ((self._memory.shared, private), (self._memory.private, shared)):
            if found := data_pages(side.fd) & wrong:
                self.strays.append(f"{side.name} of the wrong side holds pages {sorted(found)}")
        return Allow()

    on_unshare = on_share


def convert_at_random(converter: Converter, start: threading.Barrier, seed: int) -> list[int]:
    chance = random.Random(seed)
    answers = []
    start.wait(30)
    for _ in range(ROUNDS):
        first = chance.randrange(TOTAL)
        count = chance.randint(1, min(16, TOTAL - first))
        request = chance.choice((share, unshare))(first, count)
        answers.append(converter.convert(request))
    return answers


def do_io(memory: GuestMemory, start: threading.Barrier, over: threading.Event, seed: int) -> int:
    """Every host verb at random places until `over`; how many accesses were let through."""
    chance = random.Random(seed)
    file = os.memfd_create("disk")
    os.pwrite(file, pattern(page(TOTAL)), 0)
    done = 0
    start.wait(30)
    while not over.is_set():
        first = chance.randrange(TOTAL)
        gpa, size = page(first), page(chance.randint(1, min(20, TOTAL - first)))
        try:
            match chance.randrange(4):
                case 0:
                    # More pieces than one system call takes: an access of many small steps.
                    memory.pwritev([b"device" + bytes(26)] * (size // 32), gpa)
                case 1:
                    memory.pread(size, gpa)
                case 2:
                    memory.transfer_in(file, gpa, gpa, size)
                case 3:
                    memory.transfer_out(gpa, size, file, gpa)
        except PrivateAccess:
            continue
        done += 1
    os.close(file)
    return done


@pytest.mark.usefixtures("restless_threads")
def test_conversions_from_four_threads_with_io_beside_them_add_up() -> None:
    with guest_memory(pages(32, 64), ram=(pages(0, TOTAL),)) as memory:
        assert memory.private is not None
        memory.private.pwrite(pattern(page(64)), page(32))
        scheme = RecordingScheme(memory)
        inspector = Inspector(memory)
        converter = Converter(memory, scheme, inspector)
        start, over = threading.Barrier(VCPUS + 2), threading.Event()

        devices = [Background(partial(do_io, memory, start, over, seed)) for seed in (101, 102)]
        vcpus = [
            Background(partial(convert_at_random, converter, start, seed)) for seed in range(VCPUS)
        ]
        answers = [vcpu.result() for vcpu in vcpus]
        over.set()
        accesses = [device.result() for device in devices]

        counts = converter.accounting
        assert answers == [[0] * ROUNDS] * VCPUS
        assert all(accesses), "some I/O has to have got through for the test to mean anything"
        assert memory.bytes_in(PageState.CONVERTING) == 0
        assert (
            memory.bytes_in(PageState.SHARED)
            == page(32) + counts.share.bytes - counts.unshare.bytes
        )
        assert counts.share.calls + counts.unshare.calls == VCPUS * ROUNDS
        assert inspector.strays == []
        assert scheme.shared == [a for a, s in memory.states() if s is PageState.SHARED]
        assert data_pages(memory.shared.fd) <= page_numbers(memory, PageState.SHARED)
        assert data_pages(memory.private.fd) <= page_numbers(memory, PageState.PRIVATE)
        residency = memory.residency()
        assert residency.shared_bytes == page(len(data_pages(memory.shared.fd)))
        assert residency.private_bytes == page(len(data_pages(memory.private.fd)))
        assert memory._in_flight == {}
