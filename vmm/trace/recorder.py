"""Takes events from any thread into a buffer, and writes them out in batches."""

from __future__ import annotations

import threading
import time
from typing import Any

from vmm.core.errors import tell
from vmm.core.thread_signals import leave_signals_to_the_main_thread
from vmm.trace.layout import MOST_NAME_BYTES, MOST_NAMES, MOST_ROWS, ROW
from vmm.trace.store import TraceStore

FLUSH_SECONDS = 0.5
"""What a kill can cost: events that are younger than this."""
CAPACITY = 8192

_now = time.monotonic_ns
_pack_into = ROW.pack_into


class Recorder:
    """One trace being recorded. `start` begins the periodic flushes, `close` ends it.

    An event costs a clock reading and 48 bytes packed into a buffer that is there already. When
    the disk fails, the trace ends, the user is told, and the guest goes on.
    """

    def __init__(
        self,
        store: TraceStore,
        facts: dict[str, Any],
        *,
        capacity: int = CAPACITY,
        most: int = MOST_ROWS,
    ) -> None:
        """`facts` go into the sidecar, with the first flush. What comes after `most` events is only
        counted: no guest fills a disk with its trace."""
        self._store = store
        self._most_rows = most
        self._facts = {"complete": False, **facts}
        self._origin = _now()
        self._buffer = bytearray(capacity * ROW.size)
        self._spare = bytearray(capacity * ROW.size)
        self._at = 0
        self._end = capacity * ROW.size
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._names: dict[str, int] = {"": 0}
        self._names_known = 0
        self._name_bytes = 0
        self._dropped = 0
        self._failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._flush_now_and_then, name="trace", daemon=True)

    def start(self, **facts: Any) -> None:
        """Time starts now; `facts` join the sidecar's."""
        self._facts |= {"started": time.time(), **facts}
        self._names_known = 0  # has the sidecar written
        self._origin = _now()
        self._thread.start()

    def name(self, text: str) -> int:
        """The number that stands for `text` in a row's detail."""
        known = self._names.get(text)
        if known is not None:
            return known
        with self._lock:
            self._name_bytes += len(text)
            if len(self._names) == MOST_NAMES or self._name_bytes > MOST_NAME_BYTES:
                return 0
            return self._names.setdefault(text, len(self._names))

    def record(
        self,
        kind: int,
        vcpu: int,
        started: int,
        gpa: int = 0,
        size: int = 0,
        detail: int = 0,
        errno: int = 0,
        decision: int = 0,
    ) -> None:
        """One event that began at `started` (time.monotonic_ns) and ends now.

        Numbers must fit their columns: on this way nothing is checked.
        """
        latency = _now() - started
        while True:
            with self._lock:
                at = self._at
                if at < self._end:
                    _pack_into(
                        self._buffer, at, started - self._origin, gpa, size, latency,
                        detail, errno, vcpu, kind, decision,
                    )  # fmt: skip
                    self._at = at + ROW.size
                    return
            self.flush()

    def flush(self) -> None:
        """Write out what there is. The next events go into the other buffer meanwhile."""
        with self._flushing:
            with self._lock:
                full, count = self._buffer, self._at // ROW.size
                self._buffer, self._spare, self._at = self._spare, full, 0
            if self._failed:
                return
            try:
                # Names before the rows that use them.
                if len(self._names) != self._names_known:
                    self._write_sidecar()
                fitting = min(count, self._most_rows - self._store.rows)
                if fitting < count:
                    if not self._dropped:
                        tell(
                            f"--trace: {self._most_rows} events are recorded, and no more; the "
                            "guest goes on"
                        )
                    self._dropped += count - fitting
                    count = fitting
                if count:
                    with memoryview(full) as rows:
                        self._store.append(rows, count)
            except OSError as error:
                self._failed = True
                tell(f"--trace: writing failed, the trace ends here: {error.strerror}")

    def _write_sidecar(self) -> None:
        with self._lock:
            names = list(self._names)
        self._store.write_sidecar({**self._facts, "names": names})
        self._names_known = len(names)

    def _flush_now_and_then(self) -> None:
        leave_signals_to_the_main_thread()
        while not self._closing.wait(FLUSH_SECONDS):
            self.flush()

    def close(self, **ending: Any) -> None:
        """The run is over; `ending` are more facts for the sidecar. Any number of times.

        An event that comes later, from a thread that would not end, is dropped.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.flush()
        if not self._failed:
            self._facts |= {"rows": self._store.rows, **ending}
            if self._dropped:
                self._facts["dropped_events"] = self._dropped
            try:
                self._store.open_columns()  # where nothing has happened
                self._write_sidecar()
            except OSError as error:
                tell(f"--trace: writing failed, the trace has no end: {error.strerror}")
        self._failed = True
        self._store.close()
