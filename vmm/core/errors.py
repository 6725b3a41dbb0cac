"""Every error that a user may see: one sentence, and the exit status that goes with it."""

from __future__ import annotations

import contextlib
import errno
import sys


def one_line(text: str) -> str:
    """`text` fit for one line on a terminal, whatever a file name or a guest put into it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell(sentence: str) -> None:
    """One line for the user on stderr; without a working stderr there is nobody to tell."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"pyvmm: {one_line(sentence)}", file=sys.stderr, flush=True)


def in_words(error: OSError) -> str:
    """What the host's kernel refused, and the limit of this process that it met, if any."""
    if type(error).__str__ is not OSError.__str__:
        words = str(error)  # KvmError, which names the call and its arguments
    else:
        where = "" if error.filename is None else f"{error.filename}: "
        words = f"{where}{error.strerror or error}"
    return words + limit_met(error)


def limit_met(error: OSError) -> str:
    """What to do about an error that a limit of this process explains: "; ...", or nothing."""
    if error.errno not in _LIMITS:
        return ""
    name, option, words = _LIMITS[error.errno]
    try:
        import resource  # most runs meet no limit
    except ImportError:  # a file of its own: none can be opened, or not in a sandbox any more
        return f"; raise `ulimit -{option}`" if error.errno == errno.EMFILE else ""
    most, _ = resource.getrlimit(getattr(resource, name))
    if most == resource.RLIM_INFINITY:
        return ""
    return f"; {words.format(most)}: raise `ulimit -{option}`"


_LIMITS = {
    errno.EMFILE: ("RLIMIT_NOFILE", "n", "this process may have {} open"),
    errno.EFBIG: ("RLIMIT_FSIZE", "f", "a file of this process may have {} bytes"),
    errno.ENOMEM: ("RLIMIT_AS", "v", "this process may map {} bytes"),
}
"""By errno: the resource, ulimit's option in KiB or pieces, and what to say of it."""


class PyvmmError(Exception):
    """An error whose text is one complete line for the user.

    `exit_status` is what the command ends with when nothing handles the error.
    """

    exit_status = 1


class UsageError(PyvmmError):
    """Bad usage or bad input: an option, a file, a kernel image (exit status 2)."""

    exit_status = 2


class HostError(PyvmmError):
    """The host cannot do what was asked: no KVM, a capability missing (exit status 3)."""

    exit_status = 3


class OutputError(PyvmmError):
    """What was to be written could not be: a full disk, a reader that has gone (exit status 1)."""


class GuestFailure(PyvmmError):
    """The guest failed: panic, triple fault, internal error (exit status 1)."""


class GuestMemoryError(PyvmmError):
    """An access to guest memory by the host that was refused before a byte moved."""


class UnmappedAccess(GuestMemoryError):
    """The range is not (wholly) guest RAM."""


class PrivateAccess(GuestMemoryError):
    """The range holds private or converting pages, which the host does not touch."""


class AccessDenied(GuestMemoryError):
    """A policy does not want the device to touch this range."""
