"""What it costs that a guest loads itself, beside a host that loads it: 64 MiB on this machine.

    python tests/bench/strict_loading.py [--mib 64] [--rounds 7]

Both ways end when the guest has read a word of each page, because the host's way leaves it the
faults that the loader has taken already. "hash" is what the host spends on the manifest before the
guest starts, "load" what follows. Interleaved; medians in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from tests.support.strict_guest import C_BIT, MIB, StrictGuest, random_part
from vmm.arch.x86_64.micro_guest import DONE_PORT
from vmm.arch.x86_64.strict.launch import FLAG_PLAIN_HASH
from vmm.boot.manifest import FilePart, Part
from vmm.exits.run_loop import install_kick_handler

GPA = 16 * MIB
# 1: mov rax, [rdi]; add rdi, 4096; dec rsi; jnz 1b; out; and again
_TOUCH = b"\x48\x8b\x07\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xce\x75\xf1\xe6\x10\xeb\xfc"


def milliseconds(since: float) -> float:
    return (time.perf_counter() - since) * 1000


def run(guest: StrictGuest) -> None:
    exit = guest.run()
    if not (guest.loaded and isinstance(exit, IoExit) and exit.port == DONE_PORT):
        raise SystemExit(f"the guest did not get there: {guest.reason}, {exit}")


def by_itself(system: System, image: int, size: int, flags: int) -> dict[str, float]:
    """The loader loads."""
    started = time.perf_counter()
    parts = [Part("kernel", GPA, size, FilePart(image, 0, "image"))]
    parts[0].digest()
    hashed = milliseconds(started)
    with StrictGuest(
        system, parts, size=GPA + size, flags=flags, after=_TOUCH,
        rdi=GPA | 1 << C_BIT, rsi=size // 4096,
    ) as guest:  # fmt: skip
        started = time.perf_counter()
        guest.private.allocate(GPA, size)  # as GuestVm.map_ahead does where KVM can't map ahead
        run(guest)
        return {"hash": hashed, "load": milliseconds(started)}


def by_host(system: System, image: int, size: int) -> dict[str, float]:
    """The host loads, and the guest finds its pages by faults."""
    parts = [random_part("little", 8 * MIB, 64)]
    with StrictGuest(
        system, parts, size=GPA + size, after=_TOUCH, backing="guest_memfd-mmap",
        rdi=GPA | 1 << C_BIT, rsi=size // 4096,
    ) as guest:  # fmt: skip
        started = time.perf_counter()
        moved = 0
        while moved < size:
            moved += guest.private.transfer_in(image, moved, GPA + moved, size - moved)
        filled = milliseconds(started)
        run(guest)
        return {"fill": filled, "load": milliseconds(started)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure strict loading beside a rehearsal's.")
    parser.add_argument("--mib", type=int, default=64, help="size of the kernel (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="of each way (default 7)")
    options = parser.parse_args()
    size = options.mib * MIB
    install_kick_handler()
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as opened:
        system = opened.enter_context(System())
        image = os.memfd_create("image")
        opened.callback(os.close, image)
        for offset in range(0, size, MIB):
            os.pwrite(image, os.urandom(MIB), offset)
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "host loads": lambda: by_host(system, image, size),
            "loader, SHA instructions": lambda: by_itself(system, image, size, 0),
            "loader, integers": lambda: by_itself(system, image, size, FLAG_PLAIN_HASH),
        }
        for _ in range(options.rounds):
            for name, way in ways.items():
                found.setdefault(name, []).append(way())
    base = statistics.median(each["load"] for each in found["host loads"])
    for name, rounds in found.items():
        values = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        total = values["load"] + values.get("hash", 0.0)
        print(
            f"{name:26}", ", ".join(f"{key} {value:.1f}" for key, value in values.items()),
            f"ms; {total / base:.2f} times the host's",
        )  # fmt: skip


if __name__ == "__main__":
    main()
