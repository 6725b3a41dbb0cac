"""A stock kernel with several processors: its RAM in private memory, and its power button."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.lab.conftest import Starter
from tests.lab.test_linux import MIB, RAM_BYTES, Shell, linux, report_of
from vmm.core.cpio import CpioWriter
from vmm.core.kmodules import ModuleTree
from vmm.lab.machine import Lab

CPUS = 4

# Binding a virtio driver shares the pages of its rings, unbinding makes them private again.
_REBIND = (
    "cd /sys/bus/virtio/drivers/virtio_blk;"
    " for i in $(seq 10); do echo $1 >unbind; echo $1 >bind; done"
)


def test_four_processors_convert_at_once_while_a_disk_is_read(
    lab_start: Starter, tmp_path: Path
) -> None:
    content = os.urandom(16 * MIB)
    (tmp_path / "data.img").write_bytes(content)
    for name in ("b.img", "c.img", "d.img"):
        (tmp_path / name).write_bytes(bytes(MIB))
    disks = [word for name in ("data", "b", "c", "d") for word in ("--disk", f"{name}.img")]
    run = lab_start(
        [*linux(), "--private-mem", "--cpus", str(CPUS), *disks, "--report", "report.json"]
    )
    shell = Shell(run)

    assert shell.type("nproc") == str(CPUS)
    ids = shell.type("grep '^apicid' /proc/cpuinfo").split("\n")
    assert [line.split()[-1] for line in ids] == ["0", "1", "2", "3"]
    # A message for each queue and one for the rest, written to a table in memory.
    interrupts = shell.type("grep virtio /proc/interrupts")
    assert interrupts.count("PCI-MSIX") == interrupts.count("\n") + 1 >= 2 * 4
    before = shell.type("dmesg | grep -c 'virtio_blk.*logical blocks'")
    shell.type(f"echo '{_REBIND}' >/tmp/rebind")
    loops = " ".join(f"taskset {1 << n:x} sh /tmp/rebind virtio{n} &" for n in (1, 2, 3))
    hashed = shell.type(f"{loops} sha256sum /dev/vda; wait")
    rebound = shell.type("dmesg | grep -c 'virtio_blk.*logical blocks'")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    assert hashlib.sha256(content).hexdigest() in hashed
    assert (before, rebound) == ("4", "34")
    report = report_of(tmp_path)
    share, unshare = report["conversions"]["share"], report["conversions"]["unshare"]
    assert share["failed"] == share["denied"] == unshare["failed"] == unshare["denied"] == 0
    pages = report["pages"]
    assert pages["private_bytes"] + pages["shared_bytes"] == RAM_BYTES
    assert share["bytes"] - unshare["bytes"] == pages["shared_bytes"]


_ORDERLY_INIT = """#!/bin/busybox sh
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
insmod /modules/button.ko
echo "guest: ready"
until grep -q '^ *1 ' /sys/firmware/acpi/interrupts/ff_pwr_btn; do sleep 0.2; done
echo "guest: the button was pressed"
poweroff -f
"""

_PRESS = """
python3 -sP /lab/project/pyvmm --cpus 2 "$@" >out 2>&1 &
pid=$!
until grep -q 'guest: ready' out; do sleep 0.2; done
kill -TERM $pid
wait $pid
echo "status $?"
cat out
"""


def test_sigterm_lets_a_stock_kernel_power_off(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    kernel = lab.guest_kernel("debian:6.12")
    assert kernel.modules is not None
    # A second archive behind the first: its files win.
    extra = CpioWriter()
    for name, module in ModuleTree(kernel.modules).in_order(["button"]):
        extra.file(f"modules/{name}.ko", module)
    extra.file("init", _ORDERLY_INIT.encode(), 0o755)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(lab.guest_initramfs(kernel).read_bytes() + extra.finish())
    words = ["--kernel", str(kernel.image), "--initrd", str(initrd), "--append", "quiet"]

    command = ["sh", "-c", _PRESS, "sh", *words]
    run = lab_start(command, program=True, files=[kernel.image, initrd], cpus=1)
    status = run.wait(180)

    said = bytes(run.stdout.data).decode()
    assert status == 0, said
    assert "status 0" in said
    assert "guest: the button was pressed" in said
