"""virtio-console (virtio 1.2, 5.3): consoles (hvc0...) and plain ports over ConsoleBackends.

struct virtio_console_control: le32 id; le16 event, value
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from vmm.core.lean_typing import TYPE_CHECKING, Protocol
from vmm.devices.virtio.device import EXPECTED, GuestMemory, VirtioDevice, Watch
from vmm.devices.virtio.queue import Chain, QueueError, SplitQueue
from vmm.devices.virtio.segments import gather, scatter, take_front, total

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

F_MULTIPORT = 1 << 1

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY = 0, 1, 2, 3
CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 4, 5, 6, 7

QUEUE_SIZE = 64
CONTROL_RX, CONTROL_TX = 2, 3
MOST_PORTS = 16
_CHUNK = 64 << 10
_MOST_MESSAGE = 4096  # bytes of one for the guest: a port's name is somebody's word
MOST_OUTPUT = 1 << 20  # in one buffer; Linux' have 32 KiB at most

# What a new process is told by the last one (`VirtioDevice.keep_for_next`): for each port whether
# the guest has it open, for each whether it was introduced, and whether the driver is ready.
_KEPT_OPEN = (1 << MOST_PORTS) - 1
_KEPT_READY = 1 << 2 * MOST_PORTS

_CONTROL = struct.Struct("<IHH")
_CONFIG = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr


class ConsoleBackend(Protocol):
    """One byte stream of the host."""

    def start(self, changed: Callable[[], None], watch: Watch) -> None:
        """From now on `changed()` is called, on the loop's thread, when what `want` said is so."""
        ...

    def connected(self) -> bool:
        """Whether somebody is at the other end; takes in who has come."""
        ...

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none when there are none now."""
        ...

    def write(self, data: bytes) -> bool:
        """Take the bytes; False when there is no room for them now. OSError: they are lost."""
        ...

    def want(self, *, readable: bool, writable: bool) -> None:
        """What to wait for, besides somebody's coming."""
        ...

    def stop(self) -> None:
        """Wait for nothing any more, until the next `start`."""
        ...

    def close(self) -> None: ...


class Port:
    """One port: a console without a name, or a plain port with one."""

    def __init__(self, backend: ConsoleBackend, name: str | None = None) -> None:
        self.backend = backend
        self.name = name
        self.clear()

    def clear(self) -> None:
        self.guest_open = False  # the guest's side is open
        self.introduced = False  # the guest was told what it is
        self.told_open = False  # what the guest was told of the host's side
        self.hungry = False  # the guest has buffers for more input
        self.stuck = False  # output waits for room

    @property
    def is_console(self) -> bool:
        return self.name is None


class VirtioConsole(VirtioDevice):
    """Ports 0 to n. A console's output is dropped where the host is slow (Linux spins until it
    is taken), a plain port's waits."""

    device_id = 3
    pci_class = 0x078000  # communication controller, other
    descriptors: Sequence[int] | None = None
    """All that its ports need open, if it is to have a process of its own."""

    def __init__(self, ports: Sequence[Port]) -> None:
        super().__init__()
        self._ports = list(ports)
        self.features = F_MULTIPORT
        self.queue_sizes = (QUEUE_SIZE,) * (2 + 2 * len(self._ports))
        # What the guest has to be told, by port and event: at most one message of each.
        self._messages: dict[tuple[int, int], bytes] = {}
        self._ready = False  # the driver has said that it is

    def config(self) -> bytes:
        """struct virtio_console_config (5.3.4); the sizes mean nothing, F_SIZE isn't offered."""
        return _CONFIG.pack(0, 0, len(self._ports), 0)

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        super().activate(memory, queues, features)
        for number, port in enumerate(self._ports):
            # 5.3.5: without F_MULTIPORT there is one port, a console, and it is open.
            port.guest_open = not features & F_MULTIPORT and number == 0
            port.hungry = True
            if {_input_queue(number), _input_queue(number) + 1} <= queues.keys():
                port.backend.start(partial(self._changed, number), self.watch)
                self._want(port)

    @property
    def ports_shut(self) -> list[tuple[int, bytes]]:
        """The queue and the messages by which the driver learns that nobody is at plain ports."""
        return [
            (CONTROL_RX, _CONTROL.pack(number, PORT_OPEN, 0))
            for number, port in enumerate(self._ports)
            if not port.is_console
        ]

    @property
    def said_to_nobody(self) -> dict[int, int]:
        """The queues on which Linux' driver waits for each answer, with its processor; and what
        `resumed` is to take for said where nobody has heard it."""
        outputs = (_input_queue(number) + 1 for number in range(len(self._ports)))
        return {**dict.fromkeys(outputs, 0), CONTROL_TX: _KEPT_READY | _KEPT_OPEN}

    def resumed(self, kept: int) -> None:
        """What a guest's port gets while nobody has it open, the guest drops."""
        self._ready = bool(kept & _KEPT_READY)
        for number, port in enumerate(self._ports):
            port.guest_open = port.guest_open or bool(kept >> number & 1)
            port.introduced = bool(kept >> MOST_PORTS + number & 1)
            if port.introduced:
                self._introduce(number)
            elif self._ready:
                self._tell(number, PORT_ADD, 1)
            self._want(port)

    def _keep(self) -> None:
        kept = _KEPT_READY if self._ready else 0
        for number, port in enumerate(self._ports):
            kept |= port.guest_open << number | port.introduced << MOST_PORTS + number
        self.keep_for_next(kept)

    def wake_input(self, number: int) -> None:
        """There is input for a port whose backend waits for no fd: it is taken soon."""
        self.wake(_input_queue(number))

    def reset(self) -> None:
        super().reset()
        self._ready = False
        self._messages.clear()
        for port in self._ports:
            port.clear()
            port.backend.stop()

    def state(self) -> State:
        """See vmm.core.saved.Stateful. What a backend has not got rid of is lost."""
        return {
            "ports": [
                {
                    "name": port.name,
                    "guest_open": port.guest_open,
                    "told_open": port.told_open,
                }
                for port in self._ports
            ],
            "messages": [
                {"port": port, "event": event, "message": message.hex()}
                for (port, event), message in self._messages.items()
            ],
        }

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful. The guest knows a port by its name."""
        for port, inner in zip(self._ports, saved.each("ports", len(self._ports)), strict=True):
            name = inner.text("name") if inner.has("name") else None
            if name != port.name:
                raise inner.bad(
                    f"its name is {_shown(name)}, and --console has {_shown(port.name)} there"
                )
            port.guest_open = inner.flag("guest_open")
            port.told_open = inner.flag("told_open")
            inner.finish()
            if self._memory is not None:
                self._want(port)
        for inner in saved.inners("messages", 8 * MOST_PORTS):
            key = inner.number("port", len(self._ports) - 1), inner.number("event", PORT_NAME)
            self._messages[key] = inner.bytes("message", most=_MOST_MESSAGE)
            inner.finish()

    def close(self) -> None:
        for port in self._ports:
            port.backend.close()

    def process(self, queue_index: int) -> bool:
        queue = self._queues[queue_index]
        if queue_index == CONTROL_RX:
            return self._send_messages(queue)
        if queue_index == CONTROL_TX:
            return self.answer_all(queue, self._control)
        number = 0 if queue_index < 2 else queue_index // 2 - 1
        port = self._ports[number]
        self._tell_connected(number, port)
        wants_interrupt = self._output(port, queue) if queue_index & 1 else self._input(port, queue)
        self._tell_connected(number, port)
        self._want(port)
        return wants_interrupt

    def _tell_connected(self, number: int, port: Port) -> None:
        """Who comes to a plain port, or goes, is news to the guest."""
        if port.backend.connected() != port.told_open and not port.is_console:
            port.told_open = not port.told_open
            self._tell(number, PORT_OPEN, port.told_open)

    def _changed(self, number: int) -> None:
        self.serve(_input_queue(number))
        if self._ports[number].stuck:
            self.serve(_input_queue(number) + 1)

    def _want(self, port: Port) -> None:
        port.backend.want(readable=port.guest_open and port.hungry, writable=port.stuck)

    # --- data ---

    def _input(self, port: Port, queue: SplitQueue) -> bool:
        assert self._memory is not None
        used: list[tuple[int, int]] = []
        port.hungry = True
        out_of_turn = False
        while port.guest_open:
            out_of_turn = queue.budget.spent
            chains = queue.take(1)
            if not chains:
                port.hungry = out_of_turn
                break
            (chain,) = chains
            room = min(total(chain.writable), _CHUNK)
            data = port.backend.read(room) if room else b""
            if not data and room:
                queue.put_back(1)
                queue.more = False  # the backend will say when
                break
            try:
                scatter(self._memory, chain.writable, data)
            except EXPECTED:
                queue.publish(used)
                raise
            used.append((chain.head, len(data)))
            self.statistics.bytes_read += len(data)
            queue.budget.spend(2 + len(chain.writable), len(data))
        queue.more = queue.more or out_of_turn
        self.statistics.requests += len(used)
        return queue.publish(used)

    def _output(self, port: Port, queue: SplitQueue) -> bool:
        used: list[tuple[int, int]] = []
        port.stuck = False
        try:
            while True:
                chains = queue.take(1)
                if not chains:
                    break
                written = self._write(port, chains[0])
                if written is None:
                    queue.put_back(1)
                    queue.more = False  # the backend will say when
                    port.stuck = True
                    break
                used.append((chains[0].head, 0))
                queue.budget.spend(2 + len(chains[0].readable), written)
        except EXPECTED:
            queue.publish(used)
            raise
        self.statistics.requests += len(used)
        return queue.publish(used)

    def _write(self, port: Port, chain: Chain) -> int | None:
        """Hand one buffer to the backend; its size, or None where it has to wait."""
        assert self._memory is not None
        size = total(chain.readable)
        if size > MOST_OUTPUT:
            raise QueueError(f"output {chain.head} of {size:#x} bytes, more than {MOST_OUTPUT:#x}")
        data = gather(self._memory, chain.readable)
        try:
            taken = port.backend.write(data)
        except OSError:
            self.statistics.errors += 1
            return size
        if taken:
            self.statistics.bytes_written += size
        elif not port.is_console:
            return None
        return size

    # --- control ---

    def _control(self, chain: Chain) -> int:
        assert self._memory is not None
        front, _ = take_front(chain.readable, _CONTROL.size)
        number, event, value = _CONTROL.unpack(gather(self._memory, front))
        if event == DEVICE_READY and value:
            self._ready = True
            for i in range(len(self._ports)):
                self._tell(i, PORT_ADD, 1)
        elif number >= len(self._ports):
            self.statistics.errors += 1
        elif event == PORT_READY and value:
            self._introduce(number)
        elif event == PORT_OPEN:
            self._ports[number].guest_open = bool(value)
            self.wake(_input_queue(number))
        self._keep()  # before this is answered: heard twice, it is the same
        return 0

    def _introduce(self, number: int) -> None:
        port = self._ports[number]
        port.introduced = True
        if port.name is None:
            self._tell(number, CONSOLE_PORT, 1)
        else:
            self._tell(number, PORT_NAME, 1, port.name.encode("utf-8", "surrogateescape"))
        port.told_open = port.is_console or port.backend.connected()
        self._tell(number, PORT_OPEN, port.told_open)

    def _tell(self, number: int, event: int, value: int, extra: bytes = b"") -> None:
        """Queue a message; one that says the opposite and wasn't sent yet is void."""
        self._messages.pop((number, event), None)
        self._messages[number, event] = _CONTROL.pack(number, event, value) + extra
        self.wake(CONTROL_RX)

    def _send_messages(self, queue: SplitQueue) -> bool:
        assert self._memory is not None
        used: list[tuple[int, int]] = []
        while self._messages:
            chains = queue.take(1)
            if not chains:
                break
            key = next(iter(self._messages))
            message = self._messages.pop(key)
            try:
                written = scatter(self._memory, chains[0].writable, message)
            except EXPECTED:
                queue.publish(used)
                raise
            queue.budget.spend(1 + len(chains[0].writable), written)
            used.append((chains[0].head, written))
        return queue.publish(used)


def _shown(name: str | None) -> str:
    return "none" if name is None else f"{name!a:.80}"


def _input_queue(port: int) -> int:
    """The queue of a port's input; its output is the next one."""
    return 2 * port + 2 if port else 0
