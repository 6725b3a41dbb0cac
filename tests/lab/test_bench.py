"""`pyvmm bench --only linux`: a session with a stock kernel, fio, and the network in the lab."""

from __future__ import annotations

import json
from pathlib import Path

from tests.lab.conftest import Starter
from vmm.bench import linux
from vmm.lab.interpreter import executable
from vmm.lab.machine import Lab

INNER = """
import json, sys
from vmm.bench import linux, network

kernel, initrd, fio = sys.argv[1:]
with open("/tmp/disk.img", "wb") as file:
    file.truncate(linux.DISK_BYTES)
with network.peer() as peer:
    guest = linux.Guest(kernel, initrd, "/tmp/disk.img", fio, peer)
    words = [*linux.pyvmm_words(guest, "auto"), "--private-mem"]
    work = [s for s in linux.steps(guest, True) if not (s.case or "").startswith(("read", "ext4"))]
    print(json.dumps(linux.session(words, work)))
"""


def test_stock_kernel_runs_fio_and_exchanges_bytes_with_the_bench(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    kernel = lab.guest_kernel("debian:6.12")
    (tmp_path / "inner.py").write_text(INNER)
    files = [kernel.image, lab.guest_initramfs(kernel), lab.fio_image()]

    run = lab_start([str(executable()), "inner.py", *map(str, files)], program=True)
    status = run.wait()

    assert status == 0, bytes(run.stderr.data)
    taken = json.loads(bytes(run.stdout.data))
    assert [case.split(":")[0] for case, _ in taken] == [
        linux.BOOT, "write 16 MiB, 1 MiB at a time, and sync", "fio", "fio", "network", "network"
    ]  # fmt: skip
    assert all(milliseconds > 0 for _, milliseconds in taken)
