"""What a run with back ends refuses, reports, and has done outside of its sandbox."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.back_end import BackEndDouble
from vmm.arch import architecture
from vmm.core.errors import OutputError, UsageError
from vmm.core.saved import NotSaved
from vmm.devices.vhost_user.file_system import VhostUserFs
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.rng import VirtioRng
from vmm.machine.back_ends import Spares, described, require_fitting, spare
from vmm.machine.config import MachineConfig
from vmm.machine.guest_vm import GuestVm
from vmm.machine.restoring import facts
from vmm.sandbox.outside import Outside

DISK = MachineConfig(disks=("a.img", "vhost-user=s"))
FS = MachineConfig(file_systems=("home,vhost-user=s",))


def vm(scheme: str = "cbit", *, told: bool = True, in_place: bool = False) -> GuestVm:
    memory = SimpleNamespace(
        told=told, in_place=in_place, shared=SimpleNamespace(name="guest_memfd-in-place")
    )
    return cast(GuestVm, SimpleNamespace(memory=memory, scheme=SimpleNamespace(name=scheme)))


def test_a_shared_side_of_its_own_is_fine() -> None:
    require_fitting(DISK, vm(), False)
    require_fitting(FS, vm("none"), False)


@pytest.mark.parametrize(
    ("config", "machine", "watched", "words"),
    [
        (DISK, vm("pkvm", told=False), False, "--disk vhost-user=s: under scheme pkvm"),
        (DISK, vm(in_place=True), False, "--disk vhost-user=s: guest_memfd-in-place has private"),
        (DISK, vm(), True, "--disk vhost-user=s: a policy asks about each access"),
        (FS, vm(in_place=True), False, "--fs home,vhost-user=s: guest_memfd-in-place"),
    ],
)
def test_what_a_back_end_cannot_be_given_is_refused_with_the_remedy(
    config: MachineConfig, machine: GuestVm, watched: bool, words: str
) -> None:
    with pytest.raises(UsageError) as told:
        require_fitting(config, machine, watched)

    assert str(told.value).startswith(words)
    assert "; use " in str(told.value)


def test_an_iommu_is_refused_beside_a_back_end() -> None:
    config = DISK._replace(iommu=True, kernel="vmlinuz")

    with pytest.raises(UsageError, match="behind an IOMMU devices use lent private pages"):
        config.validate(architecture("x86_64"))


def test_a_machine_with_back_ends_is_not_saved() -> None:
    with pytest.raises(NotSaved, match="what its back ends are at is theirs to know"):
        facts(DISK, vm(), "x86_64", own=False)


@pytest.mark.parametrize(
    ("config", "has"), [(DISK, True), (FS, True), (MachineConfig(disks=("a.img",)), False)]
)
def test_a_config_says_whether_there_are_back_ends(config: MachineConfig, has: bool) -> None:
    assert config.has_back_ends is has


@pytest.fixture
def device() -> Iterator[VhostUserFs]:
    double = BackEndDouble()
    made = VhostUserFs("fs0", "/the/socket", double.connect, b"home")
    yield made
    made.close()
    double.end()


def test_report_has_the_devices_that_back_ends_serve(device: VhostUserFs) -> None:
    devices: dict[str, VirtioDevice] = {"rng": VirtioRng(), "fs0": device}

    found: dict[str, Any] = {**described(devices)}

    assert list(found) == ["fs0"]
    assert found["fs0"]["socket"] == "/the/socket"


def test_devices_of_back_ends_get_their_successors_from_outside(device: VhostUserFs) -> None:
    made = spare({"rng": VirtioRng(), "fs0": device})

    assert len(made) == 1
    assert device.reconnect == made[0].take
    made[0].close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        yield made


def test_a_spare_is_connected_by_another_process_which_lets_go_of_it(
    tmp_path: Path, listener: socket.socket
) -> None:
    spares = Spares(str(tmp_path / "s"))
    outside = Outside([spares.connect], lambda: None, spares.fds)
    spares.through = lambda message: outside.do(0, message)

    ours = spares.take()

    theirs, _ = listener.accept()
    peer = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    assert int.from_bytes(peer[:4], "little") != os.getpid()
    theirs.send(b"hello")
    assert ours.recv(5) == b"hello"
    ours.close()
    assert theirs.recv(1) == b""  # the other process has it no more
    theirs.close()
    spares.close()
    outside.close()


def test_a_spare_that_finds_nobody_is_there_for_the_next_time(tmp_path: Path) -> None:
    spares = Spares(str(tmp_path / "none"))

    with pytest.raises(OutputError, match="No such file or directory"):
        spares.take()
    with pytest.raises(OutputError, match="No such file or directory"):
        spares.take()
    assert spares.fds
    spares.close()


def test_spares_come_to_an_end(tmp_path: Path) -> None:
    spares = Spares(str(tmp_path / "s"))
    spares.through = lambda message: None
    taken = [spares.take() for _ in range(Spares.MOST)]

    with pytest.raises(OutputError, match="16 back ends have been lost"):
        spares.take()
    for each in taken:
        each.close()
