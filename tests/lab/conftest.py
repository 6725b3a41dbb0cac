"""The lab for tests: its packages and images are prepared once, and kept in the cache.

PYVMM_LAB_CACHE names the cache. Where the lab cannot be had (no QEMU and no Debian archive),
its tests are skipped with the reason; PYVMM_LAB_REQUIRED=1 makes that an error, for CI.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.reruns import again_after_an_emulators_fault
from vmm.core.errors import HostError
from vmm.lab.machine import Lab
from vmm.lab.options import LabOptions
from vmm.lab.run import LabRun

# From exec to the command takes 5-10 s on two quiet cores.
BOOT_SECONDS = 120.0
TIME_LIMIT = 600.0

Starter = Callable[..., LabRun]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder runs in the lab, and takes the time that emulation takes."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.lab)
            item.add_marker(again_after_an_emulators_fault)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIME_LIMIT))


def prepared(lab: Lab) -> Lab:
    try:
        lab.prepare()
    except HostError as error:
        if os.environ.get("PYVMM_LAB_REQUIRED"):
            raise
        pytest.skip(f"the lab cannot be had here: {error}")
    return lab


@pytest.fixture(scope="session")
def lab() -> Lab:
    """Everything downloaded and built, ready to start machines."""
    return prepared(Lab(LabOptions(time_limit=TIME_LIMIT)))


@pytest.fixture
def lab_start(lab: Lab, tmp_path: Path) -> Iterator[Starter]:
    """Starts lab machines in the test's directory, and ends them with the test.

    `lab_start(words, program=True, terminal=(rows, columns), LabOptions' fields...)`.
    """
    with ExitStack() as stack:

        def start(
            words: Sequence[str],
            *,
            program: bool = False,
            terminal: tuple[int, int] | None = None,
            **options: object,
        ) -> LabRun:
            machine = lab
            if options:
                given = LabOptions(time_limit=TIME_LIMIT)
                for name, value in options.items():
                    setattr(given, name, value)
                machine = prepared(Lab(given))
            run = machine.start(words, program=program, directory=tmp_path, terminal=terminal)
            return stack.enter_context(run)

        yield start
