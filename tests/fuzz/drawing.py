"""A fuzz input as a source of choices, and as changes to something that is whole.

A target whose programs are random (a hostile driver, a storm of register accesses) takes its
choices from the input instead of from chance: then what libFuzzer does to the bytes, it does to
the program. `recorded` is the other way round: the bytes of a program that chance has made.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_PATTERN = 16  # bytes that are drawn for data of any length: what is in it hardly matters


class Choices(random.Random):
    """random.Random whose numbers are the input's bytes, and zeros after its end.

    The methods that the programs use take as few bytes as they can.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    @property
    def spent(self) -> bool:
        """Whether the input has come to its end: nothing that follows says anything new."""
        return self._at >= len(self._data)

    def draw(self, size: int) -> bytes:
        """The next bytes."""
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece.ljust(size, b"\0")

    def random(self) -> float:
        return self.draw(1)[0] / 256

    def getrandbits(self, bits: int, /) -> int:
        return int.from_bytes(self.draw((bits + 7) // 8), "little") & ((1 << bits) - 1)

    def randbytes(self, size: int) -> bytes:
        piece = self.draw(min(size, _PATTERN))
        return (piece * (size // _PATTERN + 1))[:size]

    def _below(self, most: int) -> int:
        """A number from 0 to most - 1; none is drawn where there is but one."""
        if most <= 1:
            return 0
        size = ((most - 1).bit_length() + 7) // 8
        return int.from_bytes(self.draw(size), "little") % most

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        first, end = (0, start) if stop is None else (start, stop)
        count = len(range(first, end, step))
        if not count:
            raise ValueError(f"an empty range: {start}, {stop}, {step}")
        return first + step * self._below(count)

    def randint(self, a: int, b: int) -> int:
        return self.randrange(a, b + 1)

    def choice(self, seq: Any) -> Any:
        return seq[self._below(len(seq))]

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self.random()

    def shuffle(self, x: MutableSequence[Any]) -> None:
        for last in reversed(range(1, len(x))):
            other = self._below(last + 1)
            x[last], x[other] = x[other], x[last]

    def sample(self, population: Sequence[T], k: int, *, counts: Any = None) -> list[T]:
        left = list(population)
        return [left.pop(self._below(len(left))) for _ in range(k)]


class _Recorder(Choices):
    """Chance that writes down what it gives."""

    def __init__(self, chance: random.Random, first: bytes, most: int) -> None:
        super().__init__(b"")
        self.given = bytearray()
        self._chance, self._first, self._most = chance, first, most

    @property
    def spent(self) -> bool:
        return len(self.given) >= self._most

    def draw(self, size: int) -> bytes:
        piece = self._first[:size]
        self._first = self._first[size:]
        if not self.spent:
            piece += self._chance.randbytes(size - len(piece))
        self.given += piece.ljust(size, b"\0")
        return piece.ljust(size, b"\0")


def recorded(
    run: Callable[[Choices], None], seed: int, *, first: bytes = b"", most: int = 400
) -> bytes:
    """The input with which `run` does what it does with chance's numbers of this `seed`, until
    about `most` bytes are drawn; `first` are those that it begins with."""
    choices = _Recorder(random.Random(seed), first, most)
    run(choices)
    return bytes(choices.given[:most])


# --- changes to something whole ---

_PATCH = struct.Struct("<HBB")
_UNIT = 1 << 16
LONGEST_PATCH = 255


def patched(base: bytes, data: bytes, size: int | None = None) -> bytes:
    """`base` (filled up or cut to `size`) with patches: offset (u24), length (u8), bytes."""
    changed = bytearray(base if size is None else base[:size].ljust(size, b"\0"))
    at = 0
    while at + _PATCH.size <= len(data):
        low, high, length = _PATCH.unpack_from(data, at)
        piece = data[at + _PATCH.size : at + _PATCH.size + length]
        at += _PATCH.size + length
        start = (low | high * _UNIT) % max(len(changed), 1)
        piece = piece[: len(changed) - start]
        changed[start : start + len(piece)] = piece
    return bytes(changed)


def patches(base: bytes, wanted: bytes) -> bytes:
    """The patches that make `wanted` of `base`, both of one size, below 16 MiB."""
    out = b""
    at = 0
    while at < len(wanted):
        if base[at : at + LONGEST_PATCH] == wanted[at : at + LONGEST_PATCH]:
            at += LONGEST_PATCH
            continue
        if base[at] == wanted[at]:
            at += 1
            continue
        end = at + 1
        # A few bytes that are the same cost less than another patch.
        while (
            end < len(wanted)
            and end - at < LONGEST_PATCH
            and (base[end : end + _PATCH.size] != wanted[end : end + _PATCH.size])
        ):
            end += 1
        out += _PATCH.pack(at % _UNIT, at // _UNIT, end - at) + wanted[at:end]
        at = end
    return out
