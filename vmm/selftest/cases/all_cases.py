"""Every case, in the order in which they are shown."""

from __future__ import annotations

from vmm.selftest.case import CASES, Case
from vmm.selftest.cases import (
    concurrency,
    contents,
    faults,
    guest_memfd_file,
    memslots,
    patterns,
    pre_fault,
    protected,
    residency,
    transactions,
)

_ORDER = (
    contents,
    patterns,
    residency,
    transactions,
    concurrency,
    memslots,
    faults,
    guest_memfd_file,
    pre_fault,
    protected,
)


def all_cases() -> list[Case]:
    """The cases of all files."""
    places = {module.__name__: place for place, module in enumerate(_ORDER)}
    return sorted(CASES, key=lambda each: places[each.run.__module__])
