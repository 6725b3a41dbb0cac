"""Python's `signal`, for the modules that every start imports: of plain numbers.

What `signal` adds to the module that it is made of is enumerations, which take three milliseconds
to import. Type checkers see the real one.
"""

from __future__ import annotations

__all__ = ["signal"]

from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal
else:
    import _signal as signal
