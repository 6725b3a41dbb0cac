"""The conversion transaction: validate, ask the policy, quiesce, apply, discard, account, answer.

Every number in a request comes from the guest. A failure at any step puts states, scheme and
accounting back as they were, and the guest gets the errno.
"""

from __future__ import annotations

import errno
import threading

from vmm.conversion.accounting import Accounting
from vmm.conversion.scheme import Scheme
from vmm.core.errors import HostError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Decision, Deny, Event, Policy, PolicyError

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
        policy: Policy,
        quiesce_timeout: float = QUIESCE_TIMEOUT,
    ) -> None:
        self._memory = memory
        self._scheme = scheme
        self._policy = policy
        self._quiesce_timeout = quiesce_timeout
        # Conversions are serial, which keeps overlapping requests from several vCPUs simple;
        # device I/O goes on beside them.
        self._lock = threading.Lock()
        self._asked: Event | None = None
        self.accounting = Accounting()

    @property
    def undecided(self) -> str | None:
        """The policy's hook that is being waited for, for a message; None where none is."""
        event = self._asked
        return None if event is None else self._hook_name(event)

    def convert(self, request: ConversionRequest) -> int:
        """Carry out a request; the guest's answer: 0, or a negative errno.

        A range that is (partly) in the wanted state already is no error: what is left to do is
        done, as KVM_SET_MEMORY_ATTRIBUTES does.

        Raises what is not the guest's to handle: PolicyError when the policy breaks, HostError
        when a failed conversion can't be taken back. States are as before then, too.
        """
        with self._lock:
            tally = self.accounting.of(request.kind)
            tally.calls += 1
            try:
                area = self._validate(request)
                decision = self._decide(request, area)
                if isinstance(decision, Deny):
                    tally.denied += 1
                    return -decision.errno
                tally.bytes += self._carry_out(area, request.kind)
            except Refused as refusal:
                tally.failed += 1
                return -refusal.errno
            except OSError as error:
                tally.failed += 1
                return -(error.errno or errno.EIO)
            except BaseException:
                tally.failed += 1
                raise
            return 0

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

    def _decide(self, request: ConversionRequest, area: Range) -> Decision:
        event = Event(request.kind, area, request.vcpu, request.doorbell)
        share = request.kind is Kind.SHARE
        hook = self._policy.on_share if share else self._policy.on_unshare
        self._asked = event
        try:
            decision = hook(event, self._memory)
        except (Exception, SystemExit) as error:
            # An OSError of the policy's own must not reach the guest as if it were an answer, nor
            # a SystemExit the shell as if it were pyvmm's status.
            raise self._blame(event, f"raised {error!r}; --debug shows where") from error
        finally:
            self._asked = None
        if not isinstance(decision, (Allow, Deny)):
            raise self._blame(event, f"returned {decision!r}; return Allow() or Deny()")
        return decision

    def _blame(self, event: Event, what: str) -> PolicyError:
        return PolicyError(f"{self._hook_name(event)} {what}")

    def _hook_name(self, event: Event) -> str:
        return f"policy {type(self._policy).__name__}: on_{event.kind.value} for {event.area}"

    def _carry_out(self, area: Range, kind: Kind) -> int:
        """Convert `area`; the bytes whose state changed. Raises Refused or OSError, undone."""
        memory = self._memory
        target = PageState.SHARED if kind is Kind.SHARE else PageState.PRIVATE
        before = memory.begin_conversion(area)
        changing = [run for run, state in before if state is not target]
        if not changing:
            memory.abandon_conversion()
            return 0
        applied = False
        try:
            if not memory.quiesce(area, self._quiesce_timeout):
                raise Refused(errno.EBUSY, f"host accesses to {area} did not finish")
            self._scheme.apply(area, kind)
            applied = True
            # One call for the whole range, also over parts that are there already: their other
            # side is empty, and a single call can't stop half way through the runs. Discarding
            # is the one step that can't be undone, so it comes last.
            if kind is Kind.SHARE:
                memory.discard_private(area)
            else:
                memory.discard_shared(area)
        except BaseException:
            try:
                if applied:
                    self._revert(changing, kind)
            finally:
                memory.abandon_conversion()
            raise
        memory.finish_conversion(target)
        return sum(run.size for run in changing)

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
