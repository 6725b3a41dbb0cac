"""What may be asked of a machine while it runs: status, page states, pause, host's conversions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from vmm.core.event_loop import EventLoop
from vmm.core.events import Kind
from vmm.core.lean_typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from vmm.core.ranges import Range, RangeMap
from vmm.exits.outcome import QUIT, Outcome
from vmm.exits.vcpu_group import VcpuGroup
from vmm.memory.guest_memory import GuestMemory, PageState

if TYPE_CHECKING:
    from vmm.control.saving import Saving
    from vmm.conversion.events import EventFeed
    from vmm.conversion.transaction import Converter

REST_SECONDS = 5.0
"""How long all devices together may take to finish what they are doing, when the guest is paused:
for so long at most the device loop, which asks for it, does nothing else."""


MOST_TRIES = 8
"""How often vCPUs are stopped anew, for one that is in the middle of string I/O."""


class HeldDevices(Protocol):
    """The machine's devices, as far as operations need them."""

    def hold(self, timeout: float) -> ExitStack: ...
    def io_statistics(self) -> dict[str, dict[str, Any]]: ...

    def restart(self, name: str) -> None:
        """See wiring.devices.Devices.restart."""
        ...


class Status(NamedTuple):
    """The numbers of a moment; bytes, counts since the start, seconds since the start."""

    state: str
    seconds: float
    shared_bytes: int
    private_bytes: int
    deferred_bytes: int
    conversions: int
    refused: int
    exits: int
    observed_bytes: int = 0
    """RAM of whose state the host is not told; it is in no other number then."""


class Operations:
    """On the event loop's thread, except `status`."""

    def __init__(
        self,
        memory: GuestMemory,
        converter: Converter,
        vcpus: VcpuGroup,
        devices: HeldDevices,
        loop: EventLoop,
        stop: Callable[[Outcome], None],
        lending: Callable[[], dict[str, Any]] | None = None,
        events: EventFeed | None = None,
        make_saving: Callable[[Operations], Saving] | None = None,
    ) -> None:
        """`lending`: what the virtual IOMMU has lent so far, where there is one; `events`: where
        those who follow the machine subscribe; `make_saving`: makes what dumps and saves the
        machine, where that can be."""
        self._lending = lending
        self.events = events
        self._memory = memory
        self._converter = converter
        self._vcpus = vcpus
        self._devices = devices
        self._loop = loop
        self._stop = stop
        self._started = time.monotonic()
        self._held: ExitStack | None = None
        self._make_saving = make_saving

    def status(self) -> Status:
        counts = self._converter.accounting
        memory = self._memory
        return Status(
            state="paused"
            if self._vcpus.paused
            else "debugged"
            if self._vcpus.frozen
            else "running",
            seconds=time.monotonic() - self._started,
            shared_bytes=memory.bytes_in(PageState.SHARED),
            private_bytes=memory.bytes_in(PageState.PRIVATE),
            deferred_bytes=memory.bytes_in(PageState.DEFERRED),
            conversions=counts.share.calls + counts.unshare.calls,
            refused=counts.share.denied + counts.unshare.denied,
            exits=sum(sum(list(r.exit_counts.values())) for r in self._vcpus.runners),
            observed_bytes=memory.bytes_in(PageState.OBSERVED),
        )

    @property
    def memory(self) -> GuestMemory:
        """The guest's; safe on any thread."""
        return self._memory

    @property
    def ram(self) -> tuple[Range, ...]:
        """The ranges of guest-physical addresses that RAM has."""
        return self._memory.ram

    def pages(self) -> RangeMap[PageState | None]:
        """The states of all pages at this moment; None where there is no RAM."""
        states = self._memory.snapshot()
        assert states is not None
        return states

    def dump_state(self) -> dict[str, Any]:
        """All of it at one moment: no vCPU is in the guest meanwhile.

        `pages` is an iterator over [GPA, bytes, state], of that moment too: who makes a long
        answer of it does so bit by bit.
        """
        with self._vcpus.parked():
            converter, told = self._converter, self._memory.told
            return {
                "status": self.status()._asdict(),
                "pages": _rows(self.pages()),
                "residency": self._memory.accounted(),
                "conversions": converter.accounting.as_dict() if told else None,
                "refinements": converter.refinements.as_dict() if told else None,
                "io": self._devices.io_statistics(),
                "iommu": None if self._lending is None else self._lending(),
                "exits": [dict(runner.exit_counts) for runner in self._vcpus.runners],
            }

    def pause(self) -> bool:
        """The guest stands still: vCPUs are out of it, devices don't touch its memory.

        False, and it runs on, where a device does not come to rest: a disk may hang.
        """
        if self._held is None:
            self._vcpus.pause()
            try:
                self._held = self._devices.hold(REST_SECONDS)
            except TimeoutError:
                self._vcpus.resume()
                return False
            # Else what waits for them, a tap's packets perhaps, would be reported again and again.
            self._loop.hold()
            self._note("paused")
        return True

    def resume(self) -> None:
        """The guest goes on, and is served what came meanwhile; nothing where it wasn't paused."""
        if self._held is not None:
            self._held.close()
            self._held = None
            self._loop.release()
            self._vcpus.resume()
            self._note("resumed")

    @contextmanager
    def still(self) -> Iterator[None]:
        """Within the block every vCPU stands with no exit left to complete, so that its registers
        are what the guest has, and devices leave memory alone. A guest that was paused is
        paused afterwards, too. Raises NotSaved where that takes longer than REST_SECONDS."""
        from vmm.core.saved import NotSaved

        paused = self._held is not None
        if self._held is not None:
            self._held.close()  # a vCPU may wait for a device, in the middle of an exit
            self._held = None
        try:
            with self._park_still():
                try:
                    held = self._devices.hold(REST_SECONDS)
                except TimeoutError:
                    raise NotSaved(
                        f"a device does not come to rest within {REST_SECONDS:g} s (a disk may "
                        "hang); try again"
                    ) from None
                try:
                    with held:
                        yield
                finally:
                    self._vcpus.process_continued()  # as if it had been stopped
        finally:
            if paused:
                try:
                    self._held = self._devices.hold(REST_SECONDS)
                except TimeoutError:
                    self._loop.release()
                    self._vcpus.resume()
                    self._note("resumed")

    def _park_still(self) -> ExitStack:
        """All vCPUs at the gate, with no exit left to complete, until what is returned is closed.
        Raises NotSaved."""
        from vmm.core.saved import NotSaved

        self._vcpus.settles = True
        for _ in range(MOST_TRIES):
            with ExitStack() as parked:
                parked.enter_context(self._vcpus.parked())
                if not self._vcpus.wait_until_still(REST_SECONDS):
                    raise NotSaved(
                        f"a vCPU is not done with an exit within {REST_SECONDS:g} s (a policy, or "
                        "a console that nobody reads, may keep it); try again"
                    )
                if not any(runner.owes for runner in self._vcpus.runners):
                    return parked.pop_all()
        raise NotSaved("a vCPU is in the middle of string I/O; try again")

    def dump(self, fd: int, *, private: bool = False) -> dict[str, Any]:
        """See Saving.dump."""
        return self._saving().dump(fd, private=private)

    def snapshot(self, fd: int, private: int | None = None) -> dict[str, Any]:
        """See Saving.snapshot."""
        return self._saving().snapshot(fd, private)

    def _saving(self) -> Saving:
        if self._make_saving is None:
            from vmm.core.saved import NotSaved

            raise NotSaved("this machine can't be saved")
        return self._make_saving(self)

    def _note(self, what: str) -> None:
        if self.events is not None:
            self.events.note(what)

    def convert(self, kind: Kind, gpa: int, size: int) -> int:
        """A conversion that the host wants: 0, or a negative errno. As if the guest had asked."""
        return self._converter.convert_for_host(kind, gpa, size)

    def devices(self) -> dict[str, dict[str, Any] | None]:
        """By name, what there is to say of each device's process; None: it has none."""
        found = self._devices.io_statistics()
        return {name: counts.get("process") for name, counts in found.items()}

    def restart_device(self, name: str) -> None:
        """See wiring.devices.Devices.restart; LookupError also while the machine is paused."""
        if self._held is not None:
            raise LookupError("the machine is paused; resume it first")
        self._devices.restart(name)

    def quit(self) -> None:
        self._stop(Outcome(QUIT, "by the control socket"))


def _rows(states: RangeMap[PageState | None]) -> Iterator[list[int | str]]:
    """The runs of RAM in equal state, in address order."""
    for area, state in states.runs():
        if state is not None:
            yield [*area, state.value]
