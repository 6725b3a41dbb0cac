"""What is changed in KVM before it is compiled: patches, a tree of the user's own, our additions.

Where only KVM is compiled, as modules for a kernel that stays as it is, what a patch does outside
of it would not be in the machine. It is refused rather than left out, except where it isn't code of
this machine's (documentation, self-tests, other architectures). Where the whole kernel is
(vmm.lab.kernel_build), only those are left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError, UsageError

FOLDERS = ("virt", "arch/x86/kvm")
"""Taken as a whole from a kernel's sources."""
HEADERS = (
    "include/linux/kvm*.h",
    "include/uapi/linux/kvm*.h",
    "include/trace/events/kvm*.h",
    "arch/x86/include/asm/kvm*.h",
    "arch/x86/include/uapi/asm/kvm*.h",
)
"""KVM's own among the kernel's headers: nobody but KVM's modules depends on what is in them."""
ADDITIONS = Path(__file__).with_name("kernel")
"""Our own changes, a folder each: `tree/` is laid over the sources, then `hooks.patch` applied."""

NOT_COMPILED = (
    *(f"drivers/{name}" for name in ("gpu", "media", "staging", "infiniband", "scsi", "usb")),
    *(f"drivers/net/{name}" for name in ("ethernet", "wireless")),
    "sound",
    "Documentation",
    "tools/testing",
)
"""Folders of which no small kernel compiles anything, two thirds of the sources. Their makefiles
and Kconfig files are read all the same."""

_OURS = re.compile(
    r"virt/(kvm|lib)/|arch/x86/kvm/|include/(uapi/)?linux/kvm[^/]*\.h$"
    r"|include/trace/events/kvm[^/]*\.h$|arch/x86/include/(uapi/)?asm/kvm[^/]*\.h$"
)
_NOT_THIS_MACHINES = re.compile(
    r"Documentation/|tools/|samples/|MAINTAINERS$|\.mailmap$|arch/(?!x86/)[^/]+/(kvm/|include/)"
)
# What no kernel that is compiled whole has; {architectures} are those whose folders it has.
_NOT_IN_KERNELS = (
    r"Documentation/|tools/testing/|samples/|MAINTAINERS$|\.mailmap$|"
    r"arch/(?!({architectures})/)[^/]+/.*|"
    + "|".join(rf"{folder}/(?!(.*/)?(Kconfig|Kbuild|Makefile))" for folder in NOT_COMPILED)
)
# arm64 takes some of arm's files; Kconfig and makefiles of all architectures may be looked at.
_FOLDERS_OF = {"x86": "x86", "arm64": "arm64|arm"}
_FAILED_HUNK = re.compile(r"Hunk #(\d+) FAILED at (\d+)")
_FILE = re.compile(r"(?:patching|checking) file '?(.+?)'?$")
_CHANGES = re.compile(rb"^(@@ -\d|new file |deleted |rename |copy |new mode )", re.MULTILINE)
_FROM = re.compile(rb"^(?:rename|copy) from (.+)$", re.MULTILINE)
_LARGEST = 64 << 20  # bytes of a patch
# What builds and git leave in a tree.
_NO_SOURCES = re.compile(r"(.*/)?(\.[^/]*|include/config|include/generated)$")
_NO_SOURCE = re.compile(
    r"\.|vmlinux(\.(?!lds\.[Sh]$).*)?$|System\.map$|(bz)?Image$"
    r"|.*\.([oa]|ko|mod|order|symvers|dtb|gz|xz|zst)$"
)
_MAKEFILE = re.compile(r"Kconfig|Kbuild|Makefile")
_NOT_COMPILED = tuple(f"{folder}/" for folder in NOT_COMPILED)


@dataclass(frozen=True, slots=True)
class FilePatch:
    """What a patch does to one file."""

    name: str
    text: bytes


@dataclass(frozen=True, slots=True)
class KvmChange:
    """How the KVM to be compiled differs from that of the kernel's own sources."""

    sw_protected: bool = False  # with KVM_X86_SW_PROTECTED_VM
    additions: tuple[str, ...] = ()  # of ours, folders of ADDITIONS, in this order
    patches: tuple[Path, ...] = ()  # the user's, applied last, in this order
    source: Path | None = None  # a kernel tree to take KVM from
    symbols: tuple[str, ...] = ()  # more of Kconfig's, without CONFIG_, to be y
    kernel: str | None = None  # the whole kernel is compiled, of this folder of arch/

    def __bool__(self) -> bool:
        return self != KvmChange()

    @property
    def is_users(self) -> bool:
        """Whether a failure to compile is the user's to mend."""
        return bool(self.patches or self.source or self.symbols)

    def name(self) -> str:
        """Of what is compiled, in the cache: changes with the content of all that is named here."""
        if self == KvmChange(sw_protected=True):
            return "kvm-sw-protected"
        digest = hashlib.sha256(repr((self.sw_protected, self.symbols)).encode())
        for folder in self.additions:
            for path in sorted((ADDITIONS / folder).rglob("*.[chp]*")):
                digest.update(str(path.relative_to(ADDITIONS)).encode() + path.read_bytes())
        for path in self.patches:
            digest.update(b"\0patch" + read_patch(path))
        if self.source is not None:
            for path in self.source_files():
                digest.update(str(path.relative_to(self.source)).encode())
                digest.update(_content(path))
        kind = "kvm-changed-" if self.kernel is None else ""
        return f"{kind}{digest.hexdigest()[:16]}"

    def source_files(self) -> list[Path]:
        """What is taken from the user's tree."""
        if self.source is None:
            return []
        return (
            kvm_files(self.source)
            if self.kernel is None
            else kernel_files(self.source, self.kernel)
        )

    def check(self) -> None:
        """Raises UsageError for what can't be compiled this way, before anything is downloaded."""
        for path in self.patches:
            self._part(path)
        needed = ("virt/kvm/kvm_main.c", *(("Makefile",) if self.kernel is not None else ()))
        for name in needed:
            if self.source is not None and not (self.source / name).is_file():
                raise UsageError(
                    f"--kvm-source {self.source}: no kernel tree there ({name} is missing)"
                )

    def touched(self) -> set[str]:
        """The files that patches and additions read or write."""
        parts = [self._part(path)[0] for path in self.patches]
        parts += [(ADDITIONS / folder / "hooks.patch").read_bytes() for folder in self.additions]
        names = set()
        for part in parts:
            for file in split_patch(part):
                names.add(file.name)
                names.update(name.decode(errors="replace") for name in _FROM.findall(file.text))
        return names

    def _part(self, path: Path) -> tuple[bytes, list[str]]:
        return kvm_part(path) if self.kernel is None else kernel_part(path, self.kernel)

    def apply(self, sources: Path, patch_program: Sequence[str]) -> list[str]:
        """Changes the tree `sources`; files of the patches that were left out.

        Raises UsageError naming patch, file and hunk where one doesn't apply.
        """
        if self.source is not None and self.kernel is None:
            _lay_over(self.source, sources)
        for folder in self.additions:
            shutil.copytree(ADDITIONS / folder / "tree", sources, dirs_exist_ok=True)
            hooks = ADDITIONS / folder / "hooks.patch"
            try:
                _apply(hooks.read_bytes(), sources, patch_program, str(hooks))
            except UsageError as error:
                if self.source is None:
                    raise HostError(str(error)) from None
                raise UsageError(f"{error}; --host sw-protected takes your KVM as it is") from None
        left_out = []
        for path in self.patches:
            part, others = self._part(path)
            left_out += others
            _apply(part, sources, patch_program, f"--kvm-patch {path}")
        return left_out


def _content(path: Path) -> bytes:
    """Of a file, or where a link points."""
    return os.readlink(path).encode() if path.is_symlink() else path.read_bytes()


def read_patch(path: Path) -> bytes:
    """A patch's bytes; UsageError for what is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise UsageError(f"--kvm-patch {path}: {error.strerror}") from error
    if len(data) > _LARGEST:
        raise UsageError(f"--kvm-patch {path}: more than {_LARGEST >> 20} MiB, which no patch has")
    return data


def split_patch(data: bytes) -> Iterator[FilePatch]:
    """A patch by files: `diff -u` and `git diff` output, also within mails (`git format-patch`).

    Lengths of hunks are counted, so that a line of text is not taken for a file's beginning.
    """
    lines = data.splitlines(keepends=True)
    at, start, name, in_git_header = 0, None, "", False
    while at < len(lines):
        line = lines[at]
        if line.startswith(b"diff --git "):
            if start is not None:
                yield FilePatch(name, b"".join(lines[start:at]))
            start, name, in_git_header = at, _git_name(line), True
        elif line.startswith(b"--- ") and lines[at + 1 : at + 2] and lines[at + 1][:4] == b"+++ ":
            if not in_git_header:
                if start is not None:
                    yield FilePatch(name, b"".join(lines[start:at]))
                start, name = at, _plain_name(line, lines[at + 1])
            in_git_header = False
            at += 1
        elif line.startswith(b"@@ ") and start is not None:
            at = _hunk_end(lines, at)
            continue
        elif line.rstrip() == b"--" and start is not None:  # a mail's signature
            yield FilePatch(name, b"".join(lines[start:at]))
            start = None
        at += 1
    if start is not None:
        yield FilePatch(name, b"".join(lines[start:]))


def _hunk_end(lines: list[bytes], at: int) -> int:
    counts = re.match(rb"@@ -\d+(?:,(\d{1,9}))? \+\d+(?:,(\d{1,9}))? @@", lines[at])
    at += 1
    if counts is None:
        return at
    old, new = (int(count) if count else 1 for count in counts.groups())
    while at < len(lines) and (old > 0 or new > 0):
        mark = lines[at][:1]
        old -= mark in (b" ", b"-", b"\n")
        new -= mark in (b" ", b"+", b"\n")
        at += 1
    return at


def _git_name(line: bytes) -> str:
    words = line.decode(errors="replace").rstrip().split(" b/")
    return words[-1]


def _plain_name(old: bytes, new: bytes) -> str:
    for line in (new, old):
        name = line[4:].split(b"\t")[0].decode(errors="replace").strip()
        if name != "/dev/null":
            return name.partition("/")[2]
    return ""


def kvm_part(path: Path) -> tuple[bytes, list[str]]:
    """The part of a patch that is compiled as KVM's modules, and the files of the rest.

    Raises UsageError for a file that is neither KVM's nor of no concern to this machine.
    """
    part, left_out = b"", []
    for file in _files_of(path):
        if _OURS.match(file.name):
            part += file.text
        elif _NOT_THIS_MACHINES.match(file.name):
            left_out.append(file.name)
        else:
            raise UsageError(
                f"--kvm-patch {path}: it also changes {file.name}, which is outside KVM's "
                "directories; only KVM's modules are compiled: --kernel-build compiles the whole "
                "kernel (minutes, once)"
            )
    if not part:
        raise UsageError(
            f"--kvm-patch {path}: nothing of x86's KVM is in it, only {', '.join(left_out)}"
        )
    return part, left_out


def kernel_part(path: Path, architecture: str) -> tuple[bytes, list[str]]:
    """The part of a patch that is of a whole kernel of arch/`architecture`, and the rest's files.

    Raises UsageError where there is no such part.
    """
    pattern = _NOT_IN_KERNELS.format(architectures=_FOLDERS_OF[architecture])
    part, left_out = b"", []
    for file in _files_of(path):
        if re.match(pattern, file.name):
            left_out.append(file.name)
        else:
            part += file.text
    if not part:
        raise UsageError(
            f"--kvm-patch {path}: nothing of the lab's {architecture} kernel is in it, only "
            f"{', '.join(left_out)}"
        )
    return part, left_out


def _files_of(path: Path) -> Iterator[FilePatch]:
    """What a patch does to each file; UsageError for what is no patch of a kernel."""
    any_file = False
    for file in split_patch(read_patch(path)):
        any_file = True
        if not _CHANGES.search(file.text):
            raise UsageError(f"--kvm-patch {path}: garbage where {file.name} is to be changed")
        if ".." in Path(file.name).parts or Path(file.name).is_absolute():
            raise UsageError(f"--kvm-patch {path}: {file.name} is no path in a kernel's tree")
        yield file
    if not any_file:
        raise UsageError(f"--kvm-patch {path}: no patch (no line --- followed by +++)")


def kernel_files(tree: Path, architecture: str) -> list[Path]:
    """What a kernel of arch/`architecture` is compiled from: a tree's files without what builds and
    git leave there, other architectures, and all but makefiles below NOT_COMPILED."""
    found = []
    for folder, folders, names in os.walk(tree):
        inside = "" if Path(folder) == tree else f"{Path(folder).relative_to(tree)}/"
        # Links to folders are kept as links.
        names += [name for name in folders if os.path.islink(f"{folder}/{name}")]
        folders[:] = [
            name
            for name in folders
            if name not in names and not _NO_SOURCES.match(f"{inside}{name}")
        ]
        if inside == "arch/":
            folders[:] = [name for name in folders if name in _FOLDERS_OF[architecture].split("|")]
        only_makefiles = inside.startswith(_NOT_COMPILED)
        for name in names:
            if not (_NO_SOURCE.match(name) or (only_makefiles and not _MAKEFILE.match(name))):
                found.append(Path(folder, name))
    return sorted(found)


def kvm_files(tree: Path) -> list[Path]:
    """KVM's own files in a kernel tree, without what a build has left there."""
    found = [
        path
        for folder in FOLDERS
        for path in (tree / folder).rglob("*")
        if path.is_file() and (path.suffix in (".c", ".h", ".S") or path.suffix == "")
    ]
    found += [path for folder in FOLDERS for path in (tree / folder).rglob("Makefile.*")]
    found += [path for pattern in HEADERS for path in tree.glob(pattern)]
    return sorted(set(found))


def _lay_over(tree: Path, sources: Path) -> None:
    """KVM of another tree in place of what is there."""
    for folder in FOLDERS:
        shutil.rmtree(sources / folder)
    for path in kvm_files(tree):
        target = sources / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copyfile(path, target)


def _apply(text: bytes, sources: Path, program: Sequence[str], what: str) -> None:
    result = subprocess.run(
        [*program, "--strip=1", "--batch", "--forward", "--no-backup-if-mismatch"],
        cwd=sources,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if result.returncode:
        raise UsageError(f"{what} does not apply: {_complaint(result.stdout)}")


def _complaint(output: bytes) -> str:
    """The first file and hunk that failed, of what GNU patch says."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    name = ""
    for line in lines:
        if file := _FILE.match(line):
            name = file[1]
        if failed := _FAILED_HUNK.search(line):
            return f"hunk {failed[1]} of {name}, at line {failed[2]}"
        if "Reversed (or previously applied) patch" in line:
            return f"{name} has it already"
        if "****" in line:
            return line.replace("patch: **** ", "")
        if "can't find file" in line or "No file to patch" in line:
            named = [one for one in lines if one.startswith(("|+++ ", "|--- "))]
            return f"there is no file {named[-1][5:].split()[0].partition('/')[2] if named else ''}"
    return lines[-1] if lines else "no reason given"
