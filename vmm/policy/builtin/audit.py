"""Audit: writes down what another policy decides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmm.policy import Decision, End, Event, IoEvent, LendEvent, Policy, View
from vmm.policy.builtin.saved import number


class Audit(Policy):
    """Asks `of` (default: allow all) and writes a line of JSON for each decision to `file`.

    --policy vmm.policy.builtin:Audit --policy-arg file=audit.jsonl
        --policy-arg of=vmm.policy.builtin:Quota --policy-arg of.limit=80M
    """

    def __init__(self, file: Path, of: Policy | None = None) -> None:
        self._of = Policy() if of is None else of
        # Line by line: what is decided is on record before it is done.
        self._file = file.open("w", buffering=1, encoding="utf-8")
        self._started = 0.0

    def wants(self, hook: str) -> bool:
        return hook not in ("on_fault", "on_io") or self._of.wants(hook)

    def wrapped_policies(self) -> Sequence[Policy]:
        return (self._of,)

    def on_boot(self, view: View) -> Decision:
        self._started = view.now
        return self._of.on_boot(view)

    def on_save(self, view: View) -> object:
        return {"seconds": view.now - self._started}

    def on_restore(self, state: Any, view: View) -> None:
        self._started = view.now - number(state, "seconds")

    def on_share(self, event: Event, view: View) -> Decision:
        return self._noted(event, view, self._of.on_share(event, view))

    def on_unshare(self, event: Event, view: View) -> Decision:
        return self._noted(event, view, self._of.on_unshare(event, view))

    def on_fault(self, event: Event, view: View) -> Decision:
        return self._noted(event, view, self._of.on_fault(event, view))

    def on_io(self, event: IoEvent, view: View) -> Decision:
        decision = self._of.on_io(event, view)
        start, size = event.area
        what = {"device": event.device, "named": event.named, "write": event.is_write}
        self._write(view, kind="io", gpa=f"{start:#x}", bytes=size, **what, decision=repr(decision))
        return decision

    def on_lend(self, event: LendEvent, view: View) -> Decision:
        return self._noted_lending("lend", event, view, self._of.on_lend(event, view))

    def on_return(self, event: LendEvent, view: View) -> Decision:
        return self._noted_lending("return", event, view, self._of.on_return(event, view))

    def on_exit(self, end: End, view: View) -> None:
        with self._file:
            self._write(view, exit=end.exit, reason=end.reason)
            self._of.on_exit(end, view)

    def _noted(self, event: Event, view: View, decision: Decision) -> Decision:
        self._write(
            view,
            kind=event.kind.value,
            doorbell=event.doorbell,
            gpa=f"{event.area.start:#x}",
            bytes=event.area.size,
            vcpu=event.vcpu,
            decision=repr(decision),
        )
        return decision

    def _noted_lending(
        self, kind: str, event: LendEvent, view: View, decision: Decision
    ) -> Decision:
        self._write(
            view,
            kind=kind,
            device=event.device,
            iova=f"{event.iova:#x}",
            gpa=f"{event.area.start:#x}",
            bytes=event.area.size,
            read=event.may_read,
            write=event.may_write,
            forced=event.forced,
            decision=repr(decision),
        )
        return decision

    def _write(self, view: View, **what: object) -> None:
        line = {"s": round(view.now - self._started, 6)} | what
        self._file.write(json.dumps(line) + "\n")
