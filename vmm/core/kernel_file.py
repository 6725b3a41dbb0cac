"""What a kernel image says of itself, and where its modules lie."""

from __future__ import annotations

from pathlib import Path

_HEAD = 0x10000
_X86_MARK = (0x202, b"HdrS")  # Documentation/arch/x86/boot.rst of Linux
_ARM64_MARK = (0x38, b"ARM\x64")  # Documentation/arch/arm64/booting.rst of Linux
_BANNER = b"Linux version "


def modules_beside(image: Path) -> Path | None:
    """The modules of a kernel image that lies where distributions put it, or None."""
    release = kernel_release(image)
    if release is None:
        return None
    roots = [image.resolve().parent, *image.resolve().parents]
    places = [image.resolve().parent]
    for root in roots[:4]:
        places += [root / "lib" / "modules" / release, root / "usr" / "lib" / "modules" / release]
    return next((p for p in places if (p / "kernel").is_dir()), None)


def kernel_release(image: Path) -> str | None:
    """The release that a kernel image names, as `uname -r` would say; None when it isn't one."""
    words = _version_words(image)
    return words[0] if words else None


def debian_version(image: Path) -> str | None:
    """The version of the Debian package that a kernel was built as; None for other kernels."""
    words = _version_words(image)
    at = words.index("Debian") + 1 if "Debian" in words else len(words)
    return words[at] if at < len(words) else None


def _version_words(image: Path) -> list[str]:
    """What the kernel says of itself at boot, from its release on; empty for other files."""
    try:
        with open(image, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return []
    if _has(head, _X86_MARK):
        # Boot protocol: kernel_version at 0x20e.
        at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
        return head[at : at + 256].split(b"\0", 1)[0].decode("ascii", "replace").split()
    if _has(head, _ARM64_MARK):
        # It has no field for that; what it prints first (linux_banner) is in it as it is.
        content = image.read_bytes()
        at = content.find(_BANNER)
        banner = content[at + len(_BANNER) :][:256] if at >= 0 else b""
        return banner.split(b"\n", 1)[0].decode("ascii", "replace").split()
    return []


def _has(head: bytes, mark: tuple[int, bytes]) -> bool:
    at, magic = mark
    return head[at : at + len(magic)] == magic
