"""Which scheme and backing are taken on hosts made up here, and what a refusal says."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from kvm_bindings import KvmError
from tests.support.fake_kvm import FakeKernel, FakeSystem, FakeVm
from tests.support.x86 import X86
from vmm.arch import architecture
from vmm.conversion import matrix
from vmm.conversion.making import make_backing, make_scheme
from vmm.core.errors import HostError
from vmm.core.ranges import PAGE_SIZE
from vmm.host.choice import Chosen, Wanted, available, choose
from vmm.memory.backings import guest_memfd

ARM64 = architecture("aarch64")
SIZE = 2 << 20
PAYLOAD = Wanted("auto", "auto", SIZE, two_addresses=False, host_loads=False)
LINUX = Wanted("auto", "auto", SIZE, two_addresses=True, host_loads=True)
CREATE = "KVM_CREATE_GUEST_MEMFD"


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def chosen(kernel: FakeKernel, wanted: Wanted) -> tuple[str, str, dict[str, str]]:
    with FakeSystem(kernel) as system:
        found: Chosen = choose(X86, system.as_system(), wanted)
        found.backing.close()
        return found.scheme, found.backing.name, found.not_taken


def refusal(kernel: FakeKernel, wanted: Wanted) -> str:
    with FakeSystem(kernel) as system, pytest.raises(HostError) as raised:
        choose(X86, system.as_system(), wanted)
    return str(raised.value)


# The in-place ioctl's effect on the host's own accesses is not modelled: these stand in for it.


class Keeping(guest_memfd.InPlaceGuestMemfdBacking):
    """Its pages are out of the host's reach while they are private."""

    def pread(self, size: int, offset: int) -> bytes:
        if self.guest_memfd.is_private(offset):  # type: ignore[attr-defined]  # the model's
            raise OSError(errno.EIO, "out of reach")
        return super().pread(size, offset)


def test_plain_host_gives_the_payload_a_guest_memfd_under_cbit_and_says_why() -> None:
    scheme, backing, not_taken = chosen(FakeKernel(), PAYLOAD)

    assert (scheme, backing) == ("cbit", "guest_memfd")
    assert list(not_taken) == ["attributes", "in-place"]
    assert "KVM_CREATE_VM(type=1) failed: EINVAL" in not_taken["attributes"]
    assert "CONFIG_KVM_SW_PROTECTED_VM" in not_taken["attributes"]
    assert "KVM_SET_MEMORY_ATTRIBUTES2" in not_taken["in-place"]


def test_host_with_attributes_gives_the_payload_those() -> None:
    assert chosen(FakeKernel.sw_protected(), PAYLOAD) == ("attributes", "guest_memfd-plain", {})


def test_host_with_in_place_conversion_gives_the_payload_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest_memfd, "InPlaceGuestMemfdBacking", Keeping)

    scheme, backing, not_taken = chosen(FakeKernel.with_in_place(), PAYLOAD)

    assert (scheme, backing) == ("in-place", "guest_memfd-in-place")
    assert "KVM_SET_MEMORY_ATTRIBUTES(" in not_taken["attributes"]
    assert "ENOTTY" in not_taken["attributes"]


def test_attribute_that_does_not_keep_the_host_out_is_no_in_place_conversion() -> None:
    scheme, _, not_taken = chosen(FakeKernel.with_in_place(), PAYLOAD)

    assert scheme == "cbit"
    assert "the page is in the host's reach afterwards" in not_taken["in-place"]


@pytest.mark.parametrize("kernel", [FakeKernel(), FakeKernel.sw_protected()])
def test_linux_gets_cbit_with_a_backing_that_the_host_can_fill(kernel: FakeKernel) -> None:
    scheme, backing, not_taken = chosen(kernel, LINUX)

    assert (scheme, backing) == ("cbit", "guest_memfd-mmap")
    assert set(not_taken) == {"attributes", "in-place"}
    assert all("address bit" in why for why in not_taken.values())


@pytest.mark.parametrize(("wanted", "tried"), [(PAYLOAD, 2), (LINUX, 1)])
def test_host_without_guest_memfd_gives_a_memfd(wanted: Wanted, tried: int) -> None:
    kernel = FakeKernel()
    kernel.inject(CREATE, errno.ENOTTY, times=100)

    assert chosen(kernel, wanted)[:2] == ("cbit", "memfd")
    assert kernel.calls[CREATE] == tried


@pytest.mark.parametrize("backing", ["memfd", "memfd-sealed", "guest_memfd-mmap"])
@pytest.mark.parametrize("scheme", ["cbit", "remap"])
def test_named_pair_is_taken(scheme: str, backing: str) -> None:
    wanted = PAYLOAD._replace(scheme=scheme, backing=backing)

    assert chosen(FakeKernel(), wanted) == (scheme, backing, {})


def test_named_backing_leaves_the_schemes_that_take_it() -> None:
    scheme, backing, not_taken = chosen(
        FakeKernel.sw_protected(), PAYLOAD._replace(backing="memfd")
    )

    assert (scheme, backing) == ("cbit", "memfd")
    assert not_taken["attributes"] == "does not take --private-mem=memfd"


@pytest.mark.parametrize("file_io", [False, True])
@pytest.mark.parametrize("name", ["guest_memfd-mmap", "guest_memfd-in-place"])
def test_guest_memfd_is_read_by_its_fd_where_the_kernel_has_that(name: str, file_io: bool) -> None:
    kernel = FakeKernel.with_in_place()
    kernel.file_io = file_io
    with FakeSystem(kernel) as system, system.create_vm(1) as vm:
        backing = make_backing(vm.as_vm(), name, SIZE)
        try:
            backing.pwrite(b"words", 7)
            found = backing.pread(5, 7)
        finally:
            backing.close()

    assert found == b"words"
    assert backing.name == name
    assert backing.access == ("pread/pwrite" if file_io else "/proc/self/mem")
    assert backing.traits.pread == backing.traits.splice == file_io


def test_memfd_asks_kvm_for_no_guest_memfd() -> None:
    kernel = FakeKernel()

    chosen(kernel, LINUX._replace(scheme="cbit", backing="memfd"))

    assert kernel.calls[CREATE] == 0


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            PAYLOAD._replace(scheme="attributes"),
            ["--scheme attributes --private-mem=auto: not on this host (attributes: KVM_CREATE_VM"],
        ),
        (
            PAYLOAD._replace(scheme="in-place"),
            ["in-place: KVM_CREATE_VM(type=1) failed: EINVAL", "--host experimental has"],
        ),
        (PAYLOAD._replace(backing="guest_memfd-plain"), ["--private-mem=guest_memfd-plain: not"]),
    ],
)
def test_what_the_host_lacks_is_refused_with_what_it_has(wanted: Wanted, says: list[str]) -> None:
    text = refusal(FakeKernel(), wanted)

    assert all(words in text for words in says), text
    assert (
        "what works here: cbit with guest_memfd, guest_memfd-mmap, memfd, memfd-sealed" in text
    ), text
    assert "remap with guest_memfd, " in text
    assert "\n" not in text


def test_refusal_of_a_kernel_names_what_works_for_kernels() -> None:
    kernel = FakeKernel()
    kernel.inject(CREATE, errno.ENOTTY, times=100)

    text = refusal(kernel, LINUX._replace(backing="guest_memfd-mmap"))

    assert text.endswith("what works here: cbit with memfd, memfd-sealed")
    assert "Linux 6.18 or later has it" in text


def arm64_host(
    monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel, wanted: Wanted, filter: int | None = None
) -> Chosen:
    """What is chosen on arm64 without pKVM, whose KVM refuses the filter with the errno."""

    def filter_smccc(vm: FakeVm, *_: int) -> None:
        if filter is not None:
            raise KvmError("KVM_SET_DEVICE_ATTR", filter, "SMCCC filter")

    monkeypatch.setattr(FakeVm, "filter_smccc", filter_smccc, raising=False)
    with FakeSystem(kernel) as system:
        found = choose(ARM64, system.as_system(), wanted)
        found.backing.close()
        return found


def test_arm64_host_without_pkvm_gives_every_guest_a_realm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wanted in (PAYLOAD, LINUX):
        found = arm64_host(monkeypatch, FakeKernel(), wanted)

        assert found.scheme == "realm"
        assert list(found.not_taken) == ["pkvm"]
        assert "kvm-arm.mode=protected" in found.not_taken["pkvm"]


def test_arm64_host_that_passes_no_calls_on_gives_the_payload_remap_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = arm64_host(monkeypatch, FakeKernel(), PAYLOAD, errno.ENXIO)

    assert found.scheme == "remap"
    assert list(found.not_taken) == ["pkvm", "realm"]
    assert "ENXIO" in found.not_taken["realm"] and "Linux 6.4" in found.not_taken["realm"]


def test_arm64_host_that_passes_no_calls_on_has_nothing_private_for_linux(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(HostError, match=r"realm: .*ENXIO.*; what works here: nothing"):
        arm64_host(monkeypatch, FakeKernel(), LINUX, errno.ENXIO)


def test_more_memory_than_the_address_bit_leaves_room_for_is_remapped() -> None:
    """The model's processor has 40 address bits: bit 38 picks the side."""
    scheme, _, not_taken = chosen(FakeKernel(), PAYLOAD._replace(size=(1 << 38) + SIZE))

    assert scheme == "remap"
    assert "the C-bit would be bit 38" in not_taken["cbit"]


def test_reason_that_several_schemes_share_is_said_once() -> None:
    kernel = FakeKernel()
    kernel.inject(CREATE, errno.ENOTTY, times=100)

    text = refusal(kernel, PAYLOAD._replace(backing="guest_memfd"))

    assert "not on this host (cbit, remap: KVM_CREATE_GUEST_MEMFD" in text
    assert text.count("Linux 6.18 or later has it") == 1


def test_memory_that_runs_out_is_an_error_of_its_own_and_no_reason_for_less() -> None:
    kernel = FakeKernel()
    kernel.inject(CREATE, errno.ENOMEM)

    with FakeSystem(kernel) as system, pytest.raises(HostError, match="ENOMEM"):
        choose(X86, system.as_system(), PAYLOAD)


def test_what_is_available_is_named_in_order_of_strength() -> None:
    with FakeSystem(FakeKernel.sw_protected()) as system:
        found = available(X86, system.as_system(), two_addresses=False, host_loads=False)

    assert list(found) == ["attributes", "cbit", "remap"]
    assert found["attributes"] == ["guest_memfd-plain"]


def test_every_scheme_can_be_made_and_knows_its_name() -> None:
    for name in matrix.SCHEMES:
        scheme = make_scheme(name, lambda: 38, nullcontext)

        assert scheme.name == name
        assert bool(scheme.alias | scheme.shared_alias) == (name in matrix.TWO_ADDRESSES)
        assert not (scheme.alias and scheme.shared_alias)
        assert scheme.told == (name != "pkvm")


def test_every_backing_of_the_matrix_says_so_itself() -> None:
    kernel = FakeKernel.with_in_place()
    with FakeSystem(kernel) as system:
        vm = system.create_vm(1).as_vm()
        for name, schemes in matrix.BACKINGS.items():
            if name == "memfd-hugetlb":
                continue  # tests/unit/memory has it, where the host has huge pages
            backing = make_backing(vm, name, 16 * PAGE_SIZE)

            assert backing.name == name
            assert backing.traits.in_place == (schemes in (("in-place",), ("pkvm",)))
            assert (name in matrix.LOADABLE) == (
                backing.access != "none" and name != "guest_memfd-in-place"
            )
            backing.close()
