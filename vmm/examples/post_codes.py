"""A device at an I/O port: what the guest writes to port 0x80, with the time that it took.

    pyvmm --kernel bzImage --device vmm.examples.post_codes:PostCodes

Firmware and kernels have said how far they are there since the PC/AT; Linux writes to it to wait a
moment. `python -m vmm.examples.post_codes KERNEL [APPEND]` prints a count of each code.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import vmm


class PostCodes(vmm.PortDevice):
    """Counts codes; the first and the last one have a time, in seconds."""

    ports = range(0x80, 0x81)

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self.first = self.last = 0.0

    def write(self, offset: int, size: int, value: int) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.codes[value] += 1

    def statistics(self) -> dict[str, Any]:
        codes = {f"{code:#x}": count for code, count in self.codes.most_common(16)}
        return {"codes": codes, "seconds": round(self.last - self.first, 3)}


def main(kernel: str, append: str = "") -> None:
    device = PostCodes()
    config = vmm.MachineConfig(kernel=kernel, append=append, memory=256 << 20)
    with vmm.Machine(config, devices=[device]) as machine:
        outcome = machine.run(timeout=300)
    print(outcome.exit, device.statistics())


if __name__ == "__main__":
    main(*sys.argv[1:])
