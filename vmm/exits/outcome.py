"""How a run ended."""

from __future__ import annotations

from vmm.core.lean_typing import NamedTuple

POWEROFF = "poweroff"
RESET = "reset"
PANIC = "panic"
FAILED = "failed"
TRIPLE_FAULT = "triple-fault"
INTERNAL_ERROR = "internal-error"
STOPPED = "stopped"
QUIT = "quit"
KILLED = "killed"
POLICY_ERROR = "policy-error"
EXTENSION_ERROR = "extension-error"

_GOOD = frozenset({POWEROFF, RESET, QUIT})


class Outcome(NamedTuple):
    """`exit` is one of this module's words, `reason` a sentence for people (may be empty)."""

    exit: str
    reason: str = ""
    command_status: int | None = None
    """What the command in the guest ended with (--exec); None where it didn't end, or none ran."""

    @property
    def exit_status(self) -> int:
        """The command's status where one ended; else 0 when the guest ended as it wished (or the
        user quit), 1 when it failed."""
        if self.command_status is not None:
            return self.command_status
        return 0 if self.exit in _GOOD else 1
