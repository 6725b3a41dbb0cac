"""The lab itself: what goes in and comes out, seen with small programs instead of pyvmm."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.lab.conftest import BOOT_SECONDS, Starter
from vmm.core.errors import GuestFailure
from vmm.lab.heartbeat import MachineStandsStill
from vmm.lab.machine import Lab
from vmm.lab.options import LabOptions

# KVM_CHECK_EXTENSION of KVM_CAP_GUEST_MEMFD_FLAGS (244) and KVM_GET_API_VERSION.
_PROBE = """
import fcntl, json, os
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
print(json.dumps({"api": fcntl.ioctl(kvm, 0xAE00, 0), "flags": fcntl.ioctl(vm, 0xAE03, 244)}))
"""


def test_program_gets_megabytes_of_input_and_gives_output_errors_and_status(
    lab_start: Starter,
) -> None:
    data = os.urandom(4 << 20)
    script = "cat >/tmp/all; cat /tmp/all; echo trouble >&2; exit 7"
    run = lab_start(["sh", "-c", script], program=True)

    run.send(data)
    run.close_input()
    status = run.wait(BOOT_SECONDS)

    assert status == 7
    assert hashlib.sha256(run.stdout.data).digest() == hashlib.sha256(data).digest()
    assert bytes(run.stderr.data) == b"trouble\n"


def test_machine_has_kvm_with_mappable_guest_memfd_and_qemu_where_it_was_asked_for(
    lab_start: Starter,
) -> None:
    script = 'python3 -c "$1" && qemu-system-x86_64 --version'
    run = lab_start(["sh", "-c", script, "sh", _PROBE], program=True, with_qemu=True)

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stderr.data)

    probed, version = bytes(run.stdout.data).splitlines()[:2]
    assert json.loads(probed) == {"api": 12, "flags": 3}
    assert version.startswith(b"QEMU emulator version")


def test_files_named_in_the_line_are_there_and_outputs_come_back(
    lab_start: Starter, tmp_path: Path
) -> None:
    (tmp_path / "in put").write_bytes(b"content")
    script = 'cp "$1" out && mkdir d && echo "$2" >d/e'
    run = lab_start(
        ["sh", "-c", script, "sh", "in put", "it's"],
        program=True,
        outputs=[tmp_path / "out", tmp_path / "d", tmp_path / "never-made"],
    )

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stderr.data)

    assert run.collect("out") == b"content"
    assert run.collect("d/e") == b"it's\n"
    assert not (tmp_path / "never-made").exists()


def test_writes_to_a_disk_reach_the_file_unless_read_only(
    lab_start: Starter, tmp_path: Path
) -> None:
    for name in ("writable", "read"):
        (tmp_path / name).write_bytes(b"old." * 1024)
    script = "for d in $PYVMM_LAB_DISKS; do printf new. | dd of=$d bs=4 seek=1 2>/dev/null; done"
    run = lab_start(["sh", "-c", script], program=True, disks=["writable", "read,ro"])

    status = run.wait(BOOT_SECONDS)

    assert status != 0  # of the last disk's dd
    assert (tmp_path / "writable").read_bytes()[:12] == b"old.new.old."
    assert (tmp_path / "read").read_bytes() == b"old." * 1024


def test_terminal_is_one_inside_too(lab_start: Starter) -> None:
    run = lab_start(["sh", "-i"], program=True, terminal=(33, 99))

    run.expect(b"# ", BOOT_SECONDS)
    run.send(b"stty size; tty\n")
    run.expect(b"33 99\r\n/dev/", 30)
    run.send(b"stty raw -echo; echo ready; head -c 256 | md5sum; stty sane; exit 4\n")
    run.expect(b"ready\n", 30)
    run.send(bytes(range(256)))

    digest = hashlib.md5(bytes(range(256)), usedforsecurity=False).hexdigest()
    run.expect(digest.encode(), 30)
    assert run.wait(60) == 4


def test_time_limit_ends_the_machine(lab_start: Starter) -> None:
    run = lab_start(["sleep", "1000"], program=True, time_limit=2.0)

    with pytest.raises(GuestFailure, match="time limit of 2 s"):
        run.wait(BOOT_SECONDS)


def test_machine_that_stands_still_is_told_apart_and_closing_it_leaves_nothing(
    lab_start: Starter,
) -> None:
    run = lab_start(["sh", "-c", "echo done; sleep 1000"], program=True)
    process, folder = run.process_id, run.folder
    assert folder.is_dir()
    run.expect(b"done", BOOT_SECONDS)
    while not run.heartbeat.beats:
        assert run.pump()
    assert b"alive" not in run.log

    os.kill(process, signal.SIGSTOP)
    run.heartbeat.silence = 2.0
    with pytest.raises(MachineStandsStill, match="no heartbeat for 2 s"):
        run.wait(BOOT_SECONDS)

    run.close()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_machine_begins_where_an_earlier_one_had_booted_and_anew_if_that_is_damaged(
    lab_start: Starter, tmp_path: Path
) -> None:
    # A size of its own, so that no other test's machine is spoilt.
    words = ["sh", "-c", "cat /proc/sys/kernel/random/uuid; date +%s; ls /dev"]

    def run(restored: bool) -> tuple[str, Path]:
        began = time.time()
        with lab_start(words, program=True, memory_mib=600, disks=["disk"]) as machine:
            assert machine.wait(BOOT_SECONDS) == 0
            assert machine.saved_state is not None
            assert machine.is_restored is restored
            uuid, now, *devices = bytes(machine.stdout.data).decode().splitlines()
        assert began - 1 <= float(now) <= time.time() + 1
        assert {"vda", "vdb", "vdc", "vdd", "vde"} <= set(devices)
        return uuid, machine.saved_state

    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    _, state = run(restored=False)
    size = state.stat().st_size
    uuid, _ = run(restored=True)
    other, _ = run(restored=True)

    assert uuid != other
    os.truncate(state, size // 2)
    run(restored=False)
    assert state.stat().st_size > size // 2
    state.unlink()


def test_expect_that_is_not_met_shows_what_was_there_and_a_signal_gives_the_shells_status(
    lab_start: Starter,
) -> None:
    run = lab_start(["sh", "-c", "echo something else; kill -9 $$"], program=True)

    with pytest.raises(TimeoutError, match=r"something else.*"):
        run.expect(b"something wanted", BOOT_SECONDS)

    assert run.wait(BOOT_SECONDS) == 137


# The guest runs on the inner machine's KVM: what pyvmm's own tests boot, here with QEMU.
_BOOT_EACH = """
while [ $# -gt 0 ]; do
    qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -accel kvm -m 512 \
        -serial stdio -drive if=virtio,format=raw,file=/dev/vdf \
        -kernel "$1" -initrd "$2" -append "console=ttyS0 quiet panic=-1" || exit
    shift 2
done
"""


def test_stock_kernels_with_the_labs_initramfs_reach_a_shell(
    lab_start: Starter, tmp_path: Path
) -> None:
    maker = Lab(LabOptions())
    names = ["debian:6.12", "debian:7.3", "debian:6.1"]
    kernels = [maker.guest_kernel(name) for name in names]
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    words = ["sh", "-c", _BOOT_EACH, "sh"]
    for kernel in kernels:
        words += [str(kernel.image), str(maker.guest_initramfs(kernel))]
    run = lab_start(words, program=True, with_qemu=True, disks=["disk"])

    for name in names:
        run.expect(b"/ # ", BOOT_SECONDS)
        run.send(b"ls -l /dev/vda && uname -r && poweroff -f\n")
        release = name.removeprefix("debian:").encode() + b"."
        run.expect(b"/dev/vda\r\n" + release, 60)
    assert run.wait(60) == 0
