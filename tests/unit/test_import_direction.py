"""The import rule: a room imports rooms to its left only, siblings never each other.

Imports inside functions count: a lazy import is still a dependency.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    {"core"},
    {"sandbox"},
    {"memory"},
    {"policy", "devices", "boot", "trace", "snapshot"},
    {"conversion"},
    {"exits"},
    {"wiring"},
    {"host"},
    {"arch"},
    {"arch.x86_64", "arch.aarch64"},
    {"control", "replay"},
    {"machine"},
    {"selftest", "library"},
    {"bench", "scenario"},
    {"sweeps"},
    {"cli"},
    {"examples"},  # programs of their own: nothing imports them
)
ARCHITECTURES = {"arch.x86_64", "arch.aarch64"}
ALIASES = {"__main__": "cli"}  # `python -m vmm` is the command
BINDINGS_USERS = {
    "sandbox", "conversion", "exits", "wiring", "host", "arch", "machine", "selftest", "bench",
    "cli",
}  # fmt: skip
# Of an architecture only what talks to KVM; the rest is encodings: data in, bytes and values out.
ARCHITECTURES_KVM = {
    "architecture", "platform", "board", "exits", "gic", "guest_cpu", "page_tables", "micro_guest",
    "probes", "capabilities", "debug", "vcpu_state",
}  # fmt: skip
FIRMWARE_USERS = {"arch.x86_64", "arch.aarch64", "machine", "bench", "cli", "lab"}


def level(room: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports; relative imports are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, node.module or ""]).strip(".") if node.level else node.module
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def room_of(dotted: str) -> str | None:
    """The room of `vmm.<room>...`, aliases resolved; None outside vmm (or vmm itself)."""
    parts = dotted.split(".")
    if parts[0] != "vmm" or len(parts) < 2:
        return None
    if parts[1] == "arch" and len(parts) > 2 and f"arch.{parts[2]}" in ARCHITECTURES:
        return f"arch.{parts[2]}"
    return ALIASES.get(parts[1], parts[1])


def objection(importer: str, name: str) -> str | None:
    """Why the module `importer` (dotted) may not import `name`, or None."""
    top = importer.partition(".")[0]
    target = name.partition(".")[0]
    if target == "tests":
        return "the program does not know its tests"
    if top in ("kvm_bindings", "firmware"):
        return f"{top} imports nothing of ours" if target == "vmm" else None
    room = room_of(importer)
    for architecture in ARCHITECTURES:
        bindings = f"kvm_bindings.{architecture.partition('.')[2]}"
        if f"{name}.".startswith(f"{bindings}.") and room != architecture:
            return f"{bindings} is vmm.{architecture}'s"
    if target == "kvm_bindings" and room in ARCHITECTURES:
        part = importer.split(".")[3]
        return None if part in ARCHITECTURES_KVM else f"vmm.{room}.{part} does not call KVM"
    if target == "kvm_bindings" and room not in BINDINGS_USERS:
        without_kvm = ("kvm_bindings.fdops", "kvm_bindings.datapath", "kvm_bindings.mapped")
        if room == "memory" and name.startswith(without_kvm):
            return None
        if room == "devices" and name.startswith("kvm_bindings.virtqueue"):
            return None
        return f"vmm.{room} does not call KVM"
    if name.startswith("kvm_bindings.floors") and room != "bench":
        return "floors are for measuring"
    if target == "firmware" and top == "vmm":
        return "firmware is in the tree alone; a wheel has vmm._firmware"
    if f"{name}.".startswith("vmm._firmware."):
        return None if room in FIRMWARE_USERS else f"vmm.{room} does not know the payloads"
    other = room_of(name)
    if room == "examples" and name.startswith("vmm.") and name[4].isupper():
        return None  # one of the public names
    if other is None or room is None or other == room:
        return None
    if other in ARCHITECTURES:
        return f"nobody imports vmm.{other} by name: see vmm.arch"
    if room == "lab":
        return None if other == "core" else "vmm.lab imports vmm.core only"
    if other == "lab":
        return None if room == "cli" else "only vmm.cli imports vmm.lab"
    if level(other) < level(room):
        return None
    side = "is a sibling of" if level(other) == level(room) else "lies right of"
    return f"vmm.{other} {side} vmm.{room}"


def violations(source: str, importer: str, package: str) -> list[str]:
    found = []
    for line, name in imported(ast.parse(source), package):
        # `from kvm_bindings import fdops` names the module as kvm_bindings.fdops here.
        why = objection(importer, name)
        if why is not None:
            found.append(f"{importer}:{line} imports {name}: {why}")
    return found


def modules() -> list[tuple[Path, str, str]]:
    """(file, dotted name, package that its relative imports start from) of the program."""
    found = []
    for top in ("vmm", "kvm_bindings", "firmware"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append((path, dotted, ".".join(parts[:-1])))
    return found


def test_imports_of_the_program_point_left() -> None:
    found = [
        violation
        for path, dotted, package in modules()
        for violation in violations(path.read_text(), dotted, package)
    ]

    assert found == []


def test_rooms_on_disk_are_all_ranked() -> None:
    rooms = {dotted.split(".")[1] for _, dotted, _ in modules() if dotted.startswith("vmm.")}

    ranked = set().union(*LAYERS) | {"lab", "__main__"}
    assert rooms <= ranked


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("vmm.core.ranges", "from vmm.memory.backing import Backing"),
        ("vmm.memory.backing", "import vmm.policy"),
        ("vmm.devices.bus", "from vmm.arch.x86_64 import layout"),
        ("vmm.arch.x86_64.cpuid", "from kvm_bindings import Vcpu"),
        ("vmm.arch.x86_64.cpuid", "from vmm.machine.config import MachineConfig"),
        ("vmm.machine.machine", "from vmm.arch.x86_64 import layout"),
        ("vmm.machine.machine", "from kvm_bindings.x86_64 import Vm"),
        ("vmm.arch.aarch64.fdt", "from kvm_bindings import Vcpu"),
        ("vmm.arch.aarch64.board", "from vmm.arch.x86_64 import layout"),
        ("vmm.arch.x86_64.board", "def late():\n    from vmm.arch.aarch64 import layout"),
        ("vmm.arch.x86_64.platform", "from kvm_bindings.aarch64 import Vm"),
        ("vmm.arch", "def late():\n    from vmm.arch.x86_64 import layout"),
        ("vmm.host.check", "from vmm.arch.protocol import Architecture"),
        ("vmm.policy.loader", "from vmm import devices"),
        ("vmm.policy.loader", "def late():\n    from vmm.trace import store"),
        ("vmm.conversion.scheme", "def late():\n    import vmm.machine.machine"),
        ("vmm.exits.handlers", "if True:\n    from ..machine import host"),
        ("vmm.memory.backing", "from kvm_bindings import System"),
        ("vmm.memory.backing", "import kvm_bindings"),
        ("vmm.memory.backing", "from kvm_bindings import floors"),
        ("vmm.memory.engines", "from kvm_bindings.floors import pread_ns"),
        ("vmm.devices.virtio.block", "from kvm_bindings import fdops"),
        ("vmm.devices.virtio.block", "from kvm_bindings import datapath"),
        ("vmm.memory.backing", "from kvm_bindings.virtqueue import Chains"),
        ("vmm.lab.machine", "from vmm.memory.backing import Backing"),
        ("vmm.machine.machine", "from vmm.lab import machine"),
        ("kvm_bindings.vm", "from vmm.core.errors import HostError"),
        ("vmm.boot.kernel", "from vmm._firmware import payload_path"),
        ("vmm.bench.processes", "import firmware"),
        ("vmm.core.ranges", "import tests.support"),
    ],
)
def test_violation_made_up_is_found(importer: str, source: str) -> None:
    package = importer.rpartition(".")[0]

    assert len(violations(source, importer, package)) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("vmm.memory.backing", "from kvm_bindings import fdops"),
        ("vmm.memory.backing", "from kvm_bindings.fdops import punch_hole"),
        ("vmm.memory.engines", "from kvm_bindings import datapath, fdops, mapped"),
        ("vmm.devices.virtio.queue", "from kvm_bindings.virtqueue import Chains"),
        ("vmm.conversion.scheme", "from kvm_bindings import Vm"),
        ("vmm.arch.x86_64.payload", "from vmm.boot.errors import ImageError"),
        ("vmm.arch.x86_64.exits", "from kvm_bindings import exits"),
        ("vmm.machine.machine", "from vmm.arch import architecture"),
        ("vmm.cli.main", "def late():\n    from vmm.lab.command import run"),
        ("vmm.devices.virtio.block", "from .queue import SplitQueue"),
        ("vmm.policy.loader", "import os, typing"),
    ],
)
def test_import_that_points_left_is_no_violation(importer: str, source: str) -> None:
    package = importer.rpartition(".")[0]

    assert violations(source, importer, package) == []
