"""Exits of tiny real-mode guests on the real device."""

from __future__ import annotations

import errno
import signal
import threading

import pytest

from kvm_bindings import KvmError, fdops, ioctls
from kvm_bindings.exits import HltExit, InterruptedExit, IoExit, MmioExit, ShutdownExit
from kvm_bindings.x86_64 import System
from tests.support.tiny_guest import CODE, TinyGuest
from vmm.exits.run_loop import KICK_SIGNAL

pytestmark = pytest.mark.kvm

HLT = b"\xf4"
OUT_DX_AL, OUT_DX_AX, OUT_DX_EAX = b"\xee", b"\xef", b"\x66\xef"
IN_AL_DX, IN_AX_DX, IN_EAX_DX = b"\xec", b"\xed", b"\x66\xed"
REP_OUTSB, REP_INSB, REP_OUTSW = b"\xf3\x6e", b"\xf3\x6c", b"\xf3\x6f"
STORE_EAX_AT_BX = b"\x66\x89\x07"  # mov [bx], eax
COUNT_FOR_EVER = b"\x66\xff\x07\xeb\xfb"  # inc dword [bx]; jmp back


@pytest.mark.parametrize(("instruction", "size"), [(OUT_DX_AL, 1), (OUT_DX_AX, 2), (OUT_DX_EAX, 4)])
def test_out_exits_with_port_size_and_data(kvm: System, instruction: bytes, size: int) -> None:
    with TinyGuest(kvm, instruction + HLT, rdx=0x3F8, rax=0x4433_2211) as guest:
        exits = [guest.run(), guest.run()]

    assert exits == [IoExit(0x3F8, size, 1, True, b"\x11\x22\x33\x44"[:size]), HltExit()]


@pytest.mark.parametrize(("instruction", "size"), [(IN_AL_DX, 1), (IN_AX_DX, 2), (IN_EAX_DX, 4)])
def test_in_gives_the_guest_the_answer(kvm: System, instruction: bytes, size: int) -> None:
    code = instruction + STORE_EAX_AT_BX + HLT
    with TinyGuest(kvm, code, rdx=0xCFC, rbx=0x2000) as guest:
        asked = guest.run()
        guest.vcpu.answer_io(b"\xaa\xbb\xcc\xdd"[:size])
        ended = guest.run()
        seen = guest.pread(4, 0x2000)

    assert asked == IoExit(0xCFC, size, 1, False, b"")
    assert ended == HltExit()
    assert seen == b"\xaa\xbb\xcc\xdd"[:size].ljust(4, b"\0")


@pytest.mark.parametrize(("instruction", "size"), [(REP_OUTSB, 1), (REP_OUTSW, 2)])
def test_string_output_arrives_whole_and_in_order(
    kvm: System, instruction: bytes, size: int
) -> None:
    text = bytes(range(256)) * size
    arrived = b""
    with TinyGuest(kvm, instruction + HLT, rdx=0x3F8, rsi=0x2000, rcx=256) as guest:
        guest.pwrite(text, 0x2000)
        while isinstance(exit := guest.run(), IoExit):
            assert (exit.port, exit.size, exit.is_write) == (0x3F8, size, True)
            assert len(exit.data) == exit.size * exit.times
            arrived += exit.data

    assert exit == HltExit()
    assert arrived == text


def test_string_input_takes_answers_of_many_at_once(kvm: System) -> None:
    text = bytes(range(1, 201))
    given, counts = 0, []
    with TinyGuest(kvm, REP_INSB + HLT, rdx=0x3F8, rdi=0x2000, rcx=200) as guest:
        while isinstance(exit := guest.run(), IoExit):
            assert (exit.port, exit.size, exit.is_write) == (0x3F8, 1, False)
            guest.vcpu.answer_io(text[given : given + exit.times])
            given += exit.times
            counts.append(exit.times)
        seen = guest.pread(201, 0x2000)

    assert exit == HltExit()
    assert seen == text + b"\0"
    assert max(counts) > 1, "KVM is expected to batch rep ins; without that count is untested"


def test_memory_beyond_the_slots_is_mmio_both_ways(kvm: System) -> None:
    # mov ax, 0x2000; mov ds, ax; mov eax, [4]; mov [8], eax; hlt
    code = b"\xb8\x00\x20\x8e\xd8\x66\xa1\x04\x00\x66\xa3\x08\x00" + HLT
    with TinyGuest(kvm, code) as guest:
        read = guest.run()
        guest.vcpu.answer_mmio(b"\x78\x56\x34\x12")
        written = guest.run()
        ended = guest.run()

    assert read == MmioExit(0x20004, 4, False, b"")
    assert written == MmioExit(0x20008, 4, True, b"\x78\x56\x34\x12")
    assert ended == HltExit()


def test_triple_fault_is_a_shutdown(kvm: System) -> None:
    flat = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "s": 1, "db": 1, "g": 1}
    code, data = flat | {"selector": 8, "type": 11}, flat | {"selector": 16, "type": 3}
    with TinyGuest(kvm, b"\x0f\x0b") as guest:  # ud2 in protected mode, with no interrupt table
        guest.vcpu.update_sregs(
            {"cs": code, "ds": data, "ss": data, "cr0": 0x11, "idt": {"base": 0, "limit": 0}}
        )

        assert guest.run() == ShutdownExit()


def test_guest_and_host_see_the_same_memory(kvm: System) -> None:
    # mov al, [0x2000]; inc al; mov [0x2001], al; hlt
    with TinyGuest(kvm, b"\xa0\x00\x20\xfe\xc0\xa2\x01\x20" + HLT) as guest:
        guest.pwrite(b"\x41", 0x2000)
        ended = guest.run()

        assert ended == HltExit()
        assert guest.pread(3, 0x2000) == b"\x41\x42\x00"


def test_immediate_exit_keeps_the_guest_out(kvm: System) -> None:
    with TinyGuest(kvm, STORE_EAX_AT_BX + HLT, rax=1, rbx=0x2000) as guest:
        guest.vcpu.immediate_exit = True
        kept_out = guest.run()
        untouched = guest.pread(4, 0x2000)
        guest.vcpu.immediate_exit = False

        assert kept_out == InterruptedExit(errno.EINTR)
        assert untouched == bytes(4)
        assert guest.run() == HltExit()


def test_kick_gets_a_spinning_guest_out_and_it_can_go_on(kvm: System) -> None:
    with TinyGuest(kvm, COUNT_FOR_EVER, rbx=0x2000) as guest:
        runner = threading.get_ident()
        over = threading.Event()
        counted: list[bytes] = []

        def kick() -> None:
            before = guest.pread(4, 0x2000)
            while (now := guest.pread(4, 0x2000)) == before:
                if over.is_set():
                    return
            counted.append(now)
            signal.pthread_kill(runner, KICK_SIGNAL)

        for _ in range(2):
            kicker = threading.Thread(target=kick)
            kicker.start()
            exit = guest.run()
            over.set()
            kicker.join(30)
            over.clear()
            assert exit == InterruptedExit(errno.EINTR)
            assert guest.vcpu.immediate_exit is False, "the kick was enough, not the watchdog"

        assert counted[0] != counted[1]


def test_registers_come_back_as_they_were_set(kvm: System) -> None:
    with TinyGuest(kvm, HLT) as guest:
        names = guest.vcpu.get_regs().keys()
        values = {name: 0x100 + number for number, name in enumerate(names)}
        values |= {"rip": CODE, "rflags": 2, "r15": (1 << 64) - 1}

        guest.vcpu.set_regs(values)

        assert guest.vcpu.get_regs() == values


def test_run_on_many_vcpus_made_at_once_on_many_threads(kvm: System) -> None:
    """cffi realises types at first use; that several threads do it at once must not matter."""
    start = threading.Barrier(8)
    exits: list[object] = []

    def live() -> None:
        start.wait(30)
        with TinyGuest(kvm, OUT_DX_AL + HLT, rdx=0x3F8) as guest:
            exits.extend([guest.run(), guest.run()])

    threads = [threading.Thread(target=live) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert exits.count(HltExit()) == exits.count(IoExit(0x3F8, 1, 1, True, b"\0")) == 8


def test_pre_fault_brings_the_pages_into_being(kvm: System) -> None:
    with TinyGuest(kvm, HLT) as guest:
        if not guest.vm.check_extension(ioctls.KVM_CAP_PRE_FAULT_MEMORY):
            pytest.skip("KVM_CAP_PRE_FAULT_MEMORY = 0; Linux 6.11 or later has it")
        before = fdops.cached_pages(guest.memfd)
        try:
            guest.vcpu.pre_fault_memory(0x4000, 0x3000)
        except KvmError as error:
            pytest.skip(f"{error}; needs two-dimensional paging")

        assert fdops.cached_pages(guest.memfd) == before + 3
        assert guest.run() == HltExit()


def test_guest_with_a_kvmclock_is_told_that_it_was_stopped(kvm: System) -> None:
    kvmclock, clock_at, guest_stopped = 0x4B56_4D01, 0x3000, 1 << 1
    with TinyGuest(kvm, HLT) as guest:
        guest.vcpu.set_cpuid2(kvm.supported_cpuid())
        assert not guest.vcpu.kvmclock_ctrl()

        guest.vcpu.set_msrs({kvmclock: clock_at | 1})

        assert guest.vcpu.kvmclock_ctrl()
        guest.run()
        flags = guest.pread(1, clock_at + 29)[0]  # struct pvclock_vcpu_time_info, msr.rst
        assert flags & guest_stopped
