"""What an idle guest costs the host: pyvmm and QEMU, one after the other, in one lab machine.

    python tests/bench/idle.py [--kernel debian:6.12] [--cpus 1 4] [--seconds 20]

Each boots a stock kernel to its shell's prompt, waits until it has settled, and is then looked at
for some seconds. What counts is the processor time of the whole process, the guest's own work
included, in percent of one of the lab machine's processors; and how often its threads woke up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.in_lab import at_prompt, run_in_lab

LIMIT = 180.0
SETTLE_SECONDS = 10.0


def measure(words: list[str], seconds: float) -> dict[str, float]:
    """Percent of a processor and wake-ups per second of the guest that `words` start."""
    with at_prompt(words, LIMIT, ending=signal.SIGKILL) as guest:
        time.sleep(SETTLE_SECONDS)
        before, began = usage(guest.pid), time.monotonic()
        time.sleep(seconds)
        after, elapsed = usage(guest.pid), time.monotonic() - began
    busy, switches = (later - earlier for later, earlier in zip(after, before, strict=True))
    return {
        "percent": 100 * busy / os.sysconf("SC_CLK_TCK") / elapsed,
        "wakeups_per_s": switches / elapsed,
    }


def usage(pid: int) -> tuple[int, int]:
    """Clock ticks that a process has used, and how often its threads slept of their own will."""
    ticks = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime: proc(5) 14 and 15
        status = (task / "status").read_text()
        switches += int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return ticks, switches


def inner(kernel: str, initrd: str, seconds: float, counts: list[str]) -> None:
    """Runs inside the lab machine; a JSON line with all figures goes to stdout."""
    qemu = "qemu-system-x86_64 -M pc -accel kvm -cpu host -m 512 -nodefaults -no-user-config"
    figures = {}
    for cpus in counts:
        pyvmm = [sys.executable, "-sP", "/lab/project/pyvmm", "--kernel", kernel]
        pyvmm += ["--initrd", initrd, "--append", "quiet", "--cpus", cpus]
        yardstick = [*f"{qemu} -display none -serial stdio -no-reboot -smp {cpus}".split()]
        yardstick += ["-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet"]
        for name, words in {
            f"pyvmm --private-mem --cpus {cpus}": [*pyvmm, "--private-mem"],
            f"pyvmm --cpus {cpus}": pyvmm,
            f"QEMU -smp {cpus}": yardstick,
        }.items():
            figures[name] = measure(words, seconds)
            print(name, figures[name], file=sys.stderr)
    print(json.dumps(figures))


def outer(kernel_name: str, seconds: float, counts: list[str]) -> None:
    """Runs on the host: boots the lab machine, prints the table."""
    result = run_in_lab("tests.bench.idle", kernel_name, seconds, *counts, with_qemu=True, cpus=1)
    print(f"{kernel_name}, idle at its prompt inside the lab:")
    for name, figures in result.items():
        print(
            f"  {name:32} {figures['percent']:5.1f}% of a processor, "
            f"{figures['wakeups_per_s']:6.1f} wake-ups a second"
        )


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="debian:6.12")
    parser.add_argument("--cpus", nargs="+", default=["1", "4"])
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    outer(options.kernel, options.seconds, options.cpus)


if __name__ == "__main__":
    main()
