"""What a batch of a virtqueue's requests says, worked out in C: bytes in, numbers out.

Following 32 chains through a descriptor table, and planning what a disk has to move for them,
costs Python more than all system calls of these requests. Nothing here has to do with KVM or
touches guest memory: callers bring copies, which the guest can't change any more. What breaks a
rule is not told from what is just rare: None, or an early end, and the caller looks for itself.
"""

from __future__ import annotations

from typing import NamedTuple

from kvm_bindings._kvm import ffi, lib

MOST_ENTRIES = 256
"""Queues of more entries are not for this."""
_MOST_DESCRIPTORS = 2048 + 1024 + MOST_ENTRIES
_PLAN_NUMBERS = 7
_ROOM = 3 * MOST_ENTRIES + 2 * _MOST_DESCRIPTORS


class Plan(NamedTuple):
    """What a disk has to do for its first `requests` chains."""

    requests: int
    reads: list[int]
    """Disk position, gpa, size, disk position...: what is to be moved to the guest."""
    writes: list[int]
    """Gpa, disk position, size, gpa...: what is to be moved to the disk."""
    statuses: list[int]
    """Where a status byte goes for each: gpa, 1, gpa..."""
    elements: bytes
    """For the used ring, eight bytes each (2.7.8)."""
    bytes_read: int
    bytes_written: int
    cost: int
    numbers: int
    """How many of `Chains.numbers` its chains are."""


class Chains:
    """Chains that a queue has taken; the next `find` uses their room again."""

    __slots__ = ("_end", "_room", "_start", "count", "descriptors")

    def __init__(self) -> None:
        self._room = ffi.new("uint64_t[]", _ROOM)
        self._start = self._end = 0
        self.count = 0
        """How many there are, of which no plan was carried out yet."""
        self.descriptors = 0
        """How many descriptors were read for those that `find` followed."""

    def tables(
        self, ring: bytes | bytearray, size: int, first: int, count: int, most: int
    ) -> list[int] | None:
        """The indirect tables that `count` entries from number `first` on name, or as many of
        them as have `most` descriptors (`self.count`): gpa, size, gpa...; None where they are not
        the usual.

        `ring`: what is at an available ring of `size` entries (2.7.6), up to its last entry, then
        the descriptor table.
        """
        at = ffi.from_buffer(ring)
        found = ffi.new("uint32_t *")
        looked = lib.pyvmm_indirect_tables(
            at + 4, at + 4 + 2 * size, size, first, count, most, self._room, found
        )
        if looked < 0:
            return None
        self.count = looked
        pieces: list[int] = ffi.unpack(self._room, 2 * found[0])
        return pieces

    def find(
        self,
        ring: bytes | bytearray,
        size: int,
        first: int,
        count: int,
        tables: bytes | bytearray,
        most_descriptors: int,
        most_bytes: int,
    ) -> bool:
        """Follow the chains of these entries, until one of the limits is reached; False where one
        breaks a rule or is too long. `tables`: what is in the indirect ones."""
        at = ffi.from_buffer(ring)
        totals = ffi.new("uint64_t[2]")
        end = lib.pyvmm_chains(
            at + 4,
            at + 4 + 2 * size,
            size,
            first,
            count,
            ffi.from_buffer(tables),
            len(tables),
            most_descriptors,
            most_bytes,
            self._room,
            _ROOM,
            totals,
        )
        if end < 0:
            return False
        self._start, self._end = 0, end
        self.count, self.descriptors = totals[0], totals[1]
        return True

    def numbers(self) -> list[int]:
        """For each chain its head, how many pieces the device may read, how many it may write,
        then gpa and size of all of them, in this order."""
        numbers: list[int] = ffi.unpack(self._room + self._start, self._end - self._start)
        return numbers


class DiskPlanner:
    """Works out what a disk has to do; the room for it is used again each time."""

    __slots__ = ("_elements", "_plan", "_reads", "_statuses", "_writes")

    def __init__(self) -> None:
        # A move for each piece that chains have room for.
        self._reads = ffi.new("uint64_t[]", 3 * (_ROOM // 2))
        self._writes = ffi.new("uint64_t[]", 3 * (_ROOM // 2))
        self._statuses = ffi.new("uint64_t[]", 2 * MOST_ENTRIES)
        self._elements = ffi.new("uint32_t[]", 2 * MOST_ENTRIES)
        self._plan = ffi.new("uint64_t[]", _PLAN_NUMBERS)

    def headers(self, chains: Chains) -> list[int]:
        """Where the headers are, gpa, 16, gpa..., up to the first request that is not cut the
        usual way: header, data and status byte."""
        start = chains._room + chains._start
        count = lib.pyvmm_disk_headers(start, chains.count, self._statuses)
        pieces: list[int] = ffi.unpack(self._statuses, 2 * count)
        return pieces

    def plan(
        self,
        chains: Chains,
        headers: bytes | bytearray,
        limit: int,
        may_write: bool,
        each: int,
        most: int,
    ) -> Plan:
        """What to do for the chains whose `headers` these are, up to the first that is no plain
        read or write within a disk of `limit` bytes, or until the cost, bytes and `each` for
        every request, would be above `most`."""
        lib.pyvmm_disk_plan(
            chains._room + chains._start,
            len(headers) // 16,
            ffi.from_buffer(headers),
            limit,
            may_write,
            each,
            most,
            self._reads,
            self._writes,
            self._statuses,
            self._elements,
            self._plan,
        )
        requests, reads, writes, *sums = ffi.unpack(self._plan, _PLAN_NUMBERS)
        return Plan(
            requests,
            ffi.unpack(self._reads, 3 * reads),
            ffi.unpack(self._writes, 3 * writes),
            ffi.unpack(self._statuses, 2 * requests),
            ffi.buffer(self._elements, 8 * requests)[:],
            *sums,
        )

    @staticmethod
    def done(chains: Chains, plan: Plan) -> None:
        """The plan was carried out: what is left are the chains behind its own."""
        chains._start += plan.numbers
        chains.count -= plan.requests
