"""Two machines side by side in one process: the same guest, under two policies.

    python -m vmm.examples.side_by_side [KERNEL]

Without a kernel the embedded payload runs. Both run at the same time, each on a thread of its own.
"""

from __future__ import annotations

import sys

import vmm
from vmm.policy.builtin import Quota


def compare(config: vmm.MachineConfig, *policies: vmm.Policy) -> list[vmm.Report]:
    """The reports of one machine for each policy."""
    machines = [vmm.Machine(config, policies=[policy]) for policy in policies]
    for machine in machines:
        machine.start()
    for machine in machines:
        with machine:
            machine.wait(timeout=300)
    return [machine.report for machine in machines]


def main(kernel: str | None = None) -> None:
    config = vmm.MachineConfig(kernel=kernel, private_memory="auto")
    generous, strict = vmm.Policy(), Quota(limit=64 << 10)
    for name, report in zip(("all", "quota"), compare(config, generous, strict), strict=True):
        conversions = report["conversions"]
        assert conversions is not None  # told: not under pKVM
        share = conversions["share"]
        print(f"{name:>6}: {share['calls']} shares, {share['denied']} denied")


if __name__ == "__main__":
    main(*sys.argv[1:])
