"""A run, from a validated configuration to an outcome and a report. Wires; does not work."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from functools import partial

from kvm_bindings import fdops
from vmm.arch import architecture
from vmm.control.live import live_view
from vmm.control.operations import Operations
from vmm.control.signals import SignalReactions
from vmm.core import own_code
from vmm.core.errors import HostError, UsageError, in_words, tell
from vmm.core.event_loop import EventLoop
from vmm.core.lean_signal import signal
from vmm.core.lean_typing import TYPE_CHECKING, Protocol
from vmm.core.own_code import ExtensionError
from vmm.exits.outcome import (
    EXTENSION_ERROR,
    FAILED,
    INTERNAL_ERROR,
    KILLED,
    PANIC,
    POLICY_ERROR,
    POWEROFF,
    QUIT,
    RESET,
    STOPPED,
    Outcome,
)
from vmm.exits.run_loop import install_kick_handler
from vmm.exits.stragglers import Stragglers
from vmm.exits.vcpu_group import VcpuGroup
from vmm.machine.config import MachineConfig
from vmm.machine.guest_vm import GuestVm
from vmm.machine.images import OpenedImages
from vmm.machine.peripherals import open_devices
from vmm.machine.report import ReportFile, build_report, unshared
from vmm.memory.guest_memory import LaunchMemory
from vmm.policy import End, Policy, PolicyError, PolicyKill
from vmm.policy.protocol import BrokenOff

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.arch.protocol import Architecture, Guest
    from vmm.control.console import Console
    from vmm.control.control_socket import ControlSocket
    from vmm.control.saving import Saving
    from vmm.control.status_line import StatusLine
    from vmm.conversion.events import EventFeed
    from vmm.conversion.lending import Lender
    from vmm.conversion.observer import ConversionObserver
    from vmm.core.unix_listener import UnixListener
    from vmm.devices.virtio.device import DeviceObserver
    from vmm.devices.virtio.iommu import VirtioIommu
    from vmm.machine.back_ends import Spares
    from vmm.machine.debugger import Debugger
    from vmm.machine.execution import Execution
    from vmm.machine.extensions import Extensions
    from vmm.machine.memory_file import MemoryFile
    from vmm.machine.report_keys import Report
    from vmm.machine.restoring import Restoring
    from vmm.machine.tracing import RunTrace
    from vmm.memory.aliased_memory import Announce
    from vmm.sandbox.enter import Sandbox

_PANIC_TEXT = b"Kernel panic - not syncing"
_INIT_FAILED_TEXT = b"pyvmm-init: failed: "  # firmware/init/init.c
_REBOOT_TEXT = b"reboot: Restarting system"

_LAST_OUTPUT_SECONDS = 1.0
"""How long a stopped vCPU may take to get its last output out."""
_LAST_WORK_SECONDS = 2.0
"""How long it may then take to finish what it is doing."""


class Embedding(Protocol):
    """What a program does with a machine that is a part of it (vmm.library)."""

    policies: Sequence[Policy]
    extensions: Extensions | None
    """What is the program's own in the machine, besides policies."""

    @property
    def follow(self) -> Callable[[EventFeed], None] | None:
        """What follows the machine's events, if anything does."""

    def make_console(self, on_quit: Callable[[], None]) -> Console:
        """What the guest's serial line is connected to."""

    def running(self, loop: EventLoop, operations: Operations) -> None:
        """The guest runs. On the machine's thread, which serves the loop from now on."""


class Machine:
    """One VM with its vCPUs and devices; `run` may be called once."""

    def __init__(
        self,
        config: MachineConfig,
        images: OpenedImages | None = None,
        arch: Architecture | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        """`images` are the configuration's, where the caller has opened them already; `arch` is
        the guest's architecture, by default this machine's. Without an `embedding` the process is
        the machine's: its signals, and standard input and output as the console. Raises HostError
        for a machine of an architecture that pyvmm doesn't know."""
        self._architecture = architecture() if arch is None else arch
        self._own = _extensions(config, embedding)
        self._config = config
        if self._own is not None:
            self._config = self._own.as_ours(config)
            self._config.validate(self._architecture)
        self._images = images
        self._embedding = embedding
        self._cleanup = ExitStack()
        self._signals = ExitStack()
        self._outcomes: list[Outcome] = []
        self._lender: Lender | None = None
        self._unshared: set[str] = set()
        self._vcpus = VcpuGroup()
        self._abandoned = False
        self._sandbox: Sandbox | None = None
        self.report: Report | None = None
        """The report, once the run is over."""

    # -- the life of a run --------------------------------------------------------------------

    def run(self) -> Outcome:
        """Set the machine up, run the guest to its end, account for it, close everything.

        Raises UsageError and HostError for what keeps the guest from starting.
        """
        with self._cleanup, self._signals:
            started = time.monotonic()
            self._open_inputs()
            try:
                self._set_up_vm()
                self._load_guest()
            except ExtensionError as error:
                self._own_code_failed(error)
                raise
            except OSError as error:  # KvmError is one
                words = in_words(error)
                if type(error) is OSError and error.filename is None:
                    words = f"the host refused what the machine needs: {words}"
                raise HostError(words) from error
            if self._report_file is not None:
                self._report_file.begin()
            if self._memory_file is not None:
                memory, bit = self._vm.memory, self._vm.scheme.shared_alias
                served = self._memory_file.served(
                    memory, bit, self._watcher, self._loop, self.stop, self._enter_early
                )
                self._cleanup.enter_context(served)
            self._enter_sandbox()
            outcome = None
            try:
                outcome = self._refusal_to_boot() or self._run_guest()
                if self._execution is not None:
                    outcome = self._execution.outcome(outcome)
                if not self._abandoned:  # else a policy may be at work still
                    end = End(outcome.exit, outcome.reason)
                    self._converter.hooks.exit(end, self._converter.view)
            except (PolicyError, ExtensionError) as error:
                word = POLICY_ERROR if isinstance(error, PolicyError) else EXTENSION_ERROR
                outcome = outcome or Outcome(word, str(error))
                self._own_code_failed(error)
                raise
            except OSError as error:
                # Nobody else could be told: no device of the guest's, no caller.
                words = f"the host refused what the run needs: {in_words(error)}"
                outcome = outcome or Outcome(INTERNAL_ERROR, words)
                raise HostError(words) from error
            finally:
                if outcome is not None:
                    self._write_report(outcome, time.monotonic() - started)
            if self._execution is not None:
                self._execution.tell_console(outcome, self._console.tail())
                self._execution.take_share()
        return outcome

    def _open_inputs(self) -> None:
        """Everything the user named, before the host is asked for anything."""
        config = self._config
        images = self._images or OpenedImages(self._architecture, config)
        self._cleanup.callback(images.close)
        config = images.config if self._own is None else self._own.as_ours(images.config)
        self._restoring: Restoring | None = None
        if config.restore is not None:
            config = self._open_snapshot(config, config.restore)
        self._config = config
        if config.report is not None or config.consoles:
            from vmm.machine.own_files import refuse_overwriting  # most runs write no file

            refuse_overwriting(config)
        self._guest = self._make_guest(images)
        self._cleanup.callback(self._guest.close)
        self._policies = _load_policies(config)
        if self._embedding is not None:
            self._policies += self._embedding.policies
        self._execution: Execution | None = None
        if config.execute is not None:
            from vmm.machine.execution import Execution

            self._execution = Execution(config.execute, config.share)
            self._cleanup.callback(self._execution.close)
            self._execution.connect(self.stop)
        self._virtio = open_devices(
            config, self._cleanup, self._execution, may_fork=self._embedding is None
        )
        if self._own is not None:
            self._own.join(self._virtio, config, self._cleanup)
        self._trace = None if config.trace is None else _open_trace(config.trace, config)
        if self._trace is not None:
            self._cleanup.callback(self._trace.close)
        self._status_line: StatusLine | None = None
        if config.status:
            from vmm.control.status_line import choose_status_line  # most runs do without

            self._status_line = choose_status_line(self._interject)
        self._control: ControlSocket | None = None
        if config.control is not None:
            from vmm.control.control_socket import ControlSocket

            self._control = ControlSocket(config.control)
            self._cleanup.callback(self._control.close)
        if config.user is not None and self._embedding is not None:
            raise UsageError("user: all threads of your program would change; use pyvmm run")
        self._memory_file: MemoryFile | None = None
        if config.memory_file is not None:
            if self._embedding is not None:
                raise UsageError("memory_file: libfuse wants a process of its own; use pyvmm run")
            from vmm.machine.memory_file import MemoryFile

            self._memory_file = MemoryFile(config.memory_file)
            self._cleanup.callback(self._memory_file.close)
        self._debugger: Debugger | None = None
        if config.gdb is not None:
            from vmm.machine.debugger import Debugger

            self._debugger = Debugger(config.gdb, sees_private=config.gdb_sees_private)
            self._cleanup.callback(self._debugger.close)
        self._report_file = None if config.report is None else ReportFile(config.report)
        if self._report_file is not None:
            self._cleanup.callback(self._report_file.close)
        if config.sandbox != "off" or config.user is not None:
            self._leave_somebody_outside()

    def _open_snapshot(self, config: MachineConfig, path: str) -> MachineConfig:
        """What the machine is, with the snapshot's word on it."""
        from vmm.machine.restoring import Restoring
        from vmm.snapshot.folder import SnapshotFolder

        if self._own is not None:
            raise UsageError("--restore: devices and schemes of your own are in no snapshot")
        folder = SnapshotFolder(path)
        self._cleanup.callback(folder.close)
        self._restoring = Restoring(folder, config, self._architecture)
        return self._restoring.config

    def _leave_somebody_outside(self) -> None:
        """What the run has to do with paths at its end is for a process that keeps its rights."""
        if self._config.allowed_paths:
            from vmm.sandbox.enter import require_paths

            require_paths(self._config.allowed_paths)
        # Not imported where nothing listens.
        sockets = sys.modules.get("vmm.core.unix_listener")
        listeners: list[UnixListener] = [] if sockets is None else sockets.listening()
        report = self._report_file
        replaced = report if report is not None and report.is_replaced else None
        shared = None if self._execution is None else self._execution.shared
        mounted = self._memory_file
        spares: list[Spares] = []
        if self._config.has_back_ends:
            from vmm.machine.back_ends import spare

            spares = spare(self._virtio)
        if not (replaced or shared or mounted or spares or listeners):
            return
        from vmm.sandbox.outside import Outside

        def last() -> None:
            for listener in listeners:
                listener.remove()
            if mounted is not None:
                mounted.leave()

        tasks: list[Callable[[bytes], None]] = []

        def done_outside(task: Callable[[bytes], None]) -> Callable[..., None]:
            tasks.append(task)
            number = len(tasks) - 1
            return lambda message=b"": outside.do(number, message)

        keeps = [listener.fd for listener in listeners]
        if replaced is not None:
            replaced.through = done_outside(replaced.replace)
        if shared is not None:
            shared.through = done_outside(lambda _: shared.take_back())
            keeps.append(shared.archive.fileno())
        if mounted is not None:
            mounted.through = done_outside(lambda _: mounted.leave())
        for each in spares:
            each.through = done_outside(each.connect)
            keeps += each.fds
            self._cleanup.callback(each.close)
        outside = Outside(tasks, last, keeps)
        self._cleanup.callback(outside.close)

    def _enter_sandbox(self) -> None:
        """Everything is open: give up what the run doesn't need any more."""
        config = self._config
        user = None
        if config.user is not None:
            from vmm.sandbox.user import become, user_named  # most runs stay who they are

            user = user_named(config.user)
        if config.sandbox == "off":
            if user is not None:
                become(user, self._written_folders())
            return
        from vmm.sandbox.enter import enter, enter_vcpu, kept_descriptors

        self._sandbox = enter(
            config.sandbox,
            kept=kept_descriptors(),
            output=self._console.output_fd,
            folders=self._written_folders(),
            paths=config.allowed_paths,
            maps=config.allow_mapped_io,
            connects=config.vsock is not None and not self._virtio["vsock"].apart,
            receives=config.control is not None
            or any(device.apart for device in self._virtio.values()),
            core_dumps=config.core_dumps,
            user=user,
        )
        if self._sandbox.seccomp:
            self._vcpus.at_start = enter_vcpu

    def _written_folders(self) -> tuple[str, ...]:
        return () if self._config.trace is None else (self._config.trace,)

    def _enter_early(self) -> None:
        """On the memory file's thread, which starts before the sandbox, as no mount(2) is in it,
        and looks up in /proc what its openers are called."""
        if self._config.sandbox == "off":
            return
        from vmm.sandbox.enter import enter_files

        paths = self._config.allowed_paths
        enter_files(folders=self._written_folders(), reads=("/proc",), paths=paths)

    def _make_guest(self, images: OpenedImages) -> Guest:
        options = self._config.guest_options()
        if self._restoring is not None:
            return self._restoring.guest(self._architecture)
        if images.kernel is None:
            return self._architecture.payload_guest(options)
        return self._architecture.linux_guest(options, images.kernel, images.initrd)

    def _set_up_vm(self) -> None:
        """All that needs no bytes of the guest yet, while its kernel is being uncompressed."""
        try:
            self._vm = GuestVm(
                self._architecture,
                self._config,
                self._guest,
                self._vcpus.parked,
                self._cleanup,
                self._own,
            )
            if not self._vm.memory.told:
                self._require_fitting()
            if not self._config.core_dumps:
                # Not earlier: what a backing opens in /proc/self would be root's alone.
                fdops.forbid_core_dumps()
            self._connect_devices()
            self._vm.finish_memslots()
            if self._vm.is_private:
                self._vm.map_ahead(self._guest.early_private_writes(self._vm.ram))
        except (HostError, OSError):
            self._guest.finish_opening()  # where both are wrong, what the user gave comes first
            raise
        self._guest.finish_opening()

    def _require_fitting(self) -> None:
        """What can't be had of a host that is not told of shares is refused, never left out."""
        from vmm.conversion.asked import require_asked

        require_asked(self._policies, self._vm.scheme, self._architecture.schemes)
        if self._config.balloon is not None:
            raise UsageError(
                f"--balloon {self._config.balloon}: the pages of a protected guest can't be taken "
                f"back (scheme {self._vm.scheme.name}); run without it"
            )

    def _connect_devices(self) -> None:
        # Imported here, while KVM makes the memslots: it takes milliseconds, of mere waiting.
        from vmm.control.console import Console
        from vmm.conversion.transaction import Converter
        from vmm.wiring.devices import Devices

        if self._config.sandbox != "off":
            import vmm.sandbox.enter  # noqa: F401 -- for `_enter_sandbox`

        trace = self._trace
        self._loop = EventLoop()
        self._cleanup.callback(self._loop.close)
        make_console = Console if self._embedding is None else self._embedding.make_console
        if self._execution is not None:
            make_console = self._execution.make_console
        self._console = make_console(on_quit=lambda: self.stop(Outcome(QUIT, "Ctrl-A x")))
        self._cleanup.callback(self._console.close)
        observer: ConversionObserver | None = None if trace is None else trace.conversions
        self._events: EventFeed | None = None
        follow = None if self._embedding is None else self._embedding.follow
        if self._control is not None or follow is not None:
            from vmm.conversion.events import EventFeed  # nobody follows most runs

            observer = self._events = EventFeed(observer)
            if follow is not None:
                follow(self._events)
        self._converter = Converter(
            self._vm.memory,
            self._vm.scheme,
            *self._policies,
            wake_at=lambda due: self._loop.set_timer(due, self._converter.settle),
            observer=observer,
        )
        iommu = self._make_lender() if self._config.iommu else None
        if self._config.has_back_ends:
            from vmm.machine.back_ends import require_fitting

            require_fitting(self._config, self._vm, self._watcher("vhost-user") is not None)
        self._devices = Devices(
            self._vm.kvm,
            self._vm.memory,
            self._loop,
            self._virtio,
            self._vm.platform.make_board,
            output=self._console.output,
            room=self._console.room,
            power_off=lambda: self.stop(Outcome(POWEROFF)),
            reset=self._guest_reset,
            watch=self._watcher,
            observer_of=self._device_observer,
            iommu=iommu,
            own=None if self._own is None else self._own.plain,
        )
        self._cleanup.callback(self._devices.close)
        if not self._vm.memory.told:
            for name, device in self._virtio.items():
                device.refused = partial(self._tell_unshared, name)
        self._handlers = self._vm.platform.exit_handlers(
            self._devices.board, self._vm.memory, self._converter, self.stop
        )
        if self._own is not None and self._own.exits:
            from vmm.exits.own import with_own

            self._handlers.table = with_own(self._handlers.table, self._own.exits)
        if self._debugger is not None:
            watch, table = self._watcher("gdb"), self._handlers.table
            self._debugger.connect(self._architecture, self._vm, self._vcpus, watch, table)
        if trace is not None:
            self._handlers.table = trace.exits(self._handlers.table)

    def _device_observer(self, device: str) -> DeviceObserver | None:
        """Who is told of what a device does, if anybody is."""
        observer: DeviceObserver | None = None
        if self._trace is not None:
            observer = self._trace.device(device, shared_bit=self._vm.scheme.shared_alias)
        if self._events is not None:
            from vmm.wiring.device_events import DeviceEvents

            observer = DeviceEvents(self._events, device, observer)
        return observer

    def _make_lender(self) -> VirtioIommu:
        """Give the virtual IOMMU what it lends the guest's memory by."""
        from vmm.conversion.lending import Lender
        from vmm.devices.virtio.iommu import VirtioIommu
        from vmm.memory.lending import LendingMemory

        iommu, memory = self._virtio["iommu"], self._vm.memory
        assert isinstance(iommu, VirtioIommu) and isinstance(memory, LendingMemory)
        observer = None if self._trace is None else self._trace.lending()
        self._lender = iommu.lending = Lender(memory, self._converter, observer=observer)
        return iommu

    def _tell_unshared(self, device: str) -> None:
        """A device has found private what it was to use, and nobody will hear of a share: its
        driver may wait for ever, so that it is said now; once, however often it is reset."""
        if device not in self._unshared:
            self._unshared.add(device)
            tell(unshared(self._vm.scheme.name, device))

    def _watcher(self, device: str) -> Announce | None:
        """What asks the policies about the device's accesses, if one of them wants to know."""
        announce = self._converter.hooks.watcher(self._converter.view, device)
        bit = self._vm.scheme.shared_alias
        if announce is None or not bit:
            return announce
        from vmm.memory.aliased_memory import without_bit

        return without_bit(announce, bit)

    def _load_guest(self) -> None:
        """Memory contents by pwrite and fd-to-fd transfer, then registers."""
        if self._restoring is not None:
            self._restoring.load(self._vm.memory, self._vm.scheme.alias)
            self._restoring.restore(self._vm.platform, self._devices)
            return
        launch = LaunchMemory(self._vm.memory)
        platform = self._vm.platform
        functions = list(self._virtio)
        if self._own is not None:
            functions += self._own.functions
        platform.load(launch, self._vm.ram, self._vm.scheme.alias, functions)
        launch.seal()
        if not self._guest.loads_itself:
            self._guest.close()  # the kernel's bytes are in guest memory now
        self._vm.map_ahead(launch.written)

    def _refusal_to_boot(self) -> Outcome | None:
        """The policies' last word before the guest's first instruction; those of a restored guest
        get what they knew."""
        hooks, view = self._converter.hooks, self._converter.view
        try:
            hooks.boot(view)
        except PolicyKill as kill:
            return Outcome(KILLED, str(kill))
        if self._restoring is not None:
            self._restoring.restore_policies(hooks, view)
        return None

    def _run_guest(self) -> Outcome:
        """vCPU threads run the guest, this thread runs the device loop, until `stop`."""
        if self._trace is not None:
            self._trace.start(self._vm.memory, self._vm.scheme.name, self._vm.doorbell)
        install_kick_handler()
        for vcpu in self._vm.platform.vcpus:
            self._vcpus.add(vcpu, self._handlers, self.stop)
        signals = SignalReactions(
            self._loop,
            end=self._end,
            press_power_button=self._press_power_button,
            suspend=self._console.suspend,
            continued=self._continued,
            is_stuck=self._is_in_own_code,
        )
        operations = Operations(
            self._vm.memory,
            self._converter,
            self._vcpus,
            self._devices,
            self._loop,
            self.stop,
            None if self._lender is None else self._lender.as_dict,
            self._events,
            self._make_saving,
        )
        if self._control is not None:
            self._vcpus.settles = True  # a snapshot needs registers that owe no exit
        alone = self._embedding is None
        if alone:
            # Beyond the guest's end: a signal must not cost the report.
            self._signals.enter_context(signals.installed())
        with ExitStack() as live:
            live.enter_context(
                live_view(self._loop, operations, self._status_line, self._control, signals=alone)
            )
            if self._debugger is not None:
                live.enter_context(self._debugger.serving(self._loop, self.stop))
            try:
                self._console.attach(self._loop, self._devices.board.serial)
                if self._config.paused:
                    operations.pause()
                if self._restoring is not None:
                    self._devices.resume()
                self._vcpus.start()
                if self._devices.board.coalesces_output:
                    Stragglers(self._vcpus.runners[0], self._loop.set_timer).look()
                if self._embedding is not None:
                    self._embedding.running(self._loop, operations)
                self._loop.run()
            except PolicyKill as kill:
                self.stop(Outcome(KILLED, str(kill)))
            except BrokenOff:
                pass  # `_end` raised it
            finally:
                self.stop(Outcome(STOPPED, "the device loop failed"))
                operations.resume()  # no vCPU enters the guest, but one may wait for a device
                self._end_vcpus()
                if self._events is not None:
                    ended = self._outcomes[0]
                    self._events.note("ended", exit=ended.exit, reason=ended.reason)
                if self._debugger is not None:
                    self._debugger.ended(self._outcomes[0])
                self._console.restore()
        for runner in self._vcpus.runners:
            if runner.error is not None:
                raise runner.error
        return self._outcomes[0]

    def _make_saving(self, operations: Operations) -> Saving:
        """What dumps and saves the machine, once somebody asks."""
        from vmm.control.saving import Saving
        from vmm.machine.restoring import facts
        from vmm.policy.keeping import saved_policies

        vm = self._vm
        config, arch = self._config, self._architecture.name
        own = self._own is not None or self._execution is not None
        return Saving(
            operations,
            vm.memory,
            vm.platform,
            self._devices.state,
            lambda: facts(config, vm, arch, own=own),
            lambda: saved_policies(self._converter.hooks, self._converter.view),
            vm.scheme.alias,
        )

    def _interject(self, data: bytes) -> bool:
        """For who was made before the console."""
        return self._console.interject(data)

    def _end_vcpus(self) -> None:
        self._vcpus.stop()
        if not self._vcpus.join(_LAST_OUTPUT_SECONDS):
            # One hangs in a write to a stdout that nobody reads, which Python never interrupts.
            self._console.abandon_output()
            self._vcpus.stop()
            if not self._vcpus.join(_LAST_WORK_SECONDS):
                self._abandon("the vCPU's thread")
        if not self._abandoned and not self._devices.end(_LAST_WORK_SECONDS):
            self._abandon("a disk's thread")

    def _abandon(self, whom: str) -> None:
        """Go on without a thread that doesn't end, for example because of its policy.

        It may wake up and use what the machine has opened, so that all of it stays open until
        the process ends.
        """
        self._abandoned = True
        self._cleanup.pop_all()
        waiting_for = self._converter.undecided
        what = f"{whom} has not ended"
        if waiting_for is None and self._own is not None:
            waiting_for = own_code.waiting_for()
        if waiting_for is not None:
            what = f"{waiting_for} has not returned"
        tell(f"{what}; pyvmm ends without it")

    def _own_code_failed(self, error: PolicyError | ExtensionError) -> None:
        """No vCPU runs and the terminal is the user's again; memory is still there to look at."""
        if self._embedding is not None:
            return  # the program gets the error itself
        from vmm.policy.failure import show

        self._signals.close()  # Ctrl-C is the prompt's
        show(error, prompt=self._config.debug_shell)
        if self._sandbox is not None and isinstance(error.__cause__, PermissionError):
            tell(
                "policies are in the sandbox: --allow-path PATH gives a file or folder back, "
                "--sandbox=off everything"
            )

    def _write_report(self, outcome: Outcome, wall_seconds: float) -> None:
        counts: dict[str, int] = {}
        for runner in self._vcpus.runners:
            for name, count in runner.exit_counts.items():
                counts[name] = counts.get(name, 0) + count
        if self._trace is not None:
            self._trace.end(outcome)
        io = self._devices.io_statistics()
        self.report = build_report(
            scheme=self._vm.scheme.name,
            not_taken={} if self._vm.chosen is None else self._vm.chosen.not_taken,
            doorbell=self._vm.doorbell,
            memory=self._vm.memory,
            outcome=outcome,
            accounting=self._converter.accounting,
            refinements=self._converter.refinements,
            io=io,
            exits=counts,
            ports=self._handlers.port_counts(),
            wall_seconds=wall_seconds,
        )
        if self._guest.launch is not None:
            self.report["launch"] = self._guest.launch
        if self._config.sandbox != "off":
            kept = self._sandbox
            self.report["sandbox"] = (
                None
                if kept is None
                else {
                    "seccomp": kept.seccomp,
                    "landlock": kept.landlock,
                    "paths": list(kept.paths),
                }
            )
        if self._lender is not None:
            self.report["iommu"] = self._lender.as_dict()
        if self._memory_file is not None:
            self.report["memory_file"] = self._memory_file.as_dict()
        if self._config.has_back_ends:
            from vmm.machine.back_ends import described

            self.report["vhost_user"] = described(self._virtio)
        if self._debugger is not None:
            self.report["gdb"] = self._debugger.as_dict()
        if self._report_file is not None:
            self._report_file.write(self.report)

    # -- ending -------------------------------------------------------------------------------

    def stop(self, outcome: Outcome) -> None:
        """End the run with `outcome`, from any thread; the first outcome counts.

        A signal handler may call it in the middle of another call.
        """
        self._outcomes.append(outcome)
        self._vcpus.stop()
        self._loop.stop()

    def _guest_reset(self) -> None:
        """A reset ends the run; after a kernel panic (panic=-1) it is a failure."""
        self.stop(reset_outcome(self._console.tail()))

    def _press_power_button(self) -> bool:
        stands_still = self._vcpus.paused or self._vcpus.frozen
        if self._execution is not None:
            return not stands_still and self._execution.signal(signal.SIGTERM)
        return not stands_still and self._devices.board.press_power_button()

    def _continued(self) -> None:
        """The process was stopped, as by Ctrl-Z in a shell, and goes on."""
        self._console.resume()
        self._vcpus.process_continued()

    def _end(self, reason: str) -> None:
        """Somebody asked for the end by a signal; called in its handler, or later."""
        self.stop(Outcome(STOPPED, reason))
        if self._is_in_own_code():
            raise BrokenOff  # else a hook that never returns would keep the run going

    def _is_in_own_code(self) -> bool:
        """Whether this thread is in a policy's hook, or in other code of the user's."""
        return self._converter.hooks.is_this_thread_in_one or (
            self._own is not None and own_code.is_this_thread_in_one()
        )


def _extensions(config: MachineConfig, embedding: Embedding | None) -> Extensions | None:
    """What is the user's own in a machine, besides policies; None where nothing is."""
    given = None if embedding is None else embedding.extensions
    if config.has_known_names and not (config.devices or config.exit_handlers):
        return given
    from vmm.machine.extensions import named_extensions

    return named_extensions(config, given)


def _load_policies(config: MachineConfig) -> list[Policy]:
    if not config.policies:
        return []
    from vmm.policy.loader import load_policy  # a run without policies does without

    return [load_policy(spec, words) for spec, words in config.policies]


def _open_trace(path: str, config: MachineConfig) -> RunTrace:
    from vmm.machine.tracing import RunTrace  # an untraced run does without

    return RunTrace(path, config)


def reset_outcome(tail: bytes) -> Outcome:
    """What a reset means after the console output `tail`: a panic, or the guest's wish."""
    start = tail.rfind(_INIT_FAILED_TEXT)
    if start >= 0:
        line = tail[start + len(_INIT_FAILED_TEXT) : start + 300].splitlines()[0]
        return Outcome(FAILED, line.decode("utf-8", "replace"))
    start = tail.rfind(_PANIC_TEXT)
    # An orderly reboot says so, however a panic got on the screen before.
    if start < 0 or _REBOOT_TEXT in tail[start:]:
        return Outcome(RESET, "the guest asked for a reset")
    return Outcome(PANIC, tail[start : start + 200].splitlines()[0].decode("utf-8", "replace"))
