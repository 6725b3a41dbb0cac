"""How much does a guest expose, and when? One JSON line for each change, to plot as you like.

--policy vmm.examples.exposure_log:ExposureLog --policy-arg file=exposure.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

from vmm.policy import Allow, Decision, End, Event, PageState, Policy, View


class ExposureLog(Policy):
    """Allows everything; writes seconds, what was asked, and the bytes that were shared before."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w", buffering=1, encoding="utf-8")
        self._started: float | None = None

    def on_share(self, event: Event, view: View) -> Decision:
        return self._log(event.kind.value, event.area.size, view)

    def on_unshare(self, event: Event, view: View) -> Decision:
        return self._log(event.kind.value, event.area.size, view)

    def on_exit(self, end: End, view: View) -> None:
        with self._file:
            self._log(f"end: {end.exit}", 0, view)

    def _log(self, what: str, size: int, view: View) -> Decision:
        self._started = view.now if self._started is None else self._started
        shared = view.bytes_in(PageState.SHARED)
        line = {"s": round(view.now - self._started, 6), "what": what, "bytes": size}
        self._file.write(json.dumps({**line, "shared": shared}) + "\n")
        return Allow()
