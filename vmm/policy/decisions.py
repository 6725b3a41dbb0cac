"""What a policy may answer. Values: equal when they say the same, checked when they are made."""

from __future__ import annotations

import math
from errno import EACCES, EAGAIN

from vmm.core.ranges import PAGE_SIZE, Range

_LARGEST_ERRNO = 4095  # MAX_ERRNO in Linux' include/linux/err.h


class Decision:
    """One of the classes below."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        pairs = zip(self.__slots__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in pairs)})"

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


class Allow(Decision):
    """Carry the request out.

    A device may be at the pages just then: the conversion waits `patience` seconds for it at
    most (None: as long as pyvmm does by itself), and is refused with EBUSY after that.
    """

    __slots__ = ("patience",)

    def __init__(self, patience: float | None = None) -> None:
        if patience is not None and not (
            isinstance(patience, int | float) and 0 <= patience < math.inf
        ):
            raise ValueError(f"Allow(patience={patience!r}): a number of seconds, 0 or more")
        self.patience = patience

    def __repr__(self) -> str:
        return "Allow()" if self.patience is None else super().__repr__()


class Deny(Decision):
    """Refuse the request: the guest gets -errno (1 to 4095), and nothing changes."""

    __slots__ = ("errno",)

    def __init__(self, errno: int = EACCES) -> None:
        self.errno = _checked_errno("Deny", errno)


class Partial(Decision):
    """Carry out `area`, a part of the request, and no more.

    The guest gets 0 only if all that it asked for is in the wanted state then, else -errno: it
    must not take the rest for converted. The part stays converted, so that a guest that asks
    again gets on.
    """

    __slots__ = ("area", "errno")

    def __init__(self, area: Range, errno: int = EAGAIN) -> None:
        self.area = _checked_area("Partial", area)
        self.errno = _checked_errno("Partial", errno)


class Defer(Decision):
    """An unshare is answered with 0, but the host keeps the pages' shared side until `until`.

    `until` is a time of `view.now`'s clock (seconds; math.inf: until the guest shares them
    again). Meanwhile the pages are `deferred`: private to the guest, refused to the host's
    accesses. A share before that cancels it: the guest finds zeros on the shared side, as after
    any unshare and share, or with `keep` what was there before.
    """

    __slots__ = ("keep", "until")

    def __init__(self, until: float, *, keep: bool = False) -> None:
        if not isinstance(until, int | float) or math.isnan(until):
            raise ValueError(f"Defer(until={until!r}): a time in seconds is needed")
        self.until = until
        self.keep = keep


class Convert(Decision):
    """Carry out `area`, which contains the request, as one conversion.

    What `area` has beyond the request must be in the wanted state already, or deferred: the
    guest would lose what it keeps in a page that it has not asked to convert.
    """

    __slots__ = ("area",)

    def __init__(self, area: Range) -> None:
        self.area = _checked_area("Convert", area)


class Kill(Decision):
    """End the run with exit status 1 and `reason`; the guest gets no answer."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _checked_errno(what: str, errno: int) -> int:
    if not isinstance(errno, int) or not 0 < errno <= _LARGEST_ERRNO:
        raise ValueError(f"{what}(errno={errno}): the guest would not take it for an error")
    return errno


def _checked_area(what: str, area: Range) -> Range:
    if area.size <= 0 or area.start % PAGE_SIZE or area.size % PAGE_SIZE:
        raise ValueError(f"{what}({area}): one or more whole 4 KiB pages are needed")
    return area
