"""Writes conversions into a trace."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import PageState
from vmm.policy import Decision
from vmm.policy.decisions import word_of
from vmm.trace.layout import DECISIONS, DIRECTIONS, HOST, LARGEST, NO_ANSWER
from vmm.trace.layout import Kind as Traced
from vmm.trace.recorder import Recorder


class LendingTrace:
    """A LendingObserver: a row for each request to lend private pages, and one for their return."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def lent(self, device: str, area: Range, access: int, answer: int, began: int) -> None:
        detail = self._recorder.name(device) | self._recorder.name(DIRECTIONS[access]) << 16
        self._recorder.record(Traced.LEND, HOST, began, *area, detail, answer)

    def returned(self, device: str, area: Range, since: int) -> None:
        self._recorder.record(Traced.RETURN, HOST, since, *area, self._recorder.name(device))


class ConversionTrace:
    """A ConversionObserver: one row for each request, and one for each range that changes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def answered(
        self,
        request: ConversionRequest,
        decision: Decision | None,
        decided_by: str | None,
        answer: int | None,
        started: int,
    ) -> None:
        word = word_of(decision)
        detail = self._recorder.name(request.doorbell)
        if decided_by is not None:
            detail |= self._recorder.name(decided_by) << 16
        self._recorder.record(
            Traced.SHARE if request.kind is Kind.SHARE else Traced.UNSHARE,
            min(request.vcpu, HOST),
            started,
            # The guest may ask for ranges of any length.
            min(request.gpa, LARGEST),
            min(max(request.pages, 0) * PAGE_SIZE, LARGEST),
            detail,
            NO_ANSWER if answer is None else -answer,
            DECISIONS.index(word),
        )

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        for area in areas:
            self._recorder.record(
                Traced.STATE, HOST, began, *area, self._recorder.name(state.value)
            )
