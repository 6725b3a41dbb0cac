"""The lab with another KVM: our experiments in it, and a user's patch that goes wrong."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.conformance.test_emit_c import FAILING, IN_PLACE
from tests.fuzz import emit_c
from tests.fuzz import kernel_ops as ops
from tests.fuzz.kernel_replay import experimental
from tests.fuzz.kernel_worlds import World
from tests.lab.conftest import BOOT_SECONDS, Starter
from tests.lab.slow import slow
from tests.support.fake_platform import FakePlatform
from tests.support.own_kvm import CHECKS
from vmm.core.errors import GuestFailure, HostError
from vmm.selftest.emit_c import write
from vmm.selftest.recorder import as_c

# A parameter whose writing is a crash: one file more, and a line of the makefile.
_OOPS = """\
diff --git a/virt/kvm/oops.c b/virt/kvm/oops.c
new file mode 100644
--- /dev/null
+++ b/virt/kvm/oops.c
@@ -0,0 +1,12 @@
+// SPDX-License-Identifier: GPL-2.0-only
+#include <linux/moduleparam.h>
+
+static noinline int oops_on_purpose(const char *text, const struct kernel_param *parameter)
+{
+	*(volatile int *)NULL = 1;
+	return 0;
+}
+
+static const struct kernel_param_ops oops_ops = { .set = oops_on_purpose };
+
+module_param_cb(oops, &oops_ops, NULL, 0200);
diff --git a/virt/kvm/Makefile.kvm b/virt/kvm/Makefile.kvm
--- a/virt/kvm/Makefile.kvm
+++ b/virt/kvm/Makefile.kvm
@@ -8 +8,2 @@
 kvm-y := $(KVM)/kvm_main.o $(KVM)/eventfd.o $(KVM)/binary_stats.o
+kvm-y += $(KVM)/oops.o
"""
# A processor that never comes back from KVM_CREATE_VM.
_SPIN = """\
--- a/virt/kvm/kvm_main.c
+++ b/virt/kvm/kvm_main.c
@@ -5545,0 +5546,3 @@
+	{held}_disable();
+	for (;;)
+		cpu_relax();
"""
_NO_START = """\
--- a/arch/x86/kvm/x86.c
+++ b/arch/x86/kvm/x86.c
@@ -11038 +11038 @@
-	return 0;
+	return -EINVAL;
"""
# The experiments, tried; then a line for each run of the payload, and the complaints of a kernel
# whose modules don't fit it.
_SCRIPT = r"""
dd if=/dev/urandom of=/tmp/disk bs=64k count=4 2> /dev/null
python3 -m tests.support.own_kvm < /dev/null
pyvmm check --json < /dev/null | tr -d '\n'; echo
while read -r io options; do
    pyvmm --mem 32M --disk /tmp/disk,io=$io --report /tmp/report $options < /dev/null \
        > /tmp/out 2>&1
    echo "$(tail -n 1 /tmp/out | tr -d '\r')|$(tr -d '\n' < /tmp/report)"
done <<END
auto --private-mem
vmfd --private-mem
vmfd --private-mem --scheme cbit
END
pyvmm selftest --only in-place/guest_memfd-in-place < /dev/null > /tmp/out 2>&1; echo $?
for program in $PROGRAMS; do $program > /tmp/out && echo 0 || cat /tmp/out; done
dmesg | grep -c "WARNING:\|BUG:"
true
"""


def c_programs(folder: Path) -> list[Path]:
    """Random programs on both VM types, and a case, compiled: they show without pyvmm what the
    model says."""
    made = []
    for number in range(6):
        program = ops.Generator(random.Random(number)).program(24)
        expected = World(FakePlatform(experimental()), number % 2).run(program)
        source = emit_c.write(folder / str(number), number % 2, program, expected)
        made.append(source)
    case = as_c(FakePlatform(experimental()), IN_PLACE, FAILING)
    made.append(write(folder / "case", "case", case))
    for source in made:
        subprocess.run(
            ["cc", "-static", "-o", str(source.with_suffix("")), str(source)], check=True
        )
    return [source.with_suffix("") for source in made]


@pytest.mark.timeout(900)
def test_experimental_kvm_does_what_its_pages_say_and_pyvmm_uses_it(
    lab_start: Starter, tmp_path: Path
) -> None:
    programs = c_programs(tmp_path / "c")
    run = lab_start(
        ["sh", "-c", _SCRIPT],
        program=True,
        host="experimental",
        files=[Path(__file__).parents[1], *programs],
        cpus=1,
        environment={
            "PYTHONPATH": f"/lab/project:/lab/site:{Path(__file__).parents[2]}",
            "PROGRAMS": " ".join(map(str, programs)),
        },
    )

    assert run.wait(3 * BOOT_SECONDS) == 0, bytes(run.stderr.data)

    tried, checked, *rest = bytes(run.stdout.data).decode().splitlines()
    runs, (matrix, *replayed, complaints) = rest[:3], rest[3:]
    assert json.loads(tried) == dict.fromkeys(CHECKS, "as expected")
    found = {each["key"]: each["status"] for each in json.loads(checked)["capabilities"]}
    assert {found[key] for key in ("in_place", "guest_memfd_io", "vm_io")} == {"yes"}
    reports = []
    for line in runs:
        last, report = line.split("|", 1)
        assert "checks passed" in last, line
        reports.append(json.loads(report))
    assert [report["scheme"] for report in reports] == ["in-place", "in-place", "cbit"]
    assert [report["io"]["blk0"]["engine"]["name"] for report in reports] == [
        "auto",
        "vmfd",
        "vmfd",
    ]
    assert all(report["io"]["blk0"]["errors"] == 0 for report in reports)
    # Nothing of the disk's went through a mapping.
    assert all("/proc/self/mem" not in r["io"]["blk0"]["engine"]["bytes"] for r in reports)
    assert (matrix, complaints) == ("0", "0")
    assert replayed == ["0"] * len(programs)


@pytest.mark.timeout(900)
def test_crash_of_a_patched_kernel_is_told_by_its_trace(lab_start: Starter, tmp_path: Path) -> None:
    patch = tmp_path / "oops.patch"
    patch.write_text(_OOPS)
    words = "echo 1 > /sys/module/kvm/parameters/oops; sleep 1000"
    run = lab_start(["sh", "-c", words], program=True, kvm_patches=[patch])

    with pytest.raises(GuestFailure) as caught:
        run.wait(BOOT_SECONDS)

    message = str(caught.value)
    assert caught.value.exit_status == 1
    assert message.startswith("the lab machine's kernel crashed: BUG: kernel NULL pointer")
    assert "oops_on_purpose" in message
    assert "\n" not in message


@pytest.mark.timeout(900)
def test_modules_that_do_not_load_are_told_with_their_reason(
    lab_start: Starter, tmp_path: Path
) -> None:
    patch = tmp_path / "no-start.patch"
    patch.write_text(_NO_START)
    run = lab_start(["true"], program=True, kvm_patches=[patch])

    with pytest.raises(HostError, match=r"failed: loading module kvm: Invalid argument") as caught:
        run.wait(BOOT_SECONDS)

    assert "\n" not in str(caught.value)


@pytest.mark.timeout(900)
@slow  # a hang is told after minutes
@pytest.mark.parametrize(
    ("held", "cpus", "told"),
    [
        # Nobody is left to see it.
        ("local_irq", 1, "the lab machine stands still: no heartbeat for 120 s"),
        # Whoever sees it first, RCU or the watchdog: with preemption off interrupts still come.
        ("preempt", 2, "the lab machine's kernel crashed: "),
    ],
)
def test_kernel_that_hangs_is_told(
    held: str, cpus: int, told: str, lab_start: Starter, tmp_path: Path
) -> None:
    patch = tmp_path / "spin.patch"
    patch.write_text(_SPIN.format(held=held))
    words = "import fcntl; fcntl.ioctl(open('/dev/kvm'), 0xAE01, 0)"
    run = lab_start(["python3", "-c", words], program=True, kvm_patches=[patch], cpus=cpus)

    with pytest.raises(GuestFailure) as caught:
        run.wait(3 * BOOT_SECONDS)

    assert caught.value.exit_status == 1
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
