"""Interrupt messages on arm64: a message to the GICv2m frame is an SPI."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from threading import Lock

from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.devices.gic_v2m import SETSPI
from vmm.core.lean_typing import Protocol


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

    def set(self, gsi: int | None, address: int, data: int) -> int:
        """Have `gsi` (None: a new one) raise the SPI that a write of `data` to `address` raises;
        the GSI. Raises OSError (KvmError is one), unchanged, for what isn't the frame's."""
        spi = data - layout.FIRST_SPI_INTID
        first = layout.FIRST_MESSAGE_SPI
        if address != layout.V2M_GPA + SETSPI or not first <= spi < first + layout.MESSAGE_SPIS:
            raise OSError(
                errno.EINVAL,
                f"a write of {data:#x} to {address:#x} is no interrupt: the GICv2m frame at "
                f"{layout.V2M_GPA:#x} takes INTIDs from {first + layout.FIRST_SPI_INTID} to "
                f"{layout.INTERRUPTS - 1}",
            )
        with self._lock:
            number = layout.FIRST_MESSAGE_GSI + len(self._spis) if gsi is None else gsi
            spis = {**self._spis, number: spi}
            pins = [(name, 0, pin) for name, pin in spis.items()]
            self._vm.set_gsi_routing([*layout.interrupt_pins(), *pins])
            self._spis = spis
            return number
