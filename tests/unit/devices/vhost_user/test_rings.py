"""What a back end that is gone has left undone, as far as its rings say it."""

from __future__ import annotations

import random

import pytest

from vmm.devices.vhost_user.rings import unreturned

SIZE = 8


class Rings:
    """A driver and a device on rings of SIZE entries, whose indexes start anywhere."""

    def __init__(self, start: int = 0, size: int = SIZE) -> None:
        self.size = size
        self.available_index = self.used_index = start
        self.available = [0] * size
        self.used = [0] * size
        self.outstanding: list[int] = []

    def give(self, head: int) -> None:
        self.available[self.available_index % self.size] = head
        self.available_index = (self.available_index + 1) & 0xFFFF
        self.outstanding.append(head)

    def give_back(self, which: int = 0) -> None:
        head = self.outstanding.pop(which)
        self.used[self.used_index % self.size] = head
        self.used_index = (self.used_index + 1) & 0xFFFF

    def left(self) -> list[int] | None:
        return unreturned(
            self.size,
            self.available_index,
            tuple(self.available),
            self.used_index,
            tuple(self.used),
        )


def test_new_rings_have_nothing_outstanding() -> None:
    assert Rings().left() == []


def test_what_was_never_returned_is_outstanding_in_its_order() -> None:
    rings = Rings()
    for head in (0, 3, 1):
        rings.give(head)

    assert rings.left() == [0, 3, 1]


def test_a_full_ring_is_outstanding_whole() -> None:
    rings = Rings()
    for head in reversed(range(SIZE)):
        rings.give(head)

    assert rings.left() == list(reversed(range(SIZE)))


def test_a_head_that_came_back_and_went_out_again_is_outstanding() -> None:
    rings = Rings()
    rings.give(2)
    rings.give_back()
    rings.give(2)

    assert rings.left() == [2]


@pytest.mark.parametrize("start", [0, 0xFFF8, 0xFFFC, 0xFFF0])
@pytest.mark.parametrize("seed", range(20))
def test_a_device_that_keeps_the_order_leaves_no_doubt(start: int, seed: int) -> None:
    chance = random.Random(seed)
    rings = Rings(start)
    for _ in range(200):
        free = [head for head in range(SIZE) if head not in rings.outstanding]
        if free and chance.random() < 0.55:
            rings.give(chance.choice(free))
        elif rings.outstanding:
            rings.give_back()
        assert rings.left() == rings.outstanding


@pytest.mark.parametrize("skipped", [0.1, 0.5])
@pytest.mark.parametrize("reuse", [0, -1])
@pytest.mark.parametrize("depth", [2, 8, 16])
def test_a_device_that_returns_out_of_order_never_gets_a_wrong_answer(
    depth: int, reuse: int, skipped: float
) -> None:
    """`reuse`: which of the free heads the driver takes, the longest or the shortest unused."""
    chance = random.Random(depth)
    rings = Rings(size=64)
    free = list(range(64))
    told = 0
    for _ in range(600):
        if len(rings.outstanding) < depth and chance.random() < 0.55:
            rings.give(free.pop(reuse))
        elif rings.outstanding:
            which = 0
            while which < len(rings.outstanding) - 1 and chance.random() < skipped:
                which += 1
            free.append(rings.outstanding[which])
            rings.give_back(which)
        left = rings.left()
        if left is not None:
            told += 1
            assert left == rings.outstanding
    assert told > 300


def test_heads_that_cannot_be_are_left_out() -> None:
    rings = Rings()
    rings.give(0)
    rings.available[0] = 99

    assert rings.left() is None
