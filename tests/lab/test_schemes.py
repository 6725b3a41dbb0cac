"""The embedded payload under each scheme and backing that only some hosts have."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.conftest import BOOT_SECONDS, Starter

# Prints a line of JSON for each run: the options, the payload's last line, the report.
_SCRIPT = r"""
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
"""


def test_payload_under_every_scheme_of_a_host_with_memory_attributes(lab_start: Starter) -> None:
    run = lab_start(["sh", "-c", _SCRIPT], program=True, host="sw-protected")

    assert run.wait(2 * BOOT_SECONDS) == 0, bytes(run.stderr.data)

    checked, *lines = bytes(run.stdout.data).decode().splitlines()
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
