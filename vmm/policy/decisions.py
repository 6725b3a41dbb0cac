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
        # What is not said by most decisions stays out where it isn't said.
        said = [f"{n}={v}" for n, v in pairs if v is not None or n not in ("patience", "later")]
        return f"{type(self).__name__}({', '.join(said)})"

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


class Allow(Decision):
    """Carry the request out.

    A device may be at the pages just then: the conversion waits `patience` seconds for it at
    most (None: as long as pyvmm does by itself), and is refused with EBUSY after that. Every
    decision that has something carried out takes a patience.
    """

    __slots__ = ("patience",)

    def __init__(self, patience: float | None = None) -> None:
        # Made for nearly every request: nothing is called for the usual one.
        self.patience = None if patience is None else _checked_patience("Allow", patience)


class Deny(Decision):
    """Refuse the request: the guest gets -errno (1 to 4095), and nothing changes."""

    __slots__ = ("errno",)

    def __init__(self, errno: int = EACCES) -> None:
        self.errno = _checked_errno("Deny", errno)


class Partial(Decision):
    """Carry out `area`, a part of the request, and no more.

    The guest gets 0 only if all that it asked for is in the wanted state then, else -errno: it
    must not take the rest for converted. The part stays converted, so that a guest that asks
    again gets on. With `later` the discard of an unshared part is put off, as by Defer.
    """

    __slots__ = ("area", "errno", "later", "patience")

    def __init__(
        self,
        area: Range,
        errno: int = EAGAIN,
        *,
        later: Defer | None = None,
        patience: float | None = None,
    ) -> None:
        self.area = _checked_area("Partial", area)
        self.errno = _checked_errno("Partial", errno)
        self.later = later
        self.patience = _checked_patience("Partial", patience)


class Defer(Decision):
    """An unshare is answered with 0, but the host keeps the pages' shared side until `until`.

    `until` is a time of `view.now`'s clock (seconds; math.inf: until the guest shares them
    again). Meanwhile the pages are `deferred`: private to the guest, refused to the host's
    accesses. A share before that cancels it: the guest finds zeros on the shared side, as after
    any unshare and share, or with `keep` what was there before.
    """

    __slots__ = ("keep", "patience", "until")

    def __init__(self, until: float, *, keep: bool = False, patience: float | None = None) -> None:
        if not isinstance(until, int | float) or math.isnan(until):
            raise ValueError(f"Defer(until={until!r}): a time in seconds is needed")
        self.until = until
        self.keep = keep
        self.patience = _checked_patience("Defer", patience)


class Convert(Decision):
    """Carry out `area`, which contains the request, as one conversion.

    What `area` has beyond the request must be in the wanted state already, or deferred: the
    guest would lose what it keeps in a page that it has not asked to convert.
    """

    __slots__ = ("area", "patience")

    def __init__(self, area: Range, *, patience: float | None = None) -> None:
        self.area = _checked_area("Convert", area)
        self.patience = _checked_patience("Convert", patience)


class Kill(Decision):
    """End the run with exit status 1 and `reason`; the guest gets no answer."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


CarriedOut = Allow | Partial | Defer | Convert
"""The decisions that have a request carried out, in whatever way."""

Refusal = Deny | Kill
"""Those that don't."""


def word_of(decision: Decision | None) -> str:
    """As traces and figures have it: "none" where no policy was asked, the request being
    invalid."""
    return "none" if decision is None else type(decision).__name__.lower()


def combined(first: CarriedOut, then: CarriedOut) -> CarriedOut:
    """What two policies of a stack say together, neither having refused.

    Nothing that was said is lost, except where one excludes the other: a part is less than the
    request and Convert more, so that Partial counts; and between putting the discard off and
    making it at once with more pages, what was said first. The table is in
    vmm/docs/reference/policies.md.
    """
    said = [each.patience for each in (first, then) if each.patience is not None]
    patience = min(said, default=None)
    if isinstance(first, Allow):
        return _with_patience(then, patience)
    if isinstance(first, Partial):
        if isinstance(then, Partial):  # a part of the first one: its policy was asked about that
            later = _both(first.later, then.later)
            return Partial(then.area, then.errno, later=later, patience=patience)
        later = _both(first.later, then if isinstance(then, Defer) else None)
        return Partial(first.area, first.errno, later=later, patience=patience)
    if isinstance(then, Partial):
        later = _both(first if isinstance(first, Defer) else None, then.later)
        return Partial(then.area, then.errno, later=later, patience=patience)
    if isinstance(first, Defer) and isinstance(then, Defer):
        return Defer(min(first.until, then.until), keep=first.keep and then.keep, patience=patience)
    if isinstance(first, Convert) and isinstance(then, Convert):
        start = min(first.area.start, then.area.start)
        end = max(first.area.end, then.area.end)
        return Convert(Range(start, end - start), patience=patience)
    return _with_patience(first, patience)


def _both(first: Defer | None, then: Defer | None) -> Defer | None:
    """Late discards that are part of another decision: the earlier one, and kept if both keep."""
    if first is None or then is None:
        later = first or then
        return None if later is None else Defer(later.until, keep=later.keep)
    return Defer(min(first.until, then.until), keep=first.keep and then.keep)


def _with_patience(decision: CarriedOut, patience: float | None) -> CarriedOut:
    if decision.patience == patience:
        return decision
    if isinstance(decision, Partial):
        return Partial(decision.area, decision.errno, later=decision.later, patience=patience)
    if isinstance(decision, Defer):
        return Defer(decision.until, keep=decision.keep, patience=patience)
    if isinstance(decision, Convert):
        return Convert(decision.area, patience=patience)
    return Allow(patience)


def _checked_patience(what: str, patience: float | None) -> float | None:
    if patience is not None and not (
        isinstance(patience, int | float) and 0 <= patience < math.inf
    ):
        raise ValueError(f"{what}(patience={patience!r}): a number of seconds, 0 or more")
    return patience


def _checked_errno(what: str, errno: int) -> int:
    if not isinstance(errno, int) or not 0 < errno <= _LARGEST_ERRNO:
        raise ValueError(f"{what}(errno={errno}): the guest would not take it for an error")
    return errno


def _checked_area(what: str, area: Range) -> Range:
    if area.size <= 0 or area.start % PAGE_SIZE or area.size % PAGE_SIZE:
        raise ValueError(f"{what}({area}): one or more whole 4 KiB pages are needed")
    return area
