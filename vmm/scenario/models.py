"""What conversions cost on hosts of several kinds, learnt from traces of runs on them."""

from __future__ import annotations

import json
import os
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from vmm.core.errors import UsageError
from vmm.core.near import did_you_mean
from vmm.trace.cost import CostModel, Line, learn, requests_of
from vmm.trace.reader import Trace

_FILE = Path(__file__).with_name("data") / "models.json"
DEFAULT = "lab-svm"


def names() -> list[str]:
    """The host kinds that there are models of."""
    return sorted(_known())


def facts(name: str) -> dict[str, Any]:
    """How a host kind's model was made, and its numbers. Raises UsageError."""
    known = _known()
    if name not in known:
        remedy = did_you_mean(name, known) or f"there are {', '.join(sorted(known))}"
        raise UsageError(f"no cost model {name}; {remedy}, or give the folder of a trace")
    return dict(known[name])


def find(spec: str | None = None) -> CostModel:
    """The model of a host kind, by its name, or learnt from a trace, by its folder; by default
    that of DEFAULT. Raises UsageError."""
    if spec is not None and (os.sep in spec or spec.startswith(".") or os.path.isdir(spec)):
        return learnt_from(spec)
    found = facts(spec or DEFAULT)
    return CostModel(
        Line(**found["share"]), Line(**found["unshare"]), found["nothing_ns"],
        found["nothing_requests"],
    )  # fmt: skip


def learnt_from(path: str) -> CostModel:
    """A model of the host on which a trace was recorded, from its requests' latencies.

    Raises UsageError for what is no trace, and for one without a conversion.
    """
    with closing(Trace(path)) as trace:
        model = learn(trace, requests_of(trace))
    if not model.share.requests and not model.unshare.requests:
        raise UsageError(f"{path}: no conversion was carried out in it; it says nothing of costs")
    return model


@cache
def _known() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(_FILE.read_text())["models"]
    return found
