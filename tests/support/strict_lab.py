"""A strict Linux guest in the lab, hunted there: what is typed at it, and the script that hunts.

The lab machine's script (`SCRIPT`) runs pyvmm with the guest's console on its own standard streams,
and beside it a hunter that waits until the guest says so: once it has its secret, and again when it
has written that to its disk. It makes the secret out of a seed that is typed at it: the secret's
digits are never typed or shown.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from vmm.lab.machine import Lab
from vmm.lab.run import LabRun

PROMPT = b"/ # "
_READY, _WRITTEN = "READY-TO-BE-HUNTED", "WRITTEN-TO-THE-DISK"
_MACHINE = "--mem 192M --cpus $cpus --disk disk"
SCRIPT = f"""
kernel=$1 initrd=$2 backing=$3 seed=$4 cpus=$5 ways=$6 words=$7
cd /tmp
exec 3<&0  # a command in the background has another standard input
mkfifo fifo
truncate -s 1M disk
tee console <fifo &
tee=$!
(
    until grep -q {_READY} console 2>/dev/null; do sleep 1; done
    python3 -m tests.support.hunt $(cat pid) $seed $ways trace console disk >hunt \\
        2>&1 </dev/null
    echo HUNTED
    until grep -q {_WRITTEN} console; do sleep 1; done
    python3 -m tests.support.hunt files $seed disk >again 2>&1 </dev/null
    echo AGAIN-HUNTED
) &
hunter=$!
pyvmm --kernel $kernel --initrd $initrd {_MACHINE} --append "$words" --private-mem=$backing \\
    --report report --trace trace <&3 >fifo &
echo $! >pid
wait $!
status=$?
kill $hunter 2>/dev/null
wait $tee
pyvmm measure --kernel $kernel --initrd $initrd {_MACHINE} --append "$words" >measured
echo "REPORT $(tr -d '\\n' <report)"
echo "HUNT $(cat hunt)"
echo "AGAIN $(cat again)"
echo "MEASURED $(head -n 1 measured)"
exit $status
"""


class Told(NamedTuple):
    """What one guest came to."""

    release: str
    processors: str
    interrupts: str
    encryption: str
    report: dict[str, Any]
    hunt: dict[str, dict[str, Any]]
    on_purpose: dict[str, dict[str, Any]]
    """Of the files that were looked through when the guest had written its secret to its disk."""
    measured: str


def words_of(lab: Lab, backing: str, seed: str, cpus: int, *ways: str) -> list[str]:
    """The program's words; the script is given as text."""
    kernel = lab.guest_kernel("debian:6.12")
    initrd = lab.guest_initramfs(kernel)
    words = [str(kernel.image), str(initrd), backing, seed, str(cpus), " ".join(ways), "quiet"]
    return ["sh", "-c", SCRIPT, "sh", *words]


def files_of(lab: Lab) -> list[Path]:
    """What has to be taken along."""
    kernel = lab.guest_kernel("debian:6.12")
    return [kernel.image, lab.guest_initramfs(kernel)]


class Guest:
    """The guest at its prompt."""

    def __init__(self, run: LabRun, boot_seconds: float, seconds: float) -> None:
        self._run = run
        self._seconds = seconds
        run.expect(PROMPT, boot_seconds)

    def type(self, command: str) -> str:
        self._run.send(command.encode() + b"\n")
        text = self._run.expect(PROMPT, self._seconds).decode(errors="replace")
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "")
        return text.split("\n", 1)[-1].removesuffix(PROMPT.decode()).strip()

    def say(self, word: str) -> None:
        """On the console, where the echo of what is typed must not be taken for it."""
        self.type(f"echo {word[:5]}''{word[5:]}")

    def be_hunted(self, seed: str) -> Told:
        """Make the secret, keep it in a shell's variable and in a file in memory; be hunted."""
        release, processors = self.type("uname -r"), self.type("nproc")
        encryption = self.type("dmesg | grep 'Memory Encryption'")
        interrupts = self.type("cat /proc/interrupts")
        self.type(f"S=$(printf %s {seed} | sha256sum | cut -c1-64); echo $S >/secret")
        self.say(_READY)
        self._run.expect(b"HUNTED", self._seconds)
        self.type("echo $S >/dev/vda; sync")
        self.say(_WRITTEN)
        self._run.expect(b"AGAIN-HUNTED", self._seconds)
        self._run.send(b"poweroff -f\n")
        self._run.wait(self._seconds)
        found = {
            line.split(" ", 1)[0]: line.split(" ", 1)[1]
            for line in bytes(self._run.stdout.data).decode(errors="replace").splitlines()
            if line.startswith(("REPORT ", "HUNT ", "AGAIN ", "MEASURED "))
        }
        return Told(
            release,
            processors,
            interrupts,
            encryption,
            json.loads(found["REPORT"]),
            json.loads(found["HUNT"]),
            json.loads(found["AGAIN"]),
            found["MEASURED"].split()[-1],
        )
