"""The doorbell's registers: how a guest asks for conversions where its hypercalls don't work.

Each vCPU has a bank of its own, so that two can ring at the same time. The bank decodes what the
guest wrote into a request as it stands, validates and decides nothing, and keeps the answer.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vmm.core.events import ConversionRequest, Kind
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import PAGE_SHIFT
from vmm.devices.bus import Banked, all_ones

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

REG_FRAME, REG_PAGES, REG_COMMAND, REG_RESULT, REG_FAILURE = 0x00, 0x04, 0x08, 0x0C, 0x10
COMMAND_SHARE, COMMAND_UNSHARE, COMMAND_HOST_CHECK = 1, 2, 3
DOORBELL_ID = int.from_bytes(b"VMMB", "little")
REGISTER_SIZE = 4

_U32 = 0xFFFF_FFFF


class DoorbellActions:
    """What ringing comes to. `convert` and `host_check` answer 0 or a negative errno.

    `convert` carries a request out; None for an ordinary VM, whose only register is the failure's.
    `host_check(gpa, size)` is what the embedded payload asks for: verify and replace a pattern.
    `failed(code)`: the guest reports that it failed, with a code of its own, which is not 0.
    """

    __slots__ = ("convert", "failed", "host_check")

    def __init__(
        self,
        convert: Callable[[ConversionRequest], int] | None,
        host_check: Callable[[int, int], int],
        failed: Callable[[int], None],
    ) -> None:
        self.convert = convert
        self.host_check = host_check
        self.failed = failed


class DoorbellBank:
    """One vCPU's registers.

    +0x00 first guest frame number (rw)     +0x04 number of 4 KiB pages (rw)
    +0x08 write: command, read: DOORBELL_ID +0x0c result of the last command (read)
    +0x10 failure code (write)

    They are 32 bits wide: accesses of another size or alignment read all ones and write nothing.
    A result is 0 or a negative errno in two's complement.
    """

    __slots__ = ("_actions", "_frame", "_name", "_pages", "_result", "_vcpu")

    def __init__(self, vcpu: int, name: str, actions: DoorbellActions) -> None:
        """`name` is the doorbell's in reports: requests carry it."""
        self._vcpu = vcpu
        self._name = name
        self._actions = actions
        self._frame = 0
        self._pages = 0
        self._result = 0

    def read(self, offset: int, size: int) -> int:
        """A register; all ones where there is none."""
        if size != REGISTER_SIZE or self._actions.convert is None:
            return all_ones(size)
        registers = {
            REG_FRAME: self._frame,
            REG_PAGES: self._pages,
            REG_COMMAND: DOORBELL_ID,
            REG_RESULT: self._result,
        }
        return registers.get(offset, all_ones(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a register write; a command is carried out before the vCPU goes on."""
        if size != REGISTER_SIZE:
            return
        value &= _U32
        if offset == REG_FAILURE:
            if value:
                self._actions.failed(value)
        elif self._actions.convert is None:
            return
        elif offset == REG_FRAME:
            self._frame = value
        elif offset == REG_PAGES:
            self._pages = value
        elif offset == REG_COMMAND:
            self._command(value, self._actions.convert)

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        return {"frame": self._frame, "pages": self._pages, "result": self._result}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful."""
        self._frame = saved.number("frame", _U32)
        self._pages = saved.number("pages", _U32)
        self._result = saved.number("result", _U32)

    def _command(self, code: int, convert: Callable[[ConversionRequest], int]) -> None:
        gpa = self._frame << PAGE_SHIFT
        # Whatever happens on the way: a request that got no answer has not succeeded.
        self._result = -errno.EIO & _U32
        if code in (COMMAND_SHARE, COMMAND_UNSHARE):
            kind = Kind.SHARE if code == COMMAND_SHARE else Kind.UNSHARE
            result = convert(ConversionRequest(kind, gpa, self._pages, self._vcpu, self._name))
        elif code == COMMAND_HOST_CHECK:
            result = self._actions.host_check(gpa, self._pages << PAGE_SHIFT)
        else:
            result = -errno.ENOSYS
        self._result = result & _U32


def doorbell(vcpus: int, name: str, actions: DoorbellActions) -> Banked:
    """The device to put on a bus: a bank for each vCPU."""
    return Banked([DoorbellBank(vcpu, name, actions) for vcpu in range(vcpus)])
