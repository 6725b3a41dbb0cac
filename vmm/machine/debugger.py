"""`--gdb` in a run: its parts, put together as a run comes to have what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from kvm_bindings.exits import ArmDebugExit, DebugExit
from vmm.control.gdb.server import GdbServer, told_where
from vmm.control.gdb.target import Target
from vmm.core.errors import UsageError, tell
from vmm.core.event_loop import EventLoop
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.exits.outcome import QUIT, Outcome
from vmm.exits.vcpu_group import VcpuGroup
from vmm.memory.debugging import DebugAccess

if TYPE_CHECKING:
    from vmm.arch.protocol import Architecture
    from vmm.exits.handlers import Table
    from vmm.machine.guest_vm import GuestVm
    from vmm.machine.report_keys import Debugging
    from vmm.memory.debugging import Announce


class Debugger:
    """What `--gdb` and `--gdb-sees-private` ask for."""

    def __init__(self, where: str, *, sees_private: bool) -> None:
        """Listens from now on. Raises UsageError where nothing can."""
        self._sees_private = sees_private
        self._server = GdbServer(where)
        self._target: Target | None = None

    def connect(
        self,
        architecture: Architecture,
        vm: GuestVm,
        vcpus: VcpuGroup,
        announce: Announce | None,
        table: Table,
    ) -> None:
        """The VM and its exits are there. Raises UsageError, HostError, KvmError."""
        debug = architecture.debug(vm.system, vm.scheme.name)
        try:
            access = DebugAccess(
                vm.memory,
                vm.scheme.alias,
                sees_private=self._sees_private,
                announce=announce,
                caches_code=debug.caches_code,
            )
        except ValueError as error:
            raise UsageError(
                f"--gdb-sees-private: {error}; leave it out, or use a rehearsal's "
                "--private-mem=guest_memfd-mmap or memfd"
            ) from None
        lacking = debug.abilities.lacking()
        if lacking:
            tell(f"--gdb: this host's KVM has no {lacking}")
        self._target = Target(debug, vm.platform.vcpus, vcpus, access)
        for kind in (DebugExit, ArmDebugExit):  # one of them is the architecture's
            table[kind] = ("debug", self._target.on_debug_exit)

    @contextmanager
    def serving(self, loop: EventLoop, stop: Callable[[Outcome], None]) -> Iterator[None]:
        """Within the block a debugger may attach; the vCPUs, which start in it, stand still until
        one has them go on."""
        assert self._target is not None
        self._server.serve(loop, self._target, lambda: stop(Outcome(QUIT, "by the debugger")))
        tell(f"the guest waits for a debugger; in gdb: {told_where(self._server.where)}")
        yield

    def ended(self, outcome: Outcome) -> None:
        """The guest has: say so to the debugger."""
        self._server.close(outcome.exit_status)

    def close(self) -> None:
        """Any number of times."""
        self._server.close(1)
        if self._target is not None:
            self._target.close()
            self._target = None

    def as_dict(self) -> Debugging:
        """For the report."""
        assert self._target is not None
        return cast("Debugging", self._target.as_dict())
