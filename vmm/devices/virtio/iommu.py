"""virtio-iommu (virtio 1.3, 5.13): what the guest's other devices may reach is what it maps here.

Requests are a header, fields and a tail with a status, of fixed size by type. A domain is made by
ATTACH and ends with DETACH; it takes one endpoint (5.13.6.3 leaves that to the device), so that a
mapping is for exactly one device. Bypass is offered as a word and never given: an endpoint in no
domain reaches nothing.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

from vmm.core.ranges import PAGE_SIZE, Range
from vmm.core.saved import NotSaved, State
from vmm.devices.virtio.budget import Budget, Work
from vmm.devices.virtio.device import EXPECTED, IoStatistics, VirtioDevice
from vmm.devices.virtio.queue import Chain, SplitQueue
from vmm.devices.virtio.segments import first, gather, scatter, take_front, total
from vmm.memory.lending import READ, WRITE, AddressSpace, Endpoint

F_INPUT_RANGE, F_DOMAIN_RANGE, F_MAP_UNMAP = 1 << 0, 1 << 1, 1 << 2
F_PROBE, F_BYPASS_CONFIG = 1 << 4, 1 << 6

REQUESTS, EVENTS = 0, 1
QUEUE_SIZE = 256

T_ATTACH, T_DETACH, T_MAP, T_UNMAP, T_PROBE = 1, 2, 3, 4, 5
S_OK, S_UNSUPP, S_DEVERR, S_INVAL, S_RANGE, S_NOENT, S_FAULT, S_NOMEM = 0, 2, 3, 4, 5, 6, 7, 8
ATTACH_F_BYPASS = 1 << 0
FAULT_R_DOMAIN, FAULT_R_MAPPING = 1, 2
FAULT_F_ADDRESS = 1 << 8

_CONFIG = struct.Struct("<QQQIIIB3x")  # page sizes, input range, domain range, probe, bypass
PAGE_SIZES = (1 << 64) - PAGE_SIZE
LAST_INPUT = (1 << 48) - 1
LAST_DOMAIN = 0xFFFF

# Interrupt messages are no accesses to memory: the driver is told to leave their window alone.
MSI_WINDOW = Range(0xFEE0_0000, 0x10_0000)
_MSI_END = MSI_WINDOW.end
_PROPERTY = struct.Struct("<HHB3xQQ")  # type, length, subtype, first, last
_RESV_MEM, _RESV_MEM_MSI = 1, 1
PROBE_SIZE = 64

_FAULT = struct.Struct("<B3xII4xQ")  # reason, flags, endpoint, address
MOST_EVENTS = 64
"""Faults that wait for a buffer of the driver; those beyond are dropped."""

_TAIL = struct.Struct("<B3x")
_PROBE_BYTES = PROBE_SIZE + _TAIL.size
_STATUS_OF = {
    0: S_OK,
    errno.EACCES: S_FAULT,
    errno.EFAULT: S_FAULT,
    errno.EINVAL: S_INVAL,
    errno.ENOSPC: S_NOMEM,
    errno.ERANGE: S_RANGE,
}


class Lending(Protocol):
    """What carries requests out (vmm.conversion.lending.Lender). Answers: 0, or an errno."""

    def attach(self, endpoint: Endpoint) -> None: ...
    def lend(self, endpoint: Endpoint, iova: int, area: Range, access: int) -> int: ...
    def take_back(self, endpoint: Endpoint, first: int, last: int) -> tuple[int, bool]: ...
    def close(self, endpoint: Endpoint, *, wait: bool = False) -> AddressSpace | None: ...
    def empty(self, endpoint: Endpoint, space: AddressSpace) -> bool: ...


class IommuStatistics(IoStatistics):
    """What the report says of the IOMMU as a device."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = 0
        """Accesses by devices behind it that were refused."""
        self.events_dropped = 0


class _Request(NamedTuple):
    """A type of request: its header and fields, and the method that carries it out, given them:
    a status, or the steps to one."""

    layout: struct.Struct
    verb: str


_TYPES = {
    T_ATTACH: _Request(struct.Struct("<4xIII4s"), "_attach"),  # domain, endpoint, flags
    T_DETACH: _Request(struct.Struct("<4xII8x"), "_detach"),  # domain, endpoint
    T_MAP: _Request(struct.Struct("<4xIQQQI"), "_map"),  # domain, first, last, physical, flags
    T_UNMAP: _Request(struct.Struct("<4xIQQ4s"), "_unmap"),  # domain, first, last
    T_PROBE: _Request(struct.Struct("<4xI64x"), "_probe"),  # endpoint
}
_LARGEST = max(request.layout.size for request in _TYPES.values())


class VirtioIommu(VirtioDevice):
    """Translates for the endpoints that it was told of; `lending` is set before the guest runs."""

    device_id = 23
    pci_class = 0x080600  # IOMMU
    queue_sizes: Sequence[int] = (QUEUE_SIZE, QUEUE_SIZE)
    features = F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE | F_BYPASS_CONFIG
    prompt = True
    concurrent = True  # faults are told of while a request waits for a device

    statistics: IommuStatistics

    def __init__(self) -> None:
        super().__init__()
        self.statistics = IommuStatistics()
        self.lending: Lending | None = None
        self._kinds = {
            kind: (made.layout.size, made.layout.unpack_from, getattr(self, made.verb))
            for kind, made in _TYPES.items()
        }
        self._endpoints: dict[int, Endpoint] = {}
        self._domains: dict[int, Endpoint] = {}
        # Domains that have ended, whose pages are on their way back.
        self._ending: list[tuple[Endpoint, AddressSpace]] = []
        self._events: deque[bytes] = deque()
        # Where this turn's answers go (gpa, size, gpa, size...), and they themselves.
        self._statuses: list[int] = []
        self._tails = b""

    def endpoint(self, name: str, number: int) -> Endpoint:
        """The device of that name is behind this IOMMU, with that number in requests."""
        made = self._endpoints[number] = Endpoint(name, number)
        made.fault = self._faulted
        return made

    # --- the transport's side ---

    def config(self) -> bytes:
        """struct virtio_iommu_config (5.13.4); bypass is 0 whatever the driver writes."""
        return _CONFIG.pack(PAGE_SIZES, 0, LAST_INPUT, 0, LAST_DOMAIN, PROBE_SIZE, 0)

    def state(self) -> State:
        """What is lent, and to whom, is not saved."""
        raise NotSaved("--iommu: a machine with a virtual IOMMU can't be saved; run without it")

    def reset(self) -> None:
        """No endpoint is attached to a domain any more (5.13.5); waits for their accesses."""
        super().reset()
        self._events.clear()
        for endpoint in self._domains.values():
            assert self.lending is not None
            space = self.lending.close(endpoint, wait=True)
            if space is not None:
                self._ending.append((endpoint, space))
        self._domains = {}
        while self._ending:
            assert self.lending is not None
            if not self.lending.empty(*self._ending[-1]):
                self._ending.pop()

    def process(self, queue_index: int) -> bool:
        queue = self._queues[queue_index]
        if queue_index == EVENTS:
            return self._tell(queue)
        self._statuses, self._tails = [], b""
        used: list[tuple[int, int]] = []
        try:
            if self.go_on(queue, used):
                chains = queue.take()
                answer = partial(self._answer, queue.budget, self._heads(chains))
                self.answer_these(queue, chains, answer, used)
        except EXPECTED:
            queue.publish(used, self._statuses, self._tails)
            raise
        return queue.publish(used, self._statuses, self._tails)

    # --- requests ---

    def _heads(self, chains: list[Chain]) -> dict[int, bytes]:
        """The headers of all requests by one call, where that can be had, by chain."""
        memory = self._memory
        if len(chains) < 2 or not hasattr(memory, "read_many"):
            return {}
        pieces: list[int] = []
        found: dict[int, bytes] = {}
        for chain in chains:
            if len(chain.readable) != 1:
                return {}
            gpa, size = chain.readable[0]
            pieces += (gpa, min(size, _LARGEST))
        try:
            data = memory.read_many(pieces)  # type: ignore[union-attr]  # it has been asked
        except EXPECTED:
            return {}  # one by one: those before the bad one are carried out
        at = 0
        for chain, size in zip(chains, pieces[1::2], strict=True):
            found[chain.head] = bytes(data[at : at + size])
            at += size
        return found

    def _answer(self, budget: Budget, heads: dict[int, bytes], chain: Chain) -> int | Work:
        """One request. What has no room for its answer, or is of no known type, goes back with
        nothing written (5.13.6)."""
        memory = self._memory
        assert memory is not None
        self.statistics.requests += 1
        budget.spend(2)
        _, readable, writable = chain
        head = heads.get(chain.head) if heads else None
        if head is None:
            head = gather(memory, first(readable, _LARGEST)) if readable else b""
        kind = self._kinds.get(head[0]) if head else None
        room = writable[0][1] if len(writable) == 1 else total(writable)
        if kind is None or room < _TAIL.size:
            self.statistics.errors += 1
            return 0
        size, fields_of, verb = kind
        if len(head) < size:
            self.statistics.errors += 1
            return 0
        fields = fields_of(head)
        if head[0] == T_PROBE:
            return self._probe(chain, room, *fields)
        answer: int | Work = verb(budget, *fields)
        if isinstance(answer, int):
            return self._end(chain, answer)
        return self._in_steps(chain, answer)

    def _in_steps(self, chain: Chain, steps: Work) -> Work:
        status = yield from steps
        return self._end(chain, status)

    def _end(self, chain: Chain, status: int) -> int:
        assert self._memory is not None
        self.statistics.errors += status != S_OK
        gpa, size = chain.writable[0]
        if size >= _TAIL.size:  # it goes with the used ring
            self._statuses += (gpa, _TAIL.size)
            self._tails += _TAIL.pack(status)
            return _TAIL.size
        return scatter(self._memory, first(chain.writable, _TAIL.size), _TAIL.pack(status))

    def _attach(
        self, budget: Budget, domain: int, number: int, flags: int, reserved: bytes
    ) -> int | Work:
        if flags & ~ATTACH_F_BYPASS or any(reserved):
            return S_INVAL
        endpoint = self._endpoints.get(number)
        if endpoint is None:
            return S_NOENT
        if domain > LAST_DOMAIN:
            return S_RANGE
        if flags & ATTACH_F_BYPASS:
            return S_UNSUPP  # it would reach all that is shared
        holder = self._domains.get(domain)
        if holder is endpoint:
            return S_OK
        if holder is not None:
            return S_UNSUPP
        if endpoint.space is None:
            return self._join(domain, endpoint)
        return self._change(budget, domain, endpoint)

    def _join(self, domain: int, endpoint: Endpoint) -> int:
        assert self.lending is not None
        self.lending.attach(endpoint)
        self._domains[domain] = endpoint
        return S_OK

    def _change(self, budget: Budget, domain: int, endpoint: Endpoint) -> Work:
        """ATTACH of an endpoint that is in another domain: a DETACH first."""
        status = yield from self._leave(budget, endpoint)
        return status if status != S_OK else self._join(domain, endpoint)

    def _detach(self, budget: Budget, domain: int, number: int) -> int | Work:
        endpoint = self._endpoints.get(number)
        if endpoint is None:
            return S_NOENT
        if self._domains.get(domain) is not endpoint:
            return S_INVAL
        return self._leave(budget, endpoint)

    def _leave(self, budget: Budget, endpoint: Endpoint) -> Work:
        """The endpoint's domain ends, with all that is mapped in it."""
        lending = self.lending
        assert lending is not None
        space = lending.close(endpoint)
        if space is None:
            return S_DEVERR
        self._domains = {d: e for d, e in self._domains.items() if e is not endpoint}
        self._ending.append((endpoint, space))  # a reset goes on with it, and drops this request
        while lending.empty(endpoint, space):
            if not budget.spend(64):
                yield
        self._ending.pop()
        return S_OK

    def _map(
        self, budget: Budget, domain: int, start: int, last: int, physical: int, flags: int
    ) -> int:
        endpoint = self._domains.get(domain)
        if flags & ~(READ | WRITE) or not flags:
            return S_INVAL
        if endpoint is None:
            return S_NOENT
        size = last + 1 - start
        if (start | size | physical) & (PAGE_SIZE - 1) or size <= 0 or last > LAST_INPUT:
            return S_RANGE
        if last >= MSI_WINDOW.start and start < _MSI_END:
            return S_INVAL
        assert self.lending is not None
        answer = self.lending.lend(endpoint, start, Range(physical, size), flags)
        return _STATUS_OF.get(answer, S_DEVERR)

    def _unmap(
        self, budget: Budget, domain: int, start: int, last: int, reserved: bytes
    ) -> int | Work:
        endpoint = self._domains.get(domain)
        if any(reserved):
            return S_INVAL
        if endpoint is None:
            return S_NOENT
        if last < start:
            return S_RANGE
        assert self.lending is not None
        answer, more = self.lending.take_back(endpoint, start, last)
        if not more:
            return S_DEVERR if answer == errno.EACCES else _STATUS_OF.get(answer, S_DEVERR)
        return self._unmap_in_steps(budget, endpoint, start, last)

    def _unmap_in_steps(self, budget: Budget, endpoint: Endpoint, start: int, last: int) -> Work:
        assert self.lending is not None
        while True:
            if not budget.spend(64):
                yield
            answer, more = self.lending.take_back(endpoint, start, last)
            if not more:
                return S_DEVERR if answer == errno.EACCES else _STATUS_OF.get(answer, S_DEVERR)

    def _probe(self, chain: Chain, room: int, number: int) -> int:
        assert self._memory is not None
        if room < _PROBE_BYTES:
            self.statistics.errors += 1
            _, tail = take_front(chain.writable, room - _TAIL.size) if room > 4 else ([], [])
            scatter(self._memory, tail or chain.writable, _TAIL.pack(S_INVAL))
            return room
        known = number in self._endpoints
        window = _PROPERTY.pack(
            *(_RESV_MEM, _PROPERTY.size - 4, _RESV_MEM_MSI),
            *(MSI_WINDOW.start, MSI_WINDOW.end - 1),
        )
        properties = (window if known else b"").ljust(PROBE_SIZE, b"\0")
        self.statistics.errors += not known
        status = _TAIL.pack(S_OK if known else S_NOENT)
        return scatter(self._memory, chain.writable, properties + status)

    # --- faults ---

    def _faulted(self, endpoint: Endpoint, iova: int, access: int) -> None:
        """An endpoint was refused an access; on whatever thread."""
        self.statistics.add("faults", 1)
        if len(self._events) >= MOST_EVENTS:
            self.statistics.add("events_dropped", 1)
            return
        reason = FAULT_R_DOMAIN if endpoint.space is None else FAULT_R_MAPPING
        flags = FAULT_F_ADDRESS | access
        address = iova & 0xFFFF_FFFF_FFFF_FFFF
        self._events.append(_FAULT.pack(reason, flags, endpoint.number, address))
        self.wake(EVENTS)

    def _tell(self, queue: SplitQueue) -> bool:
        """Faults to the driver, one a buffer; one that is too small for it gets nothing."""
        assert self._memory is not None
        used: list[tuple[int, int]] = []
        try:
            while self._events and (chains := queue.take(1)):
                (chain,) = chains
                event = self._events.popleft()
                fits = total(chain.writable) >= len(event)
                used.append(
                    (chain.head, scatter(self._memory, chain.writable, event) if fits else 0)
                )
        except EXPECTED:
            queue.publish(used)
            raise
        if not self._events:
            queue.more = False  # buffers that are left are for later faults
        return queue.publish(used)


def translates_for(device: VirtioDevice) -> bool:
    """Whether a machine's IOMMU stands before the device: not before itself, nor before one whose
    drivers name physical pages (a balloon)."""
    return not device.may_decline and not isinstance(device, VirtioIommu)
