"""A machine as an object of a Python program."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from vmm.arch import architecture
from vmm.control.console import Console
from vmm.control.operations import Operations, Status
from vmm.core.errors import PyvmmError, UsageError
from vmm.core.event_loop import EventLoop, drain
from vmm.core.events import Kind
from vmm.core.lean_typing import TYPE_CHECKING, Self, TypeVar
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.exits.outcome import STOPPED, Outcome
from vmm.library.console import ConsoleTarget, Line
from vmm.library.events import Events
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine as RunningMachine
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Policy

if TYPE_CHECKING:
    from vmm.conversion.events import EventFeed
    from vmm.conversion.scheme import Scheme
    from vmm.exits.own import ExitHandler
    from vmm.machine.extensions import Extensions, OwnDevice
    from vmm.machine.report_keys import Report
    from vmm.memory.backing import Backing

T = TypeVar("T")
_LAST_SECONDS = 10.0
"""How long the end of a `with` block waits for a machine that it has stopped."""


class NotRunning(PyvmmError):
    """What was asked needs a running guest: it hasn't been started, or has ended."""


class Machine:
    """One virtual machine, run on a thread of its own; several may run in one process.

    No signal, no terminal and no standard stream is touched. Every method may be called on any
    thread, except from a policy's hook or the console's function, in which the guest waits.

        with Machine(MachineConfig(private_memory="auto"), policies=[Quota(8 << 20)]) as machine:
            print(machine.run(timeout=60), machine.report["conversions"])
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        policies: Sequence[Policy] = (),
        console: ConsoleTarget = None,
        devices: Sequence[OwnDevice] = (),
        exits: Sequence[ExitHandler] = (),
        scheme: type[Scheme] | None = None,
        backing: Callable[[int], Backing] | None = None,
    ) -> None:
        """`policies` are asked after those that `config` names. `console` gets what the guest
        prints: a function, which is called with bytes, a file, a descriptor, or "pty".

        `devices`: instances of subclasses of PortDevice, PciDevice and VirtioDevice; `exits`: of
        ExitHandler. `scheme`: a class in the place of the one that its `like` names, made with the
        same arguments; `backing`: what makes the private side's backing, given its size in bytes,
        `like` being "memfd" unless it says so.

        Raises UsageError for a configuration or a policy that is no good, HostError for an
        architecture that pyvmm doesn't know. Opens nothing of the host's.
        """
        self.extensions: Extensions | None = None
        if devices or exits or scheme is not None or backing is not None:
            from vmm.machine.extensions import Extensions  # most machines have none

            self.extensions = Extensions(devices, exits, scheme, backing)
            config = self.extensions.as_ours(config)
        config.validate(architecture())
        if config.execute is not None:
            raise UsageError(
                "execute: its streams would be the program's own; run pyvmm --exec instead"
            )
        if policies and config.private_memory is None:
            raise UsageError("policies need private_memory: an ordinary VM converts no pages")
        if policies:
            from vmm.policy.arguments import require_hooks  # takes as long as all the rest
        for policy in policies:
            if not isinstance(policy, Policy):
                raise UsageError(f"{policy!r} is not an instance of a subclass of vmm.Policy")
            require_hooks(policy)
        self.policies: Sequence[Policy] = tuple(policies)
        self._line = Line(console)
        self._machine = RunningMachine(config, embedding=self)
        self._thread = threading.Thread(target=self._run, name="pyvmm machine", daemon=True)
        self._calls: deque[Callable[[], None]] = deque()
        self._bell: int | None = None
        self._bell_lock = threading.Lock()
        self._stop_reason: str | None = None
        self._started = threading.Event()
        self._operations: Operations | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._is_error_told = False
        self._events: list[Events] = []

    # -- its life -----------------------------------------------------------------------------

    def start(self) -> None:
        """Set it up and let the guest run; returns when it does.

        Raises UsageError and HostError for what keeps it from starting. A machine starts once.
        """
        if self._thread.ident is not None:
            raise UsageError("a machine starts once; make another one")
        self._thread.start()
        self._started.wait()
        if self._operations is None:
            self._raise_error()

    def wait(self, timeout: float | None = None) -> Outcome:
        """How it ended, once it has, `timeout` seconds from now at most. Raises TimeoutError; what
        a policy raised as PolicyError."""
        if self._thread.ident is None:
            raise NotRunning("the machine hasn't been started")
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the guest still runs after {timeout:g} s")
        self._raise_error()
        assert self._outcome is not None
        return self._outcome

    def run(self, timeout: float | None = None) -> Outcome:
        """`start` and `wait`; at the time's end the guest is stopped, and TimeoutError raised."""
        self.start()
        try:
            return self.wait(timeout)
        except TimeoutError:
            self.stop()
            raise

    def stop(self, reason: str = "by the program") -> None:
        """End it at once, with the exit "stopped"; nothing where it has ended."""
        with self._bell_lock:
            self._stop_reason = self._stop_reason or reason
            if self._bell is not None:
                self._machine.stop(Outcome(STOPPED, reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop("the program left its block")
        if self._thread.ident is not None:
            self._thread.join(_LAST_SECONDS)
        if not self._thread.is_alive():
            self._line.close()
        if kind is None and not self._is_error_told:
            self._raise_error()  # nobody has waited for the end: it must not get lost

    def _raise_error(self) -> None:
        """What the run raised, if anything: to a caller that asks for its start or end."""
        if self._error is not None:
            self._is_error_told = True
            raise self._error

    @property
    def is_running(self) -> bool:
        """Whether the guest has started and not ended (it may be paused)."""
        return self._bell is not None

    @property
    def report(self) -> Report:
        """What the run did, as the command's --report has it. Raises NotRunning before the end."""
        if self._machine.report is None:
            raise NotRunning("there is a report when the guest has ended")
        return self._machine.report

    # -- while it runs ------------------------------------------------------------------------

    def pause(self) -> None:
        """The guest stands still: no vCPU runs, no device touches its memory. Raises NotRunning,
        and TimeoutError where a device doesn't come to rest."""
        if not self._ask(lambda operations: operations.pause()):
            raise TimeoutError("a device does not come to rest; the guest runs on")

    def resume(self) -> None:
        """It goes on. Raises NotRunning."""
        self._ask(lambda operations: operations.resume())

    def events(self, capacity: int = 4096) -> Events:
        """What happens from the start to the end, as an iterator of `Requested`, `Changed`, `Noted`
        and `Lost`, for one reader, on any thread. The guest never waits for it.

        To be called before `start`: a machine that nobody follows notes nothing. Raises UsageError
        afterwards.
        """
        if self._thread.ident is not None:
            raise UsageError("the machine has started: ask for its events before `start`")
        events = Events(capacity)
        self._events.append(events)
        return events

    def status(self) -> Status:
        """The numbers of this moment. Raises NotRunning."""
        return self._ask(lambda operations: operations.status())

    def convert(self, kind: Kind, gpa: int, size: int) -> None:
        """Convert whole pages as if the guest had asked; it is not told.

        Raises OSError with the errno that a guest would have got, that of a policy's Deny for
        example, or EBUSY; ValueError for anything but whole pages; NotRunning.
        """
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ValueError(f"gpa {gpa:#x}, size {size:#x}: whole pages of {PAGE_SIZE} bytes")
        answer = self._ask(lambda operations: operations.convert(kind, gpa, size))
        if answer:
            what = f"{kind.value} of {Range(gpa, size)}"
            raise OSError(-answer, f"{what}: {os.strerror(-answer)}")

    def states(self) -> list[tuple[Range, PageState]]:
        """The runs of RAM pages in equal state, in address order. Raises NotRunning."""
        return self.memory.states()

    @property
    def memory(self) -> GuestMemory:
        """Guest memory: `pread(size, gpa)` and `pwrite(data, gpa)` reach shared pages, and raise
        PrivateAccess for others. Raises NotRunning; an access must end before the machine does."""
        operations = self._operations
        if operations is None or not self.is_running:
            raise NotRunning("the guest doesn't run")
        return operations.memory

    def type(self, data: bytes) -> int:
        """Type on the serial console; how many bytes found room on their way to the guest."""
        return self._line.type(data)

    @property
    def console_path(self) -> str | None:
        """The pseudo-terminal of a machine with console="pty"."""
        return self._line.path

    def _ask(self, call: Callable[[Operations], T]) -> T:
        """`call`'s result, made on the machine's thread; what it raises is raised here."""
        answered = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def answer() -> None:
            try:
                if self._operations is None or not self.is_running:
                    raise NotRunning("the guest doesn't run")
                results.append(call(self._operations))
            except BaseException as error:
                errors.append(error)
            answered.set()

        if threading.get_ident() == self._thread.ident:
            answer()
        else:
            with self._bell_lock:
                if self._bell is None:
                    raise NotRunning("the guest doesn't run")
                self._calls.append(answer)
                os.eventfd_write(self._bell, 1)
            answered.wait()
        if errors:
            raise errors[0]
        return results[0]

    # -- vmm.machine.machine.Embedding, on the machine's thread -------------------------------

    @property
    def follow(self) -> Callable[[EventFeed], None] | None:
        return self._follow if self._events else None

    def _follow(self, feed: EventFeed) -> None:
        for events in self._events:
            events.follow(feed)

    def make_console(self, on_quit: Callable[[], None]) -> Console:
        return self._line.connect(on_quit)

    def running(self, loop: EventLoop, operations: Operations) -> None:
        self._operations = operations
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

        def serve() -> None:
            drain(bell)
            self._serve()

        loop.add(bell, serve, unheld=True)
        with self._bell_lock:
            self._bell = bell
            if self._stop_reason is not None:
                self._machine.stop(Outcome(STOPPED, self._stop_reason))
        self._started.set()

    def _serve(self) -> None:
        while True:
            try:
                call = self._calls.popleft()
            except IndexError:
                return
            call()

    def _run(self) -> None:
        try:
            self._outcome = self._machine.run()
        except BaseException as error:
            self._error = error
        finally:
            with self._bell_lock:
                bell, self._bell = self._bell, None
            self._serve()  # threads that still wait for an answer
            for events in self._events:
                events.finish()
            if bell is not None:
                os.close(bell)
            self._started.set()
