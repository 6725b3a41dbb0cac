"""What one probe found out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["yes", "no", "broken", "unknown"]
"""yes: seen working; no: not there, or no use here; broken: offered, but behaves otherwise;
unknown: not tried."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`result` in a few words, `evidence` what was done and seen, `data` the same for programs."""

    status: Status
    result: str
    evidence: str
    data: dict[str, object] = field(default_factory=dict)


def yes(result: str, evidence: str, **data: object) -> Finding:
    return Finding("yes", result, evidence, data)


def no(result: str, evidence: str, **data: object) -> Finding:
    return Finding("no", result, evidence, data)


def broken(result: str, evidence: str, **data: object) -> Finding:
    return Finding("broken", result, evidence, data)


def unknown(evidence: str, result: str = "not probed", **data: object) -> Finding:
    return Finding("unknown", result, evidence, data)
