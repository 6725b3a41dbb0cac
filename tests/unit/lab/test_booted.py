"""Saved lab machines: what QEMU is asked for, and what happens when it can't."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vmm.core.errors import HostError
from vmm.lab.booted import Plugging, SavedState, saved_state
from vmm.lab.cache import Cache

NODES: list[dict[str, object]] = [{"node-name": "drive1"}, {"node-name": "drive2"}]
DEVICES: list[dict[str, object]] = [{"driver": "virtio-blk-pci", "drive": "drive1"}]


class Monitor:
    """Answers as QEMU's does, with a migration that ends as `status` says; notes the commands."""

    def __init__(self, status: str = "completed", refused: str = "") -> None:
        self.status, self.refused = status, refused
        self.done: list[tuple[str, dict[str, Any]]] = []
        self.ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self.ours.close()
        self._theirs.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._theirs.close()

    @property
    def commands(self) -> list[str]:
        return [name for name, _ in self.done]

    def _serve(self) -> None:
        with self._theirs.makefile("rwb") as lines:
            self._say(lines, {"QMP": {}})
            for line in lines:
                request = json.loads(line)
                name, arguments = request["execute"], request["arguments"]
                self.done.append((name, arguments))
                if name == self.refused:
                    self._say(lines, {"error": {"desc": "not here"}})
                    continue
                if name.startswith("migrate") and "channels" in arguments:
                    if name == "migrate":
                        path = arguments["channels"][0]["addr"]["filename"]
                        Path(path).write_bytes(b"state")
                    for status in ("setup", self.status):
                        self._say(lines, {"event": "MIGRATION", "data": {"status": status}})
                self._say(lines, {"return": {}})

    def _say(self, lines: Any, what: dict[str, Any]) -> None:
        lines.write(json.dumps(what).encode() + b"\n")
        lines.flush()


@pytest.fixture
def saved(tmp_path: Path) -> SavedState:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    return saved_state(Cache(tmp_path / "cache"), ["qemu", "-m", "2048"], [kernel])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def plugging(stack: ExitStack, monitor: Monitor, saved: SavedState, restores: bool) -> Plugging:
    stack.callback(monitor.close)
    made = Plugging(monitor.ours, saved, NODES, DEVICES, restores)
    stack.callback(made.close)
    return made


def test_machine_that_has_booted_is_saved_before_anything_is_plugged(
    stack: ExitStack, saved: SavedState
) -> None:
    monitor = Monitor()

    plugging(stack, monitor, saved, restores=False).plug()

    assert saved.exists
    what = [name for name in monitor.commands if not name.startswith(("qmp", "migrate-set"))]
    assert what == ["stop", "migrate", "blockdev-add", "blockdev-add", "device_add", "cont"]
    assert [given for name, given in monitor.done if name == "blockdev-add"] == NODES


def test_machine_from_a_saved_state_is_not_saved_again(stack: ExitStack, saved: SavedState) -> None:
    first = Monitor()
    plugging(stack, first, saved, restores=False).plug()
    monitor = Monitor()
    machine = plugging(stack, monitor, saved, restores=True)

    machine.restore()
    machine.plug()

    assert "migrate" not in monitor.commands
    assert monitor.commands[-4:] == ["blockdev-add", "blockdev-add", "device_add", "cont"]
    (loaded,) = [given for name, given in monitor.done if name == "migrate-incoming"]
    (written,) = [given for name, given in first.done if name == "migrate"]
    name = "images/booted-"
    assert name in loaded["channels"][0]["addr"]["filename"]
    assert name in written["channels"][0]["addr"]["filename"].replace(".new-", "")


def test_state_that_cannot_be_loaded_is_the_hosts_error(
    stack: ExitStack, saved: SavedState
) -> None:
    plugging(stack, Monitor(), saved, restores=False).plug()

    with pytest.raises(HostError, match="failed"):
        plugging(stack, Monitor(status="failed"), saved, restores=True).restore()

    saved.discard()
    assert not saved.exists


@pytest.mark.parametrize("monitor", [{"status": "failed"}, {"refused": "migrate"}])
def test_machine_that_cannot_be_saved_runs_all_the_same(
    stack: ExitStack, saved: SavedState, monitor: dict[str, str]
) -> None:
    made = Monitor(**monitor)

    plugging(stack, made, saved, restores=False).plug()

    assert not saved.exists
    assert made.commands[-1] == "cont"


def test_drive_that_qemu_refuses_is_told_in_its_words(stack: ExitStack, saved: SavedState) -> None:
    with pytest.raises(HostError, match="QEMU refused blockdev-add: not here"):
        plugging(stack, Monitor(refused="blockdev-add"), saved, restores=False).plug()


def test_monitor_that_hangs_up_is_told(stack: ExitStack, saved: SavedState) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    machine = Plugging(ours, saved, NODES, DEVICES, restores=True)
    stack.callback(machine.close)

    with pytest.raises(HostError, match="QEMU has ended"):
        machine.restore()


def test_another_kernel_or_size_of_memory_is_another_state(tmp_path: Path) -> None:
    cache, kernel = Cache(tmp_path / "cache"), tmp_path / "kernel"
    paths = set()
    for content, memory in ((b"a", "512"), (b"a", "1024"), (b"ab", "512")):
        kernel.write_bytes(content)
        paths.add(saved_state(cache, ["qemu", "-m", memory], [kernel]).path)

    assert len(paths) == 3
