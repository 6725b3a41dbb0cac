"""Every case, in the order in which they are shown."""

from vmm.selftest.case import CASES, Case
from vmm.selftest.cases import (  # noqa: F401 - importing registers them, in this order
    concurrency,
    contents,
    faults,
    guest_memfd_file,
    memslots,
    patterns,
    pre_fault,
    residency,
    transactions,
)


def all_cases() -> list[Case]:
    """The cases of all files."""
    return list(CASES)
