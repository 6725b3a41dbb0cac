"""What a start imports: whoever adds to it is to notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

UNWANTED = {
    "argparse", "array", "ast", "ctypes", "dataclasses", "enum", "fcntl", "hashlib", "heapq",
    "inspect", "ioctl_opt", "vmm.arch.debug", "vmm.arch.x86_64.debug", "vmm.control.gdb",
    "vmm.machine.debugger", "vmm.memory.debugging", "vmm.memory.handing_out",
    "vmm.control.memory_file", "vmm.machine.memory_file", "vmm.devices.vhost_user",
    "vmm.machine.back_ends", "vmm.wiring.vhost_user",
    "logging", "numpy", "pathlib", "re", "rich", "shutil", "signal", "socket", "subprocess",
    "tempfile", "termios", "tty", "typing", "vmm.arch.x86_64.probes.strict",
    "vmm.arch.x86_64.strict", "vmm.boot", "vmm.control.control_socket",
    "vmm.control.status_line", "vmm.conversion.deferral", "vmm.devices.load_window",
    "vmm.devices.virtio", "vmm.lab",
    "importlib.metadata", "vmm.core.plugins", "vmm.devices.own", "vmm.exits.own",
    "vmm.machine.extensions", "vmm.machine.report_keys",
    "vmm.machine.tracing", "vmm.memory.engines", "vmm.policy.loader", "vmm.trace",
}  # fmt: skip
"""What takes long to import, or what a run without kernel, devices and policy has no use for."""

START = """
import sys
from vmm.exits.run_loop import VcpuRunner
start = VcpuRunner.start
def noted(runner):
    print(*sys.modules, file=sys.stderr)
    start(runner)
VcpuRunner.start = noted
sys.argv = ["pyvmm", "--private-mem"]
from vmm.cli.main import entry_point
entry_point()
"""


def test_start_of_the_payload_imports_nothing_that_it_has_no_use_for() -> None:
    """By a console script's way: `python -m` imports some more by itself."""
    done = subprocess.run(
        # -S: what the environment's own start-up files import is not ours.
        [sys.executable, "-S", "-c", f"import sys\nsys.path[:] = {sys.path!r}{START}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert UNWANTED & set(done.stderr.split()) == set()
