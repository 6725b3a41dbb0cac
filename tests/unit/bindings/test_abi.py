"""Our declarations of the KVM ABI against the kernel's <linux/kvm.h>, by a small C file.

For this machine's architecture with its compiler and headers, for the other one with a cross
compiler where there is one; nothing is run. CPATH can name newer headers than those installed.
What an older header doesn't have yet is skipped by name, one test each; what every header has
must be found, so that a broken comparison can't pass as a row of skips.
"""

from __future__ import annotations

import platform
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from kvm_bindings import abi, exits, ioctls
from kvm_bindings.aarch64 import ioctls as aarch64_ioctls
from kvm_bindings.aarch64 import registers
from kvm_bindings.abi import ffi_for
from kvm_bindings.x86_64 import ioctls as x86_64_ioctls
from tests.support.compilers import compiler_for

INCLUDES = """
#include <stddef.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#define SZ_64K 0x10000
"""
MARK = 0x4B56_4D20_4142_4920  # before the values in the object file

TABLES: dict[str, tuple[ModuleType, ...]] = {
    "x86_64": (ioctls, exits, x86_64_ioctls),
    "aarch64": (ioctls, exits, aarch64_ioctls, registers),
}
PACKAGES = {
    "x86_64": "gcc-x86-64-linux-gnu and linux-libc-dev-amd64-cross",
    "aarch64": "gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and linux-libc-dev-arm64-cross",
}
PACKAGES[platform.machine()] = "gcc and linux-libc-dev"

# Structs of ours that the kernel's header declares without a name, inside struct kvm_run.
ANONYMOUS = {
    "kvm_run_io": "io",
    "kvm_run_mmio": "mmio",
    "kvm_run_hypercall": "hypercall",
    "kvm_run_fail_entry": "fail_entry",
    "kvm_run_internal": "internal",
    "kvm_run_emulation_failure": "emulation_failure",
    "kvm_run_system_event": "system_event",
    "kvm_run_arm_nisv": "arm_nisv",
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
OLD = {
    "x86_64": ("KVM_RUN", "KVM_CREATE_VCPU", "KVM_CAP_IRQFD", "sizeof(struct kvm_sregs)"),
    "aarch64": (
        "KVM_RUN",
        "KVM_ARM_VCPU_INIT",
        "KVM_DEV_TYPE_ARM_VGIC_V3",
        "core register pc",
        "vector register v31",
        "sizeof(struct kvm_guest_debug)",
        "KVM_CAP_GUEST_DEBUG_HW_WPS",
    ),
}
# What is no macro of the same name.
SPELLED = {
    "system register MPIDR_EL1": "ARM64_SYS_REG(3, 0, 0, 0, 5)",
    "system register CNTV_CTL_EL0": "KVM_REG_ARM_TIMER_CTL",
    "system register with all bits": "ARM64_SYS_REG(3, 7, 15, 15, 7)",
    **{
        f"core register {name}": "KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | "
        f"KVM_REG_ARM_CORE_REG(regs.{f'regs[{name[1:]}]' if name[0] == 'x' else name})"
        for name in registers.CORE_REGISTERS
    },
    **{
        f"core register {name}": "KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | "
        f"KVM_REG_ARM_CORE_REG({'spsr[KVM_SPSR_EL1]' if name == 'spsr_el1' else name})"
        for name in registers.EL1_REGISTERS
    },
    **{
        f"vector register {name}": f"KVM_REG_ARM64 | KVM_REG_SIZE_U{128 if name[0] == 'v' else 32}"
        " | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(fp_regs."
        f"{f'vregs[{name[1:]}]' if name[0] == 'v' else name})"
        for name in registers.VECTOR_REGISTERS
    },
}


def constants(architecture: str) -> Iterator[tuple[str, int]]:
    for table in TABLES[architecture]:
        for name, value in vars(table).items():
            if name.isupper() and isinstance(value, int):
                yield name, value
    if architecture == "aarch64":
        for name, number in registers.CORE_REGISTERS.items():
            yield f"core register {name}", number
        for name, number in registers.EL1_REGISTERS.items():
            yield f"core register {name}", number
        for name, number in registers.VECTOR_REGISTERS.items():
            yield f"vector register {name}", number
        yield "system register MPIDR_EL1", registers.system_register(3, 0, 0, 0, 5)
        yield "system register CNTV_CTL_EL0", registers.system_register(3, 3, 14, 3, 1)
        yield "system register with all bits", registers.system_register(3, 7, 15, 15, 7)


def layout(architecture: str) -> Iterator[tuple[str, int]]:
    """sizeof and offsetof expressions for all structs of KVM's, with what cffi says."""
    ffi = ffi_for(architecture)
    for name in ffi.list_types()[1]:
        if name.startswith("pyvmm_"):
            continue
        kind = ffi.typeof(f"struct {name}")
        if name not in ANONYMOUS:
            yield f"sizeof(struct {name})", ffi.sizeof(kind)
        for field, _ in kind.fields:
            if field in OURS_ALONE or (name == "kvm_run" and field in ANONYMOUS.values()):
                continue
            offset = ffi.offsetof(kind, field)
            if name in ANONYMOUS:
                base = ffi.offsetof("struct kvm_run", "mmio")
                yield f"offsetof(struct kvm_run, {ANONYMOUS[name]}.{field})", base + offset
            else:
                theirs = RENAMED.get((name, field), field)
                yield f"offsetof(struct {name}, {theirs})", offset


CONSTANTS = {architecture: dict(constants(architecture)) for architecture in TABLES}
LAYOUT = {architecture: dict(layout(architecture)) for architecture in TABLES}


@cache
def header_values(architecture: str) -> dict[str, int | None] | str:
    """What the header says, None for what it doesn't know; or why there is nothing to ask."""
    compiler = compiler_for(architecture)
    packages = PACKAGES[architecture]
    if compiler is None:
        return f"no C compiler for {architecture}: install {packages}"
    everything = [*CONSTANTS[architecture], *LAYOUT[architecture]]
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "values.o")
        if _errors(compiler, made, []) is not None:
            return f"no <linux/kvm.h> of {architecture}: install {packages}"
        known = everything
        while lines := _errors(compiler, made, known):
            known = [expression for line, expression in enumerate(known, 1) if line not in lines]
        content = made.read_bytes()
    after = content.index(struct.pack("<Q", MARK)) + 8
    found = dict(zip(known, struct.unpack_from(f"<{len(known)}Q", content, after), strict=True))
    return {expression: found.get(expression) for expression in everything}


def _errors(compiler: str, made: Path, expressions: list[str]) -> set[int] | None:
    """Compiles a file with all values; the (1-based) numbers of the ones in error, or None."""
    spelled = [SPELLED.get(expression, expression) for expression in expressions]
    values = "".join(f"(unsigned long long)({expression}),\n" for expression in spelled)
    source = f"{INCLUDES}const unsigned long long values[] = {{ {MARK}ULL,\n#line 1\n{values} }};\n"
    command = [compiler, "-w", "-c", "-x", "c", "-o", str(made), "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    if done.returncode == 0:
        return None
    lines = {int(line) for line in re.findall(r"^<stdin>:(\d+):.*error", done.stderr, re.MULTILINE)}
    assert not expressions or lines, done.stderr
    return lines


def in_header(architecture: str, expression: str) -> int:
    """The header's value; skips where there is no header, or it is too old for this one."""
    values = header_values(architecture)
    if isinstance(values, str):
        pytest.skip(values)
    value = values[expression]
    if value is None:
        pytest.skip(f"the <linux/kvm.h> of {architecture} here has no {expression}")
    return value


def each(table: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    return [(architecture, name) for architecture, names in table.items() for name in names]


@pytest.mark.parametrize(("architecture", "expression"), each(CONSTANTS))
def test_number_is_the_headers(architecture: str, expression: str) -> None:
    assert in_header(architecture, expression) == CONSTANTS[architecture][expression]


@pytest.mark.parametrize(("architecture", "expression"), each(LAYOUT))
def test_layout_is_the_headers(architecture: str, expression: str) -> None:
    assert in_header(architecture, expression) == LAYOUT[architecture][expression]


@pytest.mark.parametrize(
    ("architecture", "expression"),
    [(architecture, name) for architecture, names in OLD.items() for name in names],
)
def test_comparison_finds_what_every_header_has(architecture: str, expression: str) -> None:
    values = header_values(architecture)
    if isinstance(values, str):
        pytest.skip(values)

    assert values[expression] is not None


def test_declarations_read_from_the_headers_are_those_compiled_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = platform.machine()
    ours, compiled = ffi_for(machine), dict(layout(machine))
    monkeypatch.setattr(abi, "MACHINE", "another")
    parsed = abi.ffi_for.__wrapped__(machine)
    monkeypatch.setitem(globals(), "ffi_for", lambda _: parsed)

    assert parsed is not ours
    assert dict(layout(machine)) == compiled


# Numbers as kernels name them in their logs and strace prints them, where headers are too old.


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_CREATE_VM", 0xAE01),
        ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
        ("KVM_SET_USER_MEMORY_REGION2", 0x40A0AE49),
        ("KVM_SET_MEMORY_ATTRIBUTES", 0x4020AED2),
        ("KVM_CREATE_GUEST_MEMFD", 0xC040AED4),
        ("KVM_CREATE_DEVICE", 0xC00CAEE0),
        ("KVM_GET_ONE_REG", 0x4010AEAB),
        ("KVM_RUN", 0xAE80),
    ],
)
def test_number_is_what_the_kernels_documentation_makes_it(name: str, number: int) -> None:
    assert getattr(ioctls, name) == number


def test_numbers_of_one_architecture_are_the_same_on_every_machine() -> None:
    assert x86_64_ioctls.KVM_SET_SREGS == 0x4138AE84
    assert aarch64_ioctls.KVM_ARM_VCPU_INIT == 0x4020AEAE
    assert aarch64_ioctls.KVM_ARM_PREFERRED_TARGET == 0x8020AEAF
    assert aarch64_ioctls.KVM_SET_GUEST_DEBUG == 0x4208AE9B
    assert x86_64_ioctls.KVM_SET_GUEST_DEBUG == 0x4048AE9B


KINDS = ("On /dev/kvm", "On a VM", "On a guest_memfd", "On a device", "On a vCPU", "Capabilities")


@pytest.mark.parametrize("table", [ioctls, x86_64_ioctls, aarch64_ioctls])
def test_table_is_in_number_order_within_each_kind(table: ModuleType) -> None:
    source = Path(str(table.__file__)).read_text()
    checked = 0
    for kind in KINDS:
        block = source.partition(f"# {kind}")[2].split("\n\n")[0]
        names = [line.split(" = ")[0] for line in block.splitlines() if line.startswith("KVM_")]
        numbers = [getattr(table, name) & 0xFF for name in names]
        if kind == "Capabilities":
            numbers = [getattr(table, name) for name in names]
        checked += len(numbers)

        assert numbers == sorted(numbers), kind
    assert checked


def test_every_exit_is_named_once() -> None:
    assert sorted(exits.EXIT_NAMES) == list(range(len(exits.EXIT_NAMES)))
    assert len(set(exits.EXIT_NAMES.values())) == len(exits.EXIT_NAMES)
    assert exits.EXIT_NAMES[exits.KVM_EXIT_X86_RDMSR] == "x86_rdmsr"
