"""The user's own code inside a machine: devices, exit handlers, schemes, backings.

What it raises ends the run and is the user's to read, never taken for an error of the guest's or
of the host's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmm.core.errors import PyvmmError
from vmm.core.lean_typing import Any, TypeVar

T = TypeVar("T")

_called: dict[int, str] = {}
"""By thread, whose method has been called and has not returned."""


class ExtensionError(PyvmmError):
    """The user's own device, exit handler, scheme or backing raised an exception, which is the
    cause, or did something that does not fit. `of` is the object."""

    def __init__(self, sentence: str, of: object = None) -> None:
        super().__init__(sentence)
        self.of = of


def called(
    of: object,
    what: str,
    method: Callable[..., T],
    *given: Any,
    passing: type[Exception] | tuple[()] = (),
    **named: Any,
) -> T:
    """`method`'s result. What it raises becomes an ExtensionError that says `what` of `of` it was;
    errors of pyvmm's own kinds (a policy's word, memory that is private) and `passing` come
    through."""
    thread = threading.get_ident()
    before = _called.get(thread)
    name = f"{getattr(of, '__name__', type(of).__name__)}: {what}"
    _called[thread] = name
    try:
        return method(*given, **named)
    except PyvmmError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, passing):
            raise
        raise ExtensionError(f"{name} raised {error!r}", of) from error
    finally:
        if before is None:
            del _called[thread]
        else:
            _called[thread] = before


def waiting_for() -> str | None:
    """A method that has been called and has not returned, for a message."""
    return next(iter(list(_called.values())), None)


def is_this_thread_in_one() -> bool:
    """Whether the calling thread is inside the user's own code (asked by a signal handler)."""
    return threading.get_ident() in _called
