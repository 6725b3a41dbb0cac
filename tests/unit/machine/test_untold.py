"""What is said of a guest whose host is not told of shares: never a number that nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.support.memory import pages
from tests.support.protected import ProtectedGuest, protected_memory
from tests.support.status import status
from tests.support.trace import start_recorder
from vmm.control.operations import Operations
from vmm.control.status_line import page_map, page_summary, status_line
from vmm.conversion.accounting import Accounting, Refinements
from vmm.conversion.schemes.pkvm import PkvmScheme
from vmm.conversion.transaction import Converter
from vmm.core.errors import UsageError
from vmm.core.event_loop import EventLoop
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE
from vmm.exits.outcome import Outcome
from vmm.exits.vcpu_group import VcpuGroup
from vmm.machine.report import build_report, isolation_of, unshared
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.observed_memory import ObservedMemory
from vmm.replay.replay import Replay
from vmm.trace.cost import Requests
from vmm.trace.reader import Trace
from vmm.trace.summary import summarise

Pair = tuple[ObservedMemory, ProtectedGuest]
RAM = 64 * PAGE_SIZE


@pytest.fixture
def observed() -> Iterator[Pair]:
    """64 pages, of which the guest keeps 48."""
    with protected_memory(pages(0, 48)) as made:
        yield made


class NoDevices:
    def io_statistics(self) -> dict[str, dict[str, int]]:
        return {}


@pytest.fixture
def operations(observed: Pair) -> Iterator[Operations]:
    loop = EventLoop()
    converter = Converter(observed[0], PkvmScheme())
    yield Operations(
        observed[0], converter, VcpuGroup(), NoDevices(), loop, lambda outcome: None  # type: ignore[arg-type]
    )  # fmt: skip
    loop.close()


def test_report_of_observed_memory_has_null_for_what_nobody_knows(observed: Pair) -> None:
    memory, guest = observed
    guest.poke(b"x", 60 * PAGE_SIZE)

    report = build_report(
        scheme="pkvm",
        not_taken={},
        doorbell="hypercall",
        memory=memory,
        outcome=Outcome("poweroff"),
        accounting=Accounting(),
        refinements=Refinements(),
        io={},
        exits={},
        ports={},
        wall_seconds=1.0,
    )

    assert report["states"] == "observed, not told"
    assert report["isolation"].startswith("kernel-enforced (pKVM): ")
    assert "DMA" in report["isolation"]
    assert report["backings"] == {"private": "memfd-protected", "shared": "memfd-protected"}
    assert report["host_access"] == {
        "private": "kernel-refused",
        "launch": "pread/pwrite",
        "shared": "copying system calls",
    }
    assert (report["conversions"], report["refinements"]) == (None, None)
    assert report["pages"] == {
        "ram_bytes": RAM,
        "private_bytes": None,
        "shared_bytes": None,
        "deferred_bytes": None,
        "common_bytes": 0,
        "observed": {"tried": 64, "private": 48, "reached": 16},
    }
    assert report["residency"] == {
        "private_bytes": None,
        "shared_bytes": None,
        "donated_bytes": 0,
        "resident_bytes": PAGE_SIZE,  # counted before pages were looked at, which makes them
    }


def test_isolation_of_a_realm_is_a_rehearsal_that_names_the_realm() -> None:
    backing = MemfdBacking(PAGE_SIZE)

    sentence = isolation_of(backing, scheme="realm")

    assert sentence.startswith("policy-enforced rehearsal")
    assert sentence.endswith("monitor of an Arm CCA realm, which it is not")
    backing.close()


def test_status_counts_bytes_as_observed_and_as_nothing_else(operations: Operations) -> None:
    now = operations.status()

    assert now.observed_bytes == RAM
    assert now.shared_bytes == now.private_bytes == now.deferred_bytes == 0


def test_dump_of_observed_memory_has_null_for_what_nobody_knows(operations: Operations) -> None:
    dump = operations.dump_state()

    assert list(dump["pages"]) == [[0, RAM, "observed"]]
    assert dump["conversions"] is dump["refinements"] is None
    assert dump["residency"]["private_bytes"] is None
    assert dump["residency"]["donated_bytes"] == 0


def test_conversion_that_the_host_wants_is_refused(operations: Operations) -> None:
    assert operations.convert(Kind.SHARE, 0, PAGE_SIZE) < 0


def test_status_line_says_that_the_host_is_not_told() -> None:
    before, now = status(), status(seconds=2.0, exits=10, observed_bytes=128 << 20)

    assert status_line(now, before) == "128.0 MiB of which the host is not told, 5 exits/s"
    paused = now._replace(state="paused")
    assert status_line(paused, before).startswith("paused, 128.0 MiB of which")


def test_page_map_has_a_sign_for_observed_pages(operations: Operations) -> None:
    pages, ram = operations.pages(), operations.ram

    assert page_map(pages, ram, columns=4) == "????"
    (line,) = page_summary(operations.status(), pages, ram)
    assert "the host is not told which pages the guest shares" in line


@pytest.fixture
def trace(tmp_path: Path, observed: Pair) -> Trace:
    recorder = start_recorder(
        tmp_path / "t",
        scheme="pkvm",
        doorbell=None,
        states=[[*area, state.value] for area, state in observed[0].states()],
    )
    recorder.close(complete=True, guest={"exit": "poweroff", "reason": ""})
    return Trace(tmp_path / "t")


def test_summary_of_a_trace_says_that_the_host_was_not_told(trace: Trace) -> None:
    memory = summarise(trace)["memory"]

    assert memory["ram_bytes"] == RAM
    assert memory["told"] is False
    assert memory["shared_bytes_peak"] is memory["shared_bytes_last"] is memory["changes"] is None


def test_replay_of_requests_that_nobody_heard_is_refused(trace: Trace) -> None:
    with pytest.raises(UsageError, match=r"without telling the host \(scheme pkvm\); there are"):
        Replay(trace, cast(Requests, None), [])


def test_device_of_a_guest_that_shares_nothing_is_told_of_in_one_line() -> None:
    sentence = unshared("pkvm", "blk0")

    assert sentence.startswith("blk0 stopped") and "CONFIG_ARM_PKVM_GUEST" in sentence
    assert "\n" not in sentence
