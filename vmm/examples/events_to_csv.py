"""Follow a machine while it runs: what it exposes over time, as a CSV that any plotter takes.

    python -m vmm.examples.events_to_csv exposed.csv [KERNEL]

Columns: seconds since the start, bytes shared, and requests refused so far. A row for each change.
"""

from __future__ import annotations

import csv
import sys

import vmm


def follow(machine: vmm.Machine, path: str) -> int:
    """Start the machine, and write a row for each change until it ends; how many events the file
    is too late for."""
    shared = refused = lost = 0
    states: dict[int, vmm.PageState] = {}
    events = machine.events()
    machine.start()
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("seconds", "shared_bytes", "refused"))
        for event in events:
            match event:
                case vmm.Changed(_, state, areas):
                    for area in areas:
                        for page in range(area.start, area.end, 4096):
                            shared += 4096 * (state is vmm.PageState.SHARED)
                            shared -= 4096 * (states.get(page) is vmm.PageState.SHARED)
                            states[page] = state
                case vmm.Requested(decision="deny"):
                    refused += 1
                case vmm.Lost(events=count):
                    lost += count
                    continue
                case _:
                    continue
            rows.writerow((f"{event.seconds:.6f}", shared, refused))
    return lost


def main(path: str, kernel: str | None = None) -> None:
    config = vmm.MachineConfig(kernel=kernel, private_memory="auto")
    with vmm.Machine(config) as machine:
        lost = follow(machine, path)
        print(machine.wait().exit, f"{lost} events lost")


if __name__ == "__main__":
    main(*sys.argv[1:])
