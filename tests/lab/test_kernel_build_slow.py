"""Lab machines whose whole kernel is compiled, with changes anywhere in it: when asked for.

The first build of each architecture takes some ten minutes, those that follow one or two.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.conftest import BOOT_SECONDS, Starter
from tests.lab.slow import slow
from vmm.core.errors import GuestFailure

pytestmark = [pytest.mark.timeout(5400), slow]

# One file more in the kernel itself, with a parameter to be seen.
_NOTE = """\
diff --git a/kernel/lab_note.c b/kernel/lab_note.c
new file mode 100644
--- /dev/null
+++ b/kernel/lab_note.c
@@ -0,0 +1,{lines} @@
+// SPDX-License-Identifier: GPL-2.0-only
+#include <linux/init.h>
+#include <linux/module.h>
+
+static int word = {word};
+module_param(word, int, 0444);
{more}diff --git a/kernel/Makefile b/kernel/Makefile
--- a/kernel/Makefile
+++ b/kernel/Makefile
@@ -14 +14,2 @@
 obj-$(CONFIG_MULTIUSER) += groups.o
+obj-y += lab_note.o
"""
_OOPS = """\
+
+static int __init oops_on_purpose(void)
+{
+	*(volatile int *)NULL = 1;
+	return 0;
+}
+core_initcall(oops_on_purpose);
"""
_SCRIPT = r"""
uname -r
cat /sys/module/lab_note/parameters/word
pyvmm check --json </dev/null | tr -d '\n'; echo
for options in $SCHEMES; do
    pyvmm --mem 32M --private-mem --scheme $options </dev/null >/tmp/out 2>&1
    tail -n 1 /tmp/out | tr -d '\r'
done
dmesg | grep -c 'WARNING:\|BUG:'
true
"""


def note(folder: Path, word: int, more: str = "") -> Path:
    path = folder / f"note-{word}.patch"
    path.write_text(_NOTE.format(word=word, more=more, lines=6 + more.count("\n")))
    return path


@pytest.mark.parametrize(
    ("host", "schemes", "wanted"),
    [
        ("experimental", "in-place cbit remap", {"in_place", "guest_memfd_io", "vm_io"}),
        ("pkvm", "pkvm", {"protected_vms"}),
    ],
)
def test_machine_with_a_patched_kernel_of_its_own_runs_guests(
    host: str, schemes: str, wanted: set[str], lab_start: Starter, tmp_path: Path
) -> None:
    run = lab_start(
        ["sh", "-c", _SCRIPT],
        program=True,
        host=host,
        kernel_build=True,
        kvm_patches=[note(tmp_path, 42)],
        environment={"SCHEMES": schemes},
    )

    assert run.wait(5 * BOOT_SECONDS) == 0, bytes(run.stderr.data)

    said = bytes(run.stdout.data).decode().splitlines()
    release, word, checked, *runs, complaints = said
    assert release.startswith("7.3.") and "cloud" not in release
    assert word == "42"
    found = {each["key"]: each["status"] for each in json.loads(checked)["capabilities"]}
    assert {found[key] for key in wanted} == {"yes"}
    assert len(runs) == len(schemes.split()) and all("checks passed" in line for line in runs), runs
    assert complaints == "0"


def test_kernel_that_does_not_boot_is_told_by_its_trace(lab_start: Starter, tmp_path: Path) -> None:
    patch = note(tmp_path, 43, _OOPS)
    run = lab_start(
        ["true"], program=True, host="experimental", kernel_build=True, kvm_patches=[patch]
    )

    with pytest.raises(GuestFailure) as caught:
        run.wait(BOOT_SECONDS)

    message = str(caught.value)
    assert caught.value.exit_status == 1
    assert message.startswith("the lab machine's kernel crashed: BUG: kernel NULL pointer")
    assert "oops_on_purpose" in message
    assert "\n" not in message
