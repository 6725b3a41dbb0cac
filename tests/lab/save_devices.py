"""Runs inside a lab machine: a stock guest with a device of each kind, restored by another pyvmm.

    python -m tests.lab.save_devices KERNEL INITRD IMAGE

The file system on IMAGE, of which a copy is the guest's disk, has `file` and `vs`, the program of
tests.support.vsock_program. A line of JSON with what was seen goes to stdout; the test judges it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench.policies import Console
from tests.lab.inside import PYVMM, SECONDS, ctl, pyvmm, said

TAP_MAC, MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
TAP, ADDRESS, GUEST = "tap0", "192.0.2.1", "192.0.2.2"
CALLED = b"from the host's program\n"
WAIT = "i=0; while [ ! -e /tmp/gone ] && [ $((i+=1)) -lt 300 ]; do usleep 100000; done; "


class Peer:
    """Host programs of one vsock at `path`: who calls port 5000 is told its bytes' SHA-256."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{path}_5000")
        self._listener.listen()
        self.calls = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            link, _ = self._listener.accept()
            self.calls += 1
            threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        digest = hashlib.sha256()
        with link:
            while data := link.recv(1 << 16):
                digest.update(data)
            link.sendall(digest.hexdigest().encode() + b"\n")

    def call(self, port: int) -> str:
        """Call the guest until it answers, say CALLED, and hear what it says."""
        while True:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(SECONDS)
                link.connect(str(self._path))
                link.sendall(b"CONNECT %d\n" % port)
                if link.recv(32).startswith(b"OK "):
                    link.sendall(CALLED)
                    link.shutdown(socket.SHUT_WR)
                    said = b""
                    while data := link.recv(4096):
                        said += data
                    return said.decode()
            time.sleep(0.2)


def bring_up_tap() -> None:
    while not os.path.exists(f"/sys/class/net/{TAP}"):
        time.sleep(0.2)
    subprocess.run(["ip", "addr", "add", f"{ADDRESS}/24", "dev", TAP], check=True)
    # One made anew has another address, which the guest would be seconds to find out.
    subprocess.run(["ip", "link", "set", TAP, "address", TAP_MAC, "up"], check=True)


class Machine:
    """One pyvmm, with its devices' other ends in a folder of its own."""

    def __init__(self, folder: Path, disk: str, net: str, words: list[str]) -> None:
        self.folder = folder
        folder.mkdir()
        self.peer = Peer(folder / "vsock")
        devices = ["--disk", disk, "--net", f"tap={TAP}{net}", "--rng"]
        devices += ["--vsock", f"path={folder}/vsock", "--console", f"file={folder}/console"]
        devices += ["--console", f"socket={folder}/port,name=test.port"]
        control = ["--control", str(folder / "control")]
        self.console = Console([*words, *devices, *control], folder / "stderr")
        bring_up_tap()

    def said(self, command: str) -> str:
        return said(self.console, command)

    def end(self) -> dict[str, Any]:
        return {
            "status": self.console.end(),
            "stderr": (self.folder / "stderr").read_text(),
            "calls": self.peer.calls,
            "console": (self.folder / "console").read_text(),
        }


def main(kernel: str, initrd: str, image: str) -> None:
    folder = Path(tempfile.mkdtemp())
    disk = shutil.copy(image, str(folder / "disk"))
    seen: dict[str, Any] = {}

    words = pyvmm(kernel, initrd, "--mem", "256M", "--private-mem=memfd")
    old = Machine(folder / "old", disk, f",mac={MAC}", words)
    seen["booted"] = old.console.expect_prompt(SECONDS) is not None
    old.said("mount -t ext4 /dev/vda /mnt; mkfifo /tmp/fifo; sleep 100000 >/tmp/fifo &")
    old.said(f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up")
    old.said("(/mnt/vs connect 5000 </tmp/fifo; echo status $? >/tmp/gone) &")
    seen["ping before"] = old.said(f"ping -c 3 -W 20 {ADDRESS} | grep received")
    seen["gone before"] = old.said("echo before >/dev/hvc0; cat /tmp/gone")
    saved = str(folder / "saved")
    control = old.folder / "control"
    _, seen["snapshot"] = ctl(control, "snapshot", saved, "--with-private", "--then-quit")
    seen["old"] = old.end()

    new = Machine(folder / "new", disk, "", [*PYVMM, "--restore", saved])
    seen["gone"] = new.said(WAIT + "cat /tmp/gone")
    seen["mac"] = new.said("cat /sys/class/net/eth0/address")
    seen["ping"] = new.said(f"ping -c 3 -W 20 {ADDRESS} | grep received")
    seen["random"] = new.said("head -c 64 /dev/hwrng | wc -c")
    seen["vsock"] = new.said("/mnt/vs connect 5000 </mnt/file")
    heard: list[str] = []
    caller = threading.Thread(target=lambda: heard.append(new.peer.call(6000)), daemon=True)
    caller.start()
    seen["called"] = new.said("echo from the guest | /mnt/vs listen 6000")
    caller.join(SECONDS)
    seen["heard"] = heard
    name = new.said("grep -l test.port /sys/class/virtio-ports/*/name | cut -d/ -f5")
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(SECONDS)
        link.connect(str(folder / "new" / "port"))
        new.said(f"echo to the port >/dev/{name}")
        seen["port"] = link.recv(100).decode()
    new.said("echo after >/dev/hvc0; umount /mnt")
    seen["complaints"] = new.said("dmesg | grep -iE 'lockup|stall|I/O error|call trace|id . is'")
    new.console.type("poweroff -f")
    seen["new"] = new.end()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
