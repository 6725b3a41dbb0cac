"""The part of a realm's monitor that pyvmm plays: it answers RSI calls about memory.

A rehearsal: on Arm CCA the monitor is firmware that the host can't touch. Here the VMM answers in
its place, for guests that take themselves for realms; the isolation is pyvmm's, not hardware's.
"""

from __future__ import annotations

from vmm.arch.aarch64 import layout, rsi
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import PageState

if TYPE_CHECKING:
    from vmm.conversion.transaction import Converter
    from vmm.memory.guest_memory import GuestMemory

Answer = tuple[int, ...]
"""x0 and what follows; registers past it are the guest's, unchanged."""

_FIRST_SHARED = 1 << layout.REALM_SHARED_BIT


class RealmMonitor:
    """Answers the calls of all vCPUs, on their threads."""

    def __init__(self, memory: GuestMemory, converter: Converter) -> None:
        self._memory = memory
        self._converter = converter

    def answer(self, function: int, x1: int, x2: int, x3: int, vcpu: int) -> Answer:
        """What a call comes to. Raises what Converter.convert does."""
        if function == rsi.ABI_VERSION:
            # 1.0 is all there is, so that it is the lower and the higher version.
            return rsi.SUCCESS, rsi.VERSION, rsi.VERSION
        if function == rsi.REALM_CONFIG:
            return (self._configure(x1),)
        if function == rsi.IPA_STATE_SET:
            return self._set_state(x1, x2, x3, vcpu)
        if function == rsi.IPA_STATE_GET:
            return self._get_state(x1, x2)
        return (rsi.NOT_SUPPORTED,)  # attestation, for one: there is nobody to vouch for this

    def _configure(self, gpa: int) -> int:
        """Write the realm's configuration to its private page at `gpa`.

        The one write to private memory after launch: it is the monitor's, not the host's.
        """
        page = Range(gpa, PAGE_SIZE)
        private = self._memory.private
        if gpa % PAGE_SIZE or private is None or not self._memory.is_ram(page):
            return rsi.ERROR_INPUT
        its_own = [(page, PageState.PRIVATE)]
        if self._memory.states(page) != its_own:
            return rsi.ERROR_INPUT
        private.pwrite(rsi.realm_config(layout.IPA_BITS), gpa)
        if self._memory.states(page) == its_own:
            return rsi.SUCCESS
        # Another vCPU shares the page meanwhile: its private side has to be gone after that. A
        # guest that has it back already, and uses it, has spoilt this page for itself.
        self._memory.discard_private(page)
        return rsi.ERROR_INPUT

    def _set_state(self, base: int, top: int, ripas: int, vcpu: int) -> Answer:
        request = rsi.decode_state_set(base, top, ripas, vcpu)
        if request is None:
            return rsi.ERROR_INPUT, base, rsi.REJECT
        return rsi.state_set_answer(base, top, self._converter.convert(request))

    def _get_state(self, base: int, top: int) -> Answer:
        """RAM is what its pages are, everything else a trusted device's: Linux then accesses its
        registers without the bit of shared addresses, where they are."""
        if rsi.decode_state_get(base, top) is None or top > _FIRST_SHARED:
            return (rsi.ERROR_INPUT,)
        runs = self._memory.states(Range(base, top - base))
        if not runs:
            return rsi.SUCCESS, top, rsi.DEV
        run, state = runs[0]
        if run.start > base:
            return rsi.SUCCESS, run.start, rsi.DEV
        return rsi.SUCCESS, run.end, rsi.EMPTY if state is PageState.SHARED else rsi.RAM
