"""(f) Start-up: from exec to the guest's first instruction, which puts a byte on the serial line.
(g) Memory: what pyvmm takes for itself, and what both sides of private memory hold.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vmm.bench import qemu as yardstick
from vmm.bench.processes import bench_guest, environment, pyvmm, seconds_to_first_byte
from vmm.bench.series import Series, interleaved
from vmm.core.errors import HostError


def measure(rounds: int, qemu: list[str] | None) -> Iterator[Series]:
    """Milliseconds; an interpreter that prints a byte is the floor for anything in Python."""
    kernel = bench_guest()
    commands = {
        "python, one byte": [sys.executable, "-c", "print(1)"],
        "pyvmm": pyvmm("--kernel", str(kernel), "--mem", "256M"),
    }
    if qemu is not None:
        commands["QEMU microvm"] = yardstick.quickest_guest(qemu, kernel)
    subjects = {
        name: lambda words=words: seconds_to_first_byte(words) * 1000
        for name, words in commands.items()
    }
    yield from interleaved("start-up", "exec to first instruction", "ms", subjects, rounds)


def measure_memory(rounds: int) -> Iterator[Series]:
    """MiB: pyvmm's own at its peak, what both sides of private memory hold together at most while
    the payload converts (looked at after each of its lines), and what either holds at its end."""
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, mib in _payload_memory().items():
            taken.setdefault(name, []).append(mib)
    for name, samples in taken.items():
        yield Series("memory", "embedded payload, --mem 512M --private-mem", name, "MiB", samples)


def _payload_memory() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        report, control = Path(scratch) / "report.json", Path(scratch) / "control"
        with subprocess.Popen(
            pyvmm("--private-mem", "--report", str(report), "--control", str(control)),
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            own = most = shared = 0
            while process.stdout.readline():
                own = max(own, _own_kib(process.pid))
                held = _held_now(control)
                most = max(most, sum(held.values()))
                shared = max(shared, held.get("shared_bytes", 0))
        if process.returncode != 0:
            raise HostError(f"the embedded payload ended with status {process.returncode}")
        held = json.loads(report.read_text())["residency"]
    mib = 1 << 20
    return {
        "pyvmm's own, at most": own / 1024,
        "both sides together, at most": most / mib,
        "shared side, at most": shared / mib,
        "private side at the end": held["private_bytes"] / mib,
        "shared side at the end": held["shared_bytes"] / mib,
        "both sides together at the end": (held["private_bytes"] + held["shared_bytes"]) / mib,
    }


def _held_now(control: Path) -> dict[str, int]:
    """Bytes resident on either side, from a running pyvmm's control socket; none once it ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        try:
            connection.connect(str(control))
            connection.sendall(b'{"command": "dump-state"}\n')
            with connection.makefile("rb") as answers:
                line = answers.readline()
        except OSError:
            return {}
    # It may end in the middle of its answer.
    answer = json.loads(line) if line.endswith(b"\n") else {}
    held: dict[str, int] = answer.get("residency", {})
    return held


def _own_kib(pid: int) -> int:
    """RssAnon + RssFile: resident without guest memory."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB", status, re.M))
