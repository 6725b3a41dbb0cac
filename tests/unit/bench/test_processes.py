"""Processes that are measured: what their output and threads come to, and how they may fail."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vmm.bench import processes
from vmm.core.errors import HostError

# A "vCPU" that never sleeps, and a host's thread that works before the second result only.
GUEST = """
import threading, time
def spin(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
print("> bench guest", flush=True)
vcpu = threading.Thread(target=spin, args=(0.5,))
vcpu.start()
print("result a: 1 ticks", flush=True)
time.sleep(0.02)
spin(0.1)
print("result b: 2 ticks", flush=True)
vcpu.join()
print("done", flush=True)
"""


def test_results_come_with_the_host_threads_processor_time() -> None:
    results = processes.results_of([sys.executable, "-c", GUEST])

    assert [line for line, _ in results] == ["result a: 1 ticks", "result b: 2 ticks"]
    first, second = (nanoseconds for _, nanoseconds in results)
    assert 0 <= first < 50_000_000
    assert 50_000_000 < second < 300_000_000


def test_guest_that_breaks_off_is_no_result() -> None:
    words = [sys.executable, "-c", "import sys; print('error no disk'); sys.exit('no such disk')"]

    with pytest.raises(HostError, match=r"broke off: \['error no disk'\] no such disk"):
        processes.results_of(words)


def test_first_byte_of_a_process_without_output_is_an_error() -> None:
    with pytest.raises(HostError, match="ended without a word"):
        processes.seconds_to_first_byte([sys.executable, "-c", "pass"])


def test_children_find_what_only_this_process_was_told_of() -> None:
    # Without site-packages, as in the lab, where pyvmm puts its requirements on the path itself.
    words = [sys.executable, "-S", "-c", "import cffi, ioctl_opt, vmm.cli.main; print('found')"]

    done = subprocess.run(words, env=processes.environment(), capture_output=True, check=False)

    assert done.stdout == b"found\n", done.stderr


def test_architecture_without_a_bench_guest_is_named_with_the_sections_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))

    with pytest.raises(HostError, match="no bench guest for aarch64") as caught:
        processes.bench_guest()

    said = str(caught.value)
    assert "disk, iommu and start-up" in said and "\n" not in said
