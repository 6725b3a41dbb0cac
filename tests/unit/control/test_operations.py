"""What may be asked of a running machine, over a group of vCPUs that none has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.fake_vcpu import PRIVATE_START, RAM, Rig
from vmm.control.operations import Operations
from vmm.core.event_loop import EventLoop
from vmm.core.events import Kind
from vmm.core.ranges import RangeMap
from vmm.exits.outcome import QUIT
from vmm.exits.vcpu_group import VcpuGroup


class FakeDevices:
    """Notes when it is held and released."""

    def __init__(self, vcpus: VcpuGroup) -> None:
        self.vcpus = vcpus
        self.log: list[str] = []
        self.busy = False

    def hold(self, timeout: float) -> ExitStack:
        if self.busy:
            raise TimeoutError
        self.log.append(f"held, vCPUs paused: {self.vcpus.paused}")
        stack = ExitStack()
        stack.callback(lambda: self.log.append(f"released, vCPUs paused: {self.vcpus.paused}"))
        return stack

    def io_statistics(self) -> dict[str, dict[str, int]]:
        return {"blk0": {"requests": 3}}

    def restart(self, name: str) -> None:
        self.log.append(f"restarted {name}")


class Bench:
    def __init__(self) -> None:
        self.rig = Rig()
        self.loop = EventLoop()
        self.vcpus = VcpuGroup()
        self.devices = FakeDevices(self.vcpus)
        self.operations = Operations(
            self.rig.memory, self.rig.converter, self.vcpus, self.devices, self.loop,
            self.rig.outcomes.append,
        )  # fmt: skip

    def close(self) -> None:
        self.loop.close()
        self.rig.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_devices_are_held_while_no_vcpu_is_in_the_guest_and_only_once(bench: Bench) -> None:
    bench.operations.resume()
    bench.operations.pause()
    bench.operations.pause()
    assert bench.operations.status().state == "paused"

    bench.operations.resume()
    bench.operations.resume()

    assert bench.devices.log == ["held, vCPUs paused: True", "released, vCPUs paused: True"]
    assert not bench.vcpus.paused
    assert bench.operations.status().state == "running"


def test_guest_runs_on_where_a_device_does_not_come_to_rest(bench: Bench) -> None:
    bench.devices.busy = True
    assert not bench.operations.pause()
    assert not bench.vcpus.paused

    bench.devices.busy = False
    assert bench.operations.pause()
    bench.operations.resume()


def test_status_counts_conversions_and_states(bench: Bench) -> None:
    assert bench.operations.convert(Kind.SHARE, PRIVATE_START, 0x1000) == 0
    assert bench.operations.convert(Kind.SHARE, RAM, 0x1000) < 0

    now = bench.operations.status()

    assert (now.conversions, now.refused, now.exits) == (2, 0, 0)
    assert now.shared_bytes == PRIVATE_START + 0x1000
    assert now.private_bytes + now.shared_bytes == RAM


def test_dump_has_everything_at_one_moment(bench: Bench) -> None:
    state = bench.operations.dump_state()

    assert list(state["pages"]) == [
        [0, PRIVATE_START, "shared"], [PRIVATE_START, RAM - PRIVATE_START, "private"],
    ]  # fmt: skip
    assert state["io"] == {"blk0": {"requests": 3}}
    assert state["iommu"] is None
    assert state["status"]["state"] == "running"
    assert not bench.vcpus.paused


def test_status_and_dump_walk_no_runs_before_somebody_wants_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RangeMap, "runs", None)

    bench.operations.status()
    state = bench.operations.dump_state()

    monkeypatch.undo()
    assert bench.operations.convert(Kind.SHARE, PRIVATE_START, 0x1000) == 0
    assert next(state["pages"]) == [0, PRIVATE_START, "shared"], "of the moment of the dump"


def test_quit_ends_the_run_well(bench: Bench) -> None:
    bench.operations.quit()

    assert [outcome.exit for outcome in bench.rig.outcomes] == [QUIT]
    assert bench.rig.outcomes[0].exit_status == 0


def test_device_of_a_paused_machine_is_not_started_anew(bench: Bench) -> None:
    bench.operations.pause()

    with pytest.raises(LookupError, match="resume"):
        bench.operations.restart_device("blk0")
    bench.operations.resume()
    bench.operations.restart_device("blk0")

    assert bench.devices.log[-1] == "restarted blk0"


def test_device_without_a_process_is_listed_as_that(bench: Bench) -> None:
    assert bench.operations.devices() == {"blk0": None}
