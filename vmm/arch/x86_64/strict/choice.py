"""Whether a Linux guest loads itself into memory that the host's user space can't reach."""

from __future__ import annotations

from vmm.arch.x86_64.probes.strict import strict_obstacle
from vmm.core.errors import HostError, UsageError, tell
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.host.kvm import SEE_CHECK

if TYPE_CHECKING:
    from kvm_bindings.x86_64 import System
    from vmm.arch.x86_64.guests import LinuxGuest


def choose_loading(system: System, guest: LinuxGuest, *, by_name: bool) -> None:
    """Make the guest a strict one where that can be. Where it can't: UsageError or HostError if
    the user wanted it `by_name`, else one line that says why."""
    unfit = guest.unfit_to_load_itself
    if unfit is not None:
        if by_name:
            raise UsageError(
                f"--private-mem=guest_memfd: {unfit}; leave that out, or use "
                "--private-mem=guest_memfd-mmap, which the host loads"
            )
        _tell_rehearsal(unfit)
        return
    obstacle = strict_obstacle(system)
    if obstacle is None:
        guest.load_itself()
    elif by_name:
        raise HostError(
            f"--private-mem=guest_memfd: {obstacle}; use --private-mem=guest_memfd-mmap or memfd, "
            f"which are rehearsals, or pyvmm lab --host bochs; {SEE_CHECK}"
        )
    else:
        _tell_rehearsal(obstacle)


def _tell_rehearsal(why: str) -> None:
    tell(f"private memory is a rehearsal here, not kept from the host by its kernel: {why}")
