"""Interrupt messages on arm64: a message to the GICv2m frame is an SPI."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from threading import Lock

from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.devices.gic_v2m import SETSPI
from vmm.core.lean_typing import Protocol
from vmm.wiring.interrupts import Message


class RoutedVm(Protocol):
    """The part of kvm_bindings.Vm that is used here."""

    def set_gsi_routing(self, pins: Iterable[tuple[int, int, int]], /) -> None: ...


class V2mRoutes:
    """KVM's routing table: the board's lines, and for each message in use a GSI of its own that
    leads to the SPI which the guest chose. See vmm.wiring.interrupts.Routes."""

    def __init__(self, vm: RoutedVm) -> None:
        self._vm = vm
        self._spis: dict[int, int] = {}
        self._lock = Lock()

    def set(self, messages: Sequence[Message]) -> list[int | OSError]:
        """Have each raise the SPI that a write of its data to its address raises: its GSI, or why
        it is no interrupt of the frame's. Raises KvmError, unchanged."""
        with self._lock:
            spis = dict(self._spis)
            gsis: list[int | OSError] = []
            for gsi, address, data in messages:
                spi = data - layout.FIRST_SPI_INTID
                if not _is_the_frames(address, spi):
                    gsis.append(_no_interrupt(address, data))
                    continue
                number = layout.FIRST_MESSAGE_GSI + len(spis) if gsi is None else gsi
                spis[number] = spi
                gsis.append(number)
            if spis != self._spis:
                pins = [(name, 0, pin) for name, pin in spis.items()]
                self._vm.set_gsi_routing([*layout.interrupt_pins(), *pins])
                self._spis = spis
            return gsis


def _is_the_frames(address: int, spi: int) -> bool:
    first = layout.FIRST_MESSAGE_SPI
    return address == layout.V2M_GPA + SETSPI and first <= spi < first + layout.MESSAGE_SPIS


def _no_interrupt(address: int, data: int) -> OSError:
    return OSError(
        errno.EINVAL,
        f"a write of {data:#x} to {address:#x} is no interrupt: the GICv2m frame at "
        f"{layout.V2M_GPA:#x} takes INTIDs from "
        f"{layout.FIRST_MESSAGE_SPI + layout.FIRST_SPI_INTID} to {layout.INTERRUPTS - 1}",
    )
