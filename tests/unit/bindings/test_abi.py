"""Our declarations of the KVM ABI against this machine's <linux/kvm.h>, by a small C program.

What an older header doesn't have yet is skipped by name, one test each; what every header has
must be found, so that a broken comparison can't pass as a row of skips.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from kvm_bindings._kvm import ffi

from kvm_bindings import ioctls
from kvm_bindings.exits import EXIT_NAMES

INCLUDES = """
#include <stddef.h>
#include <stdio.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
"""

# Structs of ours that the kernel's header declares without a name, inside struct kvm_run.
ANONYMOUS = {
    "kvm_run_io": "io",
    "kvm_run_mmio": "mmio",
    "kvm_run_hypercall": "hypercall",
    "kvm_run_fail_entry": "fail_entry",
    "kvm_run_internal": "internal",
    "kvm_run_emulation_failure": "emulation_failure",
    "kvm_run_system_event": "system_event",
    "kvm_run_msr": "msr",
    "kvm_run_memory_fault": "memory_fault",
}
RENAMED = {
    ("kvm_run", "hardware_exit_reason"): "hw.hardware_exit_reason",
    ("kvm_run", "exit_padding"): "padding",
    ("kvm_run", "sync_regs_padding"): "s.padding",
}
OURS_ALONE = {"pad", "pad1", "pad2", "padding", "padding1", "reserved"}
# In every header that could be installed: none of these may be skipped.
OLD = ("KVM_RUN", "KVM_CREATE_VCPU", "KVM_CAP_IRQFD", "sizeof(struct kvm_sregs)")


def constants() -> Iterator[tuple[str, int]]:
    for name, value in vars(ioctls).items():
        if name.isupper() and isinstance(value, int) and not name.startswith("IOC_"):
            yield name, value
    for number, name in EXIT_NAMES.items():
        yield f"KVM_EXIT_{name.upper()}", number


def layout() -> Iterator[tuple[str, int]]:
    """sizeof and offsetof expressions for all structs, with what cffi says."""
    for name in ffi.list_types()[1]:
        struct = ffi.typeof(f"struct {name}")
        if name not in ANONYMOUS:
            yield f"sizeof(struct {name})", ffi.sizeof(struct)
        for field, _ in struct.fields:
            if field in OURS_ALONE or (name == "kvm_run" and field in ANONYMOUS.values()):
                continue
            offset = ffi.offsetof(struct, field)
            if name in ANONYMOUS:
                base = ffi.offsetof("struct kvm_run", "io")
                yield f"offsetof(struct kvm_run, {ANONYMOUS[name]}.{field})", base + offset
            else:
                theirs = RENAMED.get((name, field), field)
                yield f"offsetof(struct {name}, {theirs})", offset


CONSTANTS, LAYOUT = dict(constants()), dict(layout())


@cache
def header_values() -> dict[str, int | None] | str:
    """What the header says, None for what it doesn't know; or why there is nothing to ask."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "no C compiler (cc): install gcc"
    if platform.machine() != "x86_64":
        return f"the declarations are x86-64's, this is {platform.machine()}"
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch, "program")
        if _errors(compiler, program, []) is not None:
            return "no <linux/kvm.h>: install linux-libc-dev or the like"
        known = [*CONSTANTS, *LAYOUT]
        while lines := _errors(compiler, program, known):
            known = [expression for line, expression in enumerate(known, 1) if line not in lines]
        output = subprocess.run([program], text=True, capture_output=True, check=True).stdout
    found = dict(zip(known, map(int, output.split()), strict=True))
    return {expression: found.get(expression) for expression in [*CONSTANTS, *LAYOUT]}


def _errors(compiler: str, program: Path, expressions: list[str]) -> set[int] | None:
    """Compiles a program that prints all; the (1-based) numbers of the ones in error, or None."""
    values = "".join(f"(unsigned long long)({expression}),\n" for expression in expressions)
    source = (
        f"{INCLUDES}static const unsigned long long values[] = {{\n#line 1\n{values}\n0 }};\n"
        "int main(void) {\n"
        "for (size_t i = 0; i + 1 < sizeof values / sizeof *values; i++)\n"
        'printf("%llu\\n", values[i]);\nreturn 0; }\n'
    )
    command = [compiler, "-w", "-x", "c", "-o", str(program), "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    if done.returncode == 0:
        return None
    lines = {int(line) for line in re.findall(r"^<stdin>:(\d+):.*error", done.stderr, re.MULTILINE)}
    assert not expressions or lines, done.stderr
    return lines


def in_header(expression: str) -> int:
    """The header's value; skips where there is no header, or it is too old for this one."""
    values = header_values()
    if isinstance(values, str):
        pytest.skip(values)
    value = values[expression]
    if value is None:
        pytest.skip(f"this machine's <linux/kvm.h> has no {expression}")
    return value


@pytest.mark.parametrize("expression", CONSTANTS)
def test_number_is_the_headers(expression: str) -> None:
    assert in_header(expression) == CONSTANTS[expression]


@pytest.mark.parametrize("expression", LAYOUT)
def test_layout_is_the_headers(expression: str) -> None:
    assert in_header(expression) == LAYOUT[expression]


@pytest.mark.parametrize("expression", OLD)
def test_comparison_finds_what_every_header_has(expression: str) -> None:
    values = header_values()
    if isinstance(values, str):
        pytest.skip(values)

    assert values[expression] is not None


# Numbers as kernels name them in their logs and strace prints them, where headers are too old.


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_CREATE_VM", 0xAE01),
        ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
        ("KVM_SET_USER_MEMORY_REGION2", 0x40A0AE49),
        ("KVM_SET_MEMORY_ATTRIBUTES", 0x4020AED2),
        ("KVM_CREATE_GUEST_MEMFD", 0xC040AED4),
        ("KVM_SET_SREGS", 0x4138AE84),
        ("KVM_RUN", 0xAE80),
    ],
)
def test_number_is_what_the_kernels_documentation_makes_it(name: str, number: int) -> None:
    assert getattr(ioctls, name) == number


def test_table_of_ioctls_is_in_number_order_within_each_kind_of_fd() -> None:
    source = Path(ioctls.__file__).read_text()
    for kind in ("On /dev/kvm", "On a VM", "On a guest_memfd", "On a vCPU"):
        block = source.split(f"# {kind}")[1].split("\n\n")[0]
        names = [line.split(" = ")[0] for line in block.splitlines() if line.startswith("KVM_")]
        numbers = [getattr(ioctls, name) & 0xFF for name in names]

        assert numbers == sorted(numbers), kind
