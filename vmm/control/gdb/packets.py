"""The remote serial protocol's frames: `$data#checksum`, acknowledgements, the interrupt byte.

Whoever sends them is not trusted: what is kept of an unfinished packet is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

LONGEST = 0x4000
"""Bytes of a packet's data at most, as it is sent (PacketSize)."""

INTERRUPT = b"\x03"
_ESCAPE, _ESCAPED_BY = 0x7D, 0x20
_HEX = b"0123456789abcdefABCDEF"


class TooLong(Exception):
    """A packet that is longer than LONGEST: what sends it doesn't keep to what it was told."""


class Packet:
    """One frame: its data as sent (binary data still escaped), and whether its checksum fits."""

    __slots__ = ("data", "intact")

    def __init__(self, data: bytes, intact: bool) -> None:
        self.data = data
        self.intact = intact


class Parser:
    """Takes bytes as they come; gives packets, and acknowledgements and interrupts as bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> None:
        self._rest += data

    @property
    def waiting(self) -> int:
        """Bytes that are kept."""
        return len(self._rest)

    def take(self) -> Iterator[Packet | bytes]:
        """What is there whole, in order; what isn't stays. Raises TooLong.

        Between packets everything but "+", "-" and the interrupt is noise and left out.
        """
        while self._rest:
            first = self._rest[:1]
            if first != b"$":
                self._rest = self._rest[1:] if first in (b"+", b"-", INTERRUPT) else self._noise()
                if first in (b"+", b"-", INTERRUPT):
                    yield first
                continue
            end = self._rest.find(b"#", 1, LONGEST + 2)
            if end < 0:
                if len(self._rest) > LONGEST + 1:
                    raise TooLong(f"a packet is at most {LONGEST} bytes long")
                return
            if len(self._rest) < end + 3:
                return
            body, digits = self._rest[1:end], self._rest[end + 1 : end + 3]
            self._rest = self._rest[end + 3 :]
            is_number = all(digit in _HEX for digit in digits)
            yield Packet(body, is_number and int(digits, 16) == checksum(body))

    def _noise(self) -> bytes:
        """What follows the bytes that begin nothing."""
        starts = [at for mark in b"$+-\x03" if (at := self._rest.find(bytes([mark]))) >= 0]
        return self._rest[min(starts) :] if starts else b""


def checksum(data: bytes) -> int:
    return sum(data) & 0xFF


def framed(data: bytes) -> bytes:
    """A packet with `data` in it, which must be escaped already."""
    return b"$" + data + b"#%02x" % checksum(data)


def escaped(data: bytes) -> bytes:
    """Binary data as it may stand in a packet."""
    out = bytearray()
    for byte in data:
        if byte in b"#$}*":
            out += bytes([_ESCAPE, byte ^ _ESCAPED_BY])
        else:
            out.append(byte)
    return bytes(out)


def unescaped(data: bytes) -> bytes:
    """The other way round; an escape with nothing after it is left out."""
    out = bytearray()
    at = 0
    while at < len(data):
        byte = data[at]
        if byte == _ESCAPE:
            at += 1
            if at == len(data):
                break
            byte = data[at] ^ _ESCAPED_BY
        out.append(byte)
        at += 1
    return bytes(out)
