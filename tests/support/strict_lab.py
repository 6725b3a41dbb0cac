"""A strict Linux guest in the lab, hunted there: what is typed at it, and the script that hunts.

The lab machine's script (`SCRIPT`) runs pyvmm with the guest's console on its own standard streams,
and beside it a hunter that waits until the guest says so. The guest makes its secret out of a seed
that is typed at it: the secret's digits are never typed or shown.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from vmm.lab.machine import Lab
from vmm.lab.run import LabRun

PROMPT = b"/ # "
_READY = "READY-TO-BE-HUNTED"
SCRIPT = f"""
kernel=$1 initrd=$2 backing=$3 seed=$4 words=$5
cd /tmp
exec 3<&0  # a command in the background has another standard input
mkfifo fifo
tee console <fifo &
tee=$!
(
    until grep -q {_READY} console 2>/dev/null; do sleep 1; done
    python3 -m tests.support.hunt $(cat pid) $seed trace console >hunt 2>&1 </dev/null
    echo HUNTED
) &
hunter=$!
pyvmm --kernel $kernel --initrd $initrd --mem 256M --append "$words" --private-mem=$backing \\
    --report report --trace trace <&3 >fifo &
echo $! >pid
wait $!
status=$?
kill $hunter 2>/dev/null
wait $tee
pyvmm measure --kernel $kernel --initrd $initrd --mem 256M --append "$words" >measured
echo "REPORT $(tr -d '\\n' <report)"
echo "HUNT $(cat hunt)"
echo "MEASURED $(head -n 1 measured)"
exit $status
"""


class Told(NamedTuple):
    """What one guest came to."""

    release: str
    interrupts: str
    encryption: str
    report: dict[str, Any]
    hunt: dict[str, dict[str, Any]]
    measured: str


def words_of(lab: Lab, backing: str, seed: str, append: str = "quiet") -> list[str]:
    """The program's words; the script is given as text."""
    kernel = lab.guest_kernel("debian:6.12")
    initrd = lab.guest_initramfs(kernel)
    words = [str(kernel.image), str(initrd), backing, seed, append]
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

    def be_hunted(self, seed: str) -> Told:
        """Make the secret, keep it in a shell's variable and in a file in memory; be hunted."""
        release = self.type("uname -r")
        encryption = self.type("dmesg | grep 'Memory Encryption'")
        interrupts = self.type("cat /proc/interrupts")
        self.type(f"S=$(printf %s {seed} | sha256sum | cut -c1-64); echo $S >/secret")
        left, right = _READY[:5], _READY[5:]
        self.type(f"echo {left}''{right}")  # the echo of the line itself must not start it
        self._run.expect(b"HUNTED", self._seconds)
        self._run.send(b"poweroff -f\n")
        self._run.wait(self._seconds)
        found = {
            line.split(" ", 1)[0]: line.split(" ", 1)[1]
            for line in bytes(self._run.stdout.data).decode(errors="replace").splitlines()
            if line.startswith(("REPORT ", "HUNT ", "MEASURED "))
        }
        return Told(
            release,
            interrupts,
            encryption,
            json.loads(found["REPORT"]),
            json.loads(found["HUNT"]),
            found["MEASURED"].split()[-1],
        )
