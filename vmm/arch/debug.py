"""What a debugger has to know of an architecture's guests: registers, page tables, breakpoints.

For type checkers, but for the small tuples: only a run with --gdb imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from vmm.core.lean_typing import Any, Enum, NamedTuple, Protocol


class NotMapped(Exception):
    """The guest's page tables have no page there; the text says which level said so."""


class Unwritable(Exception):
    """A register that can't be given that value; the text says why."""


class Watch(Enum):
    """What a hardware breakpoint waits for."""

    EXECUTE = "execute"
    READ = "read"
    WRITE = "write"
    ACCESS = "access"


class Hardware(NamedTuple):
    """One hardware breakpoint: `size` bytes at a linear address."""

    kind: Watch
    address: int
    size: int


class Cause(Enum):
    """Why KVM handed a vCPU to the debugger."""

    STEP = "step"
    SOFTWARE = "software"
    HARDWARE = "hardware"
    GUEST = "guest"
    """The guest's own: its breakpoint instruction, or what it set in its debug registers."""


class Caught(NamedTuple):
    """A debug exit decoded; `hardware` is the breakpoint's number in the order of `arm`'s."""

    cause: Cause
    address: int
    hardware: int = -1


class Abilities(NamedTuple):
    """What this host's KVM does, tried out: for code in kernel mode and in user mode."""

    kernel_steps: bool
    user_steps: bool
    kernel_software: bool
    user_software: bool
    kernel_hardware: bool
    user_hardware: bool
    kernel_watches: bool
    user_watches: bool

    def lacking(self) -> str:
        """What doesn't work, in words; empty where all of it does."""
        names = ("single steps", "software breakpoints", "hardware breakpoints", "watchpoints")
        pairs = zip(names, self[::2], self[1::2], strict=True)
        words = []
        for name, in_kernel, in_user in pairs:
            if not in_kernel or not in_user:
                modes = " or ".join(
                    mode
                    for mode, works in (("kernel mode", in_kernel), ("user mode", in_user))
                    if not works
                )
                words.append(f"{name} in {modes}")
        return ", ".join(words)


class Register(NamedTuple):
    """One register as the debugger sees it, in the order of its numbers."""

    name: str
    bits: int


class GuestDebug(Protocol):
    """An architecture's part. vCPUs are out of the guest, but for `caught` and `pass_on`."""

    description: str
    """The target description (XML) that names all `registers` in their order."""
    registers: Sequence[Register]
    breakpoint_instruction: bytes
    """Aligned to its size, as the instructions that it takes the place of."""
    watches: Container[Watch]
    """What hardware breakpoints there are."""
    most_hardware: int
    caches_code: bool
    """Whether the processor may execute on what the host has written over, until KVM maps the page
    anew: its instruction cache takes no notice of the host's writes."""
    abilities: Abilities

    def read_registers(self, vcpu: Any) -> list[int]:
        """All values, in the order of `registers`. Raises KvmError."""
        ...

    def write_registers(self, vcpu: Any, values: dict[int, int]) -> None:
        """Set some, by number. Raises Unwritable, KvmError; then none of them is set."""
        ...

    def is_user_mode(self, vcpu: Any) -> bool: ...

    def walk(
        self, vcpu: Any, address: int, read_entry: Callable[[int, int], bytes]
    ) -> tuple[int, int]:
        """What guest-physical address (with the scheme's bit, if its page tables set it) stands
        behind a virtual one, and the bytes up to the page's end. `read_entry(gpa, size)` reads
        page tables. Raises NotMapped, and what `read_entry` raises."""
        ...

    def places(self, kind: Watch) -> range:
        """The numbers below `most_hardware` at which such a hardware breakpoint can be."""
        ...

    def arm(
        self,
        vcpu: Any,
        *,
        step: bool,
        software: bool,
        hardware: Sequence[Hardware | None],
        peek: Callable[[int, int], bytes],
    ) -> None:
        """What stops the vCPU from its next KVM_RUN on; with none of them nothing. A step takes no
        interrupt where that can be had. `peek(address, size)` gives as many bytes of the guest's
        virtual memory as can be read. Raises KvmError."""
        ...

    def caught(self, vcpu: Any, exit: Any, hardware: Sequence[Hardware | None]) -> Caught:
        """Which of what was armed an exit is about. On the vCPU's thread."""
        ...

    def pass_on(self, vcpu: Any, exit: Any) -> None:
        """Give the guest its own exception. On the vCPU's thread, what is armed stays."""
        ...
