"""Scenarios by their names: pyvmm's own, a user's file, a trace."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import vmm.scenario
from tests.support.trace import PAGE, Events
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.policy import Allow, Decision, Deny, Event, IoEvent, Policy, View
from vmm.policy.builtin import Quota
from vmm.scenario import Guest, Scenario, ScenarioError, Share, Steps, load, names, run
from vmm.scenario.guest import Heap
from vmm.scenario.models import find, learnt_from
from vmm.scenario.models import names as model_names
from vmm.trace.layout import Kind

STOCK = ("debian-6.1-boot", "debian-6.12-boot", "debian-7.3-boot", "driver-rebind", "fio-random",
         "network", "balloon")  # fmt: skip


def test_every_public_name_is_there() -> None:
    for name in vmm.scenario.__all__:
        assert not isinstance(getattr(vmm.scenario, name), type(vmm)), name


@pytest.mark.parametrize("name", names())
def test_own_scenario_runs_to_its_end_the_same_each_time(name: str) -> None:
    first, second = (run(load(name), [Quota(70 << 20)], seed=3) for _ in range(2))

    assert first == second
    assert first.ended is None
    assert first.figures["requests"] + first.io["allowed"] > 0
    assert first.duration_ns > 0


@pytest.mark.parametrize("name", STOCK)
def test_library_has_what_stock_kernels_do(name: str) -> None:
    assert name in names()


@pytest.mark.parametrize("name", [name for name in STOCK if "boot" in name])
def test_boot_shares_its_bounce_buffer_and_stays_within_it(name: str) -> None:
    result = run(load(name), [])

    assert 64 << 20 < result.figures["shared_bytes_peak"] < 70 << 20
    assert result.io["refused"] == result.io["denied"] == 0
    assert load(name).facts["kernel"] == f"debian:{name.split('-')[1]}"


def test_device_of_a_recorded_kernel_stops_where_its_memory_was_refused() -> None:
    class NothingShared(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            return Deny(errno.EPERM)

    result = run(load("debian-6.12-boot"), [NothingShared()])

    assert result.io == {"allowed": 0, "denied": 0, "refused": 2}  # once each of two disks


def test_device_of_a_recorded_kernel_makes_no_access_after_a_refused_one() -> None:
    class NotThere(Policy):
        def on_io(self, event: IoEvent, view: View) -> Decision:
            return Deny() if event.device == "net0" else Allow()

    result = run(load("network"), [NotThere()])

    assert result.io == {"allowed": 0, "denied": 1, "refused": 0}


def test_recorded_pauses_are_scaled_and_jittered_by_the_seed() -> None:
    boot = load("driver-rebind")

    plain, half = (run(boot, parameters={"pace": pace}).duration_ns for pace in ("1", 0.5))
    chance = {run(boot, seed=seed, parameters={"jitter": 0.5}).duration_ns for seed in range(3)}

    waited = run(boot, parameters={"pace": 0}).duration_ns
    assert half - waited == pytest.approx((plain - waited) / 2, rel=1e-6)
    assert len(chance) == 3


def test_scenario_of_a_file_is_found_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from vmm.scenario import Share, scenario\n"
        "def plain(guest):\n    yield Share(guest.allocate(4096))\n"
        "@scenario(ram=64 << 20, cpus=2)\ndef made(guest):\n    yield Share(guest.allocate(8192))\n"
        "number = 5\n"
    )

    assert run(load(f"{file}:plain")).figures["converted_bytes"] == 4096
    assert run(load(f"{file}:made")).figures["converted_bytes"] == 2 * 8192
    assert load(f"{file}:made").cpus == 2


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("number = 5", "number", "number is 5, no generator function"),
        ("number = 5", "other", "has nothing named other"),
        ("def f(guest): return 5", "f", "yields nothing; write a generator function"),
        ("1 / 0", "f", "ZeroDivisionError"),
        ("def f(:", "f", "invalid syntax"),
    ],
)
def test_file_without_a_scenario_is_one_line(
    text: str, name: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)

    with pytest.raises(ScenarioError) as caught:
        load(f"{tmp_path}/mine.py:{name}")

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("debian-6.12-bot", "did you mean debian-6.12-boot?"),
        ("xyzzy", "there are balloon, "),
        ("/nowhere/x.py:f", "loading /nowhere/x.py failed"),
    ],
)
def test_unknown_scenario_is_one_line_with_what_there_is(spec: str, words: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(spec)

    assert words in str(caught.value)


def traced(folder: Path) -> Path:
    """A trace: four pages of 64 shared at 10 ms, a device at them, two unshared at 20 ms."""
    made = Events((0, 64, "private"))
    made.convert(Kind.SHARE, 10, 32, 4, took=1.0)
    made.add(Kind.IO_IN, 15, "disk", gpa=32 * PAGE, size=512)
    made.convert(Kind.UNSHARE, 20, 32, 2, took=2.0)
    return made.write(folder / "t")


def test_trace_is_a_scenario_whose_time_goes_by_the_answers(tmp_path: Path) -> None:
    path = traced(tmp_path)

    result = run(load(str(path)))

    assert result.figures["conversions"] == 2
    assert result.io["allowed"] == 1
    assert result.duration_ns == pytest.approx(22_000_000, abs=2000)
    assert result.figures["guest_ns"] == pytest.approx(3_000_000)


def test_model_is_that_of_a_host_kind_or_learnt_from_a_trace(tmp_path: Path) -> None:
    path = traced(tmp_path)

    learnt = learnt_from(str(path))

    assert learnt.share.cost(4 * PAGE) == 1_000_000
    assert find(str(path)) == learnt
    for name in model_names():
        model = find(name)
        assert 0 < model.nothing < 1e8
        assert model.share.cost(4096) > 0 and model.unshare.cost(2 << 20) > 0


def test_unknown_model_is_one_line_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="no cost model lab-svn; did you mean lab-svm"):
        run(load("hostile"), model="lab-svn")


def test_parameter_that_is_none_of_the_scenarios_is_one_line() -> None:
    with pytest.raises(ScenarioError, match="has no parameter requets; did you mean requests"):
        run(load("hostile"), parameters={"requets": 5})
    with pytest.raises(ScenarioError, match="requests=many: it wants int"):
        run(load("hostile"), parameters={"requests": "many"})


def nothing(guest: Guest) -> Steps:
    yield Share(Range(0, PAGE))


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("whole 4 KiB pages", {"ram": 5000}),
        ("in ascending order", {"ram": [Range(PAGE, PAGE), Range(0, PAGE)]}),
        ("has no RAM", {"ram": []}),
        ("use 1 to 64", {"cpus": 0}),
        ("which is no RAM of it", {"ram": PAGE, "private": [Range(PAGE, PAGE)]}),
    ],
)
def test_scenario_of_an_impossible_guest_is_refused(words: str, given: dict[str, object]) -> None:
    with pytest.raises(ScenarioError, match=words):
        Scenario(nothing, **given)  # type: ignore[arg-type]


def test_function_that_takes_no_guest_is_one_line() -> None:
    def nobody() -> Steps:
        yield Share(Range(0, PAGE))

    with pytest.raises(ScenarioError, match=r"scenario nobody is called with a guest: .* takes 0"):
        run(Scenario(nobody))


def test_parameter_of_an_unknown_type_is_one_line() -> None:
    def unknown(guest: Guest, size: Nowhere) -> Steps:  # type: ignore[name-defined]  # noqa: F821
        yield Share(Range(0, PAGE))

    with pytest.raises(ScenarioError, match="scenario unknown: its parameters' types: NameError"):
        run(Scenario(unknown), parameters={"size": "4K"})


def test_heap_gives_each_page_once_and_takes_it_back() -> None:
    heap = Heap([Range(0, 8 * PAGE), Range(16 * PAGE, 8 * PAGE)])

    taken = [heap.allocate(3 * PAGE, PAGE) for _ in range(4)]
    with pytest.raises(MemoryError, match="16384 are free in all"):
        heap.allocate(3 * PAGE, PAGE)
    for area in (taken[1], taken[0]):
        heap.free(area)

    assert taken == [Range(first * PAGE, 3 * PAGE) for first in (0, 3, 16, 19)]
    assert heap.allocate(8 * PAGE, PAGE) == Range(0, 8 * PAGE)
    with pytest.raises(ValueError, match="was not allocated"):
        heap.free(taken[1])


def test_heap_aligns_what_it_gives() -> None:
    heap = Heap([Range(PAGE, 64 * PAGE)])

    assert heap.allocate(100, 16 * PAGE) == Range(16 * PAGE, PAGE)
    with pytest.raises(ValueError, match="a power of two"):
        heap.allocate(PAGE, 3 * PAGE)


def test_streaming_driver_falls_back_to_its_bounce_slots() -> None:
    slots = 16 * (64 << 10)

    result = run(load("streaming-dma"), [Quota(slots)], parameters={"requests": 50})

    assert result.figures["conversions"] == 16
    assert result.io == {"allowed": 50, "denied": 0, "refused": 0}
