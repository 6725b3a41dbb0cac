"""A stock kernel in memory that its host's user space can't read.

On the lab host whose KVM reads a guest's instructions in guest_memfd itself; and under Bochs, whose
KVM need not read them, which takes minutes and is done when asked for.
"""

from __future__ import annotations

import secrets

import pytest

from tests.lab.conftest import Starter
from tests.lab.slow import slow
from tests.support.hunt import KERNEL_MEMORY
from tests.support.strict_lab import Guest, Told, files_of, words_of
from vmm.lab.machine import Lab

SECONDS = 600.0
CPUS = 2

pytestmark = pytest.mark.timeout(3000)
HOSTS = ["experimental", pytest.param("bochs", marks=slow)]


def told(lab: Lab, lab_start: Starter, host: str, backing: str, cpus: int, *ways: str) -> Told:
    seed = secrets.token_hex(16)
    run = lab_start(
        words_of(lab, backing, seed, cpus, *ways),
        program=True,
        host=host,
        files=files_of(lab),
        cpus=1,
    )
    return Guest(run, SECONDS, SECONDS).be_hunted(seed)


@pytest.mark.parametrize("host", HOSTS)
def test_stock_kernel_is_out_of_its_hosts_reach_where_a_rehearsal_is_not(
    host: str, lab: Lab, lab_start: Starter
) -> None:
    strict = told(lab, lab_start, host, "guest_memfd", CPUS, KERNEL_MEMORY)

    assert strict.release.startswith("6.12") and "AMD SEV" in strict.encryption
    assert "XT-PIC" in strict.interrupts and "IO-APIC" not in strict.interrupts
    assert strict.processors == str(CPUS)
    report = strict.report
    assert report["guest"]["exit"] == "poweroff"
    assert report["isolation"].startswith("kernel-enforced")
    assert report["host_access"]["private"] == "kernel-refused"
    assert report["launch"]["measurement"] == strict.measured
    assert report["launch"]["common"]["bytes"] == report["pages"]["common_bytes"] == 32768
    assert "mmio" not in report["exits"]
    times = {way: found["times"] for way, found in strict.hunt.items()}
    # What root may read of the kernel's own memory has the guest's: the kernel is trusted.
    assert times.pop("/proc/kcore") > 0
    assert times == dict.fromkeys(times, 0)
    assert strict.hunt["mappings"]["refused"]["SIGBUS"] == 1

    assert strict.on_purpose["files"]["times"] == 1

    rehearsal = told(lab, lab_start, host, "guest_memfd-mmap", 1)

    assert "launch" not in rehearsal.report
    ways = ("mappings", "/proc/PID/mem", "process_vm_readv", "core dump")
    assert all(rehearsal.hunt[way]["times"] > 0 for way in ways)
