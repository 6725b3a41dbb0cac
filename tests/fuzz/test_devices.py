"""Every virtio device under a hostile driver, with a host that fails as well.

The ordinary run gives each device a few hundred lives. PYVMM_FUZZ=N makes it N times as many,
PYVMM_FUZZ_SEED repeats a run; both are in a failure's message.
"""

from __future__ import annotations

import mmap
import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fuzz.attacked import DEVICES, FailingHost, attacked
from tests.fuzz.hostile_driver import CANARY
from tests.fuzz.oracles import Resources, TurnCost, assert_holds_little
from vmm.core.errors import UnmappedAccess
from vmm.devices.virtio.rng import VirtioRng
from vmm.memory.guest_memory import GuestMemory

EPISODES = 30
STEPS = 150


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("failing", [False, True], ids=["host-works", "host-fails"])
def test_device_survives_a_hostile_driver(
    name: str,
    failing: bool,
    fuzz_seed: int,
    fuzz_factor: int,
    tmp_path: Path,
) -> None:
    life = 0
    served = 0
    worst_calls = 0
    resources = Resources()
    rng = random.Random(f"{name} {failing} {fuzz_seed}")
    stack = ExitStack()
    host = FailingHost(rng, stack)
    # A host that fails may end a device's link for good: after that its driver gets nothing done.
    machines = 15 if failing else 3
    try:
        for number in range(machines * fuzz_factor):
            folder = tmp_path / str(number)
            folder.mkdir()
            with attacked(name, rng, folder) as (target, driver):
                cost = TurnCost(driver.machine)
                for _ in range(EPISODES // machines):
                    life += 1
                    host.on = failing
                    driver.episode(STEPS)
                    host.on = False
                    assert_holds_little(driver.machine)
                    assert CANARY not in target.came_out(), "private memory came out"
                driver.memory.check()
                served += driver.machine.device.statistics.requests
                worst_calls = max(worst_calls, cost.worst_calls)
            resources.assert_given_back()
    except Exception as error:
        host.on = False
        raise AssertionError(
            f"{name}, life {life}, PYVMM_FUZZ_SEED={fuzz_seed} PYVMM_FUZZ={fuzz_factor}: {error!r}"
        ) from error
    finally:
        stack.close()
    # A driver that never gets through tests nothing.
    assert served > 100 * fuzz_factor
    assert worst_calls > 0
    assert host.failed > 0 or not failing


@pytest.mark.parametrize("name", DEVICES)
def test_device_whose_index_moves_while_it_reads_keeps_to_a_turn(
    name: str, fuzz_seed: int, fuzz_factor: int, tmp_path: Path
) -> None:
    """A second vCPU at work in the middle of the device's own reads, on every queue in turn."""
    rng = random.Random(f"second {name} {fuzz_seed}")
    with attacked(name, rng, tmp_path) as (target, driver):
        cost = TurnCost(driver.machine)
        for _ in range(20 * fuzz_factor):
            driver.leave_work(10)
            driver.second_vcpu = True
            for index in range(len(driver.machine.device.queue_sizes)):
                driver.machine.transport.notify(index)
                target.host(rng)
            driver.second_vcpu = False
            assert_holds_little(driver.machine)
            driver.memory.check()
            assert CANARY not in target.came_out(), "private memory came out"
        assert driver.moves > 0
        assert cost.worst_calls > 0


@pytest.mark.parametrize("name", ["blk", "blk-hva"])
def test_device_that_reads_private_pages_would_be_found(
    name: str, fuzz_seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canaries do their work: with GuestMemory's check gone they come out, or are lost."""

    def bounds_only(memory: GuestMemory, gpa: int, size: int) -> None:
        if not memory._in_span(gpa, size):
            raise UnmappedAccess("outside")

    monkeypatch.setattr(GuestMemory, "_require_shared", bounds_only)
    with pytest.raises(AssertionError) as caught:
        for number in range(20):
            folder = tmp_path / str(number)
            folder.mkdir()
            with attacked(name, random.Random(number), folder) as (target, driver):
                for _ in range(EPISODES):
                    driver.episode(STEPS)
                    assert CANARY[2:8] not in target.came_out(), "private memory came out"
    assert "private" in str(caught.value) or "past RAM" in str(caught.value)


def test_device_that_keeps_memory_when_it_is_closed_would_be_found(
    fuzz_seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle of resident memory does its work."""
    kept: list[mmap.mmap] = []
    process = VirtioRng.process

    def leaking(device: VirtioRng, queue_index: int) -> bool:
        # Pages of its own: what earlier tests have freed must not be used again here.
        kept.append(mmap.mmap(-1, 256 << 10, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(b"x" * (256 << 10))
        return process(device, queue_index)

    monkeypatch.setattr(VirtioRng, "process", leaking)
    resources = Resources()
    rng = random.Random(f"leak {fuzz_seed}")
    with pytest.raises(AssertionError, match="resident memory has grown by"):
        for _ in range(20):
            with attacked("rng", rng, tmp_path) as (_, driver):
                driver.leave_work(16)
                for _ in range(30):
                    driver.machine.transport.notify(0)
            resources.assert_given_back()
    assert len(kept) < 20 * 30


def test_queues_served_by_threads_survive_resets_and_conversions(
    fuzz_seed: int, fuzz_factor: int, tmp_path: Path
) -> None:
    """A device that reads as reset touches guest memory no more, whichever thread was at it."""
    rng = random.Random(f"threads {fuzz_seed}")
    failures: list[BaseException] = []
    is_down = stopping = False
    at_it = threading.Event()
    rings, done = [threading.Semaphore(0) for _ in range(4)], threading.Semaphore(0)
    with attacked("blk-mq", rng, tmp_path) as (target, driver):
        transport, memory = driver.machine.transport, driver.memory
        enter = memory.guest._enter

        def watched_enter(gpa: int, size: int) -> None:
            at_it.set()
            if is_down:
                failures.append(AssertionError(f"access to {gpa:#x} after a reset"))
            enter(gpa, size)

        memory.guest._enter = watched_enter  # type: ignore[method-assign]

        def serve(queue: int) -> None:
            while rings[queue].acquire() and not stopping:
                try:
                    transport.notify(queue)
                except BaseException as error:
                    failures.append(error)
                done.release()

        threads = [threading.Thread(target=serve, args=(queue,)) for queue in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(50 * fuzz_factor):
            driver.leave_work(30)
            driver.memory.convert(rng.randrange(32, 64))
            at_it.clear()
            for ring in rings:
                ring.release()
            assert at_it.wait(30)  # a thread is in the middle of something
            driver.machine.driver.status = 0
            is_down = True
            for _ in rings:
                assert done.acquire(timeout=30)
            is_down = False
        stopping = True
        for ring in rings:
            ring.release()
        for thread in threads:
            thread.join()
        assert not failures, f"PYVMM_FUZZ_SEED={fuzz_seed}: {failures[0]!r}"
        assert driver.machine.device.statistics.requests > 5
        assert CANARY not in target.came_out()
