"""A guest's secret, hunted from another process by every way that root has on this machine.

Under a rehearsal it is found, which shows that the hunt works; under strict it isn't.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.hunt import Found, Hunter
from tests.support.strict_program import secret_of

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("usable_kvm", "guest_memfd_flags"),
]

ROOT = Path(__file__).resolve().parents[2]
GUEST_MEMFD = "anon_inode:[kvm-gmem]: Illegal seek"
BY_MEMORY = ("mappings", "/proc/PID/mem", "process_vm_readv", "core dump")


@contextmanager
def guest_with_a_secret(
    backing: str, seed: int, *options: str, directory: Path = ROOT
) -> Iterator[subprocess.Popen[str]]:
    """The process that runs the guest."""
    words = [sys.executable, "-m", "tests.support.strict_program", backing, str(seed), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.stdin.close()
            process.wait(30)


def hunted(backing: str) -> dict[str, Found]:
    seed = secrets.randbits(60)
    with guest_with_a_secret(backing, seed) as process:
        return Hunter(process.pid, secret_of(seed)).hunt([])


def test_secret_of_a_strict_guest_is_found_nowhere() -> None:
    found = hunted("guest_memfd")

    assert {way: each.times for way, each in found.items()} == dict.fromkeys(found, 0)
    # It was not for want of trying:
    assert found["file descriptors"].refused[GUEST_MEMFD] == 1
    assert found["mappings"].refused["SIGBUS"] == 1
    assert found["/proc/PID/mem"].refused["Input/output error"] > 0
    assert found["process_vm_readv"].refused["Bad address"] > 0
    assert all(found[way].looked_at > 1 << 20 for way in BY_MEMORY)


@pytest.mark.parametrize(
    ("backing", "ways"),
    [("guest_memfd-mmap", BY_MEMORY), ("memfd", ("file descriptors", *BY_MEMORY))],
)
def test_the_same_hunt_finds_the_secret_of_a_rehearsal(backing: str, ways: tuple[str, ...]) -> None:
    found = hunted(backing)

    assert {way for way, each in found.items() if each.times} == set(ways)


@pytest.mark.skipif(
    Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core",
    reason="core files go elsewhere here (kernel.core_pattern is not 'core')",
)
@pytest.mark.parametrize(
    ("backing", "found"), [("guest_memfd", False), ("guest_memfd-mmap", True), ("memfd", True)]
)
def test_core_file_that_leaves_nothing_out_has_a_rehearsals_secret_alone(
    backing: str, found: bool, tmp_path: Path
) -> None:
    """The kernel itself writes it; the monitor has asked for all of its memory in it."""
    seed = secrets.randbits(60)
    with guest_with_a_secret(backing, seed, "dumps", directory=tmp_path) as process:
        process.send_signal(signal.SIGABRT)
        assert process.wait(60) == -signal.SIGABRT

    (core,) = tmp_path.glob("core*")
    # RAM has its room in the file, readable or not.
    assert core.stat().st_size > 2 * 32 << 20
    assert bool(Hunter(0, secret_of(seed)).files([core]).times) is found
