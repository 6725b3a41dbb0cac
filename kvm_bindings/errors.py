"""What a failed system call becomes: a sentence with the operation, its arguments, the errno."""

from __future__ import annotations

import errno as errno_names
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class KvmError(OSError):
    """A system call on a KVM or backing fd failed.

    `errno` is the kernel's number, `operation` the ioctl's or system call's name; the text holds
    both with the decoded arguments and, where there is one, a hint about what would work.
    """

    def __init__(self, operation: str, number: int, arguments: str = "", hint: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.operation = operation
        self.arguments = arguments
        self.hint = hint

    def __str__(self) -> str:
        number = self.errno or 0
        name = errno_names.errorcode.get(number, str(number))
        text = f"{self.operation}({self.arguments}) failed: {name} ({os.strerror(number)})"
        return f"{text}; {self.hint}" if self.hint else text


def fail(operation: str, result: int, arguments: str = "", hint: str = "") -> NoReturn:
    """Raise KvmError for a negative `result` (-errno) of `operation`."""
    raise KvmError(operation, -result, arguments, hint)


def check(operation: str, result: int, template: str = "", *values: object) -> int:
    """`result`, or KvmError for a negative one (-errno).

    The arguments' text is `template`.format(*values), made only when it is needed.
    """
    if result < 0:
        fail(operation, result, template.format(*values))
    return result
