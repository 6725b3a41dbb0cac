"""What only some of the lab's hosts have: their KVM, and the payload under its schemes."""

from __future__ import annotations

import errno
import json
from typing import Any

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
# Prints what the probe does, then a line of JSON for each run: the options, the payload's last
# line, the report. Modules that don't fit their kernel may load all the same, and it complains
# later: so does the last line, with the number of complaints.
_SCRIPT = r"""
python3 -c "$1" || exit
dd if=/dev/urandom of=/tmp/disk bs=64k count=4 2> /dev/null
echo 48 > /proc/sys/vm/nr_hugepages
pyvmm check --json > /tmp/check
tr -d '\n' < /tmp/check; echo
while read -r options; do
    pyvmm --mem 32M --disk /tmp/disk --report /tmp/report $options < /dev/null > /tmp/out 2>&1
    echo "$options|$(tail -n 1 /tmp/out | tr -d '\r')|$(tr -d '\n' < /tmp/report)"
    rm -f /tmp/report
done <<END
--private-mem
--private-mem --scheme remap
--private-mem=memfd-hugetlb
--private-mem=memfd-sealed --scheme cbit
END
dmesg | grep -c "WARNING:\|BUG:"
true
"""


def test_payload_under_every_scheme_of_a_host_with_memory_attributes(lab_start: Starter) -> None:
    run = lab_start(["sh", "-c", _SCRIPT, "sh", _PROBE], program=True, host="sw-protected")

    assert run.wait(2 * BOOT_SECONDS) == 0, bytes(run.stderr.data)

    probed, checked, *lines, complaints = bytes(run.stdout.data).decode().splitlines()
    # Ordinary VMs are as ever beside those with attributes.
    assert json.loads(probed) == {"types": 3, "0": [0, 3, errno.EINVAL], "1": [8, 1, 0]}
    assert complaints == "0"
    found = {each["key"]: each["status"] for each in json.loads(checked)["capabilities"]}
    for key in ("memory_attributes", "memory_faults", "memfd_sealed", "memfd_hugetlb", "vm_types"):
        assert found[key] == "yes", checked
    assert found["in_place"] == found["memfd_secret"] == "no"
    reports: dict[str, dict[str, Any]] = {}
    for line in lines:
        options, last, report = line.split("|", 2)
        assert "checks passed" in last, line
        reports[options] = json.loads(report)
    chosen = {
        options: (report["scheme"], report["backings"]["private"], report["isolation"][:6])
        for options, report in reports.items()
    }
    assert chosen == {
        "--private-mem": ("attributes", "guest_memfd-plain", "kernel"),
        "--private-mem --scheme remap": ("remap", "guest_memfd", "kernel"),
        "--private-mem=memfd-hugetlb": ("cbit", "memfd-hugetlb", "policy"),
        "--private-mem=memfd-sealed --scheme cbit": ("cbit", "memfd-sealed", "policy"),
    }
    assert all(report["io"]["blk0"]["errors"] == 0 for report in reports.values())
    assert "mmio" not in reports["--private-mem --scheme remap"]["exits"]
    # Taken from the reserve once and kept: a hole in a part of a huge page gives nothing back.
    assert reports["--private-mem=memfd-hugetlb"]["residency"]["private_bytes"] % (2 << 20) == 0
