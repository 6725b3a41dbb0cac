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

    @property
    def exit_status(self) -> int:
        """0 when the guest ended as it wished (or the user quit), 1 when it failed."""
        return 0 if self.exit in _GOOD else 1
