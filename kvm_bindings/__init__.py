"""The kernel's door: cffi bindings (API mode) for /dev/kvm, and nothing else.

One class per kind of fd (System, Vm, Vcpu, GuestMemfd), one method per ioctl, typed exits.
Imports nothing of pyvmm's.
"""

from kvm_bindings.errors import KvmError
from kvm_bindings.guest_memfd import GuestMemfd, PagesInUse
from kvm_bindings.system import System
from kvm_bindings.vcpu import Vcpu
from kvm_bindings.vm import Vm

__all__ = ["GuestMemfd", "KvmError", "PagesInUse", "System", "Vcpu", "Vm"]
