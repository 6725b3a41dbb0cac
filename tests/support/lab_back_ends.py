"""Runs pyvmm in the lab, and the back ends that its devices have in processes of their own.

    python -m tests.support.lab_back_ends RESULTS SEED PYVMM'S OPTIONS...

virtiofsd serves /tmp/shared at /tmp/fs.sock, and the file from-host there holds BLOB;
qemu-storage-daemon serves a disk of DISK_BYTES at /tmp/disk.sock. Where the guest makes the file
kill-disk in the folder, the disk's back end is killed, and with start-disk another one is started
and taken up by way of the control socket /tmp/control; the files killed and started say that it was
done. RESULTS is a JSON object of what lay in the folder at the end: SHA-256 by name.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
STORAGE_DAEMON = "/usr/bin/qemu-storage-daemon"
BLOB_BYTES = 3 * (1 << 20) + 777
DISK_BYTES = 16 << 20
SHARED, FS_SOCKET, DISK_SOCKET = "/tmp/shared", "/tmp/fs.sock", "/tmp/disk.sock"
CONTROL = "/tmp/control"
PYVMM = (sys.executable, "-sP", "/lab/project/pyvmm")
_RETRY_SECONDS = 0.1


def blob(seed: int) -> bytes:
    """What the host's file holds: the same on both sides of the lab's wall."""
    return random.Random(seed).randbytes(BLOB_BYTES)


def virtiofsd(folder: str, path: str) -> list[str]:
    """The words that start it: QEMU's own until 7.2, another program since."""
    program = next(each for each in VIRTIOFSD if Path(each).exists())
    if program.endswith("qemu/virtiofsd"):
        settings = f"source={folder},sandbox=chroot,cache=none"
        return [program, f"--socket-path={path}", "-o", settings, "--rlimit-nofile=512"]
    return [program, f"--socket-path={path}", "--shared-dir", folder, "--sandbox=chroot"]


def storage_daemon(image: str, path: str) -> list[str]:
    """The words that start it for one disk."""
    return [
        STORAGE_DAEMON, "--blockdev", f"file,node-name=d,filename={image}", "--export",
        "vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,"
        f"addr.path={path}",
    ]  # fmt: skip


def _wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(_RETRY_SECONDS)


def _kill_and_start_when_told(processes: list[subprocess.Popen[bytes]]) -> None:
    _wait_for(f"{SHARED}/kill-disk")
    processes[-1].send_signal(signal.SIGKILL)
    processes[-1].wait()
    Path(SHARED, "killed").touch()
    _wait_for(f"{SHARED}/start-disk")
    Path(DISK_SOCKET).unlink()
    processes.append(subprocess.Popen(storage_daemon("/tmp/disk.img", DISK_SOCKET)))
    _wait_for(DISK_SOCKET)
    subprocess.check_call([*PYVMM, "ctl", CONTROL, "device", "restart", "blk0"])
    Path(SHARED, "started").touch()


def main(results: str, seed: str, *options: str) -> int:
    shared = Path(SHARED)
    shared.mkdir()
    (shared / "from-host").write_bytes(blob(int(seed)))
    Path("/tmp/disk.img").write_bytes(bytes(DISK_BYTES))
    fs = subprocess.Popen(virtiofsd(SHARED, FS_SOCKET))
    disk = subprocess.Popen(storage_daemon("/tmp/disk.img", DISK_SOCKET))
    _wait_for(FS_SOCKET)
    _wait_for(DISK_SOCKET)
    processes = [fs, disk]
    threading.Thread(target=_kill_and_start_when_told, args=(processes,), daemon=True).start()
    status = subprocess.call([*PYVMM, "--control", CONTROL, *options])
    for process in processes:
        process.kill()
        process.wait()
    found = {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in shared.iterdir()
        if each.is_file()
    }
    Path(results).write_text(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
