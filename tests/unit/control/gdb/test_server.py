"""A debugger's connection: what it gets, and what a hostile or absent-minded one can do."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings.exits import DebugExit
from tests.support.gdb_client import framed
from tests.unit.control.gdb.rig import (
    PRIVATE_START,
    STEPPED,
    VIRTUAL,
    Debugged,
    broken_at,
    hit,
)
from vmm.arch.debug import Hardware, Watch
from vmm.control.gdb.packets import LONGEST
from vmm.control.gdb.server import GdbServer
from vmm.core.errors import UsageError

Make = Callable[..., Debugged]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Debugged] = []

    def start(vcpus: int = 1, **access: Any) -> Debugged:
        made.append(Debugged(tmp_path / "gdb", vcpus, **access))
        return made[-1]

    yield start
    for each in made:
        each.end()
        for client in each.clients:
            client.close()


def at(gpa: int) -> bytes:
    return b"%x" % (VIRTUAL + gpa)


# -- standing still and going on ------------------------------------------------------------------


def test_guest_stands_still_until_a_debugger_has_it_go_on(make: Make) -> None:
    debugged = make(2)
    client = debugged.client()

    assert client.ask(b"?") == b"T05thread:1;"
    assert not any(vcpu.idle.is_set() for vcpu in debugged.vcpus)
    client.send(b"vCont;c")

    assert all(vcpu.idle.wait(10) for vcpu in debugged.vcpus)


def test_interrupt_stops_all_vcpus(make: Make) -> None:
    debugged = make(2)
    client = debugged.client()
    client.send(b"c")
    assert all(vcpu.idle.wait(10) for vcpu in debugged.vcpus)

    client.raw(b"\x03")

    assert client.reply() == b"T02thread:1;"
    assert debugged.group.frozen
    assert not any(runner.in_guest for runner in debugged.group.runners)


def test_packet_while_the_guest_runs_is_refused(make: Make) -> None:
    client = make().client()
    client.send(b"c")

    assert client.ask(b"g").startswith(b"E.")


def test_step_runs_one_vcpu_and_leaves_the_others(make: Make) -> None:
    debugged = make(2)
    client = debugged.client()
    debugged.vcpus[1].then(STEPPED)

    assert client.ask(b"vCont;s:2") == b"T05thread:2;"

    assert (1, True) in [armed[:2] for armed in debugged.debug.armed]
    assert not debugged.vcpus[0].idle.is_set()


@pytest.mark.parametrize(
    ("address", "size", "seen"),
    [
        (VIRTUAL + 0x1001, 2, b"bc"),
        (VIRTUAL + 0x1FFE, 4, b"yz"),
        (VIRTUAL + PRIVATE_START, 4, b""),
        (0x1000, 4, b""),
    ],
)
def test_step_may_look_at_its_instruction_as_the_guest_would(
    make: Make, address: int, size: int, seen: bytes
) -> None:
    debugged = make()
    debugged.memory.pwrite(b"abcd", 0x1000)
    debugged.memory.pwrite(b"yz", 0x1FFE)
    debugged.debug.peeks = address, size
    client = debugged.client()
    assert client.ask(b"Z0," + at(0x1001) + b",1") == b"OK"
    assert client.ask(b"Qqemu.PhyMemMode:1") == b"OK"
    debugged.vcpus[0].then(STEPPED)

    assert client.ask(b"s") == b"T05thread:1;"

    assert debugged.debug.peeked == seen


def test_step_with_the_others_going_on_runs_them(make: Make) -> None:
    debugged = make(2)
    client = debugged.client()
    debugged.vcpus[1].then(lambda: STEPPED if debugged.vcpus[0].idle.wait(10) else broken_at(0))

    assert client.ask(b"vCont;s:2;c") == b"T05thread:2;"

    assert debugged.vcpus[0].idle.is_set()


def test_step_that_kvm_does_not_make_is_refused_and_the_guest_stays(make: Make) -> None:
    debugged = make()
    debugged.debug.abilities = debugged.debug.abilities._replace(user_steps=False)
    debugged.debug.user_mode = True
    client = debugged.client()

    assert b"single step" in client.ask(b"vCont;s:1")
    assert client.ask(b"?") == b"T05thread:1;"


def test_detach_leaves_the_guest_running_without_breakpoints(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    assert client.ask(b"Z0," + at(0x1000) + b",1") == b"OK"
    assert debugged.memory.pread(1, 0x1000) == b"\xcc"

    assert client.ask(b"D") == b"OK"

    assert client.byte() == b""
    assert debugged.vcpus[0].idle.wait(10)
    assert debugged.memory.pread(1, 0x1000) == b"\0"


def test_debugger_that_hangs_up_is_as_one_that_detaches(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    assert client.ask(b"Z1,1000,1") == b"OK"

    client.close()

    assert debugged.vcpus[0].idle.wait(10)
    assert debugged.debug.armed[-1] == (0, False, False, (None, None))


def leave_a_breakpoint(debugged: Debugged, leaves: str) -> None:
    """The debugger leaves while KVM takes nothing back."""
    client = debugged.client()
    client.ask(b"Z1,1000,1")
    debugged.vcpus[0].then(STEPPED)
    assert client.ask(b"vCont;s:1") == b"T05thread:1;"
    debugged.debug.refuses = True
    if leaves == "detaches":
        assert client.ask(b"D") == b"OK"
    else:
        client.close()
    assert debugged.vcpus[0].idle.wait(10)
    debugged.debug.refuses = False


@pytest.mark.parametrize("leaves", ["detaches", "hangs up"])
def test_breakpoint_that_kvm_does_not_take_back_is_told(
    make: Make, leaves: str, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_a_breakpoint(make(), leaves)

    assert capsys.readouterr().err == (
        "pyvmm: --gdb: KVM_SET_GUEST_DEBUG() failed: EINVAL (Invalid argument); a breakpoint stays "
        "until vCPU 0 meets it\n"
    )


@pytest.mark.parametrize("met", [hit(0), STEPPED], ids=["breakpoint", "step"])
@pytest.mark.parametrize("leaves", ["detaches", "hangs up"])
def test_breakpoint_that_was_left_behind_holds_nobody_when_it_is_met(
    make: Make, leaves: str, met: DebugExit
) -> None:
    debugged = make()
    leave_a_breakpoint(debugged, leaves)

    debugged.target.on_debug_exit(debugged.vcpus[0], met)

    assert debugged.debug.armed[-1] == (0, False, False, (None, None))
    assert not debugged.group.frozen
    assert debugged.debug.passed_on == [], "the guest has never had it"


def test_debug_exit_after_the_one_that_was_left_behind_is_the_guests_own(make: Make) -> None:
    debugged = make()
    leave_a_breakpoint(debugged, "detaches")
    debugged.target.on_debug_exit(debugged.vcpus[0], hit(0))

    debugged.target.on_debug_exit(debugged.vcpus[0], hit(0))

    assert len(debugged.debug.passed_on) == 1


def test_connection_that_says_nothing_starts_and_stops_nothing(make: Make) -> None:
    debugged = make()
    debugged.client().close()
    client = debugged.client()

    assert client.ask(b"?") == b"T05thread:1;"
    assert debugged.target.attached == 1


def test_debugger_that_comes_back_finds_the_guest_stopped_for_it(make: Make) -> None:
    debugged = make()
    first = debugged.client()
    assert first.ask(b"D") == b"OK"
    assert debugged.vcpus[0].idle.wait(10)

    again = debugged.client()

    assert again.ask(b"?").startswith(b"T05")
    assert debugged.group.frozen


def test_second_debugger_is_hung_up_on(make: Make) -> None:
    debugged = make()
    first = debugged.client()
    assert first.ask(b"?")

    assert debugged.client().byte() == b""
    assert first.ask(b"qC") == b"QC1"


def test_kill_ends_the_run(make: Make) -> None:
    debugged = make()

    assert debugged.client().ask(b"vKill;1") == b"OK"

    assert len(debugged.quits) == 1


def test_end_of_the_guest_is_told_with_its_status(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    client.send(b"c")
    assert debugged.vcpus[0].idle.wait(10)

    debugged.end(status=1)

    assert client.reply() == b"W01"


# -- breakpoints ----------------------------------------------------------------------------------


def test_breakpoint_of_the_debuggers_stops_the_guest(make: Make) -> None:
    debugged = make(2)
    client = debugged.client()
    assert client.ask(b"Z0," + at(0x1000) + b",1") == b"OK"
    debugged.vcpus[1].then(broken_at(VIRTUAL + 0x1000))

    assert client.ask(b"c") == b"T05thread:2;swbreak:;"

    assert client.ask(b"qC") == b"QC2"


def test_breakpoint_instruction_of_the_guests_own_goes_to_the_guest(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    assert client.ask(b"Z0," + at(0x1000) + b",1") == b"OK"
    debugged.vcpus[0].then(broken_at(VIRTUAL + 0x3000))

    client.send(b"c")

    assert debugged.vcpus[0].idle.wait(10)
    assert debugged.debug.passed_on == [(0, broken_at(VIRTUAL + 0x3000))]


def test_breakpoint_does_not_show_in_memory_and_survives_a_write(make: Make) -> None:
    debugged = make()
    debugged.memory.pwrite(b"abc", 0x1000)
    client = debugged.client()
    assert client.ask(b"Z0," + at(0x1001) + b",1") == b"OK"

    assert client.ask(b"m" + at(0x1000) + b",3") == b"abc".hex().encode()
    assert client.ask(b"M" + at(0x1000) + b",3:585a59") == b"OK"
    assert debugged.memory.pread(3, 0x1000) == b"X\xccY"
    assert client.ask(b"z0," + at(0x1001) + b",1") == b"OK"

    assert debugged.memory.pread(3, 0x1000) == b"XZY"


def test_breakpoint_in_private_code_takes_a_hardware_breakpoint(make: Make) -> None:
    debugged = make()
    client = debugged.client()

    assert client.ask(b"Z0," + at(PRIVATE_START) + b",1") == b"OK"
    debugged.vcpus[0].then(hit(0))

    assert client.ask(b"c") == b"T05thread:1;swbreak:;"
    assert debugged.target.access.refused["reads"] == 1


def test_breakpoint_in_private_code_with_no_hardware_left_is_refused(make: Make) -> None:
    client = make().client()
    assert client.ask(b"Z1,1000,1") == b"OK"
    assert client.ask(b"Z1,2000,1") == b"OK"

    answer = client.ask(b"Z0," + at(PRIVATE_START) + b",1")

    assert answer.startswith(b"E.") and b"private" in answer and b"in use" in answer


def test_watchpoint_says_what_was_written_to(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    assert client.ask(b"Z2,2000,8") == b"OK"
    debugged.vcpus[0].then(hit(0))

    assert client.ask(b"c") == b"T05thread:1;watch:2000;"
    assert debugged.debug.armed[-1][3][0] == Hardware(Watch.WRITE, 0x2000, 8)


def test_two_watchpoints_hit_at_once_are_told_one_after_the_other(make: Make) -> None:
    debugged = make(2)
    client = debugged.client()
    assert client.ask(b"Z2,2000,8") == b"OK"
    assert client.ask(b"Z2,3000,8") == b"OK"
    for number, vcpu in enumerate(debugged.vcpus):
        debugged.target.on_debug_exit(vcpu, hit(number))

    first = client.ask(b"c")
    second = client.ask(b"c")

    assert {first, second} == {b"T05thread:1;watch:2000;", b"T05thread:2;watch:3000;"}


def test_vcpu_caught_at_a_breakpoint_that_is_gone_goes_on(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    place = at(0x1000)
    assert client.ask(b"Z0," + place + b",1") == b"OK"
    debugged.target.on_debug_exit(debugged.vcpus[0], broken_at(VIRTUAL + 0x1000))
    assert client.ask(b"z0," + place + b",1") == b"OK"

    client.send(b"c")

    assert debugged.vcpus[0].idle.wait(10)
    assert debugged.debug.passed_on == []


def test_silent_connection_keeps_no_debugger_out(make: Make) -> None:
    debugged = make()
    silent = debugged.client()

    assert debugged.client().ask(b"qC") == b"QC1"

    assert silent.byte() == b""


@pytest.mark.parametrize(
    ("kind", "watch"), [(b"2", b"watch"), (b"3", b"rwatch"), (b"4", b"awatch")]
)
def test_watchpoint_that_is_met_is_called_by_its_kind(
    make: Make, kind: bytes, watch: bytes
) -> None:
    debugged = make()
    debugged.debug.watches = tuple(Watch)
    client = debugged.client()
    assert client.ask(b"Z%s,2000,8" % kind) == b"OK"
    debugged.vcpus[0].then(hit(0))

    assert client.ask(b"c") == b"T05thread:1;%s:2000;" % watch


def test_watchpoint_for_reads_alone_is_unknown_where_the_processor_has_none(make: Make) -> None:
    client = make().client()

    assert client.ask(b"Z3,2000,8") == client.ask(b"z3,2000,8") == b""


def test_registers_of_one_kind_are_not_anothers(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    debugged = make()
    monkeypatch.setattr(
        debugged.debug, "places", lambda kind: range(1) if kind is Watch.EXECUTE else range(1, 2)
    )
    client = debugged.client()
    assert client.ask(b"Z2,2000,8") == b"OK"
    assert client.ask(b"Z1,1000,1") == b"OK"

    assert b"all 1 hardware" in client.ask(b"Z1,1001,1")
    assert b"all 1 hardware" in client.ask(b"Z2,3000,8")

    debugged.vcpus[0].then(hit(1))
    assert client.ask(b"c") == b"T05thread:1;watch:2000;"


def wide_breakpoints(debugged: Debugged) -> bytes:
    """Those of a processor whose instructions have four bytes."""
    debugged.debug.breakpoint_instruction = b"\x00\x00\x20\xd4"
    return debugged.debug.breakpoint_instruction


def test_breakpoint_of_four_bytes_does_not_show(make: Make) -> None:
    debugged = make()
    brk = wide_breakpoints(debugged)
    debugged.memory.pwrite(b"abcdefgh", 0x1000)
    client = debugged.client()

    assert client.ask(b"Z0," + at(0x1004) + b",4") == b"OK"

    assert debugged.memory.pread(8, 0x1000) == b"abcd" + brk
    assert client.ask(b"m" + at(0x1000) + b",8") == b"abcdefgh".hex().encode()
    assert client.ask(b"m" + at(0x1006) + b",4") == b"gh\0\0".hex().encode()


def test_breakpoint_of_four_bytes_survives_writes(make: Make) -> None:
    debugged = make()
    brk = wide_breakpoints(debugged)
    debugged.memory.pwrite(b"abcdefgh", 0x1000)
    client = debugged.client()
    assert client.ask(b"Z0," + at(0x1004) + b",4") == b"OK"

    # Over its beginning, its end, and inside.
    assert client.ask(b"M" + at(0x1003) + b",2:5859") == b"OK"
    assert client.ask(b"M" + at(0x1007) + b",2:5a31") == b"OK"
    assert client.ask(b"M" + at(0x1005) + b",1:32") == b"OK"

    assert debugged.memory.pread(9, 0x1000) == b"abcX" + brk + b"1"
    assert client.ask(b"z0," + at(0x1004) + b",4") == b"OK"
    assert debugged.memory.pread(9, 0x1000) == b"abcXY2gZ1"


@pytest.mark.parametrize("kind", [b"Z0", b"Z1"])
def test_breakpoint_amid_an_instruction_is_refused(make: Make, kind: bytes) -> None:
    debugged = make()
    wide_breakpoints(debugged)

    answer = debugged.client().ask(kind + b"," + at(0x1002) + b",4")

    assert b"no instruction begins at" in answer
    assert debugged.memory.pread(8, 0x1000) == bytes(8)


@pytest.mark.parametrize("packet", [b"Z2,2001,8", b"Z2,2000,3", b"Z4,2000,10"])
def test_watchpoint_of_an_odd_size_or_place_is_refused(make: Make, packet: bytes) -> None:
    assert make().client().ask(packet).startswith(b"E.")


def test_watchpoint_that_kvm_does_not_stop_for_is_refused(make: Make) -> None:
    debugged = make()
    able = debugged.debug.abilities
    debugged.debug.abilities = able._replace(kernel_watches=False, user_watches=False)

    assert debugged.client().ask(b"Z2,2000,8").startswith(b"E.")


def test_debugger_is_told_what_kvm_can_do(make: Make) -> None:
    assert make().client().monitor("can") == (
        "this host's KVM lacks: nothing\n"
        "hardware breakpoints: 2, watchpoints: 2, in the same registers\n"
    )


def test_debugger_is_told_what_kvm_lacks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    debugged = make()
    debugged.debug.abilities = debugged.debug.abilities._replace(user_steps=False)
    monkeypatch.setattr(
        debugged.debug, "places", lambda kind: range(1) if kind is Watch.EXECUTE else range(1, 4)
    )

    assert debugged.client().monitor("can") == (
        "this host's KVM lacks: single steps in user mode\n"
        "hardware breakpoints: 1, watchpoints: 3\n"
    )


# -- memory and registers -------------------------------------------------------------------------


def test_private_memory_is_an_error_and_never_zeros(make: Make) -> None:
    debugged = make()
    client = debugged.client()

    assert client.ask(b"m" + at(PRIVATE_START) + b",8") == b"E0e"
    assert "private" in client.monitor("why")
    assert debugged.target.as_dict()["refused"] == {"reads": 1, "writes": 0}


def test_private_memory_is_an_error_in_words_for_a_debugger_that_reads_them(make: Make) -> None:
    client = make().client()
    assert b"error-message+" in client.ask(b"qSupported:error-message+")

    answer = client.ask(b"m" + at(PRIVATE_START) + b",8")

    assert answer.startswith(b"E.") and b"private" in answer


def test_read_that_runs_into_private_memory_is_short(make: Make) -> None:
    debugged = make()
    debugged.memory.pwrite(b"end!", PRIVATE_START - 4)

    answer = debugged.client().ask(b"m" + at(PRIVATE_START - 4) + b",10")

    assert answer == b"end!".hex().encode()


def test_private_memory_is_served_and_counted_where_that_was_asked_for(make: Make) -> None:
    debugged = make(sees_private=True)
    client = debugged.client()
    debugged.memory.private.pwrite(b"secret", PRIVATE_START)

    assert client.ask(b"m" + at(PRIVATE_START) + b",6") == b"secret".hex().encode()

    assert debugged.target.as_dict()["private_bytes"] == 6
    assert debugged.target.as_dict()["sees_private"] is True


def test_memory_that_is_not_mapped_is_an_error(make: Make) -> None:
    assert make().client().ask(b"m1000,8") == b"E0e"


def test_page_tables_in_private_memory_are_not_walked(make: Make) -> None:
    debugged = make()
    debugged.debug.tables_gpa = PRIVATE_START
    client = debugged.client()

    assert client.ask(b"m" + at(0x1000) + b",8") == b"E0e"
    assert "page tables are out of reach" in client.monitor("why")


@pytest.mark.parametrize("switch", [b"Qqemu.PhyMemMode:1", b"monitor"])
def test_physical_addresses_need_no_page_tables(make: Make, switch: bytes) -> None:
    debugged = make()
    debugged.memory.pwrite(b"\x77", 0x3000)
    client = debugged.client()
    if switch == b"monitor":
        client.monitor("physical on")
    else:
        assert client.ask(switch) == b"OK"

    assert client.ask(b"m3000,1") == b"77"


def test_binary_write_reaches_shared_memory(make: Make) -> None:
    debugged = make()

    assert debugged.client().ask(b"X" + at(0x4000) + b",3:a}\x03b") == b"OK"

    assert debugged.memory.pread(3, 0x4000) == b"a#b"


def test_write_to_private_memory_is_refused(make: Make) -> None:
    debugged = make()

    assert debugged.client().ask(b"M" + at(PRIVATE_START) + b",1:41").startswith(b"E.")
    assert debugged.memory.private.pread(1, PRIVATE_START) == b"\0"


def test_registers_are_those_of_the_chosen_thread(make: Make) -> None:
    client = make(2).client()

    assert client.ask(b"Hg2") == b"OK"

    assert client.ask(b"g") == b"2211000000000000" + b"01100000"
    assert client.ask(b"p1") == b"01100000"


def test_register_is_set(make: Make) -> None:
    debugged = make()

    assert debugged.client().ask(b"P0=0807060504030201") == b"OK"

    assert debugged.debug.values[0][0] == 0x0102030405060708


def test_register_of_a_vcpu_still_in_an_exit_is_not_set(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    assert client.ask(b"?")
    debugged.group.runners[0].owes = True

    assert b"still in an exit" in client.ask(b"P0=0807060504030201")


# -- hostile --------------------------------------------------------------------------------------

NONSENSE = [
    b"", b"g0", b"G", b"G00", b"Gzz", b"p", b"pffff", b"p-1", b"P", b"P0", b"P0=", b"P0=1",
    b"Pff=0", b"P1=01000000", b"m", b"m,", b"m1", b"m1,", b"mx,1", b"m1,x",
    b"m" + b"f" * 17 + b",1", b"m0,ffffffffffffffff", b"M", b"M0,1", b"M0,1:",
    b"M0,1:zz", b"M0,2:00", b"X0,5:a", b"X", b"Z",
    b"Z0", b"Z0,", b"Z0,0", b"Z9,0,1", b"Z3,0,1", b"Z2,0,ffffffffffffffff", b"z0,0,1", b"z7,0,0",
    b"H", b"Hg", b"Hgzz", b"Hg3", b"Hc99", b"T", b"T0", b"T9", b"Tzz", b"vCont", b"vCont;",
    b"vCont;x", b"vCont;c:77", b"vCont;" + b";".join([b"c:1"] * 100), b"vCont;r1000,2000:1",
    b"qXfer:features:read:target.xml:", b"qXfer:features:read:target.xml:9,zz",
    b"qXfer:features:read:../etc/passwd:0,100", b"qXfer:memory-map:read::0,100",
    b"qXfer:features:read:target.xml:ffffffff,1", b"qRcmd,", b"qRcmd,zz", b"qRcmd,f",
    b"qRcmd," + b"states 0x0 999999999999".hex().encode(),
    b"qRcmd," + b"translate x".hex().encode(), b"qRcmd," + "\u00e4\n".encode().hex().encode(),
    b"qThreadExtraInfo,", b"qThreadExtraInfo,9", b"qThreadExtraInfo,-1", b"Qqemu.PhyMemMode:",
    b"qCRC:0,1", b"\xff\x00\x80", b"vFile:open:2f,0,0", b"vRun;", b"R00", b"i", b"!",
]  # fmt: skip


@pytest.mark.parametrize("packet", NONSENSE)
def test_packet_that_makes_no_sense_has_one_answer_and_changes_nothing(
    make: Make, packet: bytes
) -> None:
    debugged = make()
    client = debugged.client()

    answer = client.ask(packet)

    assert client.ask(b"qC") == b"QC1"
    assert b"\n" not in answer
    assert debugged.group.frozen and debugged.outcomes == []


def test_damaged_packet_is_asked_for_again(make: Make) -> None:
    client = make().client()

    client.raw(b"$qC#00")
    assert client.byte() == b"-"

    assert client.ask(b"qC") == b"QC1"


def test_packets_that_are_always_damaged_end_the_conversation(make: Make) -> None:
    client = make().client()

    client.raw(b"$qC#00" * 100)

    assert [client.byte() for _ in range(17)] == [b"-"] * 16 + [b""]


def test_answer_is_sent_again_on_demand_but_not_for_ever(make: Make) -> None:
    client = make().client()
    assert client.ask(b"qC") == b"QC1"

    client.raw(b"-")
    assert client.reply() == b"QC1"
    client.raw(b"-" * 100)

    with pytest.raises((EOFError, ConnectionResetError)):
        while True:
            assert client.reply() == b"QC1"


def test_packet_without_an_end_has_the_client_hung_up_on(make: Make) -> None:
    debugged = make()
    client = debugged.client()

    client.raw(b"$" + b"x" * (LONGEST + 8))

    assert client.reply().startswith(b"E.")
    assert client.byte() == b""


def test_client_that_takes_no_answers_holds_up_nobody(make: Make) -> None:
    debugged = make()
    client = debugged.client()
    ask = framed(b"m" + at(0) + b",1f00")
    client._socket.settimeout(0.5)

    with pytest.raises(TimeoutError):
        while True:
            client.raw(ask * 100)

    assert debugged.on_loop(lambda: len(debugged.server._client._output)) < 1 << 17  # type: ignore[union-attr]
    assert debugged.on_loop(lambda: debugged.server._client._parser.waiting) <= 3 * LONGEST  # type: ignore[union-attr]


def test_flood_of_packets_leaves_the_loop_time_for_others(make: Make) -> None:
    """Each turn of the flood's ends after some milliseconds, whatever is still waiting."""
    debugged = make()
    client = debugged.client()
    client.no_acks()
    client.raw(framed(b"") * 4000)

    turns = [debugged.on_loop(lambda: debugged.server._client is not None) for _ in range(3)]

    assert turns == [True] * 3
    assert [client.reply() for _ in range(4000)] == [b""] * 4000


# -- where it listens -----------------------------------------------------------------------------


def test_socket_is_its_owners_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    server = GdbServer(str(path))

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.close(0)

    assert not path.exists()


@pytest.mark.parametrize(
    "where", ["0", "65536", "99999999999999999999", "", "a\0b", "/no/such/folder/gdb", "x" * 200]
)
def test_impossible_place_is_one_line(where: str) -> None:
    with pytest.raises(UsageError, match="--gdb") as caught:
        GdbServer(where)

    assert "\n" not in str(caught.value)


def test_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        with pytest.raises(UsageError, match="in use"):
            GdbServer(str(taken.getsockname()[1]))


def test_port_is_on_the_loopback_address_only() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = GdbServer(str(port))

    address = server._listener._socket.getsockname()  # type: ignore[attr-defined]

    server.close(0)
    assert address == ("127.0.0.1", port)
