"""Writes conversions into a trace."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.conversion.observer import Answered
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import PageState
from vmm.trace.layout import DECISIONS, HOST, NO_ANSWER
from vmm.trace.layout import Kind as Traced
from vmm.trace.recorder import Recorder


class ConversionTrace:
    """A ConversionObserver: one row for each request, and one for each range that changes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def answered(self, what: Answered) -> None:
        request, decision, by, answer, started = what
        word = "none" if decision is None else type(decision).__name__.lower()
        detail = self._recorder.name(request.doorbell)
        if by is not None:
            detail |= self._recorder.name(by) << 16
        self._recorder.record(
            Traced.SHARE if request.kind is Kind.SHARE else Traced.UNSHARE,
            min(request.vcpu, HOST),
            started,
            request.gpa,
            max(request.pages, 0) * PAGE_SIZE,
            detail,
            NO_ANSWER if answer is None else -answer,
            DECISIONS.index(word),
        )

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        for area in areas:
            self._recorder.record(
                Traced.STATE, HOST, began, *area, self._recorder.name(state.value)
            )
