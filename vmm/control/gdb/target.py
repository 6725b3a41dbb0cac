"""The guest under a debugger: stopped and let go, its registers, memory and breakpoints.

All of it on the device loop's thread, but for `on_debug_exit`, which a vCPU's own thread calls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial

from vmm.arch.debug import Caught, Cause, GuestDebug, Hardware, NotMapped, Watch
from vmm.core.errors import GuestMemoryError, tell
from vmm.core.lean_typing import TYPE_CHECKING, Any, NamedTuple
from vmm.core.ranges import PAGE_SIZE
from vmm.exits.vcpu_group import VcpuGroup
from vmm.memory.debugging import DebugAccess

if TYPE_CHECKING:
    from vmm.exits.run_loop import VcpuRunner

MOST_SOFTWARE = 256
"""Software breakpoints at most."""
_HARDWARE_SIZES = (1, 2, 4, 8)


class Refused(Exception):
    """What can't be done; `number` is an errno for the debugger, the text a sentence for people."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


class Stop(NamedTuple):
    """Why the guest stands still, and the vCPU that it is about."""

    vcpu: int
    reason: str
    """"interrupt", "step", "software", "hardware" or "watch"."""
    watched: Hardware | None = None


class _Software(NamedTuple):
    """A breakpoint instruction in the guest's code, where it was written, and what was there."""

    gpa: int
    by_state: bool
    saved: bytes


EINVAL, EFAULT, ENOSPC, EBUSY = 22, 14, 28, 16


class Target:
    """One guest. `signal` is an eventfd that becomes readable when a vCPU was caught."""

    def __init__(
        self,
        debug: GuestDebug,
        vcpus: Sequence[Any],
        group: VcpuGroup,
        access: DebugAccess,
    ) -> None:
        self.debug = debug
        self.vcpus = vcpus
        self.access = access
        self.physical = False
        """Whether addresses are guest-physical (without an address bit) instead of virtual."""
        self.signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._group = group
        self._lock = threading.Lock()
        self._caught: list[tuple[int, Caught, Hardware | None]] = []
        self._software: dict[int, _Software] = {}
        self._hardware: list[Hardware | None] = [None] * debug.most_hardware
        self._for_software: dict[int, int] = {}
        """Software breakpoints that a hardware one stands for: address to number."""
        self._stepping: int | None = None
        self._left: dict[int, list[Hardware | None]] = {}
        """What KVM has armed still though the debugger has gone, by vCPU."""
        self._staying: list[VcpuRunner] = []
        self.attached = 0
        """How many debuggers have attached so far."""
        self.stops = 0

    def close(self) -> None:
        os.close(self.signal)

    # -- standing still and going on ----------------------------------------------------------

    def freeze(self) -> None:
        """Have all vCPUs stand still; soon after, `still` says so."""
        self._group.freeze()

    @property
    def frozen(self) -> bool:
        return self._group.frozen

    def still(self) -> bool:
        """Whether all vCPUs stand still; one in a handler may take longer."""
        return self._group.wait_until_still(0)

    def on_debug_exit(self, vcpu: Any, exit: Any) -> None:
        """A vCPU has met a breakpoint or made a step; what is the guest's own goes to the guest."""
        if self._was_left(vcpu, exit):
            return
        hardware = list(self._hardware)
        caught = self.debug.caught(vcpu, exit, hardware)
        ours = caught.cause is not Cause.GUEST
        if caught.cause is Cause.SOFTWARE:
            ours = caught.address in self._software
        if not ours:
            self.debug.pass_on(vcpu, exit)
            return
        watched = hardware[caught.hardware] if caught.cause is Cause.HARDWARE else None
        with self._lock:
            self._caught.append((vcpu.index, caught, watched))
        self._group.freeze()
        os.eventfd_write(self.signal, 1)

    def _was_left(self, vcpu: Any, exit: Any) -> bool:
        """Whether it is about what `let_go` couldn't disarm, which is done now. Raises KvmError."""
        left = self._left.get(vcpu.index)
        if left is None:
            return False
        self._arm_one(vcpu.index, step=False)
        return self.debug.caught(vcpu, exit, left).cause in (Cause.HARDWARE, Cause.STEP)

    def next_stop(self) -> Stop | None:
        """What the guest has stopped for, once it stands still; None for what no longer holds.

        Of several vCPUs one is told of. Another that stands at a breakpoint meets it again when
        it goes on; that it has written to what is watched is kept for the next time.
        """
        with self._lock:
            caught, self._caught = self._caught, []
        first: Stop | None = None
        kept = []
        for each in caught:
            stop = self._holding(*each)
            if first is None:
                first = stop
            elif stop is not None and stop.reason == "watch":
                kept.append(each)
        with self._lock:
            self._caught[:0] = kept
        if first is not None:
            self.stops += 1
        return first

    def _holding(self, vcpu: int, caught: Caught, watched: Hardware | None) -> Stop | None:
        """The stop, if what it is about is still wanted."""
        if caught.cause is Cause.STEP:
            return Stop(vcpu, "step") if self._stepping == vcpu else None
        if caught.cause is Cause.SOFTWARE:
            return Stop(vcpu, "software") if caught.address in self._software else None
        if watched is None or watched not in self._hardware:
            return None
        return Stop(vcpu, self._reason(watched), watched)

    def _reason(self, hardware: Hardware) -> str:
        if hardware.kind is not Watch.EXECUTE:
            return "watch"
        return "software" if hardware.address in self._for_software else "hardware"

    def resume(self, steps: int | None, going: Sequence[int] | None = None) -> None:
        """Let vCPUs go on: `steps` by one instruction, those in `going` (None: all others) freely,
        the rest not at all. Raises Refused, and nothing has changed."""
        if steps is not None and not self._can_step(steps):
            raise Refused(EINVAL, "this host's KVM makes no single steps there (see the docs)")
        self._arm(steps)
        self._stepping = steps
        running = {*going, steps} if going is not None else set(range(len(self.vcpus)))
        self._staying = [
            runner for number, runner in enumerate(self._group.runners) if number not in running
        ]
        with self._lock:
            # Who stands at a breakpoint meets it again.
            self._caught = [each for each in self._caught if self._is_late(*each)]
            again = bool(self._caught)
        if again:
            os.eventfd_write(self.signal, 1)  # it has stopped for something else already
        else:
            self.go_on()

    def go_on(self) -> None:
        """As the last `resume` had it."""
        self._group.thaw(self._staying)

    def _is_late(self, vcpu: int, caught: Caught, watched: Hardware | None) -> bool:
        stop = self._holding(vcpu, caught, watched)
        return stop is not None and stop.reason == "watch"

    def _can_step(self, vcpu: int) -> bool:
        able = self.debug.abilities
        if able.kernel_steps and able.user_steps:
            return True
        in_user_mode = self.debug.is_user_mode(self.vcpus[vcpu])
        return able.user_steps if in_user_mode else able.kernel_steps

    def _arm(self, steps: int | None) -> None:
        for number in range(len(self.vcpus)):
            self._arm_one(number, step=number == steps)

    def _arm_one(self, vcpu: int, *, step: bool) -> None:
        self.debug.arm(
            self.vcpus[vcpu],
            step=step,
            software=bool(self._software),
            hardware=self._hardware,
            peek=partial(self._peek, vcpu),
        )
        self._left.pop(vcpu, None)

    def _peek(self, vcpu: int, address: int, size: int) -> bytes:
        """By a virtual address, whatever the debugger's are."""
        try:
            gpa, there = self.translate(vcpu, address)
            found = self.access.read(min(size, there, PAGE_SIZE - gpa % PAGE_SIZE), gpa)
        except (Refused, GuestMemoryError, OSError):
            return b""
        return self._without_breakpoints(address, found)

    def let_go(self) -> None:
        """The debugger has gone: no breakpoint is left, and the guest runs on."""
        if not self.frozen:
            self.freeze()
            self.still()
        armed = self._hardware
        self._clear()
        for number in range(len(self.vcpus)):
            try:
                self._arm_one(number, step=False)
            except OSError as error:
                self._left[number] = armed
                tell(f"--gdb: {error}; a breakpoint stays until vCPU {number} meets it")
        self._staying = []
        self.go_on()

    def _clear(self) -> None:
        """Forget all breakpoints, and take those in the guest's code out."""
        for address in list(self._software):
            try:
                self.remove_software(address)
            except Refused:
                continue  # its page is the guest's alone by now, and what was shared is discarded
        self._software.clear()
        self._for_software.clear()
        self._hardware = [None] * self.debug.most_hardware
        self._stepping = None
        self.physical = False
        with self._lock:
            self._caught.clear()

    # -- registers ----------------------------------------------------------------------------

    def read_registers(self, vcpu: int) -> list[int]:
        return self.debug.read_registers(self.vcpus[vcpu])

    def write_registers(self, vcpu: int, values: dict[int, int]) -> None:
        """Raises Refused where the vCPU is not done with an exit, Unwritable, KvmError."""
        if not self._group.is_still(self._group.runners[vcpu]):
            raise Refused(
                EBUSY, "the vCPU is still in an exit, whose end sets registers; try again"
            )
        self.debug.write_registers(self.vcpus[vcpu], values)

    # -- memory -------------------------------------------------------------------------------

    def translate(self, vcpu: int, address: int) -> tuple[int, int]:
        """The guest-physical address (with the scheme's bit) behind a virtual one, and the bytes
        from there to its page's end. Raises Refused."""
        read = self._read_entry
        try:
            return self.debug.walk(self.vcpus[vcpu], address, read)
        except NotMapped as reason:
            raise Refused(EFAULT, str(reason)) from None
        except (GuestMemoryError, OSError) as reason:
            raise Refused(EFAULT, f"page tables are out of reach: {reason}") from None

    def _read_entry(self, gpa: int, size: int) -> bytes:
        return self.access.read(size, gpa)

    def _place(self, vcpu: int, address: int) -> tuple[int, int, bool]:
        """GPA, bytes to the end of its 4 KiB page, and whether page states pick the side."""
        if self.physical:
            return address, PAGE_SIZE - address % PAGE_SIZE, True
        gpa, size = self.translate(vcpu, address)
        return gpa, min(size, PAGE_SIZE - gpa % PAGE_SIZE), False

    def read(self, vcpu: int, address: int, size: int) -> bytes:
        """As many of the bytes as can be had from the first on. Raises Refused where it can't.

        The debugger's own breakpoint instructions don't show.
        """
        found = b""
        while len(found) < size:
            at = address + len(found)
            try:
                gpa, there, by_state = self._place(vcpu, at)
                piece = min(there, size - len(found))
                try:
                    found += self.access.read(piece, gpa, by_state=by_state)
                except (GuestMemoryError, OSError) as reason:
                    raise Refused(EFAULT, str(reason)) from None
            except Refused:
                if found:
                    break
                raise
        return self._without_breakpoints(address, found)

    def _without_breakpoints(self, address: int, found: bytes) -> bytes:
        shown = bytearray(found)
        for place, software in self._software.items():
            for offset, byte in enumerate(software.saved):
                if 0 <= place + offset - address < len(shown):
                    shown[place + offset - address] = byte
        return bytes(shown)

    def write(self, vcpu: int, address: int, data: bytes) -> None:
        """All of the bytes. Raises Refused, with some of them written."""
        done = 0
        while done < len(data):
            gpa, there, by_state = self._place(vcpu, address + done)
            piece = data[done : done + there]
            self._write_piece(gpa, by_state, address + done, piece)
            done += len(piece)

    def _write_piece(self, gpa: int, by_state: bool, address: int, piece: bytes) -> None:
        """What lies under a breakpoint instruction is only noted."""
        shown = bytearray(piece)
        noted = {}
        for place, software in self._software.items():
            saved = bytearray(software.saved)
            for number, byte in enumerate(self.debug.breakpoint_instruction):
                offset = place + number - address
                if 0 <= offset < len(piece):
                    saved[number] = piece[offset]
                    shown[offset] = byte
                    noted[place] = software._replace(saved=bytes(saved))
        try:
            self.access.write(bytes(shown), gpa, by_state=by_state)
        except (GuestMemoryError, OSError) as reason:
            raise Refused(EFAULT, str(reason)) from None
        self._software.update(noted)

    # -- breakpoints --------------------------------------------------------------------------

    def insert_software(self, vcpu: int, address: int) -> None:
        """A breakpoint instruction where the host may write there and KVM catches it, else a
        hardware breakpoint. Raises Refused."""
        if address in self._software or address in self._for_software:
            return
        able = self.debug.abilities
        try:
            if not (able.kernel_software and able.user_software):
                raise Refused(EINVAL, "this host's KVM catches no breakpoint instruction")
            self._write_software(vcpu, address)
        except Refused as reason:
            self._insert_instead(address, reason)

    def _write_software(self, vcpu: int, address: int) -> None:
        if len(self._software) >= MOST_SOFTWARE:
            raise Refused(ENOSPC, f"{MOST_SOFTWARE} software breakpoints are the most")
        self._require_instruction(address)
        gpa, _, by_state = self._place(vcpu, address)
        instruction = self.debug.breakpoint_instruction
        try:
            saved = self.access.read(len(instruction), gpa, by_state=by_state)
            self.access.write(instruction, gpa, by_state=by_state, as_code=True)
        except (GuestMemoryError, OSError) as reason:
            raise Refused(EFAULT, str(reason)) from None
        self._software[address] = _Software(gpa, by_state, saved)

    def _require_instruction(self, address: int) -> None:
        """Raises Refused."""
        if address % len(self.debug.breakpoint_instruction):
            raise Refused(EINVAL, f"no instruction begins at {address:#x}")

    def _insert_instead(self, address: int, reason: Refused) -> None:
        hardware = Hardware(Watch.EXECUTE, address, 1)
        try:
            self.insert_hardware(hardware)
        except Refused as none_left:
            raise Refused(reason.number, f"{reason}; and {none_left}") from None
        self._for_software[address] = self._hardware.index(hardware)

    def remove_software(self, address: int) -> None:
        """Raises Refused where the instruction can't be reached any more."""
        number = self._for_software.pop(address, None)
        if number is not None:
            self._hardware[number] = None
            return
        software = self._software.pop(address, None)
        if software is None:
            return
        gpa, by_state, saved = software
        try:
            now = self.access.read(len(saved), gpa, by_state=by_state)
            if now == self.debug.breakpoint_instruction:  # else the guest has put others there
                self.access.write(saved, gpa, by_state=by_state)
        except (GuestMemoryError, OSError) as reason:
            raise Refused(EFAULT, str(reason)) from None

    def insert_hardware(self, hardware: Hardware) -> None:
        """Raises Refused where none is free, or there is none of that size or place."""
        able = self.debug.abilities
        works = able.kernel_hardware or able.user_hardware
        if hardware.kind is not Watch.EXECUTE:
            works = able.kernel_watches or able.user_watches
        if not works:
            raise Refused(EINVAL, f"this host's KVM doesn't stop for {hardware.kind.value}s")
        if hardware.size not in _HARDWARE_SIZES or hardware.address % hardware.size:
            raise Refused(
                EINVAL, f"no hardware breakpoint watches {hardware.size} bytes at an odd place"
            )
        if hardware.kind is Watch.EXECUTE:
            self._require_instruction(hardware.address)
        if hardware in self._hardware:
            return
        places = self.debug.places(hardware.kind)
        free = next((number for number in places if self._hardware[number] is None), None)
        if free is None:
            raise Refused(ENOSPC, f"all {len(places)} hardware breakpoints are in use")
        self._hardware[free] = hardware

    def remove_hardware(self, hardware: Hardware) -> None:
        if hardware in self._hardware:
            self._hardware[self._hardware.index(hardware)] = None

    # -- for the report -----------------------------------------------------------------------

    def as_dict(self) -> dict[str, object]:
        return {"attached": self.attached, "stops": self.stops, **self.access.as_dict()}
