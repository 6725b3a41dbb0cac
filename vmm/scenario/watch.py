"""Says who has not returned: neither a hook nor a scenario can be stopped from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmm.core.errors import tell
from vmm.core.lean_typing import Protocol

SILENT_SECONDS = 3.0
"""How long a hook, or a scenario between two steps, may take before a line says which it is."""


class Watched(Protocol):
    """A run: `steps` grows while it gets on."""

    steps: int

    @property
    def silent(self) -> str: ...


class Watch:
    """Looks at all runs of this process, on one thread, which is there while there are any."""

    def __init__(self, seconds: float = SILENT_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[Watched, int]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, run: Watched) -> Iterator[None]:
        """Within the block one line says so when the run stands still for so long."""
        with self._lock:
            self._seen[id(run)] = (run, -1)
            # After a fork the thread is the parent's alone.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="scenarios", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._seen.pop(id(run), None)

    def _look(self) -> None:
        while True:
            time.sleep(self._seconds)
            with self._lock:
                if not self._seen:
                    self._thread = None
                    return
                still = self._standing_still()
            for run in still:
                tell(f"{run.silent} has not returned for {self._seconds:g} s; Ctrl-C ends the run")

    def _standing_still(self) -> list[Watched]:
        """Those that are where they were at the last look, once each; with the lock held."""
        still = [run for run, steps in self._seen.values() if run.steps == steps]
        self._seen = {
            key: (run, run.steps) for key, (run, steps) in self._seen.items() if run.steps != steps
        }
        return still


WATCH = Watch()
