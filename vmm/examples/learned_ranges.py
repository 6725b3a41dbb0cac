"""Does a guest share the same pages in every boot? Learn from one run, allow only those in others.

--policy vmm.examples.learned_ranges:LearnedRanges --policy-arg file=ranges.json --policy-arg
learn=yes, then the same without learn=yes.
"""

from __future__ import annotations

import json
from pathlib import Path

from vmm.policy import Allow, Decision, Deny, End, Event, Policy, View


class LearnedRanges(Policy):
    """With `learn` all shares pass, and `file` gets their pages; without, only those may pass."""

    def __init__(self, file: Path, learn: bool = False) -> None:
        # Opened now: once the guest runs, pyvmm's sandbox opens no files.
        self._file = file.open("w") if learn else None
        self._pages: set[int] = set()
        for first, count in [] if learn else json.loads(file.read_text()):
            self._pages.update(range(first, first + count))

    def on_share(self, event: Event, view: View) -> Decision:
        pages = range(event.area.start >> 12, event.area.end >> 12)
        if self._file:
            self._pages.update(pages)
        return Allow() if self._pages.issuperset(pages) else Deny()

    def on_exit(self, end: End, view: View) -> None:
        if self._file:
            runs: list[list[int]] = []  # first page, how many
            for page in sorted(self._pages):
                if runs and page == sum(runs[-1]):
                    runs[-1][1] += 1
                else:
                    runs.append([page, 1])
            with self._file:
                json.dump(runs, self._file)
