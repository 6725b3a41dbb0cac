"""What a snapshot says of the machine and its memory, before KVM sees any of it."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.saved import mutations
from vmm.arch.aarch64.architecture import ARCHITECTURE as ARM
from vmm.arch.aarch64.platform import ArmPlatform
from vmm.arch.x86_64.architecture import ARCHITECTURE
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.core.saved import BadState, NotSaved
from vmm.machine.config import MachineConfig
from vmm.machine.restoring import Restoring
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.snapshot.folder import SnapshotFolder, packed

PAGE, MIB = 4096, 1 << 20
RAM = 16 * MIB
SHARED, PRIVATE = os.urandom(2 * PAGE), os.urandom(PAGE)


def piece(gpa: int, data: bytes) -> list[Any]:
    return [gpa, len(data), hashlib.sha256(data).hexdigest()]


def state() -> dict[str, Any]:
    """A machine with 16 MiB, of which the last is private."""
    return {
        "state": {
            "architecture": "x86_64",
            "memory_bytes": RAM,
            "cpus": 2,
            "scheme": "cbit",
            "private_memory": "memfd",
            "alias": 1 << 38,
            "doorbell": "hypercall",
            "device_names": [],
            "platform": {},
            "devices": {},
            "policies": [{"policy": "m:C", "state": {"n": 1}}],
        },
        "pages": [[0, RAM - MIB, "shared"], [RAM - MIB, MIB, "private"]],
        "memory": [piece(PAGE, SHARED)],
        "private": [piece(RAM - PAGE, PRIVATE)],
    }


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


class Folder:
    """A snapshot's folder, and memory that it goes to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        for name, data, gpa in (("memory", SHARED, PAGE), ("private", PRIVATE, RAM - PAGE)):
            with (path / name).open("wb") as file:
                file.truncate(RAM)
                os.pwrite(file.fileno(), data, gpa)

    def restored(self, what: Any, **options: Any) -> GuestMemory:
        """As Machine does it, up to memory's content; the caller closes it."""
        (self.path / "state").write_bytes(packed(what))
        folder = SnapshotFolder(str(self.path))
        memory: GuestMemory | None = None
        try:
            config = MachineConfig(restore=str(self.path), **options)
            config.validate(ARCHITECTURE)
            restoring = Restoring(folder, config, ARCHITECTURE)
            guest = restoring.guest(ARCHITECTURE)
            size = restoring.config.memory
            if size > 64 * MIB:
                raise BadState("large, and all right")
            ram = ARCHITECTURE.ram_ranges(size)
            private = MemfdBacking(size)
            memory = GuestMemory(ram, MemfdBacking(size), private, guest.private_ranges(ram))
            restoring.load(memory, 1 << 38)
            return memory
        except BaseException:
            if memory is not None:
                memory.close()
            raise
        finally:
            folder.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    yield Folder(tmp_path / "saved")


def test_memory_goes_to_its_side(folder: Folder) -> None:
    memory = folder.restored(state())

    assert memory.shared.pread(2 * PAGE, PAGE) == SHARED
    assert memory.private is not None and memory.private.pread(PAGE, RAM - PAGE) == PRIVATE
    assert memory.shared.resident_bytes() == 2 * PAGE
    assert memory.private.resident_bytes() == PAGE
    assert [(run, each.value) for run, each in memory.states()] == [
        (Range(0, RAM - MIB), "shared"),
        (Range(RAM - MIB, MIB), "private"),
    ]
    memory.close()


HOSTILE: dict[str, Callable[[Any], object]] = {
    "no cpus": lambda s: s["state"].update(cpus=0),
    "many cpus": lambda s: s["state"].update(cpus=65),
    "huge memory": lambda s: s["state"].update(memory_bytes=1 << 39),
    "odd memory": lambda s: s["state"].update(memory_bytes=RAM + 1),
    "more memory": lambda s: s["state"].update(memory_bytes=2 * RAM),
    "less memory": lambda s: s["state"].update(memory_bytes=RAM // 2),
    "other scheme": lambda s: s["state"].update(scheme="../x"),
    "a scheme of arm64": lambda s: s["state"].update(scheme="realm"),
    "own scheme": lambda s: s["state"].update(scheme="os:system"),
    "own backing": lambda s: s["state"].update(private_memory="os:system"),
    "other doorbell": lambda s: s["state"].update(doorbell="x\n\x1b[31m"),
    "another architecture": lambda s: s["state"].update(architecture="aarch64"),
    "another bit": lambda s: s["state"].update(alias=1 << 40),
    "device names": lambda s: s["state"].update(device_names=["\n"] * 2),
    "device names of another kind": lambda s: s["state"].update(device_names=[[]]),
    "a disk": lambda s: s["state"].update(device_names=["blk0"]),
    "no policies": lambda s: s["state"].pop("policies"),
    "many policies": lambda s: s["state"].update(policies=s["state"]["policies"] * 65),
    "a policy's huge state": lambda s: s["state"]["policies"][0].update(state="x" * (1 << 20)),
    "a policy's deep state": lambda s: s["state"]["policies"][0].update(state=nested(17)),
    "a policy's endless number": lambda s: s["state"]["policies"][0].update(state=1 << 64),
    "no pages": lambda s: s.update(pages=[]),
    "too few pages": lambda s: s["pages"].pop(),
    "pages with a hole": lambda s: s["pages"][1].__setitem__(0, RAM - MIB + PAGE),
    "pages that overlap": lambda s: s["pages"][0].__setitem__(1, RAM),
    "pages past the end": lambda s: s["pages"].append([RAM, PAGE, "shared"]),
    "pages of no size": lambda s: s["pages"].insert(0, [0, 0, "shared"]),
    "pages of another state": lambda s: s["pages"][0].__setitem__(2, "lent"),
    "bytes outside": lambda s: s["memory"].append(piece(RAM, b"")),
    "bytes of private pages": lambda s: s["memory"].append(piece(RAM - PAGE, bytes(PAGE))),
    "private bytes of shared pages": lambda s: s["private"].insert(0, piece(0, bytes(PAGE))),
    "bytes over the border": lambda s: s["memory"].append(piece(RAM - MIB - PAGE, bytes(2 * PAGE))),
    "bytes twice": lambda s: s["memory"].append(s["memory"][0]),
    "bytes out of order": lambda s: s["memory"].append(piece(0, bytes(PAGE))),
    "another checksum": lambda s: s["memory"][0].__setitem__(2, "00"),
    "no private bytes": lambda s: s.update(private=None),
    "private bytes of none": lambda s: s.update(pages=[[0, RAM, "shared"]]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_machine_that_there_can_t_be_is_refused(folder: Folder, name: str) -> None:
    changed = state()
    HOSTILE[name](changed)

    with pytest.raises(UsageError) as refusal:
        folder.restored(changed)

    assert str(folder.path) in str(refusal.value)
    assert refusal.value.exit_status == 2


def test_private_pages_without_private_memory_are_refused(folder: Folder) -> None:
    changed = state()
    changed["state"].update(private_memory=None, scheme="none", alias=0)

    with pytest.raises(BadState, match="it has private pages, and no private memory"):
        folder.restored(changed)


def test_whatever_is_wrong_in_one_place_is_refused_or_does_no_harm(folder: Folder) -> None:
    refused = 0
    for what, changed in mutations(state()):
        try:
            folder.restored(changed).close()
        except UsageError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
    assert refused > 300


NUMBERS = st.sampled_from([0, 1, PAGE, MIB, RAM - MIB, RAM, 1 << 38, (1 << 64) - 1, -PAGE])
ROW = st.tuples(NUMBERS, NUMBERS, st.sampled_from(["shared", "private", ""])).map(list)


@given(rows=st.lists(ROW, max_size=4))
@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_page_states_are_all_of_ram_or_refused(folder: Folder, rows: list[Any]) -> None:
    changed = copy.deepcopy(state())
    changed["pages"] = rows
    try:
        memory = folder.restored(changed)
    except UsageError:
        return
    assert sum(run.size for run, _ in memory.states()) == RAM
    memory.close()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "x"},
        {"private_memory": "auto"},
        {"iommu": True},
        {"devices": ("x:y",)},
        {"exit_handlers": ("x:y",)},
    ],
)
def test_option_that_says_what_the_snapshot_says_is_refused(
    folder: Folder, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="--restore"):
        folder.restored(state(), **options)


def test_arm64_is_refused_in_a_line() -> None:
    with pytest.raises(UsageError, match="--restore: only x86-64 guests"):
        MachineConfig(restore="saved").validate(ARM)
    with pytest.raises(UsageError, match="only x86-64 guests"):
        ARM.restored_guest(MachineConfig().guest_options(), "hypercall", [])
    platform = ArmPlatform.__new__(ArmPlatform)
    for refused in (platform.state, platform.core_vcpus):
        with pytest.raises(NotSaved, match="only x86-64 guests can be saved and dumped so far"):
            refused()
