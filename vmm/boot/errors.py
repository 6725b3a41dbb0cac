"""The one error of this room: an image that cannot be booted, said in one line."""

from __future__ import annotations

from vmm.core.errors import UsageError


class ImageError(UsageError):
    """A kernel or initrd is missing, damaged, hostile, too large, or for another machine."""
