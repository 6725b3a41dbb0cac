"""One debugger's conversation: a packet in, at most one answer out.

Threads are vCPUs, numbered from 1. All of them stop, and go on, together. What isn't known is
answered with nothing, which says so by the protocol's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmm.arch.debug import Hardware, Unwritable, Watch
from vmm.control.gdb.packets import LONGEST, escaped, unescaped
from vmm.control.gdb.target import EINVAL, Refused, Stop, Target
from vmm.core.errors import one_line
from vmm.core.ranges import PAGE_SIZE, Range

MOST_BYTES = (LONGEST - 64) // 2
"""Bytes of memory in one packet at most: two digits each."""

_WATCHES = {1: Watch.EXECUTE, 2: Watch.WRITE, 3: Watch.READ, 4: Watch.ACCESS}
_HITS = {Watch.WRITE: "watch", Watch.READ: "rwatch", Watch.ACCESS: "awatch"}
_INTERRUPTED, _TRAPPED = 2, 5  # gdb's numbers of SIGINT and SIGTRAP
_SUPPORTED = (
    f"PacketSize={LONGEST:x};QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;"
    "hwbreak+;error-message+"
)
_HELP = """\
monitor why                what was refused last, and the reason
monitor can                what this host's KVM can do for a debugger, and can't
monitor translate ADDRESS  the guest-physical address behind a virtual one
monitor states ADDRESS [BYTES]  page states from a guest-physical address on
monitor physical on|off    take addresses for guest-physical ones
"""


class Session:
    """Answers packets. `no_acks` says that acknowledgements have been switched off."""

    def __init__(self, target: Target, quit: Callable[[], None]) -> None:
        """`quit` ends the run: what gdb's `kill` means here."""
        self._target = target
        self._quit = quit
        self._vcpu = 0
        self._why = "nothing"
        self._words = False
        self.no_acks = False
        self.running = False
        """Whether the guest goes on; its next stop is the answer that the debugger waits for."""
        self.detached = False
        """Whether the debugger has said goodbye, so that the guest has been let go already."""
        self._last = Stop(0, "trap")
        self._ways: tuple[tuple[bytes, Callable[[bytes], bytes | None]], ...] = (
            (b"qSupported", self._supported),
            (b"QStartNoAckMode", self._start_no_acks),
            (b"qXfer:features:read:target.xml:", self._description),
            (b"qfThreadInfo", self._threads),
            (b"qsThreadInfo", lambda _: b"l"),
            (b"qThreadExtraInfo,", self._thread_words),
            (b"qAttached", lambda _: b"1"),
            (b"qC", lambda rest: b"" if rest else b"QC%x" % (self._vcpu + 1)),
            (b"qSymbol::", lambda _: b"OK"),
            (b"qRcmd,", self._command),
            (b"qqemu.PhyMemMode", lambda _: b"1" if target.physical else b"0"),
            (b"Qqemu.PhyMemMode:", self._physical),
            (b"vCont?", lambda _: b"vCont;c;C;s;S"),
            (b"vCont;", self._continue_some),
            (b"vKill", self._kill),
            (b"?", lambda _: self.stop_reply(self._last)),
            (b"g", self._read_registers),
            (b"G", self._write_all_registers),
            (b"p", self._read_register),
            (b"P", self._write_register),
            (b"m", self._read_memory),
            (b"M", self._write_memory),
            (b"X", self._write_binary),
            (b"Z", self._insert),
            (b"z", self._remove),
            (b"H", self._choose_thread),
            (b"T", self._is_alive),
            (b"c", lambda rest: self._go(None)),
            (b"C", lambda rest: self._go(None)),
            (b"s", lambda rest: self._go(self._vcpu)),
            (b"S", lambda rest: self._go(self._vcpu)),
            (b"D", self._detach),
            (b"k", self._kill),
        )

    def answer(self, data: bytes) -> bytes | None:
        """The reply, or None where there is none (yet)."""
        for name, way in self._ways:
            if data.startswith(name):
                if self.running:
                    return self._error(Refused(EINVAL, "the guest runs; interrupt it first"))
                try:
                    return way(data[len(name) :])
                except Refused as refused:
                    self._why = f"{one_line(data[:40].decode('latin-1'))}: {refused}"
                    return self._error(refused, hidden=name == b"m")
                except (ValueError, Unwritable, OSError) as error:
                    self._why = f"{one_line(data[:40].decode('latin-1'))}: {error}"
                    return self._error(Refused(EINVAL, str(error)))
        return b""

    def _error(self, refused: Refused, *, hidden: bool = False) -> bytes:
        """In words, where the debugger reads them."""
        if hidden and not self._words:
            return b"E%02x" % refused.number
        return b"E." + escaped(one_line(str(refused)).encode("ascii", "replace"))

    # -- stopping and going on ----------------------------------------------------------------

    def stopped(self, stop: Stop) -> bytes:
        """The guest has stopped; the reply that the debugger waits for."""
        self._last = stop
        self._vcpu = stop.vcpu
        self.running = False
        return self.stop_reply(stop)

    def stop_reply(self, stop: Stop) -> bytes:
        number = _INTERRUPTED if stop.reason == "interrupt" else _TRAPPED
        words = f"T{number:02x}thread:{stop.vcpu + 1:x};"
        if stop.watched is not None and stop.reason == "watch":
            words += f"{_HITS[stop.watched.kind]}:{stop.watched.address:x};"
        elif stop.reason in ("software", "hardware"):
            words += "swbreak:;" if stop.reason == "software" else "hwbreak:;"
        return words.encode()

    def _go(self, steps: int | None, going: Iterable[int] | None = None) -> None:
        self._target.resume(steps, None if going is None else list(going))
        self.running = True

    def _continue_some(self, rest: bytes) -> None:
        """vCont;ACTION[:THREAD]...: for each vCPU the first action that names it."""
        count = len(self._target.vcpus)
        actions: dict[int, bytes] = {}
        words = rest.split(b";")
        if len(words) > count + 1:
            raise ValueError(f"{len(words)} actions for {count} vCPUs")
        for word in words:
            action, _, thread = word.partition(b":")
            if action[:1] not in (b"c", b"C", b"s", b"S"):
                raise ValueError(f"no action {action.decode('latin-1')!r}")
            chosen = self._thread(thread) if thread else None
            for vcpu in range(count) if chosen is None else (chosen,):
                actions.setdefault(vcpu, action[:1].lower())
        steppers = [vcpu for vcpu, action in actions.items() if action == b"s"]
        steps = None
        if steppers:
            steps = self._vcpu if self._vcpu in steppers else steppers[0]
        # Of several that are to step, one does; the others wait for their turn.
        self._go(steps, [vcpu for vcpu, action in actions.items() if action == b"c"])

    def _detach(self, rest: bytes) -> bytes:
        self._target.let_go()
        self.running = self.detached = True
        return b"OK"

    def _kill(self, rest: bytes) -> bytes | None:
        self._quit()
        return b"OK" if rest else None

    # -- registers ----------------------------------------------------------------------------

    def _read_registers(self, rest: bytes) -> bytes:
        values = self._target.read_registers(self._vcpu)
        registers = self._target.debug.registers
        return b"".join(
            _little_hex(value, each.bits) for value, each in zip(values, registers, strict=True)
        )

    def _write_all_registers(self, rest: bytes) -> bytes:
        values, at = {}, 0
        for number, register in enumerate(self._target.debug.registers):
            digits = register.bits // 4
            values[number] = _from_little_hex(rest[at : at + digits], register.bits)
            at += digits
        if at != len(rest):
            raise ValueError(f"{len(rest)} digits for all registers, which have {at}")
        self._target.write_registers(self._vcpu, values)
        return b"OK"

    def _register(self, digits: bytes) -> int:
        number = _number(digits)
        if number >= len(self._target.debug.registers):
            raise ValueError(f"there is no register {number}")
        return number

    def _read_register(self, rest: bytes) -> bytes:
        number = self._register(rest)
        value = self._target.read_registers(self._vcpu)[number]
        return _little_hex(value, self._target.debug.registers[number].bits)

    def _write_register(self, rest: bytes) -> bytes:
        digits, _, value = rest.partition(b"=")
        number = self._register(digits)
        bits = self._target.debug.registers[number].bits
        self._target.write_registers(self._vcpu, {number: _from_little_hex(value, bits)})
        return b"OK"

    # -- memory -------------------------------------------------------------------------------

    def _read_memory(self, rest: bytes) -> bytes:
        address, size = _pair(rest)
        if not size:
            return b""
        return self._target.read(self._vcpu, address, min(size, MOST_BYTES)).hex().encode()

    def _write_memory(self, rest: bytes) -> bytes:
        where, _, digits = rest.partition(b":")
        return self._write(where, bytes.fromhex(digits.decode("latin-1")))

    def _write_binary(self, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        return self._write(where, unescaped(data))

    def _write(self, where: bytes, data: bytes) -> bytes:
        address, size = _pair(where)
        if size != len(data):
            raise ValueError(f"{len(data)} bytes came where {size} were announced")
        self._target.write(self._vcpu, address, data)
        return b"OK"

    # -- breakpoints --------------------------------------------------------------------------

    def _insert(self, rest: bytes) -> bytes:
        kind, address, size = _three(rest)
        if kind == 0:
            self._target.insert_software(self._vcpu, address)
            return b"OK"
        if _WATCHES.get(kind) not in self._target.debug.watches:
            return b""  # x86 doesn't watch for reads alone
        self._target.insert_hardware(_hardware(kind, address, size))
        return b"OK"

    def _remove(self, rest: bytes) -> bytes:
        kind, address, size = _three(rest)
        if kind == 0:
            self._target.remove_software(address)
            return b"OK"
        if _WATCHES.get(kind) not in self._target.debug.watches:
            return b""
        self._target.remove_hardware(_hardware(kind, address, size))
        return b"OK"

    # -- threads ------------------------------------------------------------------------------

    def _thread(self, digits: bytes) -> int | None:
        """The vCPU of that number; None for all or any. Raises ValueError for no such."""
        if digits in (b"-1", b"0"):
            return None
        number = _number(digits)
        if not 1 <= number <= len(self._target.vcpus):
            raise ValueError(f"there is no vCPU for thread {number}")
        return number - 1

    def _choose_thread(self, rest: bytes) -> bytes:
        chosen = self._thread(rest[1:])
        if rest[:1] == b"g" and chosen is not None:
            self._vcpu = chosen
        return b"OK"

    def _is_alive(self, rest: bytes) -> bytes:
        self._thread(rest)
        return b"OK"

    def _threads(self, rest: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (n + 1) for n in range(len(self._target.vcpus)))

    def _thread_words(self, rest: bytes) -> bytes:
        vcpu = self._thread(rest)
        return f"vCPU {vcpu}".encode().hex().encode()

    # -- the rest -----------------------------------------------------------------------------

    def _supported(self, rest: bytes) -> bytes:
        self._words = b"error-message+" in rest.lstrip(b":").split(b";")
        return _SUPPORTED.encode()

    def _start_no_acks(self, rest: bytes) -> bytes:
        self.no_acks = True
        return b"OK"

    def _description(self, rest: bytes) -> bytes:
        offset, size = _pair(rest)
        text = self._target.debug.description.encode()
        piece = text[offset : offset + min(size, LONGEST // 2)]
        more = offset + len(piece) < len(text)
        return (b"m" if more else b"l") + escaped(piece)

    def _physical(self, rest: bytes) -> bytes:
        self._target.physical = _number(rest) != 0
        return b"OK"

    def _command(self, rest: bytes) -> bytes:
        words = bytes.fromhex(rest.decode("latin-1")).decode("utf-8", "replace").split()
        try:
            said = self._say(words)
        except (Refused, ValueError) as error:
            said = f"{error}\n"
        return said.encode("utf-8", "replace")[:MOST_BYTES].hex().encode() or b"OK"

    def _say(self, words: list[str]) -> str:
        match words:
            case ["why"]:
                return f"{self._why}\n"
            case ["can"]:
                debug = self._target.debug
                lacking = debug.abilities.lacking()
                stops, watches = debug.places(Watch.EXECUTE), debug.places(Watch.WRITE)
                same = ", in the same registers" if stops == watches else ""
                return (
                    f"this host's KVM lacks: {lacking or 'nothing'}\n"
                    f"hardware breakpoints: {len(stops)}, watchpoints: {len(watches)}{same}\n"
                )
            case ["translate", address]:
                gpa, size = self._target.translate(self._vcpu, int(address, 0))
                return f"GPA {gpa:#x}, {size:#x} bytes to the page's end\n"
            case ["states", address]:
                return self._states(int(address, 0), PAGE_SIZE)
            case ["states", address, size]:
                return self._states(int(address, 0), int(size, 0))
            case ["physical", "on" | "off" as word]:
                self._target.physical = word == "on"
                return f"addresses are {'guest-physical' if word == 'on' else 'virtual'} now\n"
        return _HELP

    def _states(self, address: int, size: int) -> str:
        if address < 0 or size <= 0:
            raise ValueError("an address and a number of bytes are wanted")
        runs = self._target.access.states(Range(address, size))
        lines = [f"{run.start:#x} {run.size:#x} {state.value}\n" for run, state in runs[:64]]
        return "".join(lines) + ("...\n" if len(runs) > 64 else "") or "no RAM there\n"


def _hardware(kind: int, address: int, size: int) -> Hardware:
    watch = _WATCHES[kind]
    return Hardware(watch, address, 1 if watch is Watch.EXECUTE else size)


def _number(digits: bytes) -> int:
    """Up to 16 hex digits. Raises ValueError for anything else."""
    if not 1 <= len(digits) <= 16 or not digits.isalnum():
        raise ValueError(f"no number: {digits[:20].decode('latin-1')!r}")
    return int(digits, 16)


def _pair(rest: bytes) -> tuple[int, int]:
    first, comma, second = rest.partition(b",")
    if not comma:
        raise ValueError("an address and a size are wanted")
    return _number(first), _number(second)


def _three(rest: bytes) -> tuple[int, int, int]:
    kind, _, where = rest.split(b";")[0].partition(b",")
    return (_number(kind), *_pair(where))


def _little_hex(value: int, bits: int) -> bytes:
    return value.to_bytes(bits // 8, "little").hex().encode()


def _from_little_hex(digits: bytes, bits: int) -> int:
    if len(digits) != bits // 4:
        raise ValueError(f"{len(digits)} digits for a register of {bits} bits")
    return int.from_bytes(bytes.fromhex(digits.decode("latin-1")), "little")
