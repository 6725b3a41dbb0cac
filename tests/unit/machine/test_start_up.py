"""The way to the guest: what is told first when several things are wrong, what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from firmware import bench_path
from tests.support.images import build_bzimage, build_elf, compress
from vmm.core.errors import HostError, PyvmmError
from vmm.machine import guest_vm
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine

ROOT = Path(__file__).resolve().parents[3]


def no_kvm(architecture: object) -> None:
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


CONFIGURE_AND_IMPORT = """
import sys
from vmm.cli.main import _configuration
from vmm.arch import architecture
from vmm.machine.images import OpenedImages
OpenedImages(architecture(), _configuration(["--kernel", sys.argv[1], "--mem", "256M"])).close()
import vmm._firmware, vmm.machine.machine, vmm.arch.x86_64.platform
print(*sys.modules)
"""


def test_start_up_imports_nothing_that_is_slow_to_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURE_AND_IMPORT, bench_path()],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip

    slow = {"dataclasses", "inspect", "json", "numpy", "vmm.policy.arguments", "vmm.policy.builtin"}
    slow |= {"argparse", "gettext", "locale", "shutil", "pathlib", "subprocess", "tempfile"}
    slow |= {"datetime", "logging", "selectors", "bz2", "lzma", "zlib", "vmm.boot.decompress"}
    slow |= {"vmm.machine.tracing", "vmm.trace.recorder"}  # for those who trace
    slow |= {"vmm.host.choice"}  # for private memory
    slow |= {"vmm.memory.lending", "vmm.conversion.lending", "vmm.policy.lending"}  # for an IOMMU
    slow |= {"vmm.devices.virtio.queue", "vmm.memory.engines", "vmm.conversion.schemes.remap"}
    assert slow.isdisjoint(done.stdout.split())


COUNT_COLLECTIONS = """
import atexit, gc
from vmm.cli import main
def collections():
    return sum(generation["collections"] for generation in gc.get_stats())
def start(arguments):
    before = collections()
    import vmm.machine.machine, vmm.conversion.transaction, vmm.wiring.devices
    import vmm.arch.x86_64.platform, vmm.arch.x86_64.board
    print(collections() - before, gc.isenabled())
main.main = start
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))
main.entry_point()
"""


def test_garbage_is_looked_for_neither_on_the_way_to_the_guest_nor_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_COLLECTIONS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.split() == ["0", "True", "True"]
