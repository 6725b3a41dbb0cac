"""What may be the user's own in a machine, and what is said of what may not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from kvm_bindings import exits as kvm_exits
from vmm.core import own_code
from vmm.core.errors import PrivateAccess, UsageError
from vmm.core.own_code import ExtensionError, called
from vmm.devices.own import PciDevice, PortDevice
from vmm.devices.virtio.own import VirtioDevice
from vmm.examples.costly_scheme import Costly
from vmm.examples.ram_disk import RamDisk
from vmm.exits.own import ExitHandler, with_own
from vmm.machine.config import MachineConfig
from vmm.machine.extensions import Extensions


def made(base: type[Any], **body: Any) -> Any:
    return type("Mine", (base,), body)()


class NoInit(RamDisk):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (object(), "is no device: derive it from vmm.PortDevice"),
        (RamDisk, "is no device"),
        (made(PortDevice), "Mine.ports is None; use a range"),
        (made(PortDevice, ports=0x510), "Mine.ports is 1296; use a range"),
        (made(PortDevice, ports=range(0, 8, 2)), "use a range"),
        (made(PortDevice, ports=range(0xFFFF, 0x1_0001)), "Mine.ports end at 0x10000; the last"),
        (made(PciDevice, bar_size=0x200), "Mine.bar_size is 512; use a power of two from 4 to 256"),
        (made(PciDevice, bar_size=3), "Mine.bar_size is 3"),
        (made(RamDisk, device_id=0), "Mine.device_id is 0; use 1 to 63"),
        (made(RamDisk, queue_sizes=(3,)), r"Mine.queue_sizes are \[3\]; use powers of two"),
        (made(RamDisk, queue_sizes=()), r"Mine.queue_sizes are \[\]"),
        (NoInit(), "NoInit.__init__ has to call super"),
    ],
)
def test_device_that_cannot_be_one_is_refused(device: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Extensions([device])


def made_handler() -> ExitHandler:
    class Empty(ExitHandler):
        hypercalls = (12,)

    return Empty()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exits": [object()]}, "not an instance of a subclass of vmm.ExitHandler"),
        ({"exits": [ExitHandler()]}, "ExitHandler handles nothing"),
        ({"exits": [made_handler()]}, r"Empty has no handle\(vcpu, exit\); write one"),
        ({"scheme": type("Mine", (), {})}, "scheme Mine.like is None; name the scheme whose VM"),
        ({"scheme": type("Mine", (Costly,), {"like": "pkvm"})}, "Mine.like is 'pkvm'"),
        ({"backing": type("Mine", (), {"like": "ram"})}, "backing Mine.like is 'ram'"),
    ],
)
def test_other_code_that_cannot_be_one_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Extensions(**given)


def test_devices_have_names_of_their_classes_and_numbers() -> None:
    class Knock(PortDevice):
        ports = range(0x510, 0x511)

    own = Extensions([Knock(), Knock(), PciDevice(), Knock()])

    assert list(own.plain) == ["knock", "knock1", "pcidevice", "knock2"]
    assert own.functions == ["pcidevice"]


def test_two_devices_of_one_given_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two devices are named blk-ram"):
        Extensions([RamDisk(), RamDisk()])


def test_name_of_pyvmms_own_device_is_refused() -> None:
    own = Extensions([made(RamDisk, name="rng")])

    with pytest.raises(UsageError, match="a device of pyvmm's is named rng"):
        own.join({"rng": RamDisk()}, MachineConfig(), ExitStack())


def test_pci_function_behind_an_iommu_is_refused() -> None:
    with pytest.raises(UsageError, match="the virtual IOMMU translates for no PciDevice"):
        Extensions([PciDevice()]).join({}, MachineConfig(iommu=True), ExitStack())


def test_devices_are_closed_by_their_owner() -> None:
    closed: list[str] = []

    class Closing(PciDevice):
        def close(self) -> None:
            closed.append("closed")

    with ExitStack() as owner:
        Extensions([Closing()]).join({}, MachineConfig(), owner)
        assert not closed

    assert closed == ["closed"]


def test_configuration_has_our_names_for_the_users_own() -> None:
    own = Extensions(scheme=Costly, backing=type("Mine", (), {}))

    config = own.as_ours(MachineConfig(private_memory="auto"))

    assert (config.scheme, config.private_memory) == ("cbit", "memfd")


def test_virtio_device_guards_what_the_user_overrides_alone() -> None:
    class Mine(RamDisk):
        def config(self) -> bytes:
            raise LookupError("mine")

    device = Mine()
    Extensions([device])

    with pytest.raises(ExtensionError, match=r"Mine: config raised LookupError\('mine'\)"):
        device.config()
    assert device.process.__func__ is VirtioDevice.process  # type: ignore[attr-defined]


# -- who is called --------------------------------------------------------------------------------


def test_errors_of_pyvmms_own_and_those_that_are_answers_pass() -> None:
    def refuse() -> None:
        raise PrivateAccess("no")

    def fail() -> None:
        raise OSError(28, "full")

    with pytest.raises(PrivateAccess):
        called(object(), "x", refuse)
    with pytest.raises(OSError, match="full"):
        called(object(), "x", fail, passing=OSError)
    with pytest.raises(ExtensionError, match=r"object: x raised OSError\(28, 'full'\)"):
        called(object(), "x", fail)


def test_thread_is_known_to_be_in_the_users_code_also_by_nested_calls() -> None:
    inside: list[object] = []

    def inner() -> None:
        inside.append(own_code.waiting_for())

    def outer() -> None:
        called(1, "inner", inner)
        inside.append((own_code.waiting_for(), own_code.is_this_thread_in_one()))

    called("", "outer", outer)

    assert inside == ["int: inner", ("str: outer", True)]
    assert (own_code.waiting_for(), own_code.is_this_thread_in_one()) == (None, False)


# -- exits ----------------------------------------------------------------------------------------


class Answering(ExitHandler):
    exits: Sequence[type[Any]] = (kvm_exits.HltExit,)

    def __init__(self, answer: object, seen: list[object]) -> None:
        self.answer = answer
        self.seen = seen

    def handle(self, vcpu: Any, exit: Any) -> bool:
        self.seen.append(self.answer)
        return self.answer  # type: ignore[return-value]


def test_first_handler_that_is_done_ends_the_matter() -> None:
    seen: list[object] = []
    ours = {kvm_exits.HltExit: ("hlt", lambda vcpu, exit: seen.append("ours"))}
    handlers = [Answering(False, seen), Answering(True, seen), Answering(True, seen)]

    table = with_own(ours, handlers)
    table[kvm_exits.HltExit][1](None, None)

    assert seen == [False, True]
    assert table[kvm_exits.HltExit][0] == "hlt"


def test_exit_that_nobody_handles_ends_the_run() -> None:
    table = with_own({}, [Answering(False, [])])

    with pytest.raises(ExtensionError, match="pyvmm has no handler for HltExit"):
        table[kvm_exits.HltExit][1](None, None)


@pytest.mark.parametrize(("number", "who"), [(99, "mine"), (12, "ours")])
def test_hypercall_goes_to_the_handler_of_its_number(number: int, who: str) -> None:
    seen: list[object] = []

    class Mine(Answering):
        exits = ()
        hypercalls = (99,)

    ours = {kvm_exits.HypercallExit: ("hypercall", lambda vcpu, exit: seen.append("ours"))}

    class Exit:
        pass

    exit = Exit()
    exit.number = number  # type: ignore[attr-defined]
    mine = Mine(True, seen)
    with_own(ours, [mine])[kvm_exits.HypercallExit][1](None, exit)

    assert seen == [True if who == "mine" else "ours"]
