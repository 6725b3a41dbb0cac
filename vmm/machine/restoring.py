"""`--restore DIR`: a machine out of a snapshot.

What it is comes from there; what it has on the host (disks, networks, consoles) the user names
again, for a snapshot is a file that anybody can have written, and opens nothing by itself.
"""

from __future__ import annotations

from vmm.conversion.matrix import BACKINGS, SCHEMES
from vmm.core.errors import UsageError, tell
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.core.saved import NotSaved, Saved
from vmm.machine.peripherals import device_names
from vmm.memory.guest_memory import MOST_RUNS, GuestMemory, LaunchMemory, PageState
from vmm.policy.keeping import read_policies, restore_policies
from vmm.snapshot.folder import MEMORY, PRIVATE, SnapshotFolder

if TYPE_CHECKING:
    from vmm.arch.protocol import Architecture, Guest, Platform
    from vmm.core.saved import State
    from vmm.machine.config import MachineConfig
    from vmm.machine.guest_vm import GuestVm
    from vmm.policy.hooks import Hooks
    from vmm.policy.protocol import View
    from vmm.wiring.devices import Devices

_OPTIONS = {
    "blk": "--disk",
    "net": "--net",
    "vsock": "--vsock",
    "console": "--console",
    "rng": "--rng",
    "balloon": "--balloon",
}
_MOST_NAMES = 64
_MOST_BITS = 64


def facts(config: MachineConfig, vm: GuestVm, architecture: str, *, own: bool) -> State:
    """What a snapshot says of the machine itself; for `Restoring`. `own`: it runs a command, or
    has devices of the user's. Raises NotSaved for a machine that can't be saved."""
    if own:
        raise NotSaved(
            "a machine with --exec, --device or --exit-handler can't be saved: a part of it is "
            "outside of pyvmm"
        )
    if config.iommu:
        raise NotSaved("a machine with --iommu can't be saved: what is lent has to be given back")
    if config.has_back_ends:
        raise NotSaved(
            "a machine with vhost-user= can't be saved: what its back ends are at is theirs to know"
        )
    return {
        "architecture": architecture,
        "memory_bytes": config.memory,
        "cpus": config.cpus,
        "scheme": vm.scheme.name,
        "private_memory": None if vm.memory.private is None else vm.memory.private.name,
        "alias": vm.scheme.alias,
        "doorbell": vm.guest_doorbell,
        "device_names": device_names(config),
    }


class Restoring:
    """A snapshot on its way to be a machine; used in the order of its methods.

    Each raises BadState (a UsageError) for what is wrong with the snapshot.
    """

    def __init__(self, folder: SnapshotFolder, config: MachineConfig, arch: Architecture) -> None:
        """`config` is what the user wants of the run: all that isn't in the snapshot."""
        self._folder = folder
        state = self._state = folder.state
        self._inner = inner = state.inner("state")
        if inner.text("architecture", 32) != arch.name:
            raise inner.bad(f"its guest is {inner.text('architecture')}, and this is {arch.name}")
        scheme = inner.text("scheme", 32)
        private = inner.text("private_memory", 32) if inner.has("private_memory") else None
        # Pyvmm's own alone: elsewhere a name with a colon is the user's code, to be imported.
        if private is not None and (private not in BACKINGS or scheme not in SCHEMES):
            raise inner.bad(f"scheme {scheme!r} with private memory {private!r} is none of pyvmm's")
        self._alias = inner.number("alias", (1 << _MOST_BITS) - 1)
        self._doorbell = inner.text("doorbell", 32)
        self._policies = read_policies(inner)
        self.config = config._replace(
            memory=inner.number("memory_bytes", arch.largest_memory),
            cpus=inner.number("cpus", 1 << 16),
            private_memory=private,
            scheme=scheme if private is not None else "auto",
            restore=None,
        )
        try:
            self.config.validate(arch)
        except UsageError as error:
            raise UsageError(f"--restore {folder.path}: {error}") from None
        self.config = self.config._replace(restore=config.restore)
        self._require_devices(config)
        self._ram = arch.ram_ranges(self.config.memory)
        self._read_pages(state)

    def _require_devices(self, config: MachineConfig) -> None:
        there = self._inner.rows("device_names", _MOST_NAMES)
        here = device_names(config)
        for number, name in enumerate(there):
            if name not in here:
                kind = name.rstrip("0123456789") if isinstance(name, str) else ""
                option = _OPTIONS.get(kind)
                if option is None:
                    raise self._inner.bad(f"device_names[{number}] is no device")
                raise UsageError(
                    f"--restore {config.restore}: its machine has {name}; name it again with "
                    f"{option}{self._hint(number)} (a snapshot opens nothing by itself)"
                )
        if here != there:
            more = next((name for name in here if name not in there), None)
            raise UsageError(
                f"--restore {config.restore}: its machine has "
                + (f"no {more}; leave that out" if more else "its devices in another order")
            )

    def _hint(self, number: int) -> str:
        """The path that a disk had, where the snapshot says one; a word for the user, no more."""
        try:
            virtio = self._inner.inner("devices").rows("virtio", _MOST_NAMES)[number]
            path = Saved(virtio, "").inner("transport").inner("device").text("path")
        except (UsageError, IndexError):
            return ""
        return f" {path!r}"

    def _read_pages(self, state: Saved) -> None:
        """Page states: runs that are all of RAM, in order."""
        runs: list[tuple[Range, bool]] = []
        rows = state.rows("pages", 2 * MOST_RUNS)
        at, left = self._ram[0].start, list(self._ram)
        for number, row in enumerate(rows):
            if not (
                type(row) is list
                and [type(one) for one in row] == [int, int, str]
                and left
                and row[0] == at
                and 0 < row[1] <= left[0].end - at
                and row[1] % PAGE_SIZE == 0
                and row[2] in (PageState.SHARED.value, PageState.PRIVATE.value)
            ):
                raise state.bad(f"pages[{number}] is no run of RAM behind the last one")
            runs.append((Range(row[0], row[1]), row[2] == PageState.PRIVATE.value))
            at += row[1]
            if at == left[0].end:
                del left[0]
                at = left[0].start if left else -1
        if left:
            raise state.bad(f"pages end at {at:#x}, before RAM does")
        self._private = [run for run, is_private in runs if is_private]
        if self._private and self.config.private_memory is None:
            raise state.bad("it has private pages, and no private memory")
        if self._private and not state.has("private"):
            private = sum(run.size for run in self._private)
            raise UsageError(
                f"--restore {self._folder.path}: {private >> 10} KiB of its memory are private and "
                "not in it, so that its guest can't run; make a snapshot with --with-private (of a "
                "rehearsal: the host's kernel gives away no other private memory)"
            )

    def guest(self, arch: Architecture) -> Guest:
        """What the machine runs."""
        options = self.config.guest_options()
        try:
            return arch.restored_guest(options, self._doorbell, self._private)
        except UsageError as error:
            raise self._inner.bad(str(error)) from None

    def load(self, memory: GuestMemory, alias: int) -> None:
        """Memory's bytes, each on its side."""
        if alias != self._alias:
            raise self._inner.bad(
                f"its guest has the address bit {self._alias:#x} for private pages, and this host "
                f"{alias:#x}; restore it where the snapshot was made"
            )
        launch = LaunchMemory(memory)
        files = [(MEMORY, PageState.SHARED)]
        if self._private:
            files.append((PRIVATE, PageState.PRIVATE))
        elif self._state.has("private") and self._state.rows("private", 0):
            raise self._state.bad("it has private memory's bytes, and no private pages")
        for file, wanted in files:
            for piece, data in self._folder.contents(self._state, file):
                if not memory.is_ram(piece) or any(
                    state is not wanted for _, state in memory.states(piece)
                ):
                    raise self._state.bad(f"{file} has bytes for {piece}, which is not all such")
                launch.pwrite(data, piece.start)
        launch.seal()

    def restore(self, platform: Platform, devices: Devices) -> None:
        """Processors, chips and devices. `Devices.resume` follows, when all may run."""
        inner = self._inner
        gone_by = platform.restore(inner.inner("platform"))
        devices_state = inner.inner("devices")
        try:
            devices.restore(devices_state)
        except OSError as error:
            raise devices_state.bad(f"a device can't go on: {error}") from error
        devices_state.finish()
        devices.board.put_forward(gone_by)
        inner.finish()
        self._state.finish()

    def restore_policies(self, hooks: Hooks, view: View) -> None:
        """What policies knew, once on_boot has been asked. The user is told of those that the guest
        had, and has no more. Raises PolicyError, too."""
        gone = restore_policies(hooks, self._policies, view)
        if gone:
            tell(
                f"--restore {self._folder.path}: its guest goes on without the policies that it "
                f"had: {', '.join(gone):.400}"
            )
