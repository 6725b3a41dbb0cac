"""What a guest can do, one step at a time.

The value of `yield STEP` is the answer: 0, or a negative errno.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.core.ranges import Range


class Share(NamedTuple):
    """The guest asks to make whole pages shared. The guest waits for the answer."""

    area: Range


class Unshare(NamedTuple):
    """The guest asks to make whole pages private."""

    area: Range


class Fault(NamedTuple):
    """The guest touches `area` as if it were private, or shared: where it isn't, that is an
    implicit conversion, which on_fault is asked about. A guest that is refused can't go on: the
    run ends, as on real machines."""

    area: Range
    private: bool = True


class Io(NamedTuple):
    """A device touches `area` (bytes, not pages): on_io is asked.

    0: it may, and the memory is there. -EACCES: a policy keeps it off. -EFAULT: a part of it is
    private or no RAM. After either a real device stops until its driver resets it.
    `named` as IoEvent's: what names the area to the device, "ring", "descriptor" or None.
    """

    device: str
    area: Range
    is_write: bool = False
    named: str | None = "descriptor"


class Discard(NamedTuple):
    """The guest does without whole pages, in whatever state they are (a balloon, free page
    reports): the host takes them back, and their state stays."""

    area: Range


class Wait(NamedTuple):
    """Time passes for this vCPU: seconds, 0 or more. The answer is 0."""

    seconds: float


Step = Share | Unshare | Fault | Io | Discard | Wait
