"""What this host can do: found out by trying, and named when it is missing."""

from __future__ import annotations

from kvm_bindings import KvmError, System, ioctls
from vmm.core.errors import HostError
from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

SEE_CHECK = "pyvmm check shows what this host can do"

NEEDED = (
    ("KVM_CAP_USER_MEMORY", ioctls.KVM_CAP_USER_MEMORY),
    ("KVM_CAP_IRQFD", ioctls.KVM_CAP_IRQFD),
    ("KVM_CAP_IRQFD_RESAMPLE", ioctls.KVM_CAP_IRQFD_RESAMPLE),
    ("KVM_CAP_IOEVENTFD", ioctls.KVM_CAP_IOEVENTFD),
    ("KVM_CAP_IMMEDIATE_EXIT", ioctls.KVM_CAP_IMMEDIATE_EXIT),
)
"""What every run needs on every architecture; each adds its own."""


def in_lab(command: str) -> str:
    """The remedy for what a host lacks, as the end of a sentence; see HostArchitecture.lab."""
    return f"{command} runs the same command on an emulated machine whose KVM can do it"


def open_kvm(
    architecture: HostArchitecture, path: str = "/dev/kvm", *, complete: bool = True
) -> System:
    """Open KVM and, if `complete`, check what every run needs. Raises HostError with the remedy."""
    lab = in_lab(architecture.lab)
    try:
        system = architecture.open_system(path)
    except FileNotFoundError:
        raise HostError(
            f"{path} does not exist: this machine has no KVM, or {architecture.without_kvm}; {lab}"
        ) from None
    except PermissionError:
        raise HostError(
            f"{path}: permission denied; run as root, or as a member of the group that owns it "
            f"(often 'kvm'); {architecture.lab} needs neither"
        ) from None
    except OSError as error:
        raise HostError(f"{path} cannot be opened: {error.strerror}; {lab}") from None
    try:
        version = system.api_version()
        if version != ioctls.KVM_API_VERSION:
            raise HostError(f"{path} speaks KVM API {version}, pyvmm {ioctls.KVM_API_VERSION}")
        missing = missing_basics(system, architecture) if complete else []
        if missing:
            raise HostError(f"this host's KVM lacks {', '.join(missing)}; {lab}")
    except KvmError as error:
        system.close()
        raise HostError(f"{path} is not a working KVM: {error}; {lab}") from None
    except HostError:
        system.close()
        raise
    return system


def missing_basics(system: System, architecture: HostArchitecture) -> list[str]:
    """The names of the capabilities that every run needs and this KVM lacks."""
    needed = (*NEEDED, *architecture.needed)
    return [name for name, number in needed if not system.check_extension(number)]
