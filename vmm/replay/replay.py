"""A trace's requests against other policies: the converter that runs guests, over memory that is
only a model. No KVM, no guest.

What is replayed is what the guest asked for, when it asked: it does not react to other answers.
"""

from __future__ import annotations

import errno
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmm.conversion.lending import Lender
from vmm.conversion.schemes.plain import PlainScheme
from vmm.conversion.transaction import Converter
from vmm.core.errors import UsageError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.memory.lending import READ, WRITE, Endpoint, LendingMemory
from vmm.policy import Decision, End, Policy, PolicyKill
from vmm.policy.decisions import word_of
from vmm.trace.arrays import np
from vmm.trace.cost import CostModel, Requests
from vmm.trace.layout import DECISIONS, DIRECTIONS
from vmm.trace.layout import Kind as Traced
from vmm.trace.reader import Trace
from vmm.trace.states import STATES, StateRows, initial_states, is_told

_BATCH = 1 << 14
_IOVAS = 1 << 40
"""How far apart the addresses are that mappings get here: a trace doesn't have the guest's."""
MOST_REFUSALS = 1000
BOTH = READ | WRITE
_CARRIED_OUT = [DECISIONS.index(word) for word in ("allow", "defer", "convert")]


def counted(decisions: Mapping[str, int], partial: int) -> dict[str, int]:
    """How many requests there were, by what policies made of them, as results have it: `decisions`
    by the trace's words, `partial` as many as were cut short."""
    return {
        "requests": sum(decisions.values()),
        "denied": decisions["deny"] + decisions["kill"],
        "partial": partial,
        "invalid": decisions["none"],
        "deferred": decisions["defer"],
        "joined": decisions["convert"],
    }


class ModelBacking(MemfdBacking):
    """A side of memory that holds nothing. Every page is taken to be there, as no trace says which
    are."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "replay")
        self.memory: GuestMemory | None = None
        self.state = PageState.SHARED
        self.asked = False
        """Whether a policy wanted to know the residency."""

    def punch(self, offset: int, size: int) -> None:
        """There is nothing to give back."""

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        self.asked = True
        return 0 if self.memory is None else self.memory.bytes_in(self.state)


class Refusal(NamedTuple):
    """A request that the guest would not have got; times in ns since the guest's start.

    `kind` is share or unshare, or lend or return for what its IOMMU maps and takes back.
    """

    time_ns: int
    kind: str
    gpa: int
    bytes: int
    decision: str
    by: str | None
    """The policy that had it so; None for what is invalid."""
    errno: int


class _Lending(NamedTuple):
    """A mapping that the guest wants for a device, or (no access) wants no more; `since`: when it
    was made, in the trace's ns."""

    device: str
    area: Range
    access: int
    since: int

    @property
    def key(self) -> tuple[str, int, int, int]:
        return (self.device, *self.area, self.since)


class Replay:
    """One pass of a trace's requests through policies; `run` may be called once."""

    def __init__(self, trace: Trace, requests: Requests, policies: Sequence[Policy]) -> None:
        """Raises UsageError for a trace that doesn't say what memory its guest had."""
        if not is_told(trace):
            raise UsageError(
                f"{trace.path} is of a guest that converts pages without telling the host (scheme "
                f"{trace.facts.get('scheme')}); there are no requests to replay"
            )
        initial = initial_states(trace)
        if not any(state for _, _, state in initial):
            raise UsageError(
                f"{trace.path} does not say how the guest's memory began: it ended before the "
                "guest ran, and there is nothing to replay"
            )
        self.initial = initial
        self._trace = trace
        self._requests = requests
        self._now = 0.0
        self._wake = math.inf
        self._memory = _model_memory(initial)
        self.converter = Converter(
            self._memory,
            PlainScheme(),
            *policies,
            clock=lambda: self._now,
            wake_at=self._wake_at,
            observer=self,
        )
        self.lender = Lender(
            self._memory, self.converter, clock=lambda: round(self._now * 1e9), observer=self
        )
        self._endpoints: dict[str, Endpoint] = {}
        # Mappings by what the trace has of them, device and area and when it was made: their IOVAs.
        self._mapped: dict[tuple[str, int, int, int], list[int]] = {}
        self._next_iova = 0
        self.lends = 0
        self.returns = 0
        self.lends_refused = 0
        """Those of `lends` and `returns` that a policy has refused."""
        self.lent_bytes_peak = 0
        """By mappings, as a trace has them: a page of two counts twice."""
        self._lent_bytes = 0
        self.refused: list[Refusal] = []
        """The first MOST_REFUSALS of them."""
        self.refused_requests = 0
        self.partial = 0
        """Those of them that were granted in part."""
        self.decisions = dict.fromkeys(DECISIONS, 0)
        self._changes = array("Q")  # the cells of `changes`: there may be millions
        self.conversions = 0
        self.converted_bytes = 0
        self.late_discards = 0
        self.late_bytes = 0
        self.guest_ns = 0.0
        """What the guest would have waited, by the model."""
        self.host_ns = 0.0
        """What late discards would have cost besides."""
        self.ended: tuple[float, str] | None = None
        """When (s) and why a policy would have ended the run."""
        self._model: CostModel | None = None
        self._changed = 0
        self._settling = False

    # -- the converter's side -----------------------------------------------------------------

    def _wake_at(self, due: float) -> None:
        self._wake = due

    def answered(
        self,
        request: ConversionRequest,
        decision: Decision | None,
        decided_by: str | None,
        answer: int | None,
        started: int,
    ) -> None:
        """Part of being a ConversionObserver."""
        word = word_of(decision)
        self.decisions[word] += 1
        if answer:
            size = request.pages * PAGE_SIZE
            now = round(self._now * 1e9)
            kind = request.kind.value
            self.refused_requests += 1
            self.partial += word == "partial"
            if len(self.refused) < MOST_REFUSALS:
                one = Refusal(now, kind, request.gpa, size, word, decided_by, -answer)
                self.refused.append(one)
        assert self._model is not None
        if self._changed:
            self.conversions += 1
            self.converted_bytes += self._changed
            line = self._model.share if request.kind is Kind.SHARE else self._model.unshare
            self.guest_ns += line.cost(self._changed)
        else:
            self.guest_ns += self._model.nothing

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        """Part of being a ConversionObserver."""
        now, number = round(self._now * 1e9), STATES.index(state.value)
        for area in areas:
            self._changes.extend((now, area.start, area.size, number))
        size = sum(area.size for area in areas)
        if self._settling:
            assert self._model is not None
            self.late_discards += len(areas)
            self.late_bytes += size
            self.host_ns += self._model.late_discard(size)
        elif state is not PageState.DEFERRED:  # what is put off costs the guest nothing
            self._changed += size

    def lent(self, device: str, area: Range, access: int, answer: int, began: int) -> None:
        """Part of being a LendingObserver."""
        if answer:
            self._refused_lending("lend", area)
        else:
            self._lent_bytes += area.size
            self.lent_bytes_peak = max(self.lent_bytes_peak, self._lent_bytes)

    def returned(self, device: str, area: Range, since: int) -> None:
        """Part of being a LendingObserver."""
        self._lent_bytes -= area.size

    def _refused_lending(self, kind: str, area: Range) -> None:
        self.lends_refused += 1
        self.refused_requests += 1
        if len(self.refused) < MOST_REFUSALS:
            now = round(self._now * 1e9)
            one = Refusal(now, kind, area.start, area.size, "deny", None, errno.EACCES)
            self.refused.append(one)

    # -- the replay ---------------------------------------------------------------------------

    def run(self, model: CostModel, until_ns: int) -> None:
        """Replay everything, and what falls due up to `until_ns`. Raises PolicyError."""
        self._model = model
        hooks, view = self.converter.hooks, self.converter.view
        try:
            hooks.boot(view)
            for at, request in self._recorded():
                self._settle_until(at)
                # A vCPU that waited for another's conversion came before it.
                self._now = max(self._now, at)
                self._changed = 0
                if isinstance(request, ConversionRequest):
                    self.converter.convert(request)
                else:
                    self._lend_or_return(request)
            self._settle_until(until_ns / 1e9)
        except PolicyKill as kill:
            self.ended = (self._now, str(kill))
        told = self._trace.facts.get("guest") or {}
        hooks.exit(End(str(told.get("exit")), str(told.get("reason"))), view)

    def _settle_until(self, limit: float) -> None:
        """Carry out late discards when they are due, as the event loop's timer does."""
        while self._wake <= limit:
            self._now, self._wake = max(self._now, self._wake), math.inf
            self._settling = True
            self.converter.settle()
            self._settling = False

    def _lend_or_return(self, asked: _Lending) -> None:
        """What the guest's IOMMU was asked for. What was refused here doesn't come back."""
        endpoint = self._endpoint(asked.device)
        if asked.access:
            self.lends += 1
            start, size = asked.area
            if not size or (start | size) % PAGE_SIZE:
                return  # a damaged trace
            iova, self._next_iova = self._next_iova, self._next_iova + _IOVAS
            if self.lender.lend(endpoint, iova, asked.area, asked.access) == 0:
                self._mapped.setdefault(asked.key, []).append(iova)
            return
        self.returns += 1
        iovas = self._mapped.get(asked.key)
        if not iovas:
            return
        answer, _ = self.lender.take_back(endpoint, iovas[-1], iovas[-1] + _IOVAS - 1)
        if answer:
            self._refused_lending("return", asked.area)
            return
        iovas.pop()
        if not iovas:
            del self._mapped[asked.key]

    def _endpoint(self, device: str) -> Endpoint:
        found = self._endpoints.get(device)
        if found is None:
            found = self._endpoints[device] = Endpoint(device, len(self._endpoints))
            self.lender.attach(found)
        return found

    def _recorded(self) -> Iterator[tuple[float, ConversionRequest | _Lending]]:
        """(seconds, request) in the order in which the converter, and the lender, took them."""
        trace = self._trace
        kinds = trace["kind"]
        lending = np.flatnonzero((kinds == Traced.LEND) | (kinds == Traced.RETURN))
        rows = np.sort(np.concatenate((self._requests.rows, lending)))
        none = DECISIONS.index("none")
        names = ("time_ns", "latency_ns", "kind", "gpa", "bytes", "vcpu", "detail", "decision")
        for start in range(0, len(rows), _BATCH):
            columns = [trace[name][rows[start : start + _BATCH]].tolist() for name in names]
            for at, took, kind, gpa, size, vcpu, detail, decision in zip(*columns, strict=True):
                if kind in (Traced.LEND, Traced.RETURN):
                    device, words = trace.name(detail & 0xFFFF), trace.name(detail >> 16)
                    back = kind == Traced.RETURN
                    # Traces of before directions were recorded have none.
                    access = DIRECTIONS.index(words) if words in DIRECTIONS else 0
                    yield (
                        (at + took if back else at) / 1e9,
                        _Lending(device, Range(gpa, size), 0 if back else access or BOTH, at),
                    )
                    continue
                way = Kind.SHARE if kind == Traced.SHARE else Kind.UNSHARE
                doorbell = trace.name(detail & 0xFFFF)
                # What was invalid stays so, whatever it was: attribute bits are not recorded.
                invalid = int(decision == none)
                yield (
                    at / 1e9,
                    ConversionRequest(way, gpa, size // PAGE_SIZE, vcpu, doorbell, invalid),
                )

    @property
    def changes(self) -> list[tuple[int, int, int, int]]:
        """(time in ns, gpa, bytes, state) of every change."""
        return list(zip(*[iter(self._changes)] * 4, strict=True))

    def state_rows(self) -> StateRows:
        """The changes in the form in which a trace has them."""
        rows = np.frombuffer(self._changes.tobytes(), np.uint64).reshape(-1, 4)
        time, gpa, size, state = rows.T
        return StateRows(time, time, gpa, size, state)

    @property
    def failed_on_host(self) -> int:
        """Requests that the policies had allowed, and a step failed."""
        rows = self._requests.rows
        allowed = np.isin(self._trace["decision"][rows], _CARRIED_OUT)
        return int(np.count_nonzero(allowed & (self._trace["errno"][rows] != 0)))

    @property
    def residency_asked(self) -> bool:
        """Whether a policy asked for what the model has no answer to."""
        sides = (self._memory.shared, self._memory.private)
        return any(isinstance(side, ModelBacking) and side.asked for side in sides)

    def close(self) -> None:
        self._memory.close()


def _model_memory(initial: Sequence[tuple[int, int, int]]) -> LendingMemory:
    ram = [Range(gpa, size) for gpa, size, state in sorted(initial) if state]
    joined: list[Range] = []
    for area in ram:
        if joined and joined[-1].end == area.start:
            joined[-1] = Range(joined[-1].start, joined[-1].size + area.size)
        else:
            joined.append(area)
    private = [Range(gpa, size) for gpa, size, state in initial if STATES[state] == "private"]
    size = joined[-1].end
    shared_side, private_side = ModelBacking(size), ModelBacking(size)
    memory = LendingMemory(joined, shared_side, private_side, private)
    private_side.state = PageState.PRIVATE
    shared_side.memory = private_side.memory = memory
    return memory
