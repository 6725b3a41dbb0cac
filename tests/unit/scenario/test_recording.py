"""Recordings: what is kept of a trace, and files that are damaged."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.trace import MILLISECOND, PAGE, Events
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.scenario.recorded import names, recording
from vmm.scenario.recording import Recorded, Recording, first_page, of_trace, parse
from vmm.trace.layout import Kind
from vmm.trace.reader import Trace


def trace(folder: Path) -> Trace:
    """64 pages: four shared at 10 ms, a device at them at 15, two unshared and one refused."""
    made = Events((0, 64, "private"))
    made.convert(Kind.SHARE, 10, 32, 4, took=1.0)
    made.add(Kind.IO_IN, 15, "disk", gpa=32 * PAGE + 8, size=5000, took=2.0)
    made.convert(Kind.UNSHARE, 20, 32, 2, took=2.0)
    made.request(Kind.SHARE, 30, 50, 1, took=0.5, decision="deny", errno=13)
    return Trace(made.write(folder / "t"))


def test_recording_of_a_trace_has_pauses_places_and_answers(tmp_path: Path) -> None:
    with closing(trace(tmp_path)) as whole:
        made = of_trace(whole, {"kernel": "mine"})

    assert made == Recording(
        {"kernel": "mine"},
        [Range(0, 64 * PAGE)],
        [],
        [
            Recorded("s", 10_000, 32 * PAGE, 4 * PAGE, 0, ""),
            Recorded("i", 4_000, 32 * PAGE + 8, 5000, 0, "disk"),
            Recorded("u", 5_000, 32 * PAGE, 2 * PAGE, 0, ""),
            Recorded("s", 8_000, 50 * PAGE, PAGE, 13, ""),
        ],
    )


def test_recording_of_a_part_begins_with_the_memory_of_that_time(tmp_path: Path) -> None:
    with closing(trace(tmp_path)) as whole:
        made = of_trace(whole, {}, 14 * MILLISECOND, 25 * MILLISECOND)

    assert made.shared == [Range(32 * PAGE, 4 * PAGE)]
    assert [(each.kind, each.pause) for each in made.events] == [("i", 1000), ("u", 5000)]


def test_trace_that_says_nothing_of_memory_is_refused(tmp_path: Path) -> None:
    with (
        closing(Trace(Events().write(tmp_path / "t"))) as whole,
        pytest.raises(UsageError, match="does not say how the guest's memory began"),
    ):
        of_trace(whole, {})


def test_access_is_taken_to_touch_the_page_of_its_first_buffer() -> None:
    assert first_page(Recorded("i", 0, 3 * PAGE + 4000, 5000, 0, "disk")) == Range(16288, 96)
    assert first_page(Recorded("i", 0, 3 * PAGE, 16, 0, "disk")) == Range(3 * PAGE, 16)


EVENTS = st.lists(
    st.one_of(
        st.builds(
            Recorded, st.sampled_from("su"), st.integers(0, 1 << 40), st.integers(0, 1 << 63),
            st.integers(0, 1 << 63), st.integers(0, 4095), st.just(""),
        ),
        st.builds(
            Recorded, st.sampled_from("io"), st.integers(0, 1 << 40), st.integers(0, 1 << 63),
            st.integers(0, 1 << 32), st.just(0), st.text(min_size=1),
        ),
    )
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(EVENTS)
def test_recording_is_read_as_it_was_written(events: list[Recorded]) -> None:
    made = Recording({"kernel": "x"}, [Range(0, PAGE)], [Range(0, PAGE)], events)

    assert parse(made.dump(), "x") == made
    assert made.dump() == made.dump()


def packed(**change: Any) -> bytes:
    content = json.loads(gzip.decompress(Recording({}, [Range(0, PAGE)], [], []).dump()))
    return gzip.compress(json.dumps(content | change).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        packed()[:-9],
        gzip.compress(b"[]"),
        gzip.compress(b"{}"),
        packed(version=2),
        packed(kinds="s"),
        packed(kinds="i", pauses_us=[0], distances=[0], sizes=[0], errnos=[0], device=[5]),
        packed(kinds="i", pauses_us=[0], distances=[0], sizes=[0], errnos=[0], devices=["x"]),
        packed(ram=[1, 2]),
        packed(kinds=None),
        gzip.compress(bytes(65 << 20)),
    ],
)
def test_damaged_recording_is_one_line(data: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        parse(data, "mine.json.gz")

    assert str(caught.value).startswith("mine.json.gz: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", names())
def test_own_recording_is_small_and_says_where_it_is_from(name: str) -> None:
    made = recording(name)

    assert len(made.dump()) < 16 << 10
    assert made.facts["by"] == "tests/bench/record_scenarios.py"
    assert made.facts["kernel"].startswith("debian:")
    assert made.facts["scheme"] == "cbit"
    assert made.events
