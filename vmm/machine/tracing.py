"""The trace of one run (`--trace DIR`): what is observed, and what the sidecar says of the run."""

from __future__ import annotations

import sys

from vmm.conversion.tracing import ConversionTrace, LendingTrace
from vmm.exits.handlers import Table
from vmm.exits.outcome import Outcome
from vmm.exits.tracing import traced
from vmm.machine.config import MachineConfig
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory
from vmm.trace.queues import DeviceTrace
from vmm.trace.recorder import Recorder
from vmm.trace.store import TraceStore


def _name(side: Backing | None) -> str | None:
    return None if side is None else side.name


class RunTrace:
    """Observers for a machine's parts, and the trace behind them."""

    def __init__(self, path: str, config: MachineConfig) -> None:
        """Raises UsageError when the folder at `path` can't be written."""
        self._recorder = Recorder(
            TraceStore(path),
            {
                "command": sys.argv,
                "kernel": config.kernel,
                "cpus": config.cpus,
                "policies": [[spec, *words] for spec, words in config.policies],
            },
        )
        self.conversions = ConversionTrace(self._recorder)

    def lending(self) -> LendingTrace:
        return LendingTrace(self._recorder)

    def device(self, name: str, shared_bit: int = 0) -> DeviceTrace:
        return DeviceTrace(self._recorder, name, shared_bit)

    def exits(self, table: Table) -> Table:
        return traced(table, self._recorder)

    def start(self, memory: GuestMemory, scheme: str, doorbell: str | None) -> None:
        """The guest is about to run."""
        self._recorder.start(
            scheme=scheme,
            doorbell=doorbell,
            backings={
                "private": _name(memory.private if memory.told else memory.shared),
                "shared": memory.shared.name,
            },
            states=[[*area, state.value] for area, state in memory.states()],
        )

    def end(self, outcome: Outcome) -> None:
        """The run is over, and everything that happened has been observed."""
        self._recorder.close(complete=True, guest={"exit": outcome.exit, "reason": outcome.reason})

    def close(self) -> None:
        """Nothing more is recorded; a run that `end` has not seen stays incomplete."""
        self._recorder.close()
