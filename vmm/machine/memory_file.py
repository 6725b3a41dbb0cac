"""`--memory-file` in a run: its parts, put together as a run comes to have what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from vmm.control.memory_file.place import Place
from vmm.core.errors import OutputError
from vmm.core.event_loop import EventLoop
from vmm.core.lean_typing import TYPE_CHECKING, cast
from vmm.exits.outcome import KILLED, Outcome
from vmm.policy import PolicyKill

if TYPE_CHECKING:
    from vmm.control.memory_file.guest_file import Announce
    from vmm.control.memory_file.mount import MemoryMount
    from vmm.machine.report_keys import FileUse
    from vmm.memory.guest_memory import GuestMemory


class MemoryFile:
    """What `--memory-file` asks for."""

    def __init__(self, path: str) -> None:
        """Makes the folder ready. Raises UsageError, HostError."""
        self._place = Place(path)
        self._mount: MemoryMount | None = None
        self.through: Callable[[], None] | None = None
        """What has `leave` done in another process."""

    @contextmanager
    def served(
        self,
        memory: GuestMemory,
        shared_bit: int,
        watcher: Callable[[str], Announce | None],
        loop: EventLoop,
        stop: Callable[[Outcome], None],
        at_start: Callable[[], None],
    ) -> Iterator[None]:
        """Within the block the file is there, from before a sandbox, which has no mount(2), to the
        end. `at_start` is the first thing that its thread does. Raises HostError where it can't be
        mounted."""
        from vmm.control.memory_file.guest_file import GuestFile
        from vmm.control.memory_file.mount import MemoryMount

        def fail(error: BaseException) -> None:
            if isinstance(error, PolicyKill):
                stop(Outcome(KILLED, str(error)))
                return

            def again() -> None:
                raise error

            loop.set_timer(0, again)  # where the run ends with it, as with any policy's

        def tell_changes(changed: Callable[[], None]) -> None:
            memory.on_change = changed

        self._mount = MemoryMount(
            self._place, GuestFile(memory, shared_bit), watcher, fail, at_start
        )
        try:
            self._mount.start(loop, tell_changes)
            yield
        finally:
            memory.on_change = None
            if self.through is not None:
                # First: libfuse finds it done, and doesn't try itself, which it would complain of.
                with suppress(OutputError):
                    self.through()
            self._mount.close()

    def leave(self) -> None:
        """Unmount, and take the folder away; by a process that may."""
        self._place.leave(mounted=True)

    def close(self) -> None:
        """Any number of times."""
        if self._mount is None:
            self._place.leave(mounted=False)

    def as_dict(self) -> FileUse:
        """For the report, of what has been mounted."""
        assert self._mount is not None
        return cast("FileUse", self._mount.as_dict())
