"""Runs cases in cells, each under a watchdog, and says how each went."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from vmm.conversion.matrix import NEEDS
from vmm.core.errors import HostError, one_line
from vmm.selftest.case import Case, Cell, Failed, Skipped
from vmm.selftest.entries import Combination, combinations
from vmm.selftest.platform import Platform
from vmm.selftest.rig import Rig

FORMAT = 1
"""Version of the JSON; its keys stay, new ones may come."""

WATCHDOG_SECONDS = 60.0
"""How long a case may take before its guests are stopped."""

Status = Literal["pass", "fail", "skip"]


class Result(NamedTuple):
    """How one case went in one cell. `reason`: why it failed or was skipped."""

    case: Case
    combination: Combination
    status: Status
    reason: str
    seconds: float

    def as_json(self) -> dict[str, object]:
        return {
            "case": self.case.name,
            "title": self.case.title,
            "scheme": self.combination.scheme,
            "backing": self.combination.backing,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 4),
        }


def lacking(platform: Platform, combination: Combination) -> str | None:
    """Why this host doesn't have a combination, or None."""
    try:
        Rig(platform, combination, pages=1).close()
    except (HostError, OSError, ValueError) as error:
        needs = NEEDS.get(combination.scheme) or NEEDS.get(combination.backing)
        text = one_line(str(error))
        return f"{text}; {needs}" if needs else text
    return None


def run_case(platform: Platform, combination: Combination, case: Case) -> Result:
    """Run one case in one cell. Never raises for what the case finds."""
    cell = Cell(platform, combination)
    started = time.monotonic()
    watchdog = threading.Timer(WATCHDOG_SECONDS, cell.interrupt)
    watchdog.daemon = True
    watchdog.start()
    status: Status = "pass"
    reason = ""
    try:
        case.run(cell)
    except Skipped as skipped:
        status, reason = "skip", str(skipped)
    except Failed as failure:
        status, reason = "fail", str(failure)
    except Exception as error:  # of pyvmm or of the host: a failure either way
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        status, reason = "fail", f"{type(error).__name__}: {error} ({place})"
    finally:
        watchdog.cancel()
        cell.close()
    return Result(case, combination, status, one_line(reason), time.monotonic() - started)


def run_matrix(
    platform: Platform, cases: Sequence[Case], cells: Sequence[Combination] | None = None
) -> Iterator[Result]:
    """Every case in every cell, cell by cell."""
    for combination in combinations() if cells is None else cells:
        missing = lacking(platform, combination)
        for case in cases:
            if missing is not None:
                yield Result(case, combination, "skip", missing, 0.0)
            else:
                yield run_case(platform, combination, case)


def as_json(results: Sequence[Result]) -> dict[str, object]:
    """Plain data for `--json`."""
    counts = dict.fromkeys(("pass", "fail", "skip"), 0)
    for result in results:
        counts[result.status] += 1
    return {
        "format": FORMAT,
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "summary": counts,
        "results": [result.as_json() for result in results],
    }
