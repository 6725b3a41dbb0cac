"""Runs a scenario: its vCPUs in the order of their times, each step's answer sent back to it.

Time is the scenario's: what its waits take, and what the cost model says that requests take.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from heapq import heappop, heappush
from random import Random
from typing import Any, NamedTuple

from vmm.conversion.transaction import Converter
from vmm.core.errors import AccessDenied, GuestMemoryError, UsageError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range, page_align_down, page_align_up
from vmm.exits.outcome import FAILED, KILLED, POWEROFF
from vmm.memory.guest_memory import PageState
from vmm.policy import (
    Allow,
    Convert,
    Decision,
    Defer,
    Deny,
    End,
    Kill,
    Partial,
    Policy,
    PolicyKill,
)
from vmm.policy.arguments import require_hooks
from vmm.policy.loader import load_policy
from vmm.replay.replay import MOST_REFUSALS, Refusal, counted
from vmm.scenario.definition import Scenario, ScenarioError, Steps
from vmm.scenario.guest import Guest, Heap
from vmm.scenario.memory import ModelMemory, ModelScheme
from vmm.scenario.models import find as find_model
from vmm.scenario.steps import Discard, Fault, Io, Share, Step, Unshare, Wait
from vmm.scenario.watch import WATCH
from vmm.trace.cost import CostModel
from vmm.trace.layout import DECISIONS, LARGEST

MOST_STEPS = 5_000_000
"""A scenario that has done so much is taken to loop for ever: minutes of work."""
MOST_SECONDS = 1e9
"""The longest that a scenario's own time may go on: 30 years."""
_DOORBELL = "hypercall"
_FAULTS_AT_ONCE = 8
"""Tries of one access: the first may be let go without a conversion, when others have asked."""
_WORDS: dict[type[Decision | None], str] = dict(
    zip((type(None), Allow, Deny, Partial, Defer, Convert, Kill), DECISIONS, strict=True)
)
"""Decisions as a trace has them."""


class Ended(NamedTuple):
    """When (seconds) and why the run ended before the scenario was through."""

    s: float
    why: str


class Result(NamedTuple):
    """What became of a scenario."""

    scenario: str
    seed: int
    figures: dict[str, float]
    """The keys of `pyvmm replay --json`'s "replayed"."""
    ended: Ended | None
    """None: the scenario came to its end."""
    refused: list[Refusal]
    """The first of the requests that the guest didn't get."""
    duration_ns: int
    """Of the scenario's own time."""
    steps: int
    io: dict[str, int]
    """Accesses of devices: "allowed", "denied" by a policy, "refused" as private or no RAM."""


def run(
    scenario: Scenario,
    policies: Sequence[Policy | str] = (),
    *,
    seed: int = 0,
    parameters: Mapping[str, Any] | None = None,
    model: CostModel | str | None = None,
    most_steps: int = MOST_STEPS,
) -> Result:
    """Put a scenario to policies (instances, or MODULE:CLASS, which are made without arguments).

    `model`: what requests cost, or of which host kind or trace (`vmm.scenario.models.find`). The
    same arguments give the same result, unless a policy or the scenario has other sources.

    Raises ScenarioError for a scenario that can't be run, PolicyError for a policy that raises or
    answers what is none, UsageError for other arguments.
    """
    asked = [load_policy(each) if isinstance(each, str) else each for each in policies]
    for policy in asked:
        if not isinstance(policy, Policy):
            raise UsageError(f"{policy!r} is not an instance of a subclass of vmm.policy.Policy")
        require_hooks(policy)
    if not isinstance(model, CostModel):
        model = find_model(model or scenario.model)
    given = scenario.bound(parameters or {})
    with closing(_Run(scenario, asked, seed, model, most_steps)) as running:
        with WATCH.over(running):
            running.go(given)
        return running.result()


class _Vcpu:
    """One vCPU's steps, and where in time it is: seconds."""

    __slots__ = ("answer", "at", "number", "steps")

    def __init__(self, number: int, steps: Steps) -> None:
        self.number = number
        self.steps = steps
        self.at = 0.0
        self.answer: int | None = None  # what a generator is started with


class _Run:
    """One pass of a scenario through policies; `go` may be called once."""

    def __init__(
        self,
        scenario: Scenario,
        policies: Sequence[Policy],
        seed: int,
        model: CostModel,
        most_steps: int,
    ) -> None:
        self.scenario = scenario
        self.steps = 0
        self._seed = seed
        self._model = model
        self._costs = {Kind.SHARE: model.share[:2], Kind.UNSHARE: model.unshare[:2]}
        self._nothing = model.nothing
        self._most_steps = most_steps
        self._now = 0.0
        self._wake = math.inf
        self._memory = ModelMemory(scenario.ram, scenario.private)
        self.converter = Converter(
            self._memory,
            ModelScheme(),
            *policies,
            clock=lambda: self._now,
            wake_at=self._wake_at,
            observer=self,
        )
        self._watchers: dict[str, Callable[[Range, bool, str | None], None] | None] = {}
        self._io = dict.fromkeys(("allowed", "denied", "refused"), 0)
        self._ended: Ended | None = None
        self._exit = End(POWEROFF, "the scenario is through")
        self._refused: list[Refusal] = []
        self._decisions: dict[type[Decision | None], int] = dict.fromkeys(_WORDS, 0)
        self._partial = 0
        self._conversions = 0
        self._converted_bytes = 0
        self._late_discards = 0
        self._guest_ns = 0.0
        self._host_ns = 0.0
        self._changed = 0
        self._took_ns = 0.0
        self._settling = False
        self._shared = self._peak = self._memory.shared_bytes
        self._shared_since = 0.0
        self._byte_seconds = 0.0
        self._deferred = 0
        self._deferred_byte_seconds = 0.0
        self._vcpus: list[_Vcpu] = []

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
        self._decisions[decision.__class__] += 1
        changed = self._changed
        if changed:
            self._conversions += 1
            self._converted_bytes += changed
            fixed, per_byte = self._costs[request[0]]
            took = fixed + per_byte * changed
        else:
            took = self._nothing
        self._took_ns = took
        self._guest_ns += took
        if answer:
            word = _WORDS[decision.__class__]
            self._partial += word == "partial"
            if len(self._refused) < MOST_REFUSALS:
                kind, gpa, pages = request[:3]
                self._refused.append(
                    Refusal(
                        round(self._now * 1e9), kind.value, gpa, pages * PAGE_SIZE, word,
                        decided_by, -answer,
                    )
                )  # fmt: skip

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        """Part of being a ConversionObserver."""
        now = self._now
        passed = now - self._shared_since
        self._byte_seconds += self._shared * passed
        self._shared_since = now
        if self._deferred or state is PageState.DEFERRED:
            self._deferred_byte_seconds += self._deferred * passed
            self._deferred = self._memory.deferred_bytes
        self._shared = shared = self._memory.shared_bytes
        self._peak = max(self._peak, shared)
        size = areas[0][1] if len(areas) == 1 else sum(area.size for area in areas)
        if self._settling:
            self._late_discards += len(areas)
            self._host_ns += self._model.late_discard(size)
        elif state is not PageState.DEFERRED:  # what is put off costs the guest nothing
            self._changed += size

    @property
    def silent(self) -> str:
        """Who has the turn: a policy's hook, or the scenario."""
        name = self.scenario.name
        return self.converter.undecided or f"scenario {name}, step {self.steps + 1},"

    # -- the run ------------------------------------------------------------------------------

    def go(self, given: Mapping[str, Any]) -> None:
        """The whole run. Raises ScenarioError, PolicyError."""
        hooks, view = self.converter.hooks, self.converter.view
        try:
            hooks.boot(view)
            self._start_vcpus(given)
            self._take_steps()
        except PolicyKill as kill:
            self._end(str(kill), KILLED)
        hooks.exit(self._exit, view)

    def _end(self, why: str, how: str) -> None:
        self._ended = Ended(self._now, why)
        self._exit = End(how, why)

    def _start_vcpus(self, given: Mapping[str, Any]) -> None:
        scenario = self.scenario
        heap, common = Heap(scenario.ram), dict[str, Any]()
        for number in range(scenario.cpus):
            rng = Random(f"{self._seed}/{number}")
            guest = Guest(scenario.ram, number, scenario.cpus, rng, lambda: self._now, heap, common)
            self._vcpus.append(_Vcpu(number, scenario.start(guest, given)))

    def _take_steps(self) -> None:
        ready = [(vcpu.at, vcpu.number) for vcpu in self._vcpus]
        latest = 0.0
        while ready and self._ended is None:
            number = heappop(ready)[1]
            vcpu = self._vcpus[number]
            if self._advance(vcpu, ready[0][0] if ready else math.inf):
                heappush(ready, (vcpu.at, number))
            latest = max(latest, vcpu.at)
        if self._ended is None:
            self._settle_until(latest)
            self._now = latest

    def _advance(self, vcpu: _Vcpu, horizon: float) -> bool:
        """Take the vCPU's steps until another one's turn has come; False: it has none left."""
        send, number, convert = vcpu.steps.send, vcpu.number, self.converter.convert
        answer, at, most = vcpu.answer, vcpu.at, self._most_steps
        try:
            while at <= horizon:
                if self._wake <= at:
                    self._settle_until(at)
                self._now = at
                try:
                    step = send(answer)  # type: ignore[arg-type]  # None starts it
                except StopIteration:
                    return False
                except ScenarioError:
                    raise
                except Exception as error:
                    raise self._error(f"raised {error!r}") from error
                self.steps += 1
                # By class, and nothing called that needn't be: this is what a run's time goes to.
                if type(step) is Share or type(step) is Unshare:
                    try:
                        start, size = step.area
                        if size % PAGE_SIZE or start < 0 or size < 0 or start + size > LARGEST:
                            raise self._area_error(step)
                    except (TypeError, ValueError):
                        raise self._area_error(step) from None
                    kind = Kind.SHARE if type(step) is Share else Kind.UNSHARE
                    self._changed = 0
                    answer = convert(
                        ConversionRequest(kind, start, size // PAGE_SIZE, number, _DOORBELL)
                    )
                    at += self._took_ns * 1e-9
                elif type(step) is Wait:
                    at, answer = self._later(step, at), 0
                elif type(step) is Io:
                    answer = self._device_access(step)
                elif type(step) is Fault:
                    self._took_ns = 0.0
                    answer = self._fault(step, number)
                    at += self._took_ns * 1e-9
                    if answer:
                        return False
                elif type(step) is Discard:
                    answer = self._discard(step)
                else:
                    raise self._error(
                        f"yielded {step!r}, which is no step; yield Share, Unshare, Fault, Io, "
                        "Discard or Wait"
                    )
                if self.steps >= most:
                    raise self._error(
                        f"has made {most} steps and goes on; if it doesn't loop for ever, run it "
                        "with a larger most_steps"
                    )
        finally:
            vcpu.answer, vcpu.at = answer, at
        return True

    def _area_of(self, step: Fault | Io | Discard) -> tuple[int, int]:
        try:
            start, size = step.area
            if start >= 0 and size >= 0 and start + size <= LARGEST:
                return start, size
        except (TypeError, ValueError):
            pass
        raise self._area_error(step)

    def _area_error(self, step: Step) -> ScenarioError:
        of = "whole 4 KiB pages" if isinstance(step, (Share, Unshare)) else "bytes"
        return self._error(f"yielded {step!r}; its area is Range(start, size) of {of}, in 64 bits")

    def _later(self, step: Wait, at: float) -> float:
        try:
            if step.seconds >= 0 and at + step.seconds <= MOST_SECONDS:
                return at + step.seconds
        except TypeError:
            pass
        raise self._error(
            f"yielded {step!r}; give 0 or more seconds, {MOST_SECONDS:g} at most in all"
        )

    def _device_access(self, step: Io) -> int:
        start, size = self._area_of(step)
        device = step.device
        if device not in self._watchers:
            hooks, view = self.converter.hooks, self.converter.view
            self._watchers[device] = hooks.watcher(view, device)
        ask = self._watchers[device]
        try:
            if ask is not None:
                ask(Range(start, size), step.is_write, step.named)
            self._memory.pread(size, start)
        except AccessDenied:
            self._io["denied"] += 1
            return -errno.EACCES
        except GuestMemoryError:
            self._io["refused"] += 1
            return -errno.EFAULT
        self._io["allowed"] += 1
        return 0

    def _discard(self, step: Discard) -> int:
        start, size = self._area_of(step)
        try:
            self._memory.discard(start, size)
        except GuestMemoryError:
            return -errno.EFAULT
        return 0

    def _fault(self, step: Fault, vcpu: int) -> int:
        """An access, tried again until it is served; one that is refused ends the run."""
        start, size = self._area_of(step)
        first, end = page_align_down(start), page_align_up(start + size)
        wanted = (PageState.PRIVATE, PageState.DEFERRED) if step.private else (PageState.SHARED,)
        kind = Kind.UNSHARE if step.private else Kind.SHARE
        answer = 0
        for _ in range(_FAULTS_AT_ONCE):
            states = self._memory.states(Range(first, end - first))
            if states and all(state in wanted for _, state in states):
                return 0
            self._changed = 0
            answer = self.converter.fault(kind, first, end - first, vcpu)
            if answer:
                break
        name = errno.errorcode.get(-answer, str(-answer))
        side = "private" if step.private else "shared"
        self._end(
            f"the guest uses {side} memory at GPA {start:#x}, {size} bytes; the {kind.value} that "
            f"this takes was refused: {name}",
            FAILED,
        )
        return answer or -errno.EFAULT

    def _settle_until(self, limit: float) -> None:
        """Carry out late discards when they are due, as the event loop's timer does."""
        while self._wake <= limit:
            self._now, self._wake = max(self._now, self._wake), math.inf
            self._settling = True
            self.converter.settle()
            self._settling = False

    def _error(self, what: str) -> ScenarioError:
        return ScenarioError(
            f"scenario {self.scenario.name}, step {self.steps + 1}, at {self._now:.6g} s: {what}"
        )

    # -- what came of it ----------------------------------------------------------------------

    def result(self) -> Result:
        decisions = {_WORDS[each]: count for each, count in self._decisions.items()}
        until = self._now
        passed = until - self._shared_since
        byte_seconds = self._byte_seconds + self._shared * passed
        deferred = self._deferred_byte_seconds + self._deferred * passed
        figures: dict[str, float] = {
            **counted(decisions, self._partial),
            "conversions": self._conversions,
            "converted_bytes": self._converted_bytes,
            "late_discards": self._late_discards,
            "lends": 0,
            "returns": 0,
            "lends_refused": 0,
            "lent_bytes_peak": 0,
            "shared_bytes_peak": self._peak,
            "shared_bytes_mean": round(byte_seconds / until) if until else self._shared,
            "deferred_bytes_mean": round(deferred / until) if until else self._deferred,
            "guest_ns": self._guest_ns,
            "host_ns": self._host_ns,
        }
        return Result(
            self.scenario.name, self._seed, figures, self._ended, self._refused,
            round(until * 1e9), self.steps, self._io,
        )  # fmt: skip

    def close(self) -> None:
        for vcpu in self._vcpus:
            with suppress(Exception):  # one that yields, or raises, when it is to end
                vcpu.steps.close()
        self._memory.close()
