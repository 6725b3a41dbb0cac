"""The loader of strict guests on this machine's KVM: what it loads, and what monitors try on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest

from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from tests.support.strict_guest import C_BIT, MIB, WINDOW, StrictGuest, random_part
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.micro_guest import DONE_PORT
from vmm.arch.x86_64.strict.launch import AREA, FLAG_PLAIN_HASH, measured
from vmm.boot.manifest import Part
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import Range
from vmm.devices.load_window import LoadWindow
from vmm.memory.guest_memory import GuestMemory

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60)]

FIRST, SECOND = 0x80_0000, 0xA0_0000
BLOCK_EDGES = (1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 129)

Writes = list[tuple[int, bytes]]


def parts_of_all_sizes() -> list[Part]:
    small = [random_part(f"{n} bytes", FIRST + 0x1000 * n, n) for n in BLOCK_EDGES]
    return [*small, random_part("chunks", SECOND, 3 * WINDOW.size + 77)]


def two_parts() -> list[Part]:
    return [random_part("kernel", FIRST, 5000), random_part("initrd", SECOND, 5000)]


@pytest.mark.parametrize("flags", [0, FLAG_PLAIN_HASH], ids=["processor", "integers"])
def test_loader_brings_every_part_to_its_place(flags: int, kvm: System) -> None:
    parts = parts_of_all_sizes()
    with StrictGuest(kvm, parts, flags=flags, backing="memfd") as guest:
        exit = guest.run()
        found = [guest.private.pread(part.size, part.gpa) for part in parts]

    assert guest.loaded and isinstance(exit, IoExit) and exit.port == DONE_PORT
    assert found == [part.content for part in parts]


@pytest.mark.parametrize("flags", [0, FLAG_PLAIN_HASH], ids=["processor", "integers"])
@pytest.mark.parametrize("wrong", range(len(BLOCK_EDGES) + 1))
def test_each_part_is_checked_to_its_last_bit(wrong: int, flags: int, kvm: System) -> None:
    parts = parts_of_all_sizes()

    def last_bit(window: LoadWindow, number: int, memory: GuestMemory) -> None:
        window.write(0, 4, number)
        last_of_all = wrong < len(BLOCK_EDGES) or number == len(BLOCK_EDGES) + 3
        if number >= wrong and last_of_all and number in (wrong, len(BLOCK_EDGES) + 3):
            size = BLOCK_EDGES[wrong] if wrong < len(BLOCK_EDGES) else 77
            place = WINDOW.start + size - 1
            byte = memory.pread(1, place)[0]
            memory.pwrite(bytes([byte ^ 1]), place)

    with StrictGuest(kvm, parts, flags=flags, fill=last_bit) as guest:
        guest.run()

    assert not guest.loaded
    assert guest.reason == f"{parts[wrong].name} is not what its manifest says (SHA-256 differs)"


def test_loader_fills_memory_that_the_host_cannot_reach(
    kvm: System, guest_memfd_flags: int
) -> None:
    parts = [random_part("kernel", FIRST, 2 * MIB)]
    with StrictGuest(kvm, parts) as guest:
        guest.run()
        backing = guest.private
        resident = backing.resident_bytes(FIRST, 2 * MIB)

    assert guest.loaded
    assert (backing.name, backing.host_access) == ("guest_memfd", "kernel-refused")
    assert resident == 2 * MIB


def test_after_the_jump_the_shared_side_holds_only_what_stays_there(kvm: System) -> None:
    parts = two_parts()
    with StrictGuest(kvm, parts) as guest:
        guest.run()
        window = guest.memory.shared.resident_bytes(WINDOW.start, WINDOW.size)
        high = guest.memory.shared.resident_bytes(AREA.end, guest.memory.ram[0].end - AREA.end)
        states = guest.memory.states(WINDOW)

    assert guest.loaded
    assert (window, high) == (0, 0)
    assert [state.value for _, state in states] == ["private"]


def test_loader_leaves_neither_header_nor_stack_nor_arguments(kvm: System) -> None:
    # mov eax, esi; out; and again
    show = b"\x89\xf0\xe7" + bytes([DONE_PORT]) + b"\xeb\xfc"
    with StrictGuest(kvm, two_parts(), backing="memfd", after=show, rsi=0x1234) as guest:
        exit = guest.run()
        registers = guest.vcpu.get_regs()
        left = guest.private.pread(0x2000, layout.LAUNCH_GPA + 0x2000)

    assert isinstance(exit, IoExit) and exit.data == (0x1234).to_bytes(4, "little")
    kept = {name: value for name, value in registers.items() if value}
    assert kept.keys() <= {"rax", "rdx", "rsi", "rip", "rsp", "rflags"}
    assert not any(left[: 0x1000 + 0x100])


def test_loader_without_a_header_stops(kvm: System) -> None:
    def no_header(writes: Writes) -> Writes:
        header = writes[1][1]
        return [writes[0], (writes[1][0], b"\0" * 8 + header[8:]), *writes[2:]]

    with StrictGuest(kvm, two_parts(), change=no_header) as guest:
        guest.run()

    assert guest.reason == "found no header of its own"


# -- a hostile monitor -----------------------------------------------------------------------------


def differs(guest: StrictGuest, name: str) -> bool:
    return guest.reason == f"{name} is not what its manifest says (SHA-256 differs)"


def serve(content: Callable[[int], bytes | None]) -> Callable[[LoadWindow, int, GuestMemory], None]:
    """Fill the window with `content(chunk)`; None leaves it as it is."""

    def fill(window: LoadWindow, number: int, memory: GuestMemory) -> None:
        data = content(number)
        if data is not None:
            memory.pwrite(data, WINDOW.start)

    return fill


def test_swapped_parts_stop_the_loader(kvm: System) -> None:
    parts = two_parts()
    swapped = serve(lambda number: bytes(parts[1 - number].content))  # type: ignore[arg-type]
    with StrictGuest(kvm, parts, fill=swapped) as guest:
        guest.run()

    assert differs(guest, "kernel")


def test_truncated_part_stops_the_loader(kvm: System) -> None:
    parts = two_parts()

    def truncated(number: int) -> bytes:
        whole = bytes(parts[number].content)  # type: ignore[arg-type]
        return whole if number == 0 else whole[:-1] + b"\0"

    with StrictGuest(kvm, parts, fill=serve(truncated)) as guest:
        guest.run()

    assert differs(guest, "initrd")


def test_another_kernel_stops_the_loader(kvm: System) -> None:
    other = random_part("other", FIRST, 5000)
    with StrictGuest(kvm, two_parts(), fill=serve(lambda number: bytes(other.content))) as guest:  # type: ignore[arg-type]
        guest.run()

    assert differs(guest, "kernel")


def test_another_kernel_with_a_manifest_of_its_own_has_another_measurement(kvm: System) -> None:
    expected, other = two_parts(), two_parts()
    with StrictGuest(kvm, expected) as guest, StrictGuest(kvm, other) as changed:
        changed.run()

    assert changed.loaded
    assert changed.launch.measurement != guest.launch.measurement


def test_manifest_of_another_image_stops_the_loader_and_is_measured(kvm: System) -> None:
    other: list[bytes] = []
    with StrictGuest(kvm, two_parts()) as guest:
        other.append(guest.launch.writes[1][1])

    def with_it(writes: Writes) -> Writes:
        return [writes[0], (writes[1][0], other[0]), *writes[2:]]

    with StrictGuest(kvm, two_parts(), change=with_it) as guest:
        guest.run()

    assert differs(guest, "kernel")
    assert measured(guest.placed, guest.launch.state) != guest.launch.measurement


def test_loader_that_compares_nothing_is_measured(kvm: System) -> None:
    test_and_return, xor_and_return = b"\x85\xd2\xc3", b"\x31\xd2\xc3"  # edx: any difference

    def careless(writes: Writes) -> Writes:
        loader = writes[0][1]
        assert loader.count(test_and_return) == 1
        return [(writes[0][0], loader.replace(test_and_return, xor_and_return)), *writes[1:]]

    zeros = serve(lambda number: bytes(5000))
    with StrictGuest(kvm, two_parts(), change=careless, fill=zeros) as guest:
        guest.run()

    assert guest.loaded  # it loads what it likes, and says so:
    assert measured(guest.placed, guest.launch.state) != guest.launch.measurement


def test_old_window_replayed_stops_the_loader(kvm: System) -> None:
    parts = two_parts()
    first = serve(lambda number: bytes(parts[0].content) if number == 0 else None)  # type: ignore[arg-type]
    with StrictGuest(kvm, parts, fill=first) as guest:
        guest.run()

    assert differs(guest, "initrd")


def test_manifest_changed_in_shared_memory_while_it_loads_is_of_no_account(kvm: System) -> None:
    parts, other = two_parts(), random_part("other", FIRST, 5000)

    def both(window: LoadWindow, number: int, memory: GuestMemory) -> None:
        memory.pwrite(other.digest(), layout.LAUNCH_HEADER_GPA + 0x100 + 0x10)
        memory.pwrite(bytes(other.content), WINDOW.start)  # type: ignore[arg-type]

    with StrictGuest(kvm, parts, fill=both) as guest:
        guest.run()

    assert differs(guest, "kernel")


def test_window_refilled_during_the_copy_never_gets_in_unseen(kvm: System) -> None:
    """Whatever the copy caught, it is the copy that is hashed."""
    parts = [random_part("kernel", FIRST, WINDOW.size)]
    good = bytes(parts[0].content)  # type: ignore[arg-type]
    bad = bytes(byte ^ 0xFF for byte in good[: 64 << 10])
    ended = threading.Event()

    def refill(memory: GuestMemory) -> None:
        with contextlib.suppress(PrivateAccess):  # once it has been converted back
            while not ended.is_set():
                memory.pwrite(bad, WINDOW.start)
                memory.pwrite(good[: len(bad)], WINDOW.start)

    threads: list[threading.Thread] = []

    def fill(window: LoadWindow, number: int, memory: GuestMemory) -> None:
        window.write(0, 4, number)
        threads.append(threading.Thread(target=refill, args=(memory,)))
        threads[-1].start()

    for _ in range(4):
        ended.clear()
        with StrictGuest(kvm, parts, fill=fill, backing="memfd") as guest:
            try:
                guest.run()
            finally:
                ended.set()
                threads[-1].join()
            copied = guest.private.pread(WINDOW.size, FIRST)
        # Which of the two it is, is chance.
        assert guest.loaded == (copied == good)
        assert guest.loaded or differs(guest, "kernel")


def test_window_is_out_of_the_monitors_reach_afterwards(kvm: System) -> None:
    with StrictGuest(kvm, two_parts()) as guest:
        guest.run()
        with pytest.raises(PrivateAccess):
            guest.memory.pwrite(b"late", WINDOW.start)
        guest.window.write(0, 4, 0)  # asked again, it does nothing

    assert guest.loaded and guest.reason is None


def test_conversion_that_is_refused_stops_the_loader(kvm: System) -> None:
    def shared_already(writes: Writes) -> Writes:
        header = bytearray(writes[1][1])
        header[0x50:0x58] = (1 << 20).to_bytes(8, "little")  # more pages than there are
        return [writes[0], (writes[1][0], bytes(header)), *writes[2:]]

    with StrictGuest(kvm, two_parts(), change=shared_already) as guest:
        guest.run()

    assert guest.reason == "could not convert its window back to private memory"


# -- what strict does not keep a monitor from: said in vmm/docs/explanation/strict.md, shown here --

# mov rax, [rdi]; mov [rsi], rax; out, for ever
_COPY_A_WORD = b"\x48\x8b\x07\x48\x89\x06\xe6" + bytes([DONE_PORT]) + b"\xeb\xfc"
_READ_INTO = layout.PAYLOAD_GPA + 0x800


def test_monitor_that_sets_registers_has_the_guest_read_its_memory_out(kvm: System) -> None:
    """A default VM's registers are its monitor's to set: KVM keeps nobody from it."""
    parts = two_parts()
    with StrictGuest(kvm, parts) as guest:
        guest.run()
        guest.memory.pwrite(_COPY_A_WORD, layout.PAYLOAD_GPA + 0x400)
        stolen = {"rdi": FIRST | 1 << C_BIT, "rsi": _READ_INTO}
        start = {"rip": layout.PAYLOAD_GPA + 0x400}
        guest.vcpu.set_regs({**guest.launch.state.regs, **stolen, **start})
        guest.run()
        found = guest.memory.pread(8, _READ_INTO)

    assert guest.loaded and found == bytes(parts[0].content)[:8]  # type: ignore[arg-type]


def test_common_memory_is_the_monitors_to_write_for_as_long_as_the_guest_runs(kvm: System) -> None:
    place = layout.TRAMPOLINE.start
    with StrictGuest(
        kvm, two_parts(), common=layout.TRAMPOLINE,
        after=_COPY_A_WORD, rdi=place | 1 << C_BIT, rsi=_READ_INTO,
    ) as guest:  # fmt: skip
        guest.memory.shared.pwrite(b"rewrote!", place)
        guest.run()
        found = guest.memory.pread(8, _READ_INTO)

    assert guest.loaded and found == b"rewrote!"


def test_areas_that_stay_shared_are_those_of_the_launch() -> None:
    assert AREA.contains(WINDOW)
    assert Range(layout.LAUNCH_GPA, layout.LAUNCH_COPY_SIZE).end <= WINDOW.start
