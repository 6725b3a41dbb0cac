"""A device that KVM emulates (KVM_CREATE_DEVICE), such as an interrupt controller."""

from __future__ import annotations

import errno

from kvm_bindings import ioctls
from kvm_bindings._kvm import ffi
from kvm_bindings.errors import check
from kvm_bindings.owned_fd import OwnedFd


class Device(OwnedFd):
    """A device's fd. What groups and attributes mean is in Documentation/virt/kvm/devices/.

    Numbers go through a little-endian 64-bit word, which also serves attributes of 32 bits.
    """

    def __init__(self, fd: int, device_type: int) -> None:
        super().__init__(fd)
        self.device_type = device_type

    def set_attr(self, group: int, attr: int, value: int | bytes | None = None) -> None:
        """KVM_SET_DEVICE_ATTR with a number, a structure's bytes, or nothing (a command).

        Raises KvmError (ENXIO: no such group or attribute; EBUSY: too late, vCPUs run).
        """
        data = b"" if value is None else value
        if isinstance(data, int):
            data = data.to_bytes(8, "little")
        buffer = ffi.new("uint8_t[]", data)
        address = ffi.NULL if value is None else buffer
        argument = ffi.new(
            "struct kvm_device_attr *", {"group": group, "attr": attr, "addr": address}
        )
        self._check(
            "KVM_SET_DEVICE_ATTR", self._pointer(ioctls.KVM_SET_DEVICE_ATTR, argument), group, attr
        )

    def get_attr(self, group: int, attr: int, value: int = 0) -> int:
        """KVM_GET_DEVICE_ATTR: a number. Some attributes read `value` first, as an index."""
        word = ffi.new("uint64_t *", value)
        argument = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr, "addr": word})
        self._check(
            "KVM_GET_DEVICE_ATTR", self._pointer(ioctls.KVM_GET_DEVICE_ATTR, argument), group, attr
        )
        return int(word[0])

    def has_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR: whether this kernel's device knows the attribute."""
        argument = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr})
        result = self._pointer(ioctls.KVM_HAS_DEVICE_ATTR, argument)
        if result == -errno.ENXIO:
            return False
        self._check("KVM_HAS_DEVICE_ATTR", result, group, attr)
        return True

    def _check(self, operation: str, result: int, group: int, attr: int) -> None:
        check(operation, result, "device={}, group={}, attr={:#x}", self.device_type, group, attr)
