"""What a virtio device is to its transport, and what every device counts for the report.

A device file has one shape: constants of its section of the virtio specification, one class
with these members, one method per kind of request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

from vmm.core.errors import GuestMemoryError, tell
from vmm.core.lean_typing import TYPE_CHECKING, Protocol
from vmm.devices.virtio.budget import Work
from vmm.devices.virtio.queue import Chain, QueueError, QueueObserver, SplitQueue

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State


class GuestMemory(Protocol):
    """Guest memory by guest-physical address, as devices need it.

    Every method raises a GuestMemoryError (UnmappedAccess, PrivateAccess) before a byte moves.
    The transfers go from fd to fd and return the bytes moved, short only at the end of a file.
    """

    def pread(self, size: int, gpa: int) -> bytes: ...

    def pwrite(self, data: bytes | memoryview, gpa: int) -> None: ...

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int: ...

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int: ...

    def discard(self, gpa: int, size: int) -> None:
        """Give whole pages back to the host's kernel; the guest finds zeroes there. OSError."""
        ...


EXPECTED = (QueueError, GuestMemoryError, OSError)
"""What carrying out a request may raise: the device needs a reset then."""

Answer = Callable[[Chain], int | Work]
"""Carries out a chain at once, or in steps: how many bytes it wrote to the guest."""

_counting = Lock()


def step(work: Work) -> int | None:
    """Carry on until the turn's budget is spent; what came of it, None when it isn't done."""
    try:
        next(work)
    except StopIteration as done:
        written: int = done.value
        return written
    return None


class IoStatistics:
    """What the report says of a device. `errors`: requests answered with an error, and broken
    rings; `refused`: accesses to memory that is private or not there."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.flushes = 0
        self.errors = 0
        self.refused = 0

    def add(self, name: str, amount: int) -> None:
        """Count, also where several threads do."""
        with _counting:
            setattr(self, name, getattr(self, name) + amount)

    def moved(self, requests: int, bytes_read: int, bytes_written: int) -> None:
        """Count requests that were carried out together."""
        with _counting:
            self.requests += requests
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


class DeviceObserver(Protocol):
    """Watches a device's queues; a new observer for each queue that the driver enables."""

    def queue(self, index: int) -> QueueObserver: ...

    def stopped(self) -> None:
        """The device needs a reset: broken rings, or memory that is private or not there."""
        ...


class Watch(Protocol):
    """EventLoop.watch_in_time: calls back on the loop's thread whenever an fd is ready."""

    def __call__(
        self,
        fd: int,
        callback: Callable[[], None],
        *,
        readable: bool = False,
        writable: bool = False,
        after: float = 0.0,
    ) -> None: ...


def _unconnected(*_: object, **__: object) -> None:
    """Stands for a transport or a loop that isn't there."""


class VirtioDevice(ABC):
    """The device behind a transport; each device file derives one class from it.

    `features` leaves out the transport's own bits. Memory and queues exist for the device from
    `activate` (the driver's DRIVER_OK) to `reset`. The transport serialises all calls except
    `config`; with `concurrent`, `process` of different queues may run at the same time.
    """

    device_id: int
    pci_class: int
    features: int = 0
    queue_sizes: Sequence[int]
    concurrent = False
    prompt = False
    """Whether its driver keeps its processor waiting for the answer: queue 0 is then served by the
    vCPU that notifies it, before the guest goes on."""
    apart = False
    """Whether this stands for a device in a process of its own (vmm.devices.process)."""
    engine: str | None = None
    """How its bytes are moved from and to a file; None where it makes no transfers."""
    may_decline = 0
    """Features of the transport that this device's drivers may do without."""
    lacks = 0
    """Features of the rings that the device can't do."""
    queue_type: type[SplitQueue] = SplitQueue
    served_elsewhere = False
    """Whether another process serves its queues: it is `vmm.devices.vhost_user`'s then."""

    def __init__(self) -> None:
        self.statistics = IoStatistics()
        self._memory: GuestMemory | None = None
        self._queues: Mapping[int, SplitQueue] = {}
        self._agreed = 0
        # What follows is set by the device's transport and by the machine.
        self.wake: Callable[[int], None] = _unconnected
        """Has `process(queue index)` called soon, on the thread that serves that queue."""
        self.serve: Callable[[int], None] = _unconnected
        """Has `process(queue index)` called now: for callbacks of `watch`, never in `process`."""
        self.interrupt: Callable[[int], None] = _unconnected
        """Interrupts the driver for a queue that somebody else has served; from any thread."""
        self.watch: Watch = _unconnected
        self.announce: Callable[[], None] = _unconnected
        """Tells the driver that `config` has changed; not to be called from `process`."""
        self.refused: Callable[[], None] = _unconnected
        """Told that it has stopped: memory that it was to use is private or not there."""
        self.tell_user: Callable[[str], None] = tell
        """Has the user read a sentence."""
        self.keep_for_next: Callable[[int], None] = _unconnected
        """Where it has a process of its own: has the next one know a number of 64 bits."""
        self.config_is_news = False
        """Set by `process`: `config` has changed, and the driver is to be told after the turn."""

    def config(self) -> bytes:
        """The device configuration structure, of the same length every time."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027  # most have none
        """The driver wrote to the configuration structure; what may not be written is dropped."""

    def start(self) -> None:  # noqa: B027  # most have nothing to begin
        """The machine is about to run: `wake`, `serve`, `watch` and `announce` work."""

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        """Start with the queues that the driver enabled, by index, and the features agreed."""
        self._memory = memory
        self._queues = queues
        self._agreed = features

    @abstractmethod
    def process(self, queue_index: int) -> bool:
        """Serve what is available on a queue now, as far as the turn's budget (`queue.budget`)
        goes; with `queue.more` it is called again, after others. True when the driver wants an
        interrupt.

        QueueError, GuestMemoryError and OSError mean that the device needs a reset.
        """

    def answer_all(self, queue: SplitQueue, answer: Answer) -> bool:
        """Go on with what the last turn left, then take what there is, as long as the turn's
        budget lasts; `answer(chain)` carries one out."""
        used: list[tuple[int, int]] = []
        try:
            if self.go_on(queue, used):
                self.answer_these(queue, queue.take(), answer, used)
        except EXPECTED:
            queue.publish(used)  # those were carried out; the bad one stops the device
            raise
        return queue.publish(used)

    @staticmethod
    def go_on(queue: SplitQueue, used: list[tuple[int, int]]) -> bool:
        """Carry on with the request that is under way; False where it is for the next turn too."""
        if queue.unfinished is None:
            return True
        head, work = queue.unfinished
        written = step(work)
        if written is None:
            queue.more = True
            return False
        queue.unfinished = None
        used.append((head, written))
        return True

    @staticmethod
    def answer_these(
        queue: SplitQueue, chains: list[Chain], answer: Answer, used: list[tuple[int, int]]
    ) -> None:
        """Carry out chains that were just taken, and leave to the next turn what this one has no
        time for."""
        for number, chain in enumerate(chains):
            if number and queue.budget.spent:
                queue.put_back(len(chains) - number)
                queue.more = True
                return
            work = answer(chain)
            written = work if isinstance(work, int) else step(work)
            if written is None:
                assert not isinstance(work, int)
                queue.unfinished = chain.head, work
                queue.put_back(len(chains) - number - 1)
                queue.more = True
                return
            used.append((chain.head, written))

    def reset(self) -> None:
        """Forget memory, queues and negotiated features."""
        self._memory = None
        self._queues = {}
        self._agreed = 0

    def state(self) -> State:
        """See vmm.core.saved.Stateful: what it knows besides its queues, when no request is under
        way. Of most devices that is nothing."""
        return {}

    def restore(self, saved: Saved) -> None:  # noqa: B027  # most have nothing to take
        """See vmm.core.saved.Stateful: after `activate`, if its driver was up. Its queues are
        served soon, whatever they hold."""

    def resumed(self, kept: int) -> None:  # noqa: B027  # most know nothing besides their queues
        """Just activated, in the place of a device whose process was lost: the queues go on, and
        what it knew besides is gone, but for what it told `keep_for_next` last (at first 0). That
        is to be believed no more than what a guest says."""

    def hear_out(self, timeout: float) -> None:  # noqa: B027  # most have done what they say
        """The loop has ended: take what is on its way yet, so that the counts are whole; what is
        under way is waited for, so many seconds at most."""

    def disconnect(self) -> None:
        """The loop and the transport go away."""
        self.wake = self.serve = self.announce = self.watch = self.interrupt = _unconnected

    def close(self) -> None:  # noqa: B027  # nor to let go of
        """The machine ends: let go of what the device has opened on the host."""
