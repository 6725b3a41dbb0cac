"""virtio-blk on a raw disk file (virtio 1.2, 5.2): data goes from fd to fd, never through here.

struct virtio_blk_req: le32 type, reserved; le64 sector; u8 data[]; u8 status
struct virtio_blk_discard_write_zeroes: le64 sector; le32 num_sectors; le32 flags (bit 0: unmap)
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial

from kvm_bindings.virtqueue import Chains, DiskPlanner
from vmm.core.disk_image import SECTOR
from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.devices.virtio.block_batch import Batch, serve_together
from vmm.devices.virtio.block_file import SERIAL_BYTES, DiskFile, ReadAhead
from vmm.devices.virtio.budget import Budget, Pace, Work
from vmm.devices.virtio.device import EXPECTED, GuestMemory, VirtioDevice
from vmm.devices.virtio.queue import Chain, QueueError, Segment, SplitQueue, listed
from vmm.devices.virtio.segments import aligned_pieces, gather, merged, take_front, total

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 12, 1 << 13, 1 << 14

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
FLAG_UNMAP = 1

QUEUE_SIZE = 256
MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES = 1 << 22, 16
# Small enough that writing the zeroes out takes no longer than other requests do.
MAX_ZERO_SECTORS, MAX_ZERO_RANGES = 1 << 16, 1
_ZEROES = bytes(1 << 18)
# Bytes deallocated by one call: as quick as other steps on the file systems of today.
PUNCH_AT_ONCE = 32 << 20
# Some tens of microseconds, in which a driver that keeps its queue full has its next request there:
# a look in vain takes three or four.
PATIENCE = 12
# Pieces of a request that is carried out without steps: header, data, status.
SIMPLE = 3
# Bytes of a request that is carried out without steps.
SMALL = 64 << 10
# Bytes at once of a request that is carried out in steps: more of them are no quicker.
LARGE = 1 << 20

_HEADER = struct.Struct("<IIQ")
_ELEMENT = struct.Struct("<II")  # of the used ring
_RANGE = struct.Struct("<QII")
# capacity, size_max, seg_max, geometry, blk_size, topology, writeback, num_queues, then the
# limits of discard and write zeroes.
_CONFIG = struct.Struct("<QII4xI8xBxHIIIIIB3x")
# EINVAL: a block device that wants other alignment than our sectors of 512 bytes.
_CANNOT_PUNCH = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)

# What a request method answers: its status, and how many bytes it wrote to the guest; in steps
# where that may take longer than a turn.
_Answer = tuple[int, int]
_Steps = Generator[None, None, _Answer]
_Request = Callable[[Budget, int, list[Segment], list[Segment]], _Answer | _Steps]


class VirtioBlock(VirtioDevice):
    """A disk. `punch(fd, offset, size)` deallocates a range of the file and keeps its size;
    without it, or where the host can't, zeroes are written and discards are not carried out.
    """

    device_id = 2
    pci_class = 0x018000  # mass storage, other

    def __init__(
        self,
        disk: DiskFile,
        punch: Callable[[int, int, int], None] | None = None,
        patience: int = PATIENCE,
    ) -> None:
        super().__init__()
        self._patience = patience
        self._disk = disk
        self._punch = punch
        self._pace = Pace()
        self._read_ahead = ReadAhead(disk.fd)
        self._planners: dict[SplitQueue, DiskPlanner] = {}
        self.queue_sizes = (QUEUE_SIZE,) * disk.queues
        self.concurrent = disk.queues > 1
        self.engine = disk.engine
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | (F_MQ if disk.queues > 1 else 0)
        if disk.read_only:
            self.features |= F_RO
        else:
            self.features |= F_WRITE_ZEROES | (F_DISCARD if punch else 0)
        self._requests: dict[int, _Request] = {
            T_IN: self._read,
            T_OUT: self._write,
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }

    # --- the transport's side ---

    def config(self) -> bytes:
        """struct virtio_blk_config up to write_zeroes_may_unmap (5.2.4)."""
        return _CONFIG.pack(
            self._disk.sectors,
            0,
            QUEUE_SIZE - 2,  # a request's header and status take a descriptor each
            SECTOR,
            1,  # writeback: what is written stays in the host's page cache until a flush
            self._disk.queues,
            MAX_DISCARD_SECTORS,
            MAX_DISCARD_RANGES,
            8,  # host blocks are 4 KiB
            MAX_ZERO_SECTORS,
            MAX_ZERO_RANGES,
            1 if self._punch else 0,
        )

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        super().activate(memory, queues, features)
        self._planners.clear()
        for queue in queues.values():
            queue.patience = self._patience

    def state(self) -> State:
        """See vmm.core.saved.Stateful: which disk it is, by what it holds now, on the disk."""
        if not self._disk.read_only:
            os.fdatasync(self._disk.fd)
        return self._disk.identity()

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful: the disk has to be as the guest has left it."""
        self._disk.require(saved)

    def close(self) -> None:
        self._planners.clear()  # large, and the rest of a machine may wait for the collector
        self._disk.close()

    def process(self, queue_index: int) -> bool:
        """Serve what is available now, or a turn's worth of it, and return it all at once."""
        queue, memory = self._queues[queue_index], self._memory
        if memory is None:
            return False
        used: list[tuple[int, int]] = []
        batch = None
        try:
            if self.go_on(queue, used):
                chains = queue.take_together()
                if isinstance(chains, Chains):
                    batch = self._together(queue, memory, chains)
                    if batch is None:
                        chains = listed(chains)
                    else:
                        self._leave(queue, chains.count)
                if not isinstance(chains, Chains):
                    self.answer_these(queue, chains, partial(self._serve, queue.budget), used)
        except EXPECTED:
            queue.publish(used)  # those were carried out; the bad one stops the device
            raise
        return queue.publish(used) if batch is None else self._return_together(queue, used, batch)

    def _return_together(
        self, queue: SplitQueue, before: list[tuple[int, int]], batch: Batch
    ) -> bool:
        """Statuses and used ring by one call. Where a page of them is refused, whose status can
        be written has its answer, up to the first whose can't."""
        assert self._memory is not None
        outstanding = queue.outstanding
        elements = b"".join([_ELEMENT.pack(*one) for one in before])
        try:
            return queue.publish_elements(
                elements + batch.elements, batch.statuses, bytes(batch.requests)
            )
        except GuestMemoryError:
            if queue.outstanding == outstanding:  # else the driver has been told
                answered = 0
                with contextlib.suppress(GuestMemoryError):
                    for gpa in batch.statuses[::2]:
                        self._memory.pwrite(b"\0", gpa)
                        answered += 1
                elements += batch.elements[: answered * _ELEMENT.size]
                if elements:
                    queue.publish_elements(elements)
            raise

    def _leave(self, queue: SplitQueue, count: int) -> None:
        """The turn is over: the last `count` chains taken are for the next one."""
        if count:
            queue.put_back(count)
            queue.more = True

    def _together(self, queue: SplitQueue, memory: GuestMemory, chains: Chains) -> Batch | None:
        """As many chains at once as the host is quick enough for, again and again for a turn, as
        long as they are plain reads and writes and nothing is in their way; None if the first is
        not. `chains` are those that are left."""
        if not hasattr(memory, "move_in"):
            return None
        planner = self._planners.get(queue)
        if planner is None:
            planner = self._planners[queue] = DiskPlanner()
        disk, pace, budget = self._disk, self._pace, queue.budget
        whole = Batch()
        while chains.count and not (whole.requests and budget.spent):
            started = time.monotonic()
            plan = serve_together(
                memory,  # type: ignore[arg-type]  # it has been asked
                planner,
                chains,
                disk.fd,
                disk.sectors,
                may_write=not disk.read_only,
                most=pace.limit,
                read_ahead=self._read_ahead,
            )
            if plan is None or (plan.bytes_written and not self._written_through()):
                break
            planner.done(chains, plan)
            pace.took(plan.cost, time.monotonic() - started)
            budget.spend(2, plan.bytes_read + plan.bytes_written)
            budget.look()
            whole.add(plan)
        if not whole.requests:
            return None
        self.statistics.moved(whole.requests, whole.bytes_read, whole.bytes_written)
        return whole

    def _written_through(self) -> bool:
        """Whether what was written is where the driver expects it now."""
        if not self._agreed & F_FLUSH:
            try:
                os.fdatasync(self._disk.fd)
            except OSError:
                return False
        return True

    # --- one request ---

    def _serve(self, budget: Budget, chain: Chain) -> int | Work:
        """Carry out one request; returns the bytes written from the start of its buffers."""
        memory = self._memory
        assert memory is not None
        header, readable = take_front(chain.readable, _HEADER.size)
        if not chain.writable:
            raise QueueError(f"request {chain.head} has no room for its status byte")
        kind, _, sector = _HEADER.unpack(gather(memory, header))
        writable = list(chain.writable)
        gpa, size = writable.pop()
        status_gpa = gpa + size - 1
        if size > 1:
            writable.append((gpa, size - 1))
        self.statistics.add("requests", 1)
        request = self._requests.get(kind)
        answer: _Answer | _Steps = S_UNSUPP, 0
        if request is not None:
            try:
                answer = request(budget, sector, readable, writable)
            except OSError:  # the disk's; the memory's own refusals are no OSErrors
                answer = S_IOERR, 0
        if isinstance(answer, tuple):
            return self._answered(memory, answer, writable, status_gpa)
        return self._serve_in_steps(memory, answer, writable, status_gpa)

    def _serve_in_steps(
        self, memory: GuestMemory, steps: _Steps, writable: list[Segment], status_gpa: int
    ) -> Work:
        try:
            answer = yield from steps
        except OSError:
            answer = S_IOERR, 0
        return self._answered(memory, answer, writable, status_gpa)

    def _answered(
        self, memory: GuestMemory, answer: _Answer, writable: list[Segment], status_gpa: int
    ) -> int:
        status, written = answer
        if status != S_OK:
            self.statistics.add("errors", 1)
        memory.pwrite(bytes((status,)), status_gpa)
        # The used length promises a prefix: the status counts if all before it was written.
        return written + 1 if written == total(writable) else written

    def _read(
        self, budget: Budget, sector: int, _: object, writable: list[Segment]
    ) -> _Answer | _Steps:
        size = total(writable)
        position = self._position(sector, size)
        if position is None:
            return S_IOERR, 0
        if size <= SMALL and len(writable) <= SIMPLE:
            return self._move_at_once(budget, position, writable, self._transfer_in)
        return self._move(budget, position, writable, self._transfer_in)

    def _write(
        self, budget: Budget, sector: int, readable: list[Segment], _: object
    ) -> _Answer | _Steps:
        size = total(readable)
        position = self._position(sector, size)
        if position is None or self._disk.read_only:
            return S_IOERR, 0
        if size <= SMALL and len(readable) <= SIMPLE:
            status, _ = self._move_at_once(budget, position, readable, self._transfer_out)
            self._write_through(budget)
            return status, 0
        return self._write_in_steps(budget, position, readable)

    def _write_in_steps(self, budget: Budget, position: int, readable: list[Segment]) -> _Steps:
        status, _ = yield from self._move(budget, position, readable, self._transfer_out)
        self._write_through(budget)
        return status, 0

    def _flush(self, budget: Budget, _sector: int, _r: object, _w: object) -> _Answer:
        os.fdatasync(self._disk.fd)
        budget.look()
        self.statistics.add("flushes", 1)
        return S_OK, 0

    def _write_through(self, budget: Budget) -> None:
        """5.2.6.2: a driver that can't flush gets its writes to the disk at once."""
        if not self._agreed & F_FLUSH:
            os.fdatasync(self._disk.fd)
            budget.look()

    def _get_id(self, _budget: Budget, _sector: int, _: object, writable: list[Segment]) -> _Answer:
        assert self._memory is not None
        identity = self._disk.serial.ljust(SERIAL_BYTES, b"\0")
        written = 0
        for gpa, size in writable:
            piece = identity[written : written + size]
            if piece:
                self._memory.pwrite(piece, gpa)
            written += len(piece)
        return S_OK, written

    def _discard(self, budget: Budget, _: int, readable: list[Segment], _w: object) -> _Steps:
        if not self._agreed & F_DISCARD:
            return S_UNSUPP, 0
        # 5.2.6.2: no flag means anything here, not even unmap.
        status, ranges = self._ranges(readable, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, 0)
        for position, size, _flags in ranges:
            # A hint: content is undefined from here on.
            yield from self._punched(budget, position, size)
        return status, 0

    def _write_zeroes(self, budget: Budget, _: int, readable: list[Segment], _w: object) -> _Steps:
        if not self._agreed & F_WRITE_ZEROES:
            return S_UNSUPP, 0
        status, ranges = self._ranges(readable, MAX_ZERO_RANGES, MAX_ZERO_SECTORS, FLAG_UNMAP)
        for position, size, flags in ranges:
            if not (flags & FLAG_UNMAP and (yield from self._punched(budget, position, size))):
                yield from self._write_out_zeroes(budget, position, size)
        self._write_through(budget)
        return status, 0

    # --- shared by the requests ---

    def _position(self, sector: int, size: int) -> int | None:
        """The byte offset of a request, or None when it is not wholly on the disk."""
        if size % SECTOR or sector + size // SECTOR > self._disk.sectors:
            return None
        return sector * SECTOR

    @staticmethod
    def _move_at_once(
        budget: Budget,
        position: int,
        segments: list[Segment],
        transfer: Callable[[int, int, int], int],
    ) -> _Answer:
        """A few pieces, none of which takes long."""
        done = 0
        try:
            for gpa, size in merged(segments):
                moved = transfer(position + done, gpa, size)
                done += moved
                if moved < size:  # the file is shorter than it was when it was opened
                    return S_IOERR, done
        except OSError:
            return S_IOERR, done
        budget.spend(len(segments), done)
        budget.look()  # the disk may have been waited for
        return S_OK, done

    def _move(
        self,
        budget: Budget,
        position: int,
        segments: list[Segment],
        transfer: Callable[[int, int, int], int],
    ) -> _Steps:
        """Piece by piece, each of a size that the host is quick enough for: also a conversion of
        pages waits for one piece at most."""
        pace = self._pace
        done = 0
        try:
            for start, length in merged(segments):
                gpa, end = start, start + length
                while gpa < end:
                    if budget.spent and done:
                        yield
                    size = min(end - gpa, max(pace.limit, Pace.LEAST), LARGE)
                    started = time.monotonic()
                    moved = transfer(position + done, gpa, size)
                    pace.took(size + Pace.EACH, time.monotonic() - started)
                    budget.spend(1, size)
                    done += moved
                    gpa += moved
                    if moved < size:
                        return S_IOERR, done
        except OSError:
            return S_IOERR, done
        return S_OK, done

    def _transfer_in(self, position: int, gpa: int, size: int) -> int:
        assert self._memory is not None
        started = time.monotonic()
        moved = self._memory.transfer_in(self._disk.fd, position, gpa, size)
        if self._read_ahead.is_due(time.monotonic() - started, moved):
            self._read_ahead.look(position + moved)
        self.statistics.add("bytes_read", moved)
        return moved

    def _transfer_out(self, position: int, gpa: int, size: int) -> int:
        assert self._memory is not None
        moved = self._memory.transfer_out(gpa, size, self._disk.fd, position)
        self.statistics.add("bytes_written", moved)
        return moved

    def _ranges(
        self, readable: list[Segment], most: int, largest: int, known_flags: int
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """The request's ranges as (position, bytes, flags); none unless the status is OK."""
        assert self._memory is not None
        size = total(readable)
        if self._disk.read_only or not 0 < size <= most * _RANGE.size or size % _RANGE.size:
            return S_IOERR, []
        ranges = []
        status = S_OK
        for sector, count, flags in _RANGE.iter_unpack(gather(self._memory, readable)):
            if flags & ~known_flags:
                return S_UNSUPP, []
            if count > largest or sector + count > self._disk.sectors:
                status = S_IOERR
            ranges.append((sector * SECTOR, count * SECTOR, flags))
        return status, ranges if status == S_OK else []

    def _punched(self, budget: Budget, position: int, size: int) -> Generator[None, None, bool]:
        """Deallocate, piece by piece; False when the host can't do that."""
        if self._punch is None or size == 0:
            return False
        for start, part in aligned_pieces(position, size, PUNCH_AT_ONCE):
            try:
                self._punch(self._disk.fd, start, part)
            except OSError as error:
                if error.errno in _CANNOT_PUNCH:
                    return False
                raise
            budget.spend()
            if not budget.look():
                yield
        return True

    def _write_out_zeroes(
        self, budget: Budget, position: int, size: int
    ) -> Generator[None, None, None]:
        end = position + size
        with memoryview(_ZEROES) as zeroes:
            while position < end:
                written = os.pwrite(self._disk.fd, zeroes[: end - position], position)
                if not written:
                    raise OSError(errno.EIO, f"nothing more is written at {position:#x}")
                position += written
                budget.spend(1, written)
                if not budget.look() and position < end:
                    yield
        self.statistics.add("bytes_written", size)
