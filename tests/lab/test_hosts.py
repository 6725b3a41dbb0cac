"""The lab's other hosts: what their KVM can do that the stock one can't."""

from __future__ import annotations

import errno
import json

from tests.lab.conftest import BOOT_SECONDS, Starter

# By VM type: KVM_CHECK_EXTENSION of KVM_CAP_MEMORY_ATTRIBUTES (233) and
# KVM_CAP_GUEST_MEMFD_FLAGS (244), and the errno of making a page private
# (KVM_SET_MEMORY_ATTRIBUTES; struct kvm_memory_attributes: address, size, attributes, flags).
_PROBE = """
import fcntl, json, os, struct
kvm = os.open("/dev/kvm", os.O_RDWR)
seen = {"types": fcntl.ioctl(kvm, 0xAE03, 235)}
for kind in (0, 1):
    vm = fcntl.ioctl(kvm, 0xAE01, kind)
    refused = 0
    try:
        fcntl.ioctl(vm, 0x4020AED2, struct.pack("=QQQQ", 0x1000, 0x1000, 8, 0))
    except OSError as error:
        refused = error.errno
    seen[str(kind)] = [fcntl.ioctl(vm, 0xAE03, 233), fcntl.ioctl(vm, 0xAE03, 244), refused]
print(json.dumps(seen))
"""


def test_sw_protected_host_has_memory_attributes_and_ordinary_vms_still_work(
    lab_start: Starter,
) -> None:
    # Modules that don't fit their kernel may load all the same, and it complains later.
    script = 'python3 -c "$1" && dmesg | grep -c "WARNING:\\|BUG:"; pyvmm --private-mem'
    run = lab_start(["sh", "-c", script, "sh", _PROBE], program=True, host="sw-protected")

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stderr.data)

    probed, warnings, *payload = bytes(run.stdout.data).decode().splitlines()
    assert json.loads(probed) == {"types": 3, "0": [0, 3, errno.EINVAL], "1": [8, 1, 0]}
    assert warnings == "0"
    assert "checks passed" in payload[-1]
