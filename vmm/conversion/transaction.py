"""The conversion transaction: validate, ask the policies, quiesce, apply, discard, account, answer.

Every number in a request comes from the guest. A failure at any step puts states, scheme and
accounting back as they were, and the guest gets the errno. A policy may put the discard of an
unshare off (Defer); `settle` makes up for it.

Conversions of different pages by different vCPUs go side by side; those of the same pages one after
another, in the order in which they came. Policies are asked one at a time, and what they have
allowed is begun before the next is asked. Who waits for a device's accesses holds nobody up.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable

from vmm.conversion.accounting import Accounting, Refinements, Tally
from vmm.conversion.scheme import Scheme
from vmm.conversion.view import GuestView
from vmm.core.errors import HostError
from vmm.core.events import FAULT, FROM_HOST, NO_VCPU, ConversionRequest, Kind
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import MOST_RUNS, GuestMemory, PageState
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
from vmm.policy.decisions import CarriedOut
from vmm.policy.hooks import Hooks

if TYPE_CHECKING:
    from vmm.conversion.deferral import DueTimes
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
"""How long a conversion for the host waits for policies and for accesses, and after how long late
discards that found the policies or their pages busy try again."""

LOOP_SECONDS = 0.01
"""How long late discards, which are the device loop's, wait for a policy that is being asked."""

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


class _Word:
    """What the policies said to one request, for an observer."""

    __slots__ = ("by", "decision")

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.by: str | None = None


class _Work:
    """A conversion that has begun: its pages are nobody's until it ends."""

    __slots__ = ("area", "began", "changing", "deferred", "kind", "later", "patience")

    def __init__(
        self, area: Range, kind: Kind, before: list[tuple[Range, PageState]], later: Defer | None
    ) -> None:
        """`before`: the states in which the pages are."""
        self.area = area
        self.kind = kind
        self.later = later
        self.patience = 0.0
        self.began = 0
        settled = _SETTLED[kind]
        if len(before) == 1:
            state = before[0][1]
            self.changing = [] if state in settled else [area]
            self.deferred = [area] if state is PageState.DEFERRED else []
        else:
            self.changing = [run for run, state in before if state not in settled]
            self.deferred = [run for run, state in before if state is PageState.DEFERRED]


class Converter:
    """Carries out share and unshare requests from any vCPU's thread."""

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
        # Held from the order of requests over the policies' answer to the beginning of the
        # conversion, never while it is waited for a device. Taken before `_books`, and `_books`
        # before memory's own lock.
        self._asking = threading.Lock()
        self._turns: list[Range] = []  # requests that wait for others, as they came
        # Counts, late discards, and what is observed; held for moments.
        self._books = threading.Lock()
        self._ended = threading.Condition(self._books)
        self._ends = 0
        self._waiting = 0
        self._one_by_one = None if scheme.side_by_side else threading.Lock()
        # With an observer, it hears of changes in the order in which they happen.
        self._telling = threading.Lock()
        self.accounting = Accounting()
        self.refinements = Refinements()
        self.hooks = Hooks(policies)
        self.view = GuestView(memory, self.accounting, clock)
        self._observer = observer
        self._due: DueTimes | None = None  # made by the first Defer
        self._wake = math.inf
        self._fruitless: dict[int, tuple[ConversionRequest, int]] = {}
        # Who faults has to know of the requests of others.
        self._is_told_of_requests = scheme.converts_on_fault or observer is not None
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
        started = 0 if self._observer is None else time.monotonic_ns()
        self._asking.acquire()
        return self._answer(request, started)

    def convert_for_host(self, kind: Kind, gpa: int, size: int) -> int:
        """`convert` whole pages without the guest's asking, which is not told either.

        -EBUSY where another conversion of these pages is under way, and where a policy or a
        device's access does not come to an end soon: the device loop has to go on.
        """
        request = ConversionRequest(kind, gpa, size // PAGE_SIZE, NO_VCPU, FROM_HOST)
        started = time.monotonic_ns()
        if not self._asking.acquire(timeout=BUSY_SECONDS):
            return -errno.EBUSY
        return self._answer(request, started)

    def _answer(self, request: ConversionRequest, started: int) -> int:
        """`convert`, with `_asking` held, which is given back."""
        word = _Word()
        answer = None
        try:
            answer = self._convert(request, word)
            return answer
        finally:
            if self._is_told_of_requests:
                with self._books:
                    self._requests += 1
                    vcpu = request.vcpu
                    self._requests_by[vcpu] = self._requests_by.get(vcpu, 0) + 1
                    if self._observer is not None:
                        self._observer.answered(request, word.decision, word.by, answer, started)

    def _convert(self, request: ConversionRequest, word: _Word) -> int:
        kind = request.kind
        tally = self.accounting.of(kind)
        is_hosts = request.vcpu == NO_VCPU
        try:
            try:
                tally.calls += 1
                area = self._validate(request)
                if self._turns or self._memory.is_converting(area):
                    self._await_turn(area, is_hosts)
                decision = self.hooks.decide(kind, area, request.vcpu, request.doorbell, self.view)
                word.decision, word.by = decision, self.hooks.decided_by
                if isinstance(decision, (Deny, Kill)):
                    return self._refused(decision, tally)
                work = self._begin(area, kind, decision, is_hosts)
            finally:
                self._asking.release()
            if work is not None:
                self._complete(work, tally)
            if decision.__class__ is not Allow:
                return self._refined(area, kind, decision)
            return 0
        except Refused as refusal:
            self._count_failure(kind)
            return -refusal.errno
        except OSError as error:
            self._count_failure(kind)
            return -(error.errno or errno.EIO)
        except PolicyKill:
            with self._books:
                tally.denied += 1
            raise
        except BaseException:
            self._count_failure(kind)
            raise

    def _refused(self, decision: Deny | Kill, tally: Tally) -> int:
        if isinstance(decision, Kill):
            raise PolicyKill(decision.reason)
        with self._books:
            tally.denied += 1
        return -decision.errno

    def _count_failure(self, kind: Kind) -> None:
        with self._books:
            self.accounting.of(kind).failed += 1

    def _refined(self, area: Range, kind: Kind, decision: Decision) -> int:
        """The answer to a request that was carried out by a decision other than Allow."""
        answer = 0
        # 0 says that all of the range is converted; the guest would act on that.
        if isinstance(decision, Partial) and not all(
            state in _SETTLED[kind] for _, state in self._memory.states(area)
        ):
            answer = -decision.errno
        with self._books:
            if answer:
                self.refinements.partial += 1
            elif isinstance(decision, Convert):
                self.refinements.widened += decision.area != area
        return answer

    # -- order --------------------------------------------------------------------------------

    def _await_turn(self, area: Range, is_hosts: bool) -> None:
        """Wait until no page of `area` is being converted and no earlier request waits for
        one. With `_asking` held, which others may have meanwhile.

        The host's requests wait for nobody. Raises Refused.
        """
        if is_hosts:
            if self._memory.is_converting(area) or any(map(area.overlaps, self._turns)):
                raise Refused(errno.EBUSY, f"{area} is being converted")
            return
        mine = Range(*area)  # known by its identity: two may ask for the same pages
        self._turns.append(mine)
        try:
            while self._has_to_wait(mine):
                with self._books:
                    seen = self._ends
                if not self._has_to_wait(mine):
                    break
                self._asking.release()
                try:
                    self._await_end_after(seen)
                finally:
                    self._asking.acquire()
        finally:
            place = next(n for n, each in enumerate(self._turns) if each is mine)
            del self._turns[place]
            with self._books:
                self._note_end()

    def _has_to_wait(self, mine: Range) -> bool:
        for each in self._turns:
            if each is mine:
                break
            if each.overlaps(mine):
                return True
        return self._memory.is_converting(mine)

    def _await_end_after(self, seen: int) -> None:
        with self._books:
            self._waiting += 1
            try:
                self._ended.wait_for(lambda: self._ends != seen)
            finally:
                self._waiting -= 1

    def _note_end(self) -> None:
        """A conversion has ended, or nobody waits for a turn any more; `_books` held."""
        self._ends += 1
        if self._waiting:
            self._ended.notify_all()

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
        self._asking.acquire()
        try:
            # Who is at these pages already may be the one that has overtaken it.
            self._await_turn(Range(gpa, request.pages * PAGE_SIZE), is_hosts=False)
            overtaken = self._may_be_overtaken(vcpu)
        except BaseException:
            self._asking.release()
            raise
        if overtaken:
            self._asking.release()
            return 0
        return self._answer(request, started)

    def _may_be_overtaken(self, vcpu: int) -> bool:
        """Whether another vCPU's request may have changed the page since this one touched it: to
        act on the fault would undo that. Who is let go on faults again if it meant it."""
        with self._books:
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

    def _require_wanted(self, wide: Range, area: Range, kind: Kind, is_hosts: bool) -> None:
        """Beyond the request there may only be pages that the guest wants in that state.

        A conversion of some of them that is under way is waited for, with `_asking` held: it would
        be another question if others came in between.
        """
        if not self._memory.is_ram(wide):
            raise PolicyError(f"a policy answered Convert({wide}), which is not wholly guest RAM")
        if is_hosts and self._memory.is_converting(wide):
            raise Refused(errno.EBUSY, f"a part of {wide} is being converted")
        while self._memory.is_converting(wide):
            with self._books:
                seen = self._ends
            if self._memory.is_converting(wide):
                self._await_end_after(seen)
        around = (Range(wide.start, area.start - wide.start), Range(area.end, wide.end - area.end))
        for side in around:
            for run, state in self._memory.states(side):
                if state not in _SETTLED[kind]:
                    raise PolicyError(
                        f"a policy answered Convert({wide}) to {kind.value} {area}, but the guest "
                        f"has not asked to {kind.value} {run}, which is {state.value}"
                    )

    # -- a conversion -------------------------------------------------------------------------

    def _begin(self, area: Range, kind: Kind, decision: CarriedOut, is_hosts: bool) -> _Work | None:
        """Take the pages of an allowed request away from everybody; None: nothing is to be done.

        With `_asking` held: since the policies looked, nobody else has begun. Raises PolicyError,
        Refused, or OSError (ENOSPC) where the pages' states would take too many words to tell.
        """
        memory = self._memory
        later: Defer | None = None
        if decision.__class__ is not Allow:
            if isinstance(decision, Partial):
                area, later = decision.area, decision.later
            elif isinstance(decision, Convert):
                self._require_wanted(decision.area, area, kind, is_hosts)
                area = decision.area
            elif isinstance(decision, Defer):
                later = decision
            if memory.in_place:
                later = None  # there is no other side that could be kept
        target = _TARGET[kind] if later is None else PageState.DEFERRED
        before = memory.begin_conversion(area, target)
        try:
            work = _Work(area, kind, before, later)
            if not work.changing and (not work.deferred or later is not None):
                memory.abandon_conversion()
                return None
            if later is not None:
                self._require_room(len(work.changing))
        except BaseException:
            memory.abandon_conversion()
            raise
        patience = decision.patience
        work.patience = self._quiesce_timeout if patience is None else patience
        if is_hosts:
            work.patience = min(work.patience, BUSY_SECONDS)
        if self._observer is not None:
            work.began = time.monotonic_ns()
        return work

    def _require_room(self, runs: int) -> None:
        with self._books:
            count = 0 if self._due is None else len(self._due)
        if count and count + 2 * runs > MOST_RUNS:
            raise OSError(
                errno.ENOSPC, f"{count} runs of pages have late discards; {MOST_RUNS} are the most"
            )

    def _complete(self, work: _Work, tally: Tally) -> None:
        """Carry out what has begun, all of it or nothing. Raises Refused or OSError, undone."""
        memory, area, kind = self._memory, work.area, work.kind
        gone: list[Range] = []
        try:
            if not memory.quiesce(area, work.patience):
                raise Refused(errno.EBUSY, f"host accesses to {area} did not finish")
            if self._one_by_one is None:
                self._take_steps(work, gone)
            else:
                with self._one_by_one:
                    self._take_steps(work, gone)
        except BaseException:
            # What is gone has changed sides: the guest could not have its content back.
            self._finish(_TARGET[kind], gone, work.began, all_of_it=False)
            with self._books:
                tally.bytes += sum(run.size for run in gone)
                self._note_end()
            raise
        later, changing = work.later, work.changing
        # Late discards first: once the pages have their state, the next one may begin with them.
        if later is not None:
            self._put_off(changing, later)
            self._finish(PageState.DEFERRED, changing, work.began, all_of_it=False)
        else:
            if work.deferred:
                self._no_longer_due(area, work.deferred, kind)
            if self._observer is None:
                memory.finish_conversion(_TARGET[kind])
            else:
                self._finish(_TARGET[kind], [area], work.began, all_of_it=True)
        size = changing[0].size if len(changing) == 1 else sum(run.size for run in changing)
        with self._books:
            tally.bytes += size
            self._note_end()

    def _take_steps(self, work: _Work, gone: list[Range]) -> None:
        """Apply and discard; `gone` gets the runs that cannot come back if a later step fails."""
        memory, area, kind = self._memory, work.area, work.kind
        applied = False
        try:
            if work.deferred and kind is Kind.SHARE:
                self._discard_owed(area)
            if work.changing:
                self._scheme.apply(area, kind)
                applied = True
            # Discarding is the one step that can't be undone, so it comes last. One call for the
            # whole range, also over parts that are there already: their other side is empty, and
            # a single call can't stop half way through the runs.
            if memory.in_place:
                for run in work.changing:  # the page itself goes: not those that stay as they are
                    memory.discard_shared(run)
                    gone.append(run)
            elif kind is Kind.SHARE:
                memory.discard_private(area)
            elif work.later is None:
                memory.discard_shared(area)
        except BaseException:
            if applied:
                self._revert(work.changing[len(gone) :], kind)
            raise

    def _finish(self, state: PageState, runs: list[Range], began: int, *, all_of_it: bool) -> None:
        """`runs`, or all pages of the conversion under way, are in `state`, and it is over."""
        part = None if all_of_it else runs
        if self._observer is None:
            self._memory.finish_conversion(state, part)
            return
        with self._telling:
            self._memory.finish_conversion(state, part)
            if runs:
                self._observer.changed(runs, state, began)

    # -- discards that were put off -----------------------------------------------------------

    def settle(self) -> None:
        """Discard shared sides that are due, some at a time, and ask to be woken for the next.

        The guest has had its answer: a discard that fails leaves the pages deferred, which is
        what they are, and is tried again. Waits only shortly for a policy that is being asked,
        which may never answer: the device loop has to go on.
        """
        if not self._asking.acquire(timeout=LOOP_SECONDS):
            self._wake_at(self._clock() + BUSY_SECONDS)
            return
        try:
            due, now = self._due, self._clock()
            if due is None:
                return
            with self._books:
                areas = due.take_expired(now)
            for area in areas:
                self._discard_late(due, area, now)
            with self._books:
                self._wake = due.next()
            if self._wake < math.inf:
                self._wake_at(self._wake)
        finally:
            self._asking.release()

    @property
    def asking(self) -> threading.Lock:
        """Held while policies are asked about what isn't a conversion, and until that is so."""
        return self._asking

    def discard_now(self, area: Range) -> None:
        """Make late discards in `area` at once, those that can be made."""
        with self._asking:
            due = self._due
            if due is None:
                return
            with self._books:
                runs = due.waiting(area)
            for run in runs:
                self._discard_late(due, run, self._clock())

    def _discard_late(self, due: DueTimes, area: Range, now: float) -> None:
        """With `_asking` held, so that nobody begins with the same pages."""
        memory = self._memory
        if memory.is_converting(area):  # by a share, after which it may not be due any more
            with self._books:
                due.retry(area, now + BUSY_SECONDS)
            return
        # One that was under way when these were taken may have ended since.
        with self._books:
            runs = due.waiting(area)
        for run in runs:
            began = 0 if self._observer is None else time.monotonic_ns()
            memory.begin_conversion(run)  # no host access can be under way: refused
            try:
                memory.discard_shared(run)
            except OSError:
                memory.abandon_conversion()
                with self._books:
                    self.refinements.discards_failed += 1
                    due.retry(run, now + RETRY_SECONDS)
            else:
                with self._books:
                    due.clear(run)
                self._finish(PageState.PRIVATE, [run], began, all_of_it=True)

    def _discard_owed(self, area: Range) -> None:
        """Before a share: what the guest may not find again. The guest gave it up long ago, so
        that nothing has to be taken back when a later step fails."""
        if self._due is None:
            return
        with self._books:
            runs = self._due.not_kept(area)
        for run in runs:
            self._memory.discard_shared(run)

    def _put_off(self, runs: list[Range], later: Defer) -> None:
        from vmm.conversion.deferral import RUNS_AT_ONCE, DueTimes  # most runs put nothing off

        for first in range(0, len(runs), RUNS_AT_ONCE):
            with self._books:
                if self._due is None:
                    self._due = DueTimes(Range(0, self._memory.ram[-1].end))
                for run in runs[first : first + RUNS_AT_ONCE]:
                    self._due.put(run, later.until, later.keep)
                    self.refinements.deferred_bytes += run.size
        with self._books:
            earlier = later.until < self._wake
            if earlier:
                self._wake = later.until
        if earlier:
            self._wake_at(later.until)

    def _no_longer_due(self, area: Range, deferred: list[Range], kind: Kind) -> None:
        if self._due is None:
            return
        with self._books:
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
