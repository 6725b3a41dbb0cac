"""The arm64 KVM: what these classes add to those of kvm_bindings, under the same names."""

from kvm_bindings.aarch64.system import System
from kvm_bindings.aarch64.vcpu import Vcpu
from kvm_bindings.aarch64.vm import Vm

__all__ = ["System", "Vcpu", "Vm"]
