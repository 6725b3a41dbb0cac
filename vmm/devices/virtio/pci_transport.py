"""virtio-pci, modern, all registers in one I/O BAR (virtio 1.2, 4.1): every access is an IN or OUT.

struct virtio_pci_common_cfg (4.1.4.3), at offset 0 of the BAR:
    le32 device_feature_select, device_feature, driver_feature_select, driver_feature;
    le16 config_msix_vector, num_queues; u8 device_status, config_generation;
    le16 queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_off;
    le64 queue_desc, queue_driver, queue_device;
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock

from vmm.core.errors import GuestMemoryError, PyvmmError, tell
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.devices.msix import MsixTable
from vmm.devices.virtio.device import EXPECTED, DeviceObserver, GuestMemory, VirtioDevice
from vmm.devices.virtio.pci_function import (
    COMMON_CFG_SIZE,
    DEVICE_CFG,
    ISR_STATUS,
    NOTIFY,
    VirtioPciFunction,
)
from vmm.devices.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, SplitQueue

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

VIRTIO_F_VERSION_1 = 1 << 32
VIRTIO_F_ACCESS_PLATFORM = 1 << 33
REQUIRED_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX

STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FEATURES_OK = 1, 2, 4, 8
STATUS_NEEDS_RESET, STATUS_FAILED = 0x40, 0x80
_STATUS_OF_DRIVER = (
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED
)

ISR_QUEUE, ISR_CONFIG = 1, 2
NO_VECTOR = 0xFFFF

LOOKS_AT_ONCE = 16
"""How often a turn looks at a queue whose driver is likely to be ready with more. A look by way of
the loop costs three system calls and twice the time; but a queue that is never empty must not keep
the other queues waiting for long."""

_COMMON = struct.Struct("<IIIIHHBBHHHHHQQQ")
_WORD = 0xFFFF_FFFF


class _QueueSettings:
    """What the driver wrote for one queue."""

    __slots__ = ("desc", "device", "driver", "enabled", "size", "vector")

    def __init__(self, size: int) -> None:
        self.size = size
        self.vector = NO_VECTOR
        self.enabled = False
        self.desc = 0
        self.driver = 0
        self.device = 0


class _ActiveQueue:
    """A queue of a driver that is up. Whoever serves the queue holds `lock` while it does."""

    __slots__ = ("lock", "queue")

    def __init__(self, queue: SplitQueue, lock: RLock) -> None:
        self.queue = queue
        self.lock = lock


# The driver may write a queue only while it negotiates: (offset, size) -> (field, shift).
_QUEUE_ADDRESSES = {
    (0x20, 4): ("desc", 0),
    (0x24, 4): ("desc", 32),
    (0x28, 4): ("driver", 0),
    (0x2C, 4): ("driver", 32),
    (0x30, 4): ("device", 0),
    (0x34, 4): ("device", 32),
}


def _acquire(lock: RLock, deadline: float, owner: ExitStack) -> None:
    if not lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
        raise TimeoutError
    owner.callback(lock.release)


class VirtioPciTransport:
    """Registers, status machine and interrupt of one device.

    `interrupt()` raises the function's INTx line, which its owner lowers at the
    guest's EOI and raises again while `interrupt_pending()`. With `msix`, whose table is mapped
    at `msix_base`, the guest may have a message for each queue and one for the rest instead.
    The registers are in a BAR at `bar_base`, of I/O ports or (`bar_in_io` False) in memory.
    `moved(address or None)` names the port, or the address, whose 16-bit writes are to be turned
    into `notify(value)`, whenever it changes.
    `ring(queue index)` has `notify` called soon, on the thread that serves requests (default: at
    once), when a device has more to do; `notified(queue index)` does so, too, for a notify that
    came as an access to the register (default: `ring`).
    Configuration has a lock, each queue another one (all queues of a device that isn't
    `concurrent` share theirs), taken in this order. A reset takes them all, so that a device
    that reads as reset touches guest memory no more. The ISR has its own: its reader must not
    wait for a batch.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        interrupt: Callable[[], None],
        *,
        bar_base: int,
        bar_in_io: bool = True,
        interrupt_line: int,
        moved: Callable[[int | None], None] | None = None,
        ring: Callable[[int], None] | None = None,
        notified: Callable[[int], None] | None = None,
        observer: DeviceObserver | None = None,
        make_queue: Callable[..., SplitQueue] = SplitQueue,
        msix: MsixTable | None = None,
        msix_base: int = 0,
    ) -> None:
        self._device = device
        self._make_queue = make_queue
        self._memory = memory
        self._interrupt = interrupt
        self._moved = moved
        self._observer = observer
        self._ring = self.notify if ring is None else ring
        self._notified = self._ring if notified is None else notified
        device.wake = self._ring
        device.serve = self.notify
        device.announce = self.config_changed
        device.interrupt = self.interrupt_for
        # A driver that waits for each answer has no use for them: an indirect table is one more
        # read of guest memory, event indexes are two more and a write.
        ring_features = 0 if device.prompt else RING_FEATURES & ~device.lacks
        self._offered = device.features | REQUIRED_FEATURES | ring_features
        self._required = REQUIRED_FEATURES & ~device.may_decline
        self._config = device.config()
        self._generation = 0
        self._lock = RLock()
        self._isr_lock = Lock()
        self._isr = 0
        self._msix = msix
        self.notify_address: int | None = None
        self.failure: str | None = None
        self._told = False
        self._clear()
        self.function = VirtioPciFunction(
            self,
            device_id=device.device_id,
            pci_class=device.pci_class,
            config_size=len(self._config),
            bar_base=bar_base,
            bar_in_io=bar_in_io,
            interrupt_line=interrupt_line,
            moved=self._bar_moved,
            msix_table=msix,
            msix_base=msix_base,
        )

    def _clear(self) -> None:
        self._status = 0
        self._device_feature_select = 0
        self._driver_feature_select = 0
        self._driver_features = 0
        self._queue_select = 0
        self._config_vector = NO_VECTOR
        self._queues = [_QueueSettings(size) for size in self._device.queue_sizes]
        self._active: dict[int, _ActiveQueue] = {}
        # Those in use since the last reset; a failure empties `_active` but not this.
        self._started: list[_ActiveQueue] = []

    # --- the event loop's side ---

    def notify(self, queue_index: int) -> None:
        """There is something to do for a queue: do it, with at most one interrupt."""
        active = self._active.get(queue_index)
        if active is None:
            return
        failure: Exception | None = None
        with active.lock:
            if self._active.get(queue_index) is not active:
                return  # reset, or stopped, while this thread waited
            queue = active.queue
            queue.budget.begin()
            try:
                for _ in range(LOOKS_AT_ONCE):
                    # A turn without a take would repeat the last one's word.
                    queue.more = queue.soon = False
                    if self._device.process(queue_index):
                        self._raise(ISR_QUEUE, self._queues[queue_index].vector)
                    if not (queue.soon and queue.budget.look()):
                        break
            except EXPECTED as error:
                failure = error
            except PyvmmError:
                raise  # a policy's word on the run as a whole
            except Exception as error:
                failure = self._unexpected(error)
        # After the turn: configuration has a lock, which is taken before those of queues.
        if self._device.config_is_news:
            self._device.config_is_news = False
            self.config_changed()
        if failure is not None:
            self._stop(queue_index, active, failure)
        elif active.queue.more:
            self._ring(queue_index)

    @contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        """Within the block the device touches no guest memory; other threads that need it
        wait. The calling thread must not serve it meanwhile. Raises TimeoutError when what is
        under way, on all queues together, takes longer than `timeout` (seconds)."""
        deadline = time.monotonic() + timeout
        with ExitStack() as locks:
            _acquire(self._lock, deadline, locks)
            # Only now: the last holder of that lock may have started the device anew.
            for active in self._started:
                _acquire(active.lock, deadline, locks)
            yield

    # --- snapshots; the device is `held` ---

    def finish(self, timeout: float) -> None:
        """Carry out the requests that a turn has left half done. Raises TimeoutError when that
        takes longer (seconds)."""
        deadline = time.monotonic() + timeout
        for index, active in list(self._active.items()):
            queue = active.queue
            used: list[tuple[int, int]] = []
            try:
                while queue.unfinished is not None:
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    queue.budget.begin()
                    self._device.go_on(queue, used)
                if queue.publish(used):
                    self._raise(ISR_QUEUE, self._queues[index].vector)
            except EXPECTED as error:
                if isinstance(error, TimeoutError):
                    raise
                self._stop(index, active, error)

    def state(self) -> State:
        """See vmm.core.saved.Stateful; after `finish`. Raises OSError where a disk can't be
        flushed."""
        queues = []
        for index, settings in enumerate(self._queues):
            active = self._active.get(index)
            queues.append(
                {
                    "size": settings.size,
                    "vector": settings.vector,
                    "enabled": settings.enabled,
                    "desc": settings.desc,
                    "driver": settings.driver,
                    "device": settings.device,
                    "position": None if active is None else active.queue.state(),
                }
            )
        return {
            "id": self._device.device_id,
            "status": self._status,
            "device_feature_select": self._device_feature_select,
            "driver_feature_select": self._driver_feature_select,
            "driver_features": self._driver_features,
            "queue_select": self._queue_select,
            "config_vector": self._config_vector,
            "generation": self._generation,
            "isr": self._isr,
            "queues": queues,
            "device": self._device.state(),
            "function": self.function.state(),
            "msix": None if self._msix is None else self._msix.state(),
        }

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful. Rings and registers are as hostile as the guest's own
        writes, and a driver that is up starts the device as it does itself. `resume` follows, once
        the whole machine is there."""
        kind = saved.number("id", 0xFFFF)
        if kind != self._device.device_id:
            raise saved.bad(f"it is device {kind}, and here is {self._device.device_id}")
        if self._msix is None and saved.has("msix"):
            raise saved.bad("its function has messages, and none can be had here")
        if self._msix is not None:
            inner = saved.inner("msix")
            self._msix.restore(inner)
            inner.finish()
        with self._lock:
            self._device_feature_select = saved.number("device_feature_select", _WORD)
            self._driver_feature_select = saved.number("driver_feature_select", _WORD)
            self._driver_features = saved.number("driver_features", (1 << 64) - 1)
            self._queue_select = saved.number("queue_select", 0xFFFF)
            self._config_vector = self._vector(saved.number("config_vector", NO_VECTOR))
            # One that was reading a device's configuration reads it anew: it may be another one.
            self._generation = (saved.number("generation", 0xFF) + 1) & 0xFF
            self._isr = saved.number("isr", ISR_QUEUE | ISR_CONFIG)
            status = saved.number("status", 0xFF)
            if status & STATUS_DRIVER_OK and not status & STATUS_FEATURES_OK:
                raise saved.bad(f"status {status:#x}: its driver is up without features agreed on")
            if status & STATUS_FEATURES_OK and not self._features_acceptable():
                raise saved.bad(
                    f"its driver agreed on features {self._driver_features:#x}, and here are "
                    f"{self._offered:#x}; give the device the options that it had"
                )
            positions = self._restore_queues(saved)
            inner = saved.inner("device")
            self._status = status & (_STATUS_OF_DRIVER | STATUS_NEEDS_RESET)
            if status & STATUS_DRIVER_OK and not status & STATUS_NEEDS_RESET:
                self._start(positions)
            self._device.restore(inner)
            inner.finish()
            self._config = self._device.config()
        inner = saved.inner("function")
        self.function.restore(inner)
        inner.finish()

    def _restore_queues(self, saved: Saved) -> dict[int, Saved]:
        """What the driver wrote for each; and for those in use where they were."""
        positions: dict[int, Saved] = {}
        for index, inner in enumerate(saved.each("queues", len(self._queues))):
            queue, largest = self._queues[index], self._device.queue_sizes[index]
            queue.size = inner.number("size", largest, 1)
            if queue.size & (queue.size - 1):
                raise inner.bad(f"size is {queue.size}, no power of two")
            queue.vector = self._vector(inner.number("vector", NO_VECTOR))
            queue.enabled = inner.flag("enabled")
            for name in ("desc", "driver", "device"):
                setattr(queue, name, inner.number(name, (1 << 64) - 1))
            if inner.has("position"):
                positions[index] = inner.inner("position")
            inner.finish()
        return positions

    def resume(self) -> None:
        """After `restore`: look at all queues, and interrupt for each once, since what was on its
        way may be lost. An interrupt too many means nothing to a driver."""
        with self._lock:
            active = list(self._active)
            if self._status & STATUS_DRIVER_OK:
                for index in active:
                    self._raise(ISR_QUEUE, self._queues[index].vector)
                self._raise(ISR_CONFIG, self._config_vector)
        for index in active:
            self._ring(index)

    def config_changed(self) -> None:
        """The device's configuration is another one: let the driver know (4.1.4.3.1)."""
        with self._lock:
            self._config = self._device.config()
            self._generation = (self._generation + 1) & 0xFF
            if self._status & STATUS_DRIVER_OK:
                self._raise(ISR_CONFIG, self._config_vector)

    def interrupt_for(self, queue_index: int) -> None:
        """Somebody else has served that queue of the device's: let the driver know."""
        self._raise(ISR_QUEUE, self._queues[queue_index].vector)

    def vector_of(self, queue_index: int) -> int:
        """The queue's MSI-X vector, as the driver has set it; NO_VECTOR for none."""
        return self._queues[queue_index].vector

    def interrupt_pending(self) -> bool:
        """After the guest's EOI: whether the line has to go up again."""
        return self._isr != 0 and self._uses_intx and self.function.intx_enabled

    # --- the BAR ---

    def read(self, offset: int, size: int) -> int:
        """IN from the BAR; what is no register reads as zero."""
        if offset == ISR_STATUS:
            with self._isr_lock:
                value, self._isr = self._isr, 0
            return value
        if offset >= DEVICE_CFG:
            start = offset - DEVICE_CFG
            return int.from_bytes(self._config[start : start + size], "little")
        if offset < COMMON_CFG_SIZE:
            with self._lock:
                return int.from_bytes(self._common()[offset : offset + size], "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """OUT to the BAR; dropped unless it is a whole field that may be written now."""
        if offset == NOTIFY and size in (2, 4):
            if value & 0xFFFF < len(self._queues):
                self._notified(value & 0xFFFF)
            return
        with self._lock:
            if (offset, size) == (0x14, 1):
                self._write_status(value)
            elif (offset, size) == (0x00, 4):
                self._device_feature_select = value
            elif (offset, size) == (0x08, 4):
                self._driver_feature_select = value
            elif (offset, size) == (0x16, 2):
                self._queue_select = value
            elif (offset, size) == (0x0C, 4):
                self._write_features(value)
            elif (offset, size) == (0x10, 2):
                self._config_vector = self._vector(value)
            elif (offset, size) == (0x1A, 2):
                queue = self._selected()
                if queue is not None:
                    queue.vector = self._vector(value)
            elif DEVICE_CFG <= offset < DEVICE_CFG + len(self._config):
                self._device.write_config(offset - DEVICE_CFG, value.to_bytes(size, "little"))
                self._config = self._device.config()
            else:
                self._write_queue(offset, size, value)

    def has_cause(self) -> bool:
        """Whether the ISR holds a cause, for the PCI status register."""
        return self._isr != 0

    def interrupts_enabled(self) -> None:
        """The guest cleared the command register's INTx disable bit."""
        if self._isr and self._uses_intx:
            self._interrupt()

    # --- what follows is called with the lock held ---

    def _common(self) -> bytes:
        queue = self._selected()
        select = self._device_feature_select
        offered = (self._offered >> (32 * select)) & _WORD if select < 2 else 0
        select = self._driver_feature_select
        accepted = (self._driver_features >> (32 * select)) & _WORD if select < 2 else 0
        return _COMMON.pack(
            self._device_feature_select,
            offered,
            self._driver_feature_select,
            accepted,
            self._config_vector,
            len(self._queues),
            self._status,
            self._generation,
            self._queue_select,
            queue.size if queue else 0,
            queue.vector if queue else NO_VECTOR,
            queue.enabled if queue else 0,
            0,
            queue.desc if queue else 0,
            queue.driver if queue else 0,
            queue.device if queue else 0,
        )

    def _selected(self) -> _QueueSettings | None:
        return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None

    @property
    def _uses_intx(self) -> bool:
        return self._msix is None or not self._msix.enabled

    def _vector(self, value: int) -> int:
        """4.1.5.1.2: what reads back after a vector is written; NO_VECTOR if it doesn't exist."""
        return value if self._msix is not None and value < self._msix.vectors else NO_VECTOR

    def _write_features(self, value: int) -> None:
        select = self._driver_feature_select
        if select > 1 or self._status & STATUS_FEATURES_OK:
            return
        shift = 32 * select
        self._driver_features = (self._driver_features & ~(_WORD << shift)) | value << shift

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        queue = self._selected()
        if queue is None or queue.enabled or self._status & STATUS_DRIVER_OK:
            return
        if (offset, size) == (0x18, 2):
            # 4.1.5.1.3: the driver may make it smaller, to another power of two.
            largest = self._device.queue_sizes[self._queue_select]
            if 0 < value <= largest and not value & (value - 1):
                queue.size = value
        elif (offset, size) == (0x1C, 2):
            queue.enabled = value == 1
        elif (offset, size) in _QUEUE_ADDRESSES:
            field, shift = _QUEUE_ADDRESSES[offset, size]
            setattr(queue, field, (getattr(queue, field) & ~(_WORD << shift)) | value << shift)

    def _write_status(self, value: int) -> None:
        """3.1: bits are only ever added, each step needs the one before; zero resets."""
        if value == 0:
            self._reset()
            return
        added = value & _STATUS_OF_DRIVER & ~self._status
        if added & STATUS_FEATURES_OK and not self._features_acceptable():
            added &= ~STATUS_FEATURES_OK
        if added & STATUS_DRIVER_OK and not (self._status | added) & STATUS_FEATURES_OK:
            added &= ~STATUS_DRIVER_OK
        self._status |= added
        if added & STATUS_DRIVER_OK:
            self._start()

    def _features_acceptable(self) -> bool:
        accepted = self._driver_features
        return not accepted & ~self._offered and accepted & self._required == self._required

    def _start(self, positions: Mapping[int, Saved] | None = None) -> None:
        """The driver is up. `positions`: where queues were that go on (a queue without one begins
        anew)."""
        try:
            queues = {
                index: self._make_queue(
                    self._memory, q.size, q.desc, q.driver, q.device, self._driver_features
                )
                for index, q in enumerate(self._queues)
                if q.enabled
            }
            for index, saved in () if positions is None else positions.items():
                if index in queues:
                    queues[index].restore(saved)
                saved.finish()
            if self._observer is not None:
                for index, queue in queues.items():
                    queue.observer = self._observer.queue(index)
            self._device.activate(self._memory, queues, self._driver_features)
        except EXPECTED as error:
            self._fail(error)
            return
        except PyvmmError:
            raise
        except Exception as error:
            self._fail(self._unexpected(error))
            return
        shared = RLock()
        active = {
            index: _ActiveQueue(queue, RLock() if self._device.concurrent else shared)
            for index, queue in queues.items()
        }
        self._started = list(active.values())
        self._active = active

    def _reset(self) -> None:
        self._halt()
        self._clear()
        if self._msix is not None:
            self._msix.forget_pending()
        with self._isr_lock:
            self._isr = 0

    def _halt(self) -> None:
        """Take memory and queues away from the device, once no request is under way."""
        self._active = {}
        with ExitStack() as idle:
            for active in self._started:
                idle.enter_context(active.lock)
            self._device.reset()

    def _stop(self, index: int, active: _ActiveQueue, error: Exception) -> None:
        with self._lock:
            if self._active.get(index) is active:  # else a reset was quicker
                self._fail(error)

    def _unexpected(self, error: Exception) -> Exception:
        """A device's own mistake costs the guest that device, until it resets it, not the run."""
        if not self._told:  # the guest may make it happen as often as it likes
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = ""
            if where is not None:
                file = os.path.basename(where.tb_frame.f_code.co_filename)
                place = f" at {file}:{where.tb_lineno}"
            tell(
                f"a device stopped by a fault of its own, until the guest resets it: "
                f"{type(self._device).__name__}: {error!r}{place}; "
                "please report this"
            )
        self._told = True
        return error

    def _fail(self, error: Exception) -> None:
        """2.1.2: stop, set DEVICE_NEEDS_RESET and tell a driver that is up."""
        if isinstance(error, GuestMemoryError):
            self._device.statistics.refused += 1
            self._device.refused()
        else:
            self._device.statistics.errors += 1
        self.failure = str(error)
        if self._observer is not None:
            self._observer.stopped()
        self._halt()  # also what it waits for on the host: nobody would serve it
        self._status |= STATUS_NEEDS_RESET
        if self._status & STATUS_DRIVER_OK:
            self._raise(ISR_CONFIG, self._config_vector)

    def _raise(self, cause: int, vector: int) -> None:
        if self._msix is not None and not self._uses_intx:
            self._msix.interrupt(vector)  # 4.1.4.5: the ISR is INTx' business
            return
        with self._isr_lock:
            self._isr |= cause
        if self.function.intx_enabled:
            self._interrupt()

    def _bar_moved(self, base: int | None) -> None:
        self.notify_address = None if base is None else base + NOTIFY
        if self._moved is not None:
            self._moved(self.notify_address)
