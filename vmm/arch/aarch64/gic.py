"""KVM's GICv3, at the board's places."""

from __future__ import annotations

from contextlib import ExitStack

from kvm_bindings.aarch64 import Vm, ioctls
from kvm_bindings.device import Device
from vmm.arch.aarch64 import layout

_PLACES = {
    ioctls.KVM_VGIC_V3_ADDR_TYPE_DIST: layout.GIC_DISTRIBUTOR_GPA,
    # One region for all vCPUs, however many: the attribute without a count.
    ioctls.KVM_VGIC_V3_ADDR_TYPE_REDIST: layout.GIC_REDISTRIBUTORS_GPA,
}


def create_gic(vm: Vm) -> Device:
    """A new one, to be initialised after the vCPUs (Documentation/virt/kvm/devices/
    arm-vgic-v3.rst). Raises KvmError where KVM has none."""
    with ExitStack() as opened:
        gic = vm.create_device(ioctls.KVM_DEV_TYPE_ARM_VGIC_V3)
        opened.callback(gic.close)
        for kind, gpa in _PLACES.items():
            gic.set_attr(ioctls.KVM_DEV_ARM_VGIC_GRP_ADDR, kind, gpa)
        gic.set_attr(ioctls.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, layout.INTERRUPTS)
        opened.pop_all()
    return gic
