"""The bench of the virtual IOMMU: what is asked of fio, and what comes of two moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmm.bench import iommu
from vmm.bench.iommu import FULL, QUICK, SECTION, SUBJECTS, UNITS, Work, measure
from vmm.bench.linux import Guest
from vmm.core.errors import HostError

GUEST = Guest("kernel", "initrd", "disk", "fio.ext4", None)
WORK = Work("randread", 4, 32, 200)


def moment(at: float, **lending: float) -> dict[str, Any]:
    scale = int(at)
    return {
        "status": {"conversions": 10 * scale, "exits": 1000 * scale, "shared_bytes": 7 << 20},
        "iommu": {
            "maps": 400 * scale,
            "average_lent_bytes": 1000 * scale,
            "over_s": at,
            "peak_lent_bytes": 5000,
            "peak_runs": 9,
            **lending,
        },
    }


def test_moments_are_told_apart_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([moment(1), moment(3)])
    spent = iter([{"1": 0, "2": 1_000_000}, {"1": 4_000_000, "2": 2_000_000, "3": 1_000_000}])
    monkeypatch.setattr(iommu, "_dump", lambda control: next(states))
    monkeypatch.setattr(iommu, "on_processor", lambda pid: next(spent))

    first = iommu._Moment(1, Path("control"))
    second = iommu._Moment(1, Path("control"))
    told = second.since(first, WORK, b"0;800;50;0;0\r\n")

    assert told == {
        "time": 250.0, "conversions": 0.1, "exits": 10.0, "vCPU": 20.0, "host": 10.0,
        "shared": 7 << 20, "maps": 4.0, "lent, average": (3000 * 3 - 1000) / 2,
        "lent, peak": 5000, "runs": 9,
    }  # fmt: skip
    assert set(told) == set(UNITS)


def test_work_that_fio_did_not_do_is_an_error() -> None:
    with pytest.raises(HostError, match="did not do its 200 requests"):
        iommu._milliseconds(WORK, b"0;796;50;0;0\r\n")


def test_work_is_asked_of_fio_by_its_numbers() -> None:
    assert WORK.title == "4 KiB random reads, depth 32"
    assert "--rw=randread --bs=4k --iodepth=32" in WORK.command
    assert "--number_ios=200" in WORK.command
    assert Work("write", 1024, 4, 8).title == "1 MiB sequential writes, depth 4"


def test_more_in_flight_comes_later() -> None:
    """Peaks are those since the start."""
    for works in (QUICK, FULL):
        in_flight = [work.size * work.depth for work in works]
        assert in_flight == sorted(in_flight)


def test_every_subject_has_its_turn_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def session(guest: Guest, subject: str, works: Any) -> Any:
        turns.append(subject)
        return [(work, {"time": float(len(turns))}) for work in works]

    monkeypatch.setattr(iommu, "session", session)

    series = list(measure(GUEST, True, 2, lambda turn: None))

    assert turns == [*SUBJECTS, *reversed(SUBJECTS)]
    assert {one.section for one in series} == {SECTION}
    assert len(series) == len(QUICK) * len(SUBJECTS)
    assert series[0].case == "4 KiB random reads, depth 1: time, us"
    assert series[0].samples == [1.0, 6.0]


def test_without_fio_nothing_is_measured() -> None:
    with pytest.raises(HostError, match="needs --fio"):
        next(measure(GUEST._replace(fio=None), True, 1, lambda turn: None))
