"""(f) A stock kernel's disk behind the virtual IOMMU, in private memory: pages lent for each
request (strict), given back in batches (lazy), and, without an IOMMU, bounced through the shared
buffer.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmm.bench.linux import PROMPT, Guest, until_prompt
from vmm.bench.processes import environment, on_processor, pyvmm
from vmm.bench.series import Series
from vmm.core.errors import HostError

SECTION = "iommu"
LONGEST = 240.0
"""Seconds for one piece of work: each request is several exits, and the lab emulates them."""
# A bounce buffer of 1 MiB is left for the IOMMU's own driver: all that is shared counts.
SMALL = "swiotlb=512"
SUBJECTS: dict[str, tuple[list[str], str]] = {
    "bounced": ([], "quiet"),
    "lent, strict": (["--iommu"], f"quiet iommu.strict=1 {SMALL}"),
    "lent, lazy": (["--iommu"], f"quiet iommu.strict=0 {SMALL}"),
}
"""Options and the kernel's command line."""


class Work(NamedTuple):
    """A run of fio: `requests` requests of `size` KiB, `depth` at a time."""

    way: str
    size: int
    depth: int
    requests: int

    @property
    def title(self) -> str:
        size = f"{self.size} KiB" if self.size < 1024 else f"{self.size >> 10} MiB"
        verb = "reads" if self.way.endswith("read") else "writes"
        order = "random" if self.way.startswith("rand") else "sequential"
        return f"{size} {order} {verb}, depth {self.depth}"

    @property
    def command(self) -> str:
        return (
            f"/fio/run --name=x --filename=/dev/vda --rw={self.way} --bs={self.size}k "
            f"--iodepth={self.depth} --ioengine=libaio --direct=1 --number_ios={self.requests} "
            "--gtod_reduce=1 --minimal | cut -d';' -f5,6,9,47,50"
        )


# Little in flight comes first: peaks are those since the start.
QUICK = (
    Work("randread", 4, 1, 200),
    Work("randread", 4, 32, 600),
    Work("read", 128, 8, 100),
    Work("read", 1024, 4, 30),
)
FULL = (
    *QUICK[:1],
    Work("randwrite", 4, 1, 200),
    QUICK[1],
    Work("randwrite", 4, 32, 600),
    Work("read", 64, 8, 200),
    QUICK[2],
    Work("write", 128, 8, 100),
    QUICK[3],
    Work("write", 1024, 4, 30),
    Work("read", 1024, 32, 96),
)

UNITS = {
    "time": "us",
    "maps": "per request",
    "conversions": "per request",
    "exits": "per request",
    "vCPU": "us",
    "host": "us",
    "lent, average": "bytes",
    "lent, peak": "bytes",
    "shared": "bytes",
    "runs": "runs",
}
"""What is said of each piece of work. Microseconds a request as the guest sees it. Requests to the
IOMMU, conversions and exits for each. Processor time of the vCPU's thread, which is the guest's and
its exits', and of the host's other threads. Bytes that devices could reach, and the bytes that were
shared besides. Runs of pages in equal state, at most since the start."""


def measure(
    guest: Guest, quick: bool, rounds: int, tell: Callable[[str], None]
) -> Iterator[Series]:
    """One boot a round for each subject. Raises HostError after all series when a guest didn't do
    as it should."""
    if guest.fio is None:
        raise HostError("the section iommu needs --fio FILE; pyvmm lab has it")
    works = QUICK if quick else FULL
    samples: dict[tuple[str, str, str], list[float]] = {}
    broken: list[str] = []
    for number in range(rounds):
        order = list(SUBJECTS)
        for name in order if number % 2 == 0 else reversed(order):
            tell(f"round {number + 1} of {rounds}, {name}")
            try:
                for work, told in session(guest, name, works):
                    for what, value in told.items():
                        samples.setdefault((work.title, what, name), []).append(value)
            except HostError as error:  # the others' turns are worth having
                broken.append(f"{name}: {error}")
    for work in works:
        for what, unit in UNITS.items():
            for name in SUBJECTS:
                taken = samples.get((work.title, what, name))
                if taken is not None:
                    yield Series(SECTION, f"{work.title}: {what}, {unit}", name, unit, taken)
    if broken:
        raise HostError(f"{len(broken)} session(s) broke off: {'; '.join(broken)}")


def session(
    guest: Guest, subject: str, works: Sequence[Work]
) -> Iterator[tuple[Work, dict[str, float]]]:
    """Boot the subject and have it do all of the work, one after the other."""
    options, append = SUBJECTS[subject]
    control = Path(guest.disk).with_name("control")
    words = pyvmm(
        "--kernel", guest.kernel, "--initrd", guest.initrd, "--append", append, "--private-mem",
        "--disk", guest.disk, "--disk", f"{guest.fio},ro", "--control", str(control), *options,
    )  # fmt: skip
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        typed, printed = process.stdin.fileno(), process.stdout.fileno()

        def run(command: str) -> bytes:
            os.write(typed, command.encode() + b"\n")
            said = until_prompt(printed, LONGEST)
            return said[said.index(b"\n") + 1 : said.index(PROMPT)]

        try:
            until_prompt(printed)
            run("mkdir /fio && mount -t ext4 -o ro /dev/vdb /fio")
            run(Work("randread", 4, 1, 1).command)  # fio is in the guest's memory from here on
            for work in works:
                before = _Moment(process.pid, control)
                said = run(work.command)
                yield work, _Moment(process.pid, control).since(before, work, said)
        finally:
            process.kill()
            control.unlink(missing_ok=True)


class _Moment:
    """What pyvmm says of its run so far."""

    def __init__(self, pid: int, control: Path) -> None:
        self.state = _dump(control)
        self.spent = on_processor(pid)
        self.at = time.monotonic()

    def since(self, before: _Moment, work: Work, said: bytes) -> dict[str, float]:
        """The differences, for each request."""
        count = work.requests
        now, then = self.state, before.state
        spent = {thread: ns - before.spent.get(thread, 0) for thread, ns in self.spent.items()}
        vcpu = max(spent, key=lambda thread: spent[thread])
        told = {
            "time": _milliseconds(work, said) * 1000 / count,
            "conversions": (now["status"]["conversions"] - then["status"]["conversions"]) / count,
            "exits": (now["status"]["exits"] - then["status"]["exits"]) / count,
            "vCPU": spent[vcpu] / count / 1000,
            "host": sum(ns for thread, ns in spent.items() if thread != vcpu) / count / 1000,
            "shared": now["status"]["shared_bytes"],
        }
        lending, earlier = now["iommu"], then["iommu"]
        if lending is not None:
            seconds = lending["over_s"] - earlier["over_s"]
            held = lending["average_lent_bytes"] * lending["over_s"]
            held -= earlier["average_lent_bytes"] * earlier["over_s"]
            told |= {
                "maps": (lending["maps"] - earlier["maps"]) / count,
                "lent, average": max(held, 0) / seconds if seconds else 0.0,
                "lent, peak": lending["peak_lent_bytes"],
                "runs": lending["peak_runs"],
            }
        return told


def _dump(control: Path) -> dict[str, Any]:
    """The control socket's dump-state."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(30)
        link.connect(str(control))
        link.sendall(b'{"command": "dump-state"}\n')
        with link.makefile("rb") as answers:
            answer: dict[str, Any] = json.loads(answers.readline())
    if not answer["ok"]:
        raise HostError(f"dump-state: {answer['error']}")
    return answer


def _milliseconds(work: Work, said: bytes) -> float:
    """fio's words: error; KiB read, milliseconds; the same for written."""
    found = re.search(rb"0;(\d+);(\d+);(\d+);(\d+)\r", said)
    read, reading, written, writing = map(int, found.groups()) if found else (0, 0, 0, 0)
    if read + written != work.requests * work.size:
        raise HostError(f"fio did not do its {work.requests} requests: {said!r}")
    return float(reading + writing)
