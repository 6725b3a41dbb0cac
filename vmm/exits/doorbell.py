"""What ringing the doorbell comes to: conversions, the payload's page test, the guest's failure."""

from __future__ import annotations

from functools import partial

from vmm.conversion.transaction import Converter
from vmm.devices.doorbell import DoorbellActions
from vmm.devices.host_check import host_check
from vmm.exits.handlers import Stop
from vmm.exits.outcome import FAILED, Outcome
from vmm.memory.guest_memory import GuestMemory


def doorbell_actions(
    memory: GuestMemory, converter: Converter | None, stop: Stop
) -> DoorbellActions:
    """The actions of a machine's doorbell; `converter` is None for an ordinary VM."""

    def failed(code: int) -> None:
        stop(Outcome(FAILED, f"the guest reported failure code {code}"))

    convert = None if converter is None else converter.convert
    return DoorbellActions(convert, partial(host_check, memory), failed)
