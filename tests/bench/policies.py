"""What each built-in policy makes of a stock kernel's boot and disk, in one lab machine.

    python tests/bench/policies.py [--kernel debian:6.12] [--rounds 1] [--only NAME] [--json FILE]

Every run boots the same kernel to its shell, writes random data to the disk, drops the caches and
reads it back. It takes the disk's driver off the device and puts it back CYCLES times, and each
time the queue's memory is unshared and shared again. Then it powers off. Prints conversions, bytes,
refusals and times under each policy, and the ratio of the times to those under AllowAll. A run in
which the guest hangs is ended, and said to be stuck.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.in_lab import PROMPT, run_in_lab

BOOT_LIMIT = 90.0
COMMAND_LIMIT = 15.0
MOST_CHURNS = 20
CYCLES = 20
DISK_BYTES = 4 << 20

DRIVER = "/sys/bus/virtio/drivers/virtio_blk"
CHURN = (
    f"i=0; while [ $i -lt {CYCLES} ]; do i=$((i+1)); "
    f"echo virtio0 >{DRIVER}/unbind; echo virtio0 >{DRIVER}/bind; done"
)
DISK = (
    f"dd if=/dev/urandom of=/dev/vda bs=64k count={DISK_BYTES >> 16} 2>/dev/null; sync; "
    "echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda"
)

# Each with its arguments: bounds that a stock kernel with 512 MiB fits into, except for those in
# STOPPING, whose refusals are what is to be seen. Several are stacked with a +.
POLICIES = {
    "no policy": "",
    "AllowAll": "AllowAll",
    "DenyAfterBoot": "DenyAfterBoot seconds=30",
    "Quota 80M": "Quota limit=80M",
    "Quota 32M": "Quota limit=32M",
    "RateLimit 400": "RateLimit per_second=20 burst=400",
    "RateLimit 140": "RateLimit per_second=1 burst=140",
    "Hysteresis": "Hysteresis seconds=1",
    "KeepShared": "KeepShared limit=64M",
    "Coalesce": "Coalesce size=128K seconds=1",
    "DeferredDiscard": "DeferredDiscard seconds=1",
    "PageBudget 400M": "PageBudget limit=400M",
    "LeastPrivilege": "LeastPrivilege",
    "Audit of Quota": "Audit file=audit.jsonl of=vmm.policy.builtin:Quota of.limit=80M",
}
_BOUNDS = ("AllowAll", "RateLimit 400", "PageBudget 400M", "LeastPrivilege", "Audit of Quota")
POLICIES["bounds together"] = " + ".join(POLICIES[name] for name in _BOUNDS)

STOPPING = ("DenyAfterBoot", "RateLimit 140")
"""Under these the disk is rebound until a share is refused."""


class Console:
    """A guest's console on pipes: commands typed, and what they printed."""

    def __init__(self, words: list[str], log: Path) -> None:
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self.seen = b""

    def expect_prompt(self, limit: float) -> str | None:
        """What came before the next prompt; None when the time is up or the guest has ended."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit
        while PROMPT not in self.seen:
            left = max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([self.process.stdout], [], [], left)
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                return None
            self.seen += data
        text, _, self.seen = self.seen.partition(PROMPT)
        return text.decode(errors="replace").replace("\r", "")

    def type(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Wait for the end, or bring it about; the exit status."""
        assert self.process.stdout is not None and self.process.stdin is not None
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)  # SIGTERM would ask the guest first
            return self.process.wait(20)
        finally:
            self.process.stdin.close()
            self.process.stdout.close()


def run_once(kernel: str, initrd: str, name: str, folder: Path) -> dict[str, Any]:
    """One guest from exec to its end, under the policy of that name."""
    disk, report, log = folder / "disk.img", folder / "report.json", folder / "stderr"
    disk.write_bytes(bytes(DISK_BYTES))
    report.unlink(missing_ok=True)
    words = [sys.executable, "-sP", "/lab/project/pyvmm", "--kernel", kernel, "--initrd", initrd]
    words += ["--append", "quiet", "--private-mem", "--disk", str(disk), "--report", str(report)]
    for policy in filter(None, POLICIES[name].split(" + ")):
        kind, *given = policy.split()
        words += ["--policy", f"vmm.policy.builtin:{kind}"]
        for argument in given:
            words += ["--policy-arg", argument.replace("file=", f"file={folder}/")]
    seconds: dict[str, float] = {}
    answers: dict[str, str] = {}
    hung = None
    started = time.monotonic()
    console = Console(words, log)
    steps = [("boot", "", BOOT_LIMIT), ("disk", DISK, COMMAND_LIMIT)]
    steps += [("churn", CHURN, COMMAND_LIMIT)] * (MOST_CHURNS if name in STOPPING else 1)
    for step, command, limit in steps:
        if command:
            console.type(command)
        answer = console.expect_prompt(limit)
        now = time.monotonic()
        if answer is None:
            hung = step
            break
        seconds[step], started = now - started, now
        answers[step] = answer.removeprefix(command).strip()[-2000:]
    if hung is None:
        console.type("dmesg | grep -iE 'warn|bug:|leak|fail|error|timed out' | tail -5")
        answers["dmesg"] = (console.expect_prompt(COMMAND_LIMIT) or "").partition("\n")[2].strip()
        console.type("poweroff -f")
    else:
        console.process.send_signal(signal.SIGINT)
    status = console.end()
    digest = hashlib.md5(disk.read_bytes(), usedforsecurity=False).hexdigest()
    return {
        "seconds": seconds,
        "hung": hung,
        "status": status,
        "stderr": log.read_text(errors="replace").strip()[-500:],
        "answers": answers,
        "disk_agrees": digest in answers.get("disk", ""),
        "report": json.loads(report.read_text()) if report.exists() else None,
    }


def inner(kernel: str, initrd: str, rounds: int, names: list[str]) -> None:
    """Runs inside the lab machine; a JSON line with all runs goes to stdout."""
    folder = Path(tempfile.mkdtemp())
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            run = run_once(kernel, initrd, name, folder)
            runs[name].append(run)
            times = ", ".join(f"{what} {s:.1f} s" for what, s in run["seconds"].items())
            end = f"stopped in {run['hung']}" if run["hung"] else f"status {run['status']}"
            print(f"round {number + 1}: {name}: {times}, {end}", file=sys.stderr, flush=True)
    audit = folder / "audit.jsonl"
    lines = audit.read_text().splitlines() if audit.exists() else []
    print(json.dumps({"runs": runs, "audit": [len(lines), *lines[:1], *lines[-1:]]}))


def arguments_of(kernel: str, initrd: str, rounds: int, names: list[str]) -> list[str]:
    """The words that run `inner` inside a lab machine, after the interpreter."""
    return [str(Path(__file__).resolve()), "--inner", kernel, initrd, str(rounds), *names]


def outer(kernel_name: str, rounds: int, names: list[str], json_file: Path | None) -> None:
    """Runs on the host: boots the lab machine, prints the table."""
    result = run_in_lab("tests.bench.policies", kernel_name, rounds, *names)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    print_table(kernel_name, result["runs"])


def print_table(kernel_name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{kernel_name} in the lab: boot, {CYCLES} rebinds of the disk, {DISK_BYTES >> 20} MiB")
    print("policy           | share calls,  MiB | unshare calls,  MiB | refused | by disk |"
          " deferred MiB, back |  boot s |  disk s | churn s | ratio | ended")  # fmt: skip
    whole = {name: [sum(run["seconds"].values()) for run in each] for name, each in runs.items()}
    base = statistics.median(whole["AllowAll"]) if "AllowAll" in whole else None
    for name, each in runs.items():
        print(f"{name:16} | {_row(each[-1]['report'])} | {_times(each)} | ", end="")
        hung = next((run["hung"] for run in each if run["hung"]), None)
        comparable = base is not None and not hung
        ratio = f"{statistics.median(whole[name]) / base:5.2f}" if comparable else "    -"
        good = all(run["disk_agrees"] and run["status"] == 0 for run in each)
        print(f"{ratio} | {f'stuck in {hung}' if hung else 'as it should' if good else 'wrong'}")


def _row(report: dict[str, Any]) -> str:
    share, unshare = report["conversions"]["share"], report["conversions"]["unshare"]
    late, back = (report["refinements"][f"{name}_bytes"] for name in ("deferred", "reclaimed"))
    return (
        f"{share['calls']:11} {share['bytes'] / (1 << 20):5.1f} | "
        f"{unshare['calls']:13} {unshare['bytes'] / (1 << 20):5.1f} | "
        f"{share['denied'] + unshare['denied']:7} | {report['io']['blk0']['refused']:7} | "
        f"{late / (1 << 20):12.2f}, {back / (1 << 20):4.2f}"
    )


def _times(each: list[dict[str, Any]]) -> str:
    texts = []
    for name, width in (("boot", 7), ("disk", 7), ("churn", 7)):
        values = [run["seconds"][name] for run in each if name in run["seconds"]]
        texts.append(f"{statistics.median(values):{width}.2f}" if values else " " * width)
    return " | ".join(texts)


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:])
        return
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="debian:6.12")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", action="append", choices=POLICIES, help="these policies only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    outer(options.kernel, options.rounds, options.only or list(POLICIES)[:-1], options.json)


if __name__ == "__main__":
    main()
