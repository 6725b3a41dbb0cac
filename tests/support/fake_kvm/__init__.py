"""An executable model of KVM's private-memory semantics, behind kvm_bindings' interface.

It models memslots, guest_memfd (flags, binding), memory attributes per VM and per guest_memfd,
faults, KVM_HC_MAP_GPA_RANGE and errors injected at any ioctl. Guest accesses are explicit:
`FakeVm.guest_read` and `guest_write` at a guest-physical address, or a script of a vCPU.
Bytes live where they would: in memfds, reached by HVA through /proc/self/mem.

What it says is compared with real kernels by random programs (tests/fuzz/kernel_programs.py).
Sources: virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c, arch/x86/kvm/mmu/mmu.c of Linux 6.18 to
7.3; the in-place ABI as posted to the KVM list in May 2026 (v7).
"""

from tests.support.fake_kvm.kernel import FakeKernel, VmType
from tests.support.fake_kvm.system import FakeSystem
from tests.support.fake_kvm.vm import FakeVm

__all__ = ["FakeKernel", "FakeSystem", "FakeVm", "VmType"]
