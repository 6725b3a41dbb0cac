"""A whole run whose host is not told of shares, on this machine's KVM: an ordinary VM stands in for
the protected one, so that everything but the hypervisor's part is the real thing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmm.arch.x86_64.architecture import X86
from vmm.core.errors import UsageError
from vmm.exits.outcome import FAILED
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine
from vmm.memory.observed_memory import ObservedMemory
from vmm.policy import Allow, Decision, Event, Policy, View

pytestmark = pytest.mark.kvm

CONFIG = MachineConfig(memory=64 << 20, private_memory="auto", scheme="pkvm")


class Standing(X86):
    """x86 with the scheme's name; the VM is of the default type."""

    schemes = ("pkvm", "cbit")  # type: ignore[assignment]


class Share(Policy):
    """For --policy."""

    def on_share(self, event: Event, view: View) -> Decision:
        return Allow()


class Looks(Policy):
    """Sees the start and the end."""

    seen: list[Any] = []

    def on_boot(self, view: View) -> Decision:
        self.seen.append(view.states())
        return Allow()

    def on_exit(self, end: Any, view: View) -> None:
        self.seen.append(view.residency())


def named(policy: type[Policy]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((f"{__name__}:{policy.__name__}", ()),)


def machine(config: MachineConfig) -> Machine:
    return Machine(config, arch=Standing())


def test_run_is_composed_of_observed_memory_and_forks_nothing_once_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, report = tmp_path / "disk", tmp_path / "report"
    disk.write_bytes(bytes(1 << 20))
    launched = ObservedMemory.launched

    def forbid(*_: object, **__: object) -> int:
        raise AssertionError("a process is made after the launch")

    def launch_and_watch(memory: ObservedMemory) -> None:
        launched(memory)
        for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
            monkeypatch.setattr(os, name, forbid)
        monkeypatch.setattr(subprocess, "Popen", forbid)

    monkeypatch.setattr(ObservedMemory, "launched", launch_and_watch)
    Looks.seen.clear()

    made = machine(CONFIG._replace(disks=(str(disk),), report=str(report), policies=named(Looks)))
    outcome = made.run()

    # The x86 payload knows no way to share that the host isn't part of: its request is refused.
    assert outcome.exit == FAILED
    assert os.fork is forbid
    found = json.loads(report.read_text())
    assert (found["scheme"], found["states"]) == ("pkvm", "observed, not told")
    assert found["conversions"] is None
    assert found["pages"]["observed"]["tried"] == 256
    assert found["residency"]["resident_bytes"] > 16 << 20
    assert found["io"]["blk0"]["engine"]["bytes"] == {"copying system calls": 0}
    states, residency = Looks.seen
    assert {state.value for _, state in states} == {"observed"}
    assert residency.shared_bytes == found["residency"]["resident_bytes"]


def test_device_that_finds_its_memory_private_is_told_of_at_once_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    made = machine(CONFIG._replace(disks=(str(disk),)))
    made.run()

    for _ in range(3):  # the guest may reset it and have it stop again
        made._virtio["blk0"].refused()

    (line,) = [line for line in capsys.readouterr().err.splitlines() if "blk0" in line]
    assert "blk0 stopped, the guest hasn't shared" in line and "CONFIG_ARM_PKVM_GUEST" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": named(Share)},
            "policy Share: on_share can't be asked under scheme pkvm, .*; use --scheme cbit",
        ),
        ({"balloon": "size=16M"}, "--balloon size=16M: .* can't be taken back"),
        ({"disks": ("DISK,io=fd2fd",)}, "io=fd2fd: .*; use io=auto or io=pread"),
    ],
)
def test_what_an_untold_host_cannot_do_is_a_usage_error_before_the_guest_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    if "disks" in changes:
        specs = [spec.replace("DISK", str(tmp_path / "disk")) for spec in changes["disks"]]
        changes = {"disks": tuple(specs)}

    with pytest.raises(UsageError, match=message) as caught:
        machine(CONFIG._replace(**changes)).run()

    assert "\n" not in str(caught.value)


def test_every_policy_runs_where_the_host_is_told() -> None:
    outcome = machine(CONFIG._replace(scheme="cbit", policies=named(Share))).run()

    assert outcome.exit == "poweroff"
