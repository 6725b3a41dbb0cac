"""The conversion transaction: validate, ask the policies, quiesce, apply, discard, account, answer.

Every number in a request comes from the guest. A failure at any step puts states, scheme and
accounting back as they were, and the guest gets the errno. A policy may put the discard of an
unshare off (Defer); `settle` makes up for it.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.conversion.accounting import Accounting, Refinements
from vmm.conversion.deferral import DueTimes
from vmm.conversion.scheme import Scheme
from vmm.conversion.view import GuestView
from vmm.core.errors import HostError
from vmm.core.events import FAULT, FROM_HOST, NO_VCPU, ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import (
    Allow,
    Convert,
    Decision,
    Defer,
    Deny,
    Kill,
    Partial,
    Policy,
    PolicyError,
    PolicyKill,
)
from vmm.policy.hooks import Hooks

if TYPE_CHECKING:
    from vmm.conversion.observer import ConversionObserver  # most runs do without

_SETTLED = {
    Kind.SHARE: frozenset({PageState.SHARED}),
    Kind.UNSHARE: frozenset({PageState.PRIVATE, PageState.DEFERRED}),
}
"""The states in which a page already is to the guest what the request wants it to be."""

_TARGET = {Kind.SHARE: PageState.SHARED, Kind.UNSHARE: PageState.PRIVATE}

RETRY_SECONDS = 1.0
"""When a late discard that failed is tried again."""

BUSY_SECONDS = 0.1
"""How long late discards wait for a conversion under way, and after how long they try again."""

FRUITLESS_FAULTS = 1000
"""How often in a row a vCPU may fault on a page that is in the state it wants already: another
vCPU's conversion explains a few, a page that KVM cannot serve goes on for ever."""

QUIESCE_TIMEOUT = 5.0
"""Seconds that a conversion waits for host accesses under way before it fails with EBUSY."""


class Refused(Exception):
    """A request that can't be carried out; `errno` is the guest's answer."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = number


class Converter:
    """Carries out share and unshare requests, one at a time, from any vCPU's thread."""

    def __init__(
        self,
        memory: GuestMemory,
        scheme: Scheme,
        *policies: Policy,
        quiesce_timeout: float = QUIESCE_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        wake_at: Callable[[float], None] = lambda due: None,
        observer: ConversionObserver | None = None,
    ) -> None:
        """`wake_at(due)` is called when `settle` has work at a time earlier than before."""
        self._memory = memory
        self._scheme = scheme
        self._quiesce_timeout = quiesce_timeout
        self._clock = clock
        self._wake_at = wake_at
        # Conversions are serial, which keeps overlapping requests from several vCPUs simple;
        # device I/O goes on beside them.
        self._lock = threading.Lock()
        self.accounting = Accounting()
        self.refinements = Refinements()
        self.hooks = Hooks(policies)
        self.view = GuestView(memory, self.accounting, clock)
        self._observer = observer
        self._decision: Decision | None = None  # on the request under way, once there is one
        self._due: DueTimes | None = None  # made by the first Defer
        self._wake = math.inf
        self._fruitless: dict[int, tuple[ConversionRequest, int]] = {}
        # Requests so far, those of each vCPU, and those of others at a vCPU's last fault.
        self._requests = 0
        self._requests_by: dict[int, int] = {}
        self._others_seen: dict[int, int] = {}

    @property
    def undecided(self) -> str | None:
        """The policy's hook that is being waited for, for a message; None where none is."""
        return self.hooks.waiting_for

    def convert(self, request: ConversionRequest) -> int:
        """Carry out a request; the guest's answer: 0, or a negative errno.

        A range that is (partly) in the wanted state already is no error: what is left to do is
        done, as KVM_SET_MEMORY_ATTRIBUTES does.

        Raises what is not the guest's to handle: PolicyError when the policy breaks, HostError
        when a failed conversion can't be taken back. States are as before then, too. PolicyKill
        when a policy ends the run: the guest gets no answer.
        """
        if self._observer is None:
            with self._lock:
                return self._convert(request)
        started = time.monotonic_ns()
        with self._lock:
            return self._observed(request, started)

    def convert_for_host(self, kind: Kind, gpa: int, size: int) -> int:
        """`convert` whole pages without the guest's asking, which is not told either.

        -EBUSY where another conversion does not end soon: the device loop has to go on.
        """
        request = ConversionRequest(kind, gpa, size // PAGE_SIZE, NO_VCPU, FROM_HOST)
        started = time.monotonic_ns()
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            return -errno.EBUSY
        try:
            return self._observed(request, started)
        finally:
            self._lock.release()

    def _observed(self, request: ConversionRequest, started: int) -> int:
        answer = None
        try:
            answer = self._convert(request)
            return answer
        finally:
            if self._observer is not None:
                by = None if self._decision is None else self.hooks.decided_by
                self._observer.answered(request, self._decision, by, answer, started)

    def _convert(self, request: ConversionRequest) -> int:
        self._requests += 1
        self._requests_by[request.vcpu] = self._requests_by.get(request.vcpu, 0) + 1
        tally = self.accounting.of(request.kind)
        tally.calls += 1
        self._decision = None
        try:
            area = self._validate(request)
            self._decision = decision = self.hooks.decide(
                request.kind, area, request.vcpu, request.doorbell, self.view
            )
            if isinstance(decision, Allow):
                tally.bytes += self._carry_out(area, request.kind, patience=decision.patience)
                return 0
            return self._refine(area, request.kind, decision)
        except Refused as refusal:
            tally.failed += 1
            return -refusal.errno
        except OSError as error:
            tally.failed += 1
            return -(error.errno or errno.EIO)
        except PolicyKill:
            tally.denied += 1
            raise
        except BaseException:
            tally.failed += 1
            raise

    def fault(self, kind: Kind, gpa: int, size: int, vcpu: int) -> int:
        """An access that wants its pages in another state (implicit conversion): `convert` them.

        0: the vCPU may try again. -EOPNOTSUPP where faults ask for nothing, -EFAULT where trying
        again has not helped, else as `convert`.
        """
        if not self._scheme.converts_on_fault:
            return -errno.EOPNOTSUPP
        request = ConversionRequest(kind, gpa, -(-size // PAGE_SIZE), vcpu, FAULT)
        states = self._memory.states(Range(gpa, size))
        if states and all(state in _SETTLED[kind] for _, state in states):
            last, count = self._fruitless.get(vcpu, (request, 0))
            count = count + 1 if last == request else 1
            self._fruitless[vcpu] = (request, count)
            return 0 if count <= FRUITLESS_FAULTS else -errno.EFAULT
        self._fruitless.pop(vcpu, None)
        started = time.monotonic_ns()
        with self._lock:
            if self._may_be_overtaken(vcpu):
                return 0
            return self._observed(request, started)

    def _may_be_overtaken(self, vcpu: int) -> bool:
        """Whether another vCPU's request may have changed the page since this one touched it: to
        act on the fault would undo that. Who is let go on faults again if it meant it."""
        by_others = self._requests - self._requests_by.get(vcpu, 0)
        overtaken = by_others != self._others_seen.get(vcpu, 0)
        self._others_seen[vcpu] = by_others
        return overtaken

    def _validate(self, request: ConversionRequest) -> Range:
        if request.reserved:
            raise Refused(errno.EINVAL, f"reserved attribute bits {request.reserved:#x}")
        if self._memory.private is None:
            raise Refused(errno.EOPNOTSUPP, "this VM has no private memory")
        if request.pages <= 0:
            raise Refused(errno.EINVAL, f"{request.pages} pages")
        if request.gpa % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"GPA {request.gpa:#x} is not page-aligned")
        # Python's integers don't wrap: a product past 64 bits is simply past all RAM.
        area = Range(request.gpa, request.pages * PAGE_SIZE)
        if not self._memory.is_ram(area):
            raise Refused(errno.EINVAL, f"{area} is not wholly guest RAM")
        return area

    def _refine(self, area: Range, kind: Kind, decision: Decision) -> int:
        """Carry out a decision that is no plain Allow; the guest's answer."""
        tally, refinements = self.accounting.of(kind), self.refinements
        if isinstance(decision, Kill):
            raise PolicyKill(decision.reason)
        if isinstance(decision, Deny):
            tally.denied += 1
            return -decision.errno
        if isinstance(decision, Partial):
            tally.bytes += self._carry_out(decision.area, kind)
            # 0 says that all of the range is converted; the guest would act on that.
            if all(state in _SETTLED[kind] for _, state in self._memory.states(area)):
                return 0
            refinements.partial += 1
            return -decision.errno
        if isinstance(decision, Convert):
            self._require_wanted(decision.area, area, kind)
            tally.bytes += self._carry_out(decision.area, kind)
            refinements.widened += decision.area != area
        elif isinstance(decision, Defer):
            tally.bytes += self._carry_out(area, kind, decision)
        return 0

    def _require_wanted(self, wide: Range, area: Range, kind: Kind) -> None:
        """Beyond the request there may only be pages that the guest wants in that state."""
        if not self._memory.is_ram(wide):
            raise PolicyError(f"a policy answered Convert({wide}), which is not wholly guest RAM")
        around = (Range(wide.start, area.start - wide.start), Range(area.end, wide.end - area.end))
        for side in around:
            for run, state in self._memory.states(side):
                if state not in _SETTLED[kind]:
                    raise PolicyError(
                        f"a policy answered Convert({wide}) to {kind.value} {area}, but the guest "
                        f"has not asked to {kind.value} {run}, which is {state.value}"
                    )

    def _carry_out(
        self,
        area: Range,
        kind: Kind,
        later: Defer | None = None,
        patience: float | None = None,
    ) -> int:
        """Convert `area`; the bytes whose state changed. Raises Refused or OSError, undone.

        With `later` the discard waits, and what changes is deferred. `patience`: seconds to wait
        for host accesses under way.
        """
        memory, observer = self._memory, self._observer
        settled = _SETTLED[kind]
        began = 0 if observer is None else time.monotonic_ns()
        before = memory.begin_conversion(area)
        changing = [run for run, state in before if state not in settled]
        deferred = self._deferred_runs(before)
        if not changing and (not deferred or later is not None):
            memory.abandon_conversion()
            return 0
        if memory.in_place:
            later = None  # there is no other side that could be kept
        applied = False
        gone: list[Range] = []
        try:
            if not memory.quiesce(area, self._quiesce_timeout if patience is None else patience):
                raise Refused(errno.EBUSY, f"host accesses to {area} did not finish")
            if deferred and kind is Kind.SHARE:
                self._discard_owed(area)
            if changing:
                self._scheme.apply(area, kind)
                applied = True
            # Discarding is the one step that can't be undone, so it comes last. One call for the
            # whole range, also over parts that are there already: their other side is empty, and
            # a single call can't stop half way through the runs.
            if memory.in_place:
                for run in changing:  # here the page itself goes: not those that stay as they are
                    memory.discard_shared(run)
                    gone.append(run)
            elif kind is Kind.SHARE:
                memory.discard_private(area)
            elif later is None:
                memory.discard_shared(area)
        except BaseException:
            try:
                if applied:
                    self._revert(changing[len(gone) :], kind)
            finally:
                # What is gone has changed sides: the guest could not have its content back.
                memory.finish_conversion(_TARGET[kind], gone)
                self.accounting.of(kind).bytes += sum(run.size for run in gone)
                if gone and observer is not None:
                    observer.changed(gone, _TARGET[kind], began)
            raise
        if later is None:
            state = _TARGET[kind]
            memory.finish_conversion(state)
        else:
            state = PageState.DEFERRED
            memory.finish_conversion(state, changing)
            self._put_off(changing, later)
        if observer is not None:
            observer.changed([area] if later is None else changing, state, began)
        if deferred and later is None:
            self._no_longer_due(area, deferred, kind)
        return sum(run.size for run in changing)

    # -- discards that were put off -----------------------------------------------------------

    def settle(self) -> None:
        """Discard the shared sides that are due, and ask to be woken for the next ones.

        The guest has had its answer: a discard that fails leaves the pages deferred, which is
        what they are, and is tried again. Waits only shortly for a conversion under way: its
        policy may never return, and the device loop has to go on.
        """
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            self._wake_at(self._clock() + BUSY_SECONDS)
            return
        try:
            due, now = self._due, self._clock()
            if due is None:
                return
            for area in due.expired(now):
                began = 0 if self._observer is None else time.monotonic_ns()
                self._memory.begin_conversion(area)  # no host access can be under way: refused
                try:
                    self._memory.discard_shared(area)
                except OSError:
                    self._memory.abandon_conversion()
                    self.refinements.discards_failed += 1
                    due.retry(area, now + RETRY_SECONDS)
                else:
                    self._memory.finish_conversion(PageState.PRIVATE)
                    due.clear(area)
                    if self._observer is not None:
                        self._observer.changed([area], PageState.PRIVATE, began)
            self._wake = due.next()
            if self._wake < math.inf:
                self._wake_at(self._wake)
        finally:
            self._lock.release()

    def _discard_owed(self, area: Range) -> None:
        """Before a share: what the guest may not find again. The guest gave it up long ago, so
        that nothing has to be taken back when a later step fails."""
        if self._due is not None:
            for run in self._due.not_kept(area):
                self._memory.discard_shared(run)

    def _deferred_runs(self, runs: list[tuple[Range, PageState]]) -> list[Range]:
        if self._due is None:
            return []
        return [run for run, state in runs if state is PageState.DEFERRED]

    def _put_off(self, runs: list[Range], later: Defer) -> None:
        if self._due is None:
            self._due = DueTimes(Range(0, self._memory.ram[-1].end))
        for run in runs:
            self._due.put(run, later.until, later.keep)
            self.refinements.deferred_bytes += run.size
        if later.until < self._wake:
            self._wake = later.until
            self._wake_at(later.until)

    def _no_longer_due(self, area: Range, deferred: list[Range], kind: Kind) -> None:
        assert self._due is not None
        self._due.clear(area)
        if kind is Kind.SHARE:
            self.refinements.reclaimed_bytes += sum(run.size for run in deferred)

    def _revert(self, changed: list[Range], kind: Kind) -> None:
        """Take `apply` back where it changed something; the rest was in the wanted state before.

        Raises HostError when KVM refuses: it and the page states disagree from then on.
        """
        for run in changed:
            try:
                self._scheme.revert(run, kind)
            except OSError as error:
                raise HostError(
                    f"a failed {kind.value} of {run} cannot be taken back: {error}; "
                    "the guest cannot go on"
                ) from error
