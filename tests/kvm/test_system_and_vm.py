"""System and Vm on the real device: what they make, and the sentences they fail with."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from kvm_bindings import KvmError, fdops, ioctls
from kvm_bindings.exits import HltExit
from kvm_bindings.x86_64 import System, Vcpu
from tests.support.tiny_guest import TinyGuest

pytestmark = pytest.mark.kvm

PAGE = 4096


def test_system_answers_what_every_kvm_answers(kvm: System) -> None:
    assert kvm.api_version() == ioctls.KVM_API_VERSION
    assert kvm.vcpu_mmap_size() >= 2 * PAGE
    assert kvm.check_extension(ioctls.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(100_000) == 0
    assert {leaf[0] for leaf in kvm.supported_cpuid()} >= {0, 1, 0x8000_0000}


def test_system_on_something_that_is_no_kvm_says_so() -> None:
    with (
        System("/dev/null") as system,
        pytest.raises(KvmError, match=r"KVM_GET_API_VERSION\(\) failed: ENOTTY"),
    ):
        system.api_version()


def test_vm_type_that_does_not_exist_is_named(kvm: System) -> None:
    with pytest.raises(KvmError, match=r"KVM_CREATE_VM\(type=77\) failed: EINVAL"):
        kvm.create_vm(77)


def test_everything_made_is_closed_again(kvm: System) -> None:
    before = sorted(os.listdir("/proc/self/fd"))

    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_vcpu(0).close()
    vm.close()

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_vcpus_created_on_many_threads_at_once_are_all_there(kvm: System) -> None:
    made: list[Vcpu] = []
    start = threading.Barrier(8)
    with kvm.create_vm() as vm:
        vm.create_irqchip()

        def create(number: int) -> None:
            start.wait(30)
            vcpu = vm.create_vcpu(number)
            vcpu.update_sregs({})
            made.append(vcpu)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for vcpu in made:
            vcpu.close()

    assert sorted(vcpu.index for vcpu in made) == list(range(8))


def test_vcpu_whose_id_is_taken_is_an_error_with_the_id(kvm: System) -> None:
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(1)
        with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU\(1\) failed: EEXIST"):
            vm.create_vcpu(1)
        vcpu.close()


def test_register_value_that_kvm_refuses_is_an_error_that_names_the_register(kvm: System) -> None:
    refusal = pytest.raises(KvmError, match=r"KVM_SET_SREGS\(vcpu=0, cr4\) failed: EINVAL")
    with TinyGuest(kvm, b"\xf4") as guest, refusal:
        guest.vcpu.update_sregs({"cr4": 1 << 62})


def test_cpuid_of_the_host_can_be_given_to_a_vcpu(kvm: System) -> None:
    with TinyGuest(kvm, b"\xf4") as guest:
        guest.vcpu.set_cpuid2(kvm.supported_cpuid())

        with pytest.raises(KvmError, match=r"KVM_SET_CPUID2\(vcpu=0, nent=1000\) failed: E2BIG"):
            guest.vcpu.set_cpuid2([(0, 0, 0, 0, 0, 0, 0)] * 1000)


def test_write_to_an_ioeventfd_port_signals_and_does_not_exit(kvm: System) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    # out dx, ax (matches); inc ax; out dx, ax (another value); hlt
    with TinyGuest(kvm, b"\xef\x40\xef\xf4", rdx=0xC080, rax=0) as guest:
        guest.vm.ioeventfd(eventfd, 0xC080, 2, 0, port=True)

        first = guest.run()
        count = os.eventfd_read(eventfd)
        ended = guest.run()

    assert type(first).__name__ == "IoExit"
    assert getattr(first, "data", None) == b"\1\0"
    assert count == 1
    assert ended == HltExit()
    os.close(eventfd)


def test_ioeventfd_taken_away_exits_again(kvm: System) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    with TinyGuest(kvm, b"\xef\xf4", rdx=0xC080) as guest:
        guest.vm.ioeventfd(eventfd, 0xC080, 2, 0, port=True)
        guest.vm.ioeventfd(eventfd, 0xC080, 2, 0, port=True, deassign=True)

        assert type(guest.run()).__name__ == "IoExit"
    os.close(eventfd)


def test_irqfd_without_interrupt_controller_is_an_error_with_its_line(kvm: System) -> None:
    eventfd = os.eventfd(0)
    with kvm.create_vm() as vm, pytest.raises(KvmError, match=rf"eventfd={eventfd}, gsi=5"):
        vm.irqfd(eventfd, 5)
    os.close(eventfd)


@pytest.mark.parametrize(
    ("slot", "gpa", "size", "number"),
    [
        (1, 0x8000, PAGE, errno.EEXIST),
        (1, 0x20001, PAGE, errno.EINVAL),
        (1, 0x20000, 100, errno.EINVAL),
        (70_000, 0x20000, PAGE, errno.EINVAL),
    ],
)
def test_bad_memslot_is_an_error_with_all_its_numbers(
    kvm: System, slot: int, gpa: int, size: int, number: int
) -> None:
    with TinyGuest(kvm, b"\xf4") as guest, pytest.raises(KvmError) as raised:
        guest.vm.set_user_memory_region(slot, gpa, size, guest._hva)

    assert raised.value.errno == number
    assert f"slot={slot}, gpa={gpa:#x}, size={size:#x}" in str(raised.value)


@pytest.mark.parametrize("mmap", [0, ioctls.GUEST_MEMFD_FLAG_MMAP])
@pytest.mark.parametrize("init_shared", [0, ioctls.GUEST_MEMFD_FLAG_INIT_SHARED])
def test_guest_memfd_is_made_with_every_flag_on_offer(
    kvm: System, guest_memfd_flags: int, mmap: int, init_shared: int
) -> None:
    flags = (mmap | init_shared) & guest_memfd_flags
    with kvm.create_vm() as vm:
        made = vm.create_guest_memfd(16 * PAGE, flags)

        assert (made.size, made.flags) == (16 * PAGE, flags)
        assert os.fstat(made.fd).st_size == 16 * PAGE
        assert os.get_inheritable(made.fd) is False, "a child must not get the guest's memory"
        if mmap:
            fdops.unmap(fdops.map_shared(made.fd, 16 * PAGE), 16 * PAGE)
        else:
            with pytest.raises(KvmError, match=r"mmap\(.*ENODEV"):
                fdops.map_shared(made.fd, 16 * PAGE)
        made.close()
        made.close()


@pytest.mark.parametrize(("size", "flags"), [(16 * PAGE, 1 << 40), (0, 0), (100, 0), (1 << 63, 0)])
def test_guest_memfd_that_cannot_be_made_is_an_error_with_size_and_flags(
    kvm: System, guest_memfd_flags: int, size: int, flags: int
) -> None:
    with kvm.create_vm() as vm, pytest.raises(KvmError) as raised:
        vm.create_guest_memfd(size, flags)

    assert raised.value.errno == errno.EINVAL
    assert f"KVM_CREATE_GUEST_MEMFD(size={size:#x}, flags={flags:#x})" in str(raised.value)


def test_guest_memfd_bound_twice_is_refused_by_name(kvm: System, guest_memfd_flags: int) -> None:
    with kvm.create_vm() as vm:
        made = vm.create_guest_memfd(16 * PAGE, ioctls.GUEST_MEMFD_FLAG_MMAP)
        hva = fdops.map_shared(made.fd, 16 * PAGE)
        vm.set_user_memory_region2(0, 0, 16 * PAGE, hva, made.fd, 0)

        with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION2\(.*(EINVAL|EEXIST)"):
            vm.set_user_memory_region2(1, 1 << 30, 16 * PAGE, hva, made.fd, 0)
        fdops.unmap(hva, 16 * PAGE)
        made.close()


def test_memory_attributes_where_there_are_none_point_at_the_other_scheme(kvm: System) -> None:
    with kvm.create_vm() as vm:
        if vm.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES):
            pytest.skip("KVM_CAP_MEMORY_ATTRIBUTES is there on a default VM")

        with pytest.raises(KvmError) as raised:
            vm.set_memory_attributes(0x10_0000, 0x2000, ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE)

    text = str(raised.value)
    assert text.startswith("KVM_SET_MEMORY_ATTRIBUTES(gpa=0x100000, size=0x2000, attributes=0x8)")
    assert "KVM_CAP_MEMORY_ATTRIBUTES = 0x0" in text
    assert text.endswith("use --scheme cbit")
