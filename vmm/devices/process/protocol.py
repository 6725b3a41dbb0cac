"""What pyvmm and a device's process say to each other, in packets of a SOCK_SEQPACKET pair.

Every packet begins with HEAD: u8 what, u8 flags, u16 queue (or file), u32 generation. Numbers have
this machine's byte order: both sides run on it. A generation is what lies between two resets of
the device; what belongs to an earlier one is stale, and carried out no more.

pyvmm to the process:
    ACTIVATE   u64 features, and what KEEP said last; then for each queue a QUEUE; flags: memory
               takes BATCHES, is QUIET about what it refuses; RESUMED
    RESET      nothing
    KICK       for a queue: nothing, or what is in its rings (see `ring_pieces`); flags: or what is
               where the RETURN with this number had it read afterwards
    ANSWER     flags: a STATUS. The bytes read, or u64 bytes moved; else a sentence or u32 errno
The process to pyvmm, which answers the first five, one at a time:
    READ       pieces: u64 gpa, size...
    WRITE      u32 counts: of moves (of a file, flags: OUT), of pieces, of those read afterwards;
               all of these; the data, which is written when all has been moved: SHORT otherwise,
               and u64 bytes moved
    RETURN     as WRITE, for what tells the driver of chains; a RETURNED before it. Once that is
               written its counts hold, and pyvmm sees to the interrupt. It looks at the available
               ring until there is something new, or else asks for a notify. The answer's body is
               what was read afterwards, if there is something; else the ring's flags and index,
               and then the index that a notify was asked for; or nothing, where the process has to
               see to all of this. Flags: as WRITE; and RESTED, which counts if a notify was asked
               for
    MOVE_IN    file: moves: u64 file offset, gpa, size...
    MOVE_OUT   file: moves: u64 gpa, file offset, size...
               flags of both: WHOLE: one move, which ends short at the file's end alone, and not
               where the host is slow
    TURN       for a queue; flags: INTERRUPT, RESTED (the last KICK is done with); COUNTS
    STOPPED    flags: REFUSED; a sentence: the device needs a reset
    KEEP       u64: what another process is to be told that takes this one's place
    NOTE       a sentence for the user
    CONFIG     the device configuration structure has become this
    DONE       an ACTIVATE or RESET was carried out

The process is not believed. What doesn't keep to this, or to the limits here, ends it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import add
from struct import Struct

from vmm.core.lean_typing import NamedTuple

HEAD = Struct("=BBHI")
QUEUE = Struct("=HHIQQQ")
"""Index, the available index to go on from, size, then the three addresses."""
COUNTS = Struct("=QQQQQ")
"""Requests, flushes and errors of the device since its process began, bytes read and written: of a
device without files, as what is moved from and to those is counted where it is done."""
WRITE_HEAD = Struct("=IIIxxxx")
RETURNED = Struct("=HHHHBB6x40s")
"""Queue, what its used index becomes, how many chains that are, the available index that isn't new,
how often it is looked at in vain before a notify is asked for (0: none is), a number for what is
read afterwards (0: it has none), and COUNTS."""
FEATURES = Struct("=QQ")
KEPT = Struct("=Q")
MOVED = Struct("=Q")
ERRNO = Struct("=I")

ACTIVATE, RESET, KICK, ANSWER = 1, 2, 3, 4
READ, WRITE, MOVE_IN, MOVE_OUT, TURN, STOPPED, CONFIG, DONE = 16, 17, 18, 19, 20, 21, 22, 23
KEEP, NOTE, RETURN = 24, 25, 26

BATCHES, RESUMED, QUIET = 1, 2, 4  # flags of ACTIVATE
INTERRUPT, RESTED = 1, 2  # flags of TURN, and the second of RETURN
REFUSED = 1  # flag of STOPPED
WHOLE = 1  # flag of MOVE_IN and MOVE_OUT
OUT = 1  # flag of WRITE and RETURN

OK, PRIVATE, UNMAPPED, DENIED, FAILED, STALE, SHORT = 0, 1, 2, 3, 4, 5, 6
"""How an access ended."""

MOST_DATA = 68 << 10
"""Bytes that one message reads or writes: a network's largest frame, and what a ring has of it."""
MOST_PIECES = 3072
"""Pieces of one message: as many as a turn has descriptors, and some more."""
MOST_AFTER = 128
"""Pieces that are read after a write."""
MOST_LOOKS = 16
"""At an available ring after a write: some tens of microseconds."""
MOST_WITH_KICK = 16 << 10
"""Bytes that come with a KICK: rings, and what else is read afterwards."""
MOST_MOVED = 8 << 20
"""Bytes that one message moves: twice what a disk asks for at once where it is quick."""
MOST_WHOLE = 1 << 20
LONGEST = 192 << 10
"""Of any packet."""
MOST_TEXT = 300
MOST_COUNT = 1 << 62
MOST_NOTES = 4
"""Sentences of a device that the user is shown."""

_HEADS = HEAD.size + RETURNED.size + WRITE_HEAD.size
assert _HEADS + 40 * MOST_PIECES + 16 * MOST_AFTER + MOST_DATA <= LONGEST


class ProtocolError(Exception):
    """The other side has broken the protocol; the text says how."""


class Asked(NamedTuple):
    """A WRITE, taken apart."""

    moves: memoryview
    pieces: list[int]
    then: list[int]
    data: memoryview


class Returned(NamedTuple):
    """What a RETURN says besides its write: see RETURNED."""

    queue: int
    used: int
    chains: int
    known: int
    looks: int
    number: int
    counts: bytes


def words(numbers: Sequence[int]) -> bytes:
    """u64, u64..."""
    return array("Q", numbers).tobytes()


def numbers_in(body: memoryview, each: int) -> list[int]:
    """The u64s of a message that come in groups of `each`, at least one. Raises ProtocolError."""
    size = len(body)
    if not size or size % (8 * each) or size > 8 * each * MOST_PIECES:
        raise ProtocolError(f"a list of {size} bytes")
    return body.cast("Q").tolist()


def pieces_in(body: memoryview) -> list[int]:
    """What a READ asks for. Raises ProtocolError."""
    pieces = numbers_in(body, 2)
    if not 0 < sum(pieces[1::2]) <= MOST_DATA:
        raise ProtocolError(f"{sum(pieces[1::2])} bytes to read")
    return pieces


def write_in(body: memoryview) -> Asked:
    """What a WRITE asks for; its moves are for `moves_in`. Raises ProtocolError."""
    if len(body) < WRITE_HEAD.size:
        raise ProtocolError("a write without its head")
    moves, count, after = WRITE_HEAD.unpack_from(body)
    if moves > MOST_PIECES or not 0 < count <= MOST_PIECES or after > MOST_AFTER:
        raise ProtocolError(f"a write of {count} pieces after {moves} moves, and {after} to read")
    start = WRITE_HEAD.size + 24 * moves
    end = start + 16 * (count + after)
    if len(body) < end:
        raise ProtocolError(f"a write of {count} pieces in {len(body)} bytes")
    numbers = body[start:end].cast("Q").tolist()
    pieces, then = numbers[: 2 * count], numbers[2 * count :]
    if then and not 0 < sum(then[1::2]) <= MOST_DATA:
        raise ProtocolError(f"{sum(then[1::2])} bytes to read after a write")
    data = body[end:]
    size = sum(pieces[1::2])
    if size != len(data) or not 0 < size <= MOST_DATA:
        raise ProtocolError(f"a write of {size} bytes with {len(data)}")
    return Asked(body[WRITE_HEAD.size : start], pieces, then, data)


def returned_in(body: memoryview) -> Returned:
    """What a RETURN begins with. Raises ProtocolError."""
    if len(body) < RETURNED.size:
        raise ProtocolError("chains returned without saying which")
    found = Returned._make(RETURNED.unpack_from(body))
    if found.looks > MOST_LOOKS:
        raise ProtocolError(f"{found.looks} looks at a ring")
    return found


def moves_in(body: memoryview, at: int, end: int, whole: bool) -> list[int]:
    """What a MOVE_IN or MOVE_OUT asks for; `at`: where in each triple the file's offset is, and
    `end`: how many bytes of the file there are for it. Raises ProtocolError."""
    moves = numbers_in(body, 3)
    offsets, sizes = moves[at::3], moves[2::3]
    size = sum(sizes)
    if not 0 < size <= (MOST_WHOLE if whole else MOST_MOVED) or (whole and len(moves) > 3):
        raise ProtocolError(f"{size} bytes to move")
    is_near_end = max(offsets) + max(sizes) > end  # or each is looked at in vain
    if not min(sizes) or (is_near_end and max(map(add, offsets, sizes)) > end):
        raise ProtocolError(f"up to {max(sizes)} bytes at {offsets} of a file of {end}"[:MOST_TEXT])
    return moves


def ring_pieces(size: int, desc: int, avail: int) -> list[int]:
    """What a look at a queue reads, as SplitQueue does: index, entries, descriptors."""
    return [avail, 4, avail + 4, 2 * size, desc, 16 * size]
