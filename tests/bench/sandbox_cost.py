"""What the sandbox's filters cost an exit: exits a second with --sandbox=auto and =off, in turns.

    python -m tests.bench.sandbox_cost [--rounds 20] [--exits 100000]

The guest reads the serial port's line status in a loop, and prints a character before it and one
after it. Each of those exits is a KVM_RUN, which the filters look at, and the handler in Python.
The figure is the median of the rounds' ratios, with its quartiles. Needs a usable /dev/kvm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support import command, guests

BEFORE, AFTER = b"a", b"b"
WAYS = ("auto", "off")


def code(exits: int) -> bytes:
    # mov ecx, exits; mov dx, 0x3fd; in al, dx; dec ecx; jnz back to the in
    loop = b"\xb9" + struct.pack("<I", exits) + guests.STATUS + bytes.fromhex("ec ffc9 75fb")
    return guests.say(BEFORE) + loop + guests.say(AFTER) + guests.RESET


def rate(kernel: Path, exits: int, way: str) -> float:
    """Exits a second of one run."""
    words = [*command.COMMAND, "--kernel", str(kernel), "--mem", "16M", f"--sandbox={way}"]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        fd = process.stdout.fileno()
        if os.read(fd, 1) != BEFORE:
            raise SystemExit(process.stderr.read().decode())
        began = time.perf_counter()
        if os.read(fd, 1) != AFTER:
            raise SystemExit(process.stderr.read().decode())
        return exits / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--exits", type=int, default=100_000)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernel"
        kernel.write_bytes(guests.kernel(code(options.exits)))
        for round_ in range(options.rounds):
            for way in WAYS if round_ % 2 else reversed(WAYS):
                rates[way].append(rate(kernel, options.exits, way))
    for way, found in rates.items():
        print(f"--sandbox={way}: {statistics.median(found):,.0f} exits/s, best {max(found):,.0f}")
    ratios = [one / other for one, other in zip(rates["auto"], rates["off"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"auto/off: {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
