"""The kernel's door: cffi bindings (API mode) for /dev/kvm, and nothing else.

One class per kind of fd (System, Vm, Vcpu, GuestMemfd, Device), one method per ioctl, typed exits.
These have what every architecture has; kvm_bindings.x86_64 and kvm_bindings.aarch64 have classes of
the same names with what theirs adds. Imports nothing of pyvmm's.
"""

from kvm_bindings.errors import KvmError
from kvm_bindings.guest_memfd import GuestMemfd, PagesInUse
from kvm_bindings.system import System
from kvm_bindings.vcpu import Vcpu
from kvm_bindings.vm import MessageRoute, Vm

__all__ = [
    "GuestMemfd",
    "KvmError",
    "MessageRoute",
    "PagesInUse",
    "System",
    "Vcpu",
    "Vm",
]
