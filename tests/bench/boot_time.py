"""How long a stock kernel takes to its shell: pyvmm and QEMU, interleaved, in one lab machine.

    python tests/bench/boot_time.py [--kernel debian:6.12] [--rounds 3] [--messages] [--json FILE]

Each round boots the same kernel, initrd and command line four times, from exec to the shell's
prompt: QEMU (-M pc, KVM, one vCPU, 512 MiB, serial, a modern virtio-blk disk), pyvmm with
--private-mem, pyvmm as an ordinary VM, QEMU again. Prints medians with their spread, the ratios
to QEMU's, and of pyvmm's last boot the exits per character on the serial console. `--messages`
leaves out "quiet": the kernel tells what it does, some 19,000 characters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.in_lab import at_prompt, run_in_lab

LIMIT = 240.0
COMMAND_LINE = "console=ttyS0 panic=-1"
UART = range(0x3F8, 0x400)


def boot_seconds(words: list[str], memory_of: list[float] | None = None) -> tuple[float, int]:
    """Seconds from exec until the guest's prompt, and the characters on its console until then;
    the process is ended then."""
    started = time.monotonic()
    with at_prompt(words, LIMIT) as guest:
        elapsed = time.monotonic() - started
        if memory_of is not None:
            memory_of.append(own_memory_mib(guest.pid))
    return elapsed, guest.characters


def own_memory_mib(pid: int) -> float:
    """Resident memory of a process in MiB, without its mappings of guest memory."""
    kib, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # a mapping's own line: addresses, ..., name
            counts = not any(name in rest for name in ("gmem", "guest_memfd", "memfd:"))
        elif first == "Rss:" and counts:
            kib += int(rest.split()[0])
    return kib / 1024


def uart_exits(report: Path) -> int:
    """Exits of a run at the serial port's registers."""
    ports = json.loads(report.read_text())["io_ports"]
    return sum(count for port, count in ports.items() if int(port, 16) in UART)


def inner(kernel: str, initrd: str, rounds: int, append: str) -> None:
    """Runs inside the lab machine; a JSON line with all samples goes to stdout."""
    folder = Path(tempfile.mkdtemp())  # the lab machine is thrown away
    disk, report = folder / "disk.img", folder / "report.json"
    disk.touch()
    os.truncate(disk, 16 << 20)
    qemu = "qemu-system-x86_64 -M pc -accel kvm -cpu host -smp 1 -m 512 -nodefaults -no-user-config"
    devices = "-display none -serial stdio -no-reboot"
    drive = f"-drive file={disk},format=raw,if=none,id=d"
    block = "-device virtio-blk-pci,drive=d,disable-legacy=on"
    commands = {
        "qemu": [
            *f"{qemu} {devices} {drive} {block}".split(),
            *("-kernel", kernel, "-initrd", initrd, "-append", f"{COMMAND_LINE} {append}"),
        ],
        "pyvmm --private-mem": [*_pyvmm(kernel, initrd, append, disk, report), "--private-mem"],
        "pyvmm": _pyvmm(kernel, initrd, append, disk, report),
    }
    console: dict[str, list[int]] = {}
    samples: dict[str, list[float]] = {name: [] for name in commands}
    memory: list[float] = []
    for number in range(rounds):
        for name in ("qemu", "pyvmm --private-mem", "pyvmm", "qemu"):
            collect = memory if name == "pyvmm --private-mem" else None
            seconds, characters = boot_seconds(commands[name], collect)
            samples[name].append(seconds)
            if name != "qemu":
                console[name] = [uart_exits(report), characters]
            print(f"round {number + 1}: {name} {seconds:.1f} s", file=sys.stderr)
    print(json.dumps({"samples": samples, "memory_mib": memory, "console": console}))


def _pyvmm(kernel: str, initrd: str, append: str, disk: Path, report: Path) -> list[str]:
    words = [sys.executable, "-sP", "/lab/project/pyvmm", "--kernel", kernel, "--initrd", initrd]
    words += ["--disk", str(disk), "--report", str(report)]
    return [*words, "--append", append] if append else words


def outer(kernel_name: str, rounds: int, append: str, json_file: Path | None) -> None:
    """Runs on the host: boots the lab machine, prints the table."""
    result = run_in_lab("tests.bench.boot_time", kernel_name, rounds, append, with_qemu=True)
    report(kernel_name, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def report(kernel_name: str, result: dict[str, Any]) -> None:
    """The table: median, smallest and largest sample, ratio of medians to QEMU's."""
    samples = result["samples"]
    yardstick = statistics.median(samples["qemu"])
    print(f"{kernel_name}, exec to shell prompt inside the lab, seconds:")
    for name, values in samples.items():
        middle = statistics.median(values)
        print(
            f"  {name:22} median {middle:6.2f}  min {min(values):6.2f}  max {max(values):6.2f}"
            f"  n={len(values)}  ratio to QEMU {middle / yardstick:.2f}"
        )
    for name, (exits, characters) in result["console"].items():
        print(
            f"  {name:22} {exits} exits of the serial port for {characters} characters, "
            f"{exits / characters:.2f} each"
        )
    own = max(result["memory_mib"])
    print(f"  pyvmm --private-mem at the prompt: {own:.1f} MiB resident without guest memory")


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="debian:6.12")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", action="store_true", help="boot without quiet")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    append = "" if options.messages else "quiet"
    outer(options.kernel, options.rounds, append, options.json)


if __name__ == "__main__":
    main()
