"""Results: what is written can be read, compared, and shown; a hostile file is bad input."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vmm.bench import results
from vmm.bench.chart import chart
from vmm.bench.series import Series
from vmm.bench.targets import TARGETS, verdicts
from vmm.core.errors import UsageError

HOST = {"processor": "<b>fast</b>", "cpus": 2, "kernel": "6.18", "python": "3.11", "load": 1.5}


def some_series(factor: float = 1.0) -> list[Series]:
    reads = "1 MiB sequential reads, depth 4"
    return [
        Series("exits", "OUT to a device", "C loop", "us", [50.0, 60.0, 70.0]),
        Series(
            "exits", "OUT to a device", "run loop", "us", [100 * factor, 120 * factor, 140 * factor]
        ),
        Series("disk", reads, "pyvmm auto", "us", [400.0 * factor]),
        Series("disk", reads, "QEMU", "us", [500.0]),
    ]


def test_results_written_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results.as_json(HOST, {"quick": True}, some_series())))

    host, series = results.load(str(path))

    assert host == HOST
    assert series == some_series()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "other", "version": 1}',
     '{"format": "pyvmm-bench", "version": 1, "host": {}, "series": [{"section": "x"}]}',
     '{"format": "pyvmm-bench", "version": 1, "host": {}, "series": [{"section": "x", "case": "c",'
     '"subject": "s", "unit": "us", "samples": []}]}'],
)  # fmt: skip
def test_loading_something_else_is_bad_input(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)

    with pytest.raises(UsageError, match=r"is no (result of pyvmm bench|JSON)"):
        results.load(str(path))


def test_loading_no_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        results.load(str(tmp_path / "absent"))


def test_text_shows_medians_and_judges_ratios() -> None:
    lines = results.text(HOST, some_series()).splitlines()

    assert any(line.startswith("OUT to a device  60.0 (50.0..70.0)") for line in lines)
    judged = {line.split(":")[0]: line.split()[-1] for line in lines if ">=" in line}
    assert judged == {"OUT to a device": "missed", "1 MiB sequential reads, depth 4": "reached"}


def test_text_tells_processor_time_from_time() -> None:
    case = "4 KiB random reads, depth 1"
    series = [
        Series("disk-cpu", case, subject, "us", [value])
        for subject, value in (("pyvmm auto", 26.0), ("QEMU", 20.0))
    ]

    judged = results.text(HOST, series).splitlines()[-1]

    assert judged.startswith(f"{case}, processor time: pyvmm auto / QEMU  0.77")
    assert judged.endswith("reached")


def test_json_has_the_ratios_with_their_spread() -> None:
    ratios = results.as_json(HOST, {}, some_series())["ratios"]

    assert {
        "section": "exits", "case": "OUT to a device", "subject": "run loop", "against": "C loop",
        "wanted": 0.6, "median": 0.5, "low": 0.5, "high": 0.5, "reached": False,
    } in ratios  # fmt: skip


def test_target_without_both_sides_measured_is_left_out() -> None:
    assert verdicts(some_series()[:1]) == []
    assert len(verdicts(some_series())) < len(TARGETS)


def test_compared_runs_say_what_changed_and_whether_it_is_noise() -> None:
    table = results.compared(some_series(), some_series(factor=2.0))

    assert "+100 %" in next(line for line in table.splitlines() if "run loop" in line)
    assert "overlap" in next(line for line in table.splitlines() if "C loop" in line)
    assert results.compared(some_series(), []) == "the two runs have no case in common"


def test_page_escapes_what_the_host_says_of_itself() -> None:
    page = results.page(HOST, some_series())

    assert "&lt;b&gt;fast" in page
    assert "<b>" not in page
    assert page.count('class="bar"') == 4


def test_chart_is_well_formed_and_has_a_bar_for_each_series() -> None:
    picture = ElementTree.fromstring(chart(HOST, some_series()))

    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.attrib["width"]) for bar in picture.iter(f"{space}rect") if "x" in bar.attrib]
    said = " ".join(text.text or "" for text in picture.iter(f"{space}text"))
    assert len(bars) == len(some_series())
    assert bars[0] != bars[1]
    assert "<b>fast" in said
    for one in some_series():
        assert f"{one.subject}: {results.number(one.median)} {one.unit}" in said
