"""(e) A stock kernel: boot, reads and writes of its disk and its network, on each engine, with all
memory private (each byte bounced through the guest's shared buffer) and as an ordinary VM, and on
QEMU.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vmm.bench import network
from vmm.bench import qemu as yardstick
from vmm.bench.processes import environment, pyvmm
from vmm.bench.series import Series
from vmm.core.errors import HostError

PROMPT = b"/ # "
APPEND = "quiet"
BOOT = "boot to the prompt"
ENGINES = ("auto", "pread", "fd2fd", "mmap")
DISK_BYTES = 64 << 20
FIO_REQUESTS = 4000
LONGEST = 60.0  # seconds for one piece of work: a guest that QEMU halts would wait for ever


class Guest(NamedTuple):
    """What a guest is made of, besides the monitor."""

    kernel: str
    initrd: str
    disk: str  # of DISK_BYTES, written to
    fio: str | None  # an image of a file system with fio in it (vmm.lab.image.fio_image)
    peer: network.Peer | None


class Step(NamedTuple):
    """A line for the guest's shell. Without a case it prepares others and isn't measured."""

    command: str
    case: str | None = None
    by_fio: bool = False  # the time is what fio says, without its start


def steps(guest: Guest, transfers: bool) -> list[Step]:
    """All that is done in one session; `transfers`: over the network too."""
    ext4 = (
        "mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt && (for i in $(seq 200); "
        "do head -c 4096 /dev/zero >/mnt/$i; done; sync; umount /mnt)"
    )
    done = [
        Step("dd if=/dev/vda of=/dev/null bs=1M count=32", "read 32 MiB, 1 MiB at a time"),
        Step(
            "dd if=/dev/vda of=/dev/null bs=4k count=1024 iflag=direct",
            "read 4 MiB, 4 KiB at a time, uncached",
        ),
        Step(
            "dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync",
            "write 16 MiB, 1 MiB at a time, and sync",
        ),
        Step(ext4, "ext4: 200 files of 4 KiB, and sync"),
    ]
    if guest.fio is not None:
        done.append(Step("mkdir /fio && mount -t ext4 -o ro /dev/vdb /fio"))
        for what in ("read", "write"):
            words = f"/fio/run --name=x --filename=/dev/vda --rw=rand{what} --bs=4k --iodepth=16"
            words += f" --ioengine=libaio --direct=1 --number_ios={FIO_REQUESTS} --gtod_reduce=1"
            words += " --minimal | cut -d';' -f5,6,9,47,50"
            case = f"fio: {FIO_REQUESTS} random {what}s of 4 KiB, depth 16, uncached"
            done.append(Step(words, case, by_fio=True))
    if guest.peer is not None and transfers:
        host, size = network.HOST, network.TRANSFER
        address = f"ip addr add {network.GUEST}/24 dev eth0 && ip link set eth0 up"
        give = f"nc {host} {guest.peer.gives} </dev/null | wc -c"
        take = f"head -c {size} /dev/zero | nc {host} {guest.peer.takes}"
        done += [
            # One exchange ahead: addresses are resolved then.
            Step(f"{address} && echo | nc {host} {guest.peer.takes}"),
            Step(f'[ "$({give})" = {size} ]', f"network: {size >> 20} MiB to the guest"),
            Step(f'[ "$({take})" = {size} ]', f"network: {size >> 20} MiB from the guest"),
        ]
    return done


def measure(
    guest: Guest, rounds: int, qemu: list[str] | None, tell: Callable[[str], None]
) -> Iterator[Series]:
    """Milliseconds from exec to the shell's prompt, then for each piece of work in the shell.

    Network transfers don't depend on the engine: they are measured with one. `tell` is told whose
    turn it is. Raises HostError after all series when a guest didn't do as it should.
    """
    commands: dict[str, list[str]] = {}
    for engine in ENGINES:
        words = pyvmm_words(guest, engine)
        commands[f"pyvmm {engine}"] = words
        commands[f"pyvmm --private-mem {engine}"] = [*words, "--private-mem"]
    if qemu is not None:
        commands["QEMU"] = yardstick.linux_guest(
            qemu, guest.kernel, guest.initrd, APPEND,
            [guest.disk, *filter(None, [guest.fio])],
            (network.INTERFACE, network.MAC) if guest.peer is not None else None,
        )  # fmt: skip
    samples: dict[tuple[str, str], list[float]] = {}
    # Whoever comes first compiles pyvmm and reads kernel and libraries from the disk.
    tell("a boot that isn't counted")
    session(commands["pyvmm auto"], [])
    broken: list[str] = []
    for number in range(rounds):
        order = list(commands)
        for name in order if number % 2 == 0 else reversed(order):
            tell(f"round {number + 1} of {rounds}, {name}")
            work = steps(guest, name == "QEMU" or name.endswith("auto"))
            for case, taken in _session_or_another(commands[name], work, name, broken):
                samples.setdefault((case, name), []).append(taken)
    cases = [BOOT, *(step.case for step in steps(guest, True))]
    for case in filter(None, cases):
        for name in commands:
            if (case, name) in samples:
                yield Series("linux", case, name, "ms", samples[case, name])
    if broken:
        raise HostError(f"{len(broken)} session(s) broke off: {'; '.join(broken)}")


def _session_or_another(
    words: Sequence[str], work: Sequence[Step], name: str, broken: list[str]
) -> list[tuple[str, float]]:
    """A guest that crashes isn't worth all the others' turns: there's one more for it, and what
    happened goes to `broken`. Nothing when that one crashes too.
    """
    for _ in range(2):
        try:
            return session(words, work)
        except HostError as error:
            broken.append(f"{name}: {error}")
    return []


def pyvmm_words(guest: Guest, engine: str) -> list[str]:
    """The words that start pyvmm with this guest, as an ordinary VM."""
    words = ["--kernel", guest.kernel, "--initrd", guest.initrd, "--append", APPEND]
    words += ["--allow-mapped-io", "--disk", f"{guest.disk},io={engine}"]
    if guest.fio is not None:
        words += ["--disk", f"{guest.fio},ro"]
    if guest.peer is not None:
        words += ["--net", f"tap={network.INTERFACE},mac={network.MAC}"]
    return pyvmm(*words)


def session(words: Sequence[str], work: Sequence[Step]) -> list[tuple[str, float]]:
    """Cases and milliseconds: to the prompt, and for each step from its line feed to the next."""
    started = time.monotonic()
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            until_prompt(process.stdout.fileno())
            taken = [(BOOT, (time.monotonic() - started) * 1000)]
            for step in work:
                started = time.monotonic()
                os.write(process.stdin.fileno(), step.command.encode() + b" && echo $((40 + 2))\n")
                said = until_prompt(process.stdout.fileno())
                milliseconds = (time.monotonic() - started) * 1000
                if b"\n42\r" not in said:
                    raise HostError(f"the guest's shell did not do {step.command!r}: {said!r}")
                if step.by_fio:
                    milliseconds = _by_fio(said)
                if step.case is not None:
                    taken.append((step.case, milliseconds))
        finally:
            process.kill()
    return taken


def _by_fio(said: bytes) -> float:
    """The milliseconds in fio's words: error; KiB read, milliseconds; the same for written."""
    found = re.search(rb"\n0;(\d+);(\d+);(\d+);(\d+)\r", said)
    read, reading, written, writing = map(int, found.groups()) if found else (0, 0, 0, 0)
    if read + written != FIO_REQUESTS * 4:
        raise HostError(f"fio did not do its {FIO_REQUESTS} requests: {said!r}")
    return float(reading + writing)


def until_prompt(fd: int, seconds: float = LONGEST) -> bytes:
    """What is said up to the prompt, and it. Raises HostError where that takes longer."""
    deadline = time.monotonic() + seconds
    seen = b""
    while PROMPT not in seen:
        ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
        data = os.read(fd, 65536) if ready else b""
        if not data:
            raise HostError(f"the guest did not come to a prompt: {seen[-500:]!r}")
        seen += data
    return seen
