"""The way to the guest: what is told first when several things are wrong, what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import build_bzimage, build_elf, compress
from vmm.core.errors import HostError, PyvmmError
from vmm.machine import guest_vm
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine

ROOT = Path(__file__).resolve().parents[3]


def no_kvm() -> None:
    raise HostError("no KVM here")


@pytest.mark.parametrize(("damage", "message"), [(0, "no KVM here"), (64, "payload is damaged")])
def test_damaged_kernel_on_a_host_without_kvm_is_told_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: int, message: str
) -> None:
    payload = compress(build_elf(), "gzip")
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(build_bzimage(payload[: len(payload) - damage]))
    monkeypatch.setattr(guest_vm, "open_kvm", no_kvm)

    with pytest.raises(PyvmmError, match=message):
        Machine(MachineConfig(kernel=str(kernel))).run()


def test_start_up_imports_nothing_that_is_slow_to_import() -> None:
    code = (
        "import sys, vmm.cli.main as c, vmm.machine.machine; c.build_parser(); print(*sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    slow = {"dataclasses", "inspect", "json", "numpy", "vmm.policy.arguments", "vmm.policy.builtin"}
    slow |= {"vmm.machine.tracing", "vmm.trace.recorder"}  # for those who trace
    slow |= {"shutil", "bz2", "lzma"}  # which argparse would like to have
    slow |= {"vmm.devices.virtio.queue", "vmm.memory.engines", "vmm.conversion.schemes.remap"}
    assert slow.isdisjoint(done.stdout.split())
