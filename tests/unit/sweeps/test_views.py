"""The page, the SVG and the fronts."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

from tests.unit.cli.conftest import Command
from vmm.core.output import Output
from vmm.sweeps import chart
from vmm.sweeps.page import page
from vmm.sweeps.plots import write_svg
from vmm.sweeps.results import CellResult, Group, Results
from vmm.sweeps.store import Result

MIB = 1 << 20


def cell(policy: str, shared: float, waits: float, *, denied: int = 0, repetition: int = 0,
         ended: str | None = None, workload: str = "boot") -> CellResult:  # fmt: skip
    figures = {"shared_bytes_mean": shared, "guest_ns": waits, "denied": denied}
    return CellResult(
        policy, {}, policy, workload, None, {}, workload, "replay", repetition, 0,
        Result("ok", figures, ended, None, None, "here", 0.1, 1),
    )  # fmt: skip


def failed(policy: str, error: str, log: str) -> CellResult:
    result = Result("failed", {}, None, error, log, "here", 0.1, 1)
    return cell(policy, 0, 0)._replace(result=result)


def results(*cells: CellResult) -> Results:
    return Results("s", cells)


def marks(*cells: CellResult) -> dict[str, tuple[bool, bool]]:
    found: list[Group] = results(*cells).groups()
    return {group.policy: (group.on_front, group.on_front_of_all) for group in found}


def test_front_has_those_that_none_beats_and_equals() -> None:
    assert marks(
        cell("left", 30, 1), cell("low", 10, 3), cell("middle", 20, 2), cell("same", 20, 2),
        cell("beaten", 20, 2.5), cell("worse", 40, 4),
    ) == {
        "left": (True, True), "low": (True, True), "middle": (True, True), "same": (True, True),
        "beaten": (False, False), "worse": (False, False),
    }  # fmt: skip


def test_front_of_those_that_grant_everything_leaves_out_who_refuses_or_ends_the_run() -> None:
    assert marks(
        cell("grants", 30, 3), cell("refuses", 10, 1, denied=1), cell("ends", 20, 0.5, ended="x")
    ) == {"grants": (True, False), "refuses": (False, True), "ends": (False, True)}


def test_fronts_of_workloads_are_their_own() -> None:
    assert marks(cell("a", 10, 1), cell("b", 20, 2, workload="other")) == {
        "a": (True, True), "b": (True, True),
    }  # fmt: skip


def test_group_has_mean_and_spread_over_repetitions() -> None:
    (group,) = results(*(cell("a", shared, 1, repetition=shared) for shared in (2, 4, 9))).groups()

    spread = group.figures["exposed_bytes_mean"]
    assert (spread.mean, spread.least, spread.most) == (5, 2, 9)
    assert round(spread.deviation, 3) == 3.606


def test_mean_of_equal_values_is_among_them() -> None:
    waits = 725002883.6276482 / 3

    (group,) = results(*(cell("a", 0.1, waits, repetition=n) for n in range(3))).groups()

    for spread in group.figures.values():
        assert spread.least == spread.mean == spread.most


def test_deferred_bytes_are_exposed_as_well() -> None:
    one = cell("a", 5, 1)
    assert one.result is not None
    figures = {**one.result.figures, "deferred_bytes_mean": 3}
    both = one._replace(result=one.result._replace(figures=figures))

    assert both.figures["exposed_bytes_mean"] == 8


def test_front_line_is_a_staircase() -> None:
    groups = results(cell("a", 30, 1), cell("b", 10, 3), cell("c", 40, 4)).groups()
    drawn = chart.points(groups)

    assert chart.front_line(drawn) == [(1, 30), (3, 30), (3, 10)]
    assert chart.front_line(drawn, of_all=True) == []


def test_axis_is_logarithmic_where_values_are_far_apart() -> None:
    far, near, none = (
        chart.axis([(low, low), (high, high)], 10) for low, high in ((1, 1e4), (5, 10), (0, 0))
    )

    assert (far.is_log, near.is_log, none.is_log) == (True, False, False)
    for axis, low, high in ((far, 1, 1e4), (near, 5, 10), (none, 0, 0)):
        assert 0 <= axis.at(low) <= axis.at(high) <= 1
    assert 1.0 in far.ticks and 1000.0 in far.ticks
    assert near.ticks[0] == 0


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_has_a_plot_for_each_workload_and_asks_for_nothing() -> None:
    evil = "<script>alert(1)</script>"
    made = "".join(
        page(
            results(
                cell("a", 3 * MIB, 1e6), cell("a", 5 * MIB, 1e6, repetition=1),
                cell(evil, 1 * MIB, 2e6, denied=2), cell("b", 9 * MIB, 1e3, workload="other"),
                failed("c", f"broken {evil}", f"log {evil}"),
            )
        )
    )  # fmt: skip
    elements = _Elements()
    elements.feed(made)

    tags = [tag for tag, _ in elements.found]
    assert tags.count("svg") == 2
    assert sum(attributes.get("data-front") == "yes" for _, attributes in elements.found) == 2
    assert "script" not in tags
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    assert "Hollow dots refuse requests" in made
    assert "4 MiB (3 MiB to 5 MiB)" in made
    assert "log &lt;script&gt;" in made


def test_svg_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    found = results(cell("a", 3 * MIB, 1e6), cell("b", MIB, 2e6, denied=1))
    for name in ("one", "two"):
        write_svg(Output(name, str(tmp_path / name)), found)

    text = (tmp_path / "one").read_text()
    assert text == (tmp_path / "two").read_text()
    assert "Pareto front" in text
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_command_writes_page_and_svg(command: Command, folder: Path) -> None:
    assert command("sweep", "s.toml", "--html", "p.html", "--svg", "p.svg").status == 0

    assert (folder / "p.html").read_text().startswith("<!doctype html>")
    assert "</svg>" in (folder / "p.svg").read_text()


def test_page_that_cannot_be_written_is_found_before_anything_runs(
    command: Command, folder: Path
) -> None:
    result = command("sweep", "s.toml", "--html", "no/where.html")

    assert result.status == 2
    assert result.complaint.startswith("--html no/where.html cannot be written")
    assert not (folder / "s.sqlite").exists()
