"""What this host can do: found out by trying, and named when it is missing."""

from __future__ import annotations

from kvm_bindings import KvmError, Vm, ioctls
from kvm_bindings.x86_64 import System
from kvm_bindings.x86_64 import ioctls as x86
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.core.errors import HostError

_LAB = "pyvmm lab runs the same command on an emulated machine whose KVM can do it"

SEE_CHECK = "pyvmm check shows what this host can do"

_NEEDED = (
    ("KVM_CAP_USER_MEMORY", ioctls.KVM_CAP_USER_MEMORY),
    ("KVM_CAP_IRQCHIP", ioctls.KVM_CAP_IRQCHIP),
    ("KVM_CAP_PIT2", x86.KVM_CAP_PIT2),
    ("KVM_CAP_IRQFD", ioctls.KVM_CAP_IRQFD),
    ("KVM_CAP_IRQFD_RESAMPLE", ioctls.KVM_CAP_IRQFD_RESAMPLE),
    ("KVM_CAP_IOEVENTFD", ioctls.KVM_CAP_IOEVENTFD),
    ("KVM_CAP_EXT_CPUID", x86.KVM_CAP_EXT_CPUID),
    ("KVM_CAP_IMMEDIATE_EXIT", ioctls.KVM_CAP_IMMEDIATE_EXIT),
)


def open_kvm(path: str = "/dev/kvm", *, complete: bool = True) -> System:
    """Open KVM and, if `complete`, check what every run needs. Raises HostError with the remedy."""
    try:
        system = System(path)
    except FileNotFoundError:
        raise HostError(
            f"{path} does not exist: this machine has no KVM, or its module is not loaded "
            f"(modprobe kvm-intel or kvm-amd); {_LAB}"
        ) from None
    except PermissionError:
        raise HostError(
            f"{path}: permission denied; run as root, or as a member of the group that owns it "
            "(often 'kvm'); pyvmm lab needs neither"
        ) from None
    except OSError as error:
        raise HostError(f"{path} cannot be opened: {error.strerror}; {_LAB}") from None
    try:
        version = system.api_version()
        if version != ioctls.KVM_API_VERSION:
            raise HostError(f"{path} speaks KVM API {version}, pyvmm {ioctls.KVM_API_VERSION}")
        missing = missing_basics(system) if complete else []
        if missing:
            raise HostError(f"this host's KVM lacks {', '.join(missing)}; {_LAB}")
    except KvmError as error:
        system.close()
        raise HostError(f"{path} is not a working KVM: {error}; {_LAB}") from None
    except HostError:
        system.close()
        raise
    return system


def missing_basics(system: System) -> list[str]:
    """The names of the capabilities that every run needs and this KVM lacks."""
    return [name for name, number in _NEEDED if not system.check_extension(number)]


def require_hypercall_exits(vm: Vm) -> None:
    """Raises HostError unless KVM hands KVM_HC_MAP_GPA_RANGE to user space (says its word)."""
    offered = vm.check_extension(x86.KVM_CAP_EXIT_HYPERCALL)
    if not offered & 1 << KVM_HC_MAP_GPA_RANGE:
        raise HostError(
            f"this host's KVM does not pass share requests on (KVM_CAP_EXIT_HYPERCALL = "
            f"{offered:#x}, Linux 5.15 or later is needed); {_LAB}; {SEE_CHECK}"
        )
    if not vm.check_extension(x86.KVM_CAP_X86_USER_SPACE_MSR):
        raise HostError(
            f"this host's KVM does not pass MSR accesses on (KVM_CAP_X86_USER_SPACE_MSR); {_LAB}"
        )
