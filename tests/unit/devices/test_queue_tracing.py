"""What the trace has of a device's requests, whichever device it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.disk_machine import DATA, DiskMachine, MakeMachine
from tests.support.trace import now, rows_of, start_recorder
from tests.support.virtio_driver import Piece
from vmm.devices.virtio.block import T_IN, T_OUT
from vmm.devices.virtio.queue import Chain
from vmm.trace.queues import DeviceTrace


def rows_after(make_machine: MakeMachine, path: Path, act: Any) -> list[tuple[Any, ...]]:
    """Brings a disk up, has `act` use it, and returns what was traced."""
    recorder = start_recorder(path / "t")
    machine: DiskMachine = make_machine(observer=DeviceTrace(recorder, "blk0"))
    before = now()
    act(machine, machine.up())
    recorder.close()
    rows = rows_of(path / "t")
    assert all(row["latency_ns"] <= now() - before for row in rows)
    return [(r["kind"], r["name"], r["detail"] >> 16, r["gpa"], r["bytes"]) for r in rows]


def test_requests_traced_have_device_queue_direction_and_buffers(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    def read_and_write(machine: DiskMachine, queue: Any) -> None:
        machine.do(queue, T_IN, 0, Piece(DATA, 1024, True))
        machine.do(queue, T_OUT, 0, Piece(DATA + 0x4000, 512))

    assert rows_after(make_machine, tmp_path, read_and_write) == [
        ("io-in", "blk0", 0, DATA, 1025),
        ("io-out", "blk0", 0, DATA + 0x4000, 528),
    ]


def test_batch_traced_has_a_row_for_each_request(make_machine: MakeMachine, tmp_path: Path) -> None:
    def read_eight(machine: DiskMachine, queue: Any) -> None:
        heads = []
        for i in range(8):
            pieces, _ = machine.request(T_IN, i, Piece(DATA + 0x1000 * i, 512, True))
            heads.append(queue.chain(pieces))
        queue.offer(*heads)
        machine.driver.notify()

    rows = rows_after(make_machine, tmp_path, read_eight)

    assert [row[3] for row in rows] == [DATA + 0x1000 * i for i in range(8)]


def test_request_put_back_is_traced_once(
    make_machine: MakeMachine, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vmm.devices.virtio.budget.TURN_BYTES", 512)

    def read_three(machine: DiskMachine, queue: Any) -> None:
        heads = []
        for i in range(3):
            pieces, _ = machine.request(T_IN, i, Piece(DATA + 0x1000 * i, 512, True))
            heads.append(queue.chain(pieces))
        queue.offer(*heads)
        machine.driver.notify()

    assert len(rows_after(make_machine, tmp_path, read_three)) == 3


def test_request_on_another_queue_says_which_and_counts_once(tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    queue = DeviceTrace(recorder, "net0").queue(3)

    queue.taken([Chain(7, [(DATA, 60)], [])])
    queue.returned([(7, 0)])
    queue.returned([(7, 0)])  # no honest device does that
    recorder.close()

    assert [(r["name"], r["detail"] >> 16) for r in rows_of(tmp_path / "t")] == [("net0", 3)]


def test_device_stopped_by_a_bad_ring_is_traced(make_machine: MakeMachine, tmp_path: Path) -> None:
    def break_the_ring(machine: DiskMachine, queue: Any) -> None:
        queue.set_available_index(queue.size + 9)
        machine.driver.notify()

    rows = rows_after(make_machine, tmp_path, break_the_ring)

    assert [row[:2] for row in rows] == [("io-refused", "blk0")]


def test_trace_has_addresses_without_the_bit_of_shared_pages(tmp_path: Path) -> None:
    recorder, bit = start_recorder(tmp_path / "t"), 1 << 39
    queue = DeviceTrace(recorder, "blk0", bit).queue(0)

    queue.taken([Chain(1, [(DATA | bit, 60)], []), Chain(2, [], [(DATA + 4096 | bit, 60)])])
    queue.returned([(1, 0), (2, 0)])
    recorder.close()

    assert [row["gpa"] for row in rows_of(tmp_path / "t")] == [DATA, DATA + 4096]
