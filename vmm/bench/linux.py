"""(e) A stock kernel: boot, and reads and writes of its disk, on each engine, with all memory
private (each byte bounced through the guest's shared buffer) and as an ordinary VM, and on QEMU.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from vmm.bench import qemu as yardstick
from vmm.bench.processes import TIME_LIMIT, environment, pyvmm
from vmm.bench.series import Series
from vmm.core.errors import HostError

PROMPT = b"/ # "
APPEND = "quiet"
WORK = {
    "read 32 MiB, 1 MiB at a time": "dd if=/dev/vda of=/dev/null bs=1M count=32",
    "read 4 MiB, 4 KiB at a time, uncached": "dd if=/dev/vda of=/dev/null bs=4k count=1024 "
    "iflag=direct",
    "write 16 MiB, 1 MiB at a time, and sync": "dd if=/dev/zero of=/dev/vda bs=1M count=16 "
    "conv=fsync",
    "ext4: 200 files of 4 KiB, and sync": "mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda "
    "/mnt && (for i in $(seq 200); do head -c 4096 /dev/zero >/mnt/$i; done; sync; umount /mnt)",
}
DISK_BYTES = 64 << 20


def measure(
    kernel: str, initrd: str, disk: Path, rounds: int, qemu: list[str] | None
) -> Iterator[Series]:
    """Milliseconds from exec to the shell's prompt, then for each piece of work in the shell."""
    guest = ["--kernel", kernel, "--initrd", initrd, "--append", APPEND, "--allow-mapped-io"]
    commands: dict[str, list[str]] = {}
    for engine in ("auto", "pread", "fd2fd", "mmap"):
        words = pyvmm(*guest, "--disk", f"{disk},io={engine}")
        commands[f"pyvmm {engine}"] = words
        commands[f"pyvmm --private-mem {engine}"] = [*words, "--private-mem"]
    if qemu is not None:
        commands["QEMU"] = yardstick.linux_guest(qemu, kernel, initrd, APPEND, str(disk))
    cases = ["boot to the prompt", *WORK]
    samples: dict[tuple[str, str], list[float]] = {
        (case, name): [] for case in cases for name in commands
    }
    for number in range(rounds):
        order = list(commands)
        for name in order if number % 2 == 0 else reversed(order):
            for case, seconds in zip(cases, _session(commands[name]), strict=True):
                samples[case, name].append(seconds * 1000)
    for (case, name), taken in samples.items():
        yield Series("linux", case, name, "ms", taken)


def _session(words: list[str]) -> list[float]:
    """Seconds to the prompt, and for each command from its line feed to the next prompt."""
    started = time.monotonic()
    taken = []
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            _until_prompt(process.stdout.fileno())
            taken.append(time.monotonic() - started)
            for command in WORK.values():
                started = time.monotonic()
                os.write(process.stdin.fileno(), command.encode() + b" && echo $((40 + 2))\n")
                said = _until_prompt(process.stdout.fileno())
                taken.append(time.monotonic() - started)
                if b"\n42\r" not in said:
                    raise HostError(f"the guest's shell did not do {command!r}: {said!r}")
        finally:
            process.kill()
    return taken


def _until_prompt(fd: int) -> bytes:
    deadline = time.monotonic() + TIME_LIMIT
    seen = b""
    while PROMPT not in seen:
        ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
        data = os.read(fd, 65536) if ready else b""
        if not data:
            raise HostError(f"the guest did not come to a prompt: {seen[-500:]!r}")
        seen += data
    return seen
