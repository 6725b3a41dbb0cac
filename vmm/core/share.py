"""A folder that goes into a guest and comes back: as a tar archive both ways.

What comes back was written by the guest. Nothing outside of the folder is ever written, whatever
names, links and numbers are in it: each directory on the way to a file is opened by its own name,
never through a link, and files are made beside their place and renamed into it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from typing import IO

from vmm.core.errors import OutputError, UsageError, tell
from vmm.core.lean_typing import NamedTuple
from vmm.core.output import write_all
from vmm.core.suboptions import Suboptions, size_text

DEFAULT_LIMIT = 256 << 20
MOST_FILES = 100_000
_PIECE = 1 << 20
_DEPTH = 64
_LATEST = 1 << 33  # what every file system can keep


class Share(NamedTuple):
    """`--share DIR[,size=SIZE]`; `limit` is in bytes, each way."""

    folder: str
    limit: int = DEFAULT_LIMIT


class Taken(NamedTuple):
    """What came back: files written (an unchanged one isn't), and names that were left out."""

    written: int
    refused: list[str]


def parse_share(text: str) -> Share:
    """`--share DIR[,size=SIZE]`. Raises UsageError."""
    words = Suboptions("--share", text, "DIR[,size=SIZE]")
    folder, size = words.first("directory"), words.take_size("size")
    words.finish()
    return Share(folder) if size is None else Share(folder, size)


def take_back(share: Share, archive: IO[bytes]) -> None:
    """`unpack`, and a line for the user about what was left out. Raises OutputError."""
    taken = unpack(share, archive)
    if taken.refused:
        more = f" and {len(taken.refused) - 3} more" if len(taken.refused) > 3 else ""
        names = ", ".join(name[:80] for name in taken.refused[:3])
        tell(f"--share {share.folder}: left out what leads out of it or is no file: {names}{more}")


def pack(share: Share, archive: IO[bytes]) -> None:
    """Write the folder into `archive`: files, directories and links, which belong to root there.

    Raises UsageError for no folder, one that can't be read, or more than the limit.
    """
    if not os.path.isdir(share.folder):
        raise UsageError(f"--share {share.folder}: no such directory")
    count = 0
    with tarfile.open(fileobj=archive, mode="w:", format=tarfile.GNU_FORMAT) as tar:
        for path, name, status in _found(share.folder):
            count += 1
            member = tar.gettarinfo(path, name)
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            if archive.tell() + status.st_size > share.limit or count > MOST_FILES:
                raise UsageError(
                    f"--share {share.folder}: more than {size_text(share.limit)}, or than "
                    f"{MOST_FILES} files; add size=SIZE"
                )
            if member.islnk():  # another name of a file that is in it: its bytes once more
                member.type, member.size = tarfile.REGTYPE, status.st_size
            try:
                if member.isreg():
                    with open(path, "rb") as file:
                        tar.addfile(member, file)
                else:
                    tar.addfile(member)
            except OSError as error:
                raise UsageError(f"--share {path} cannot be read: {error.strerror}") from error


def _found(folder: str) -> Iterator[tuple[str, str, os.stat_result]]:
    """(path, name below the folder, status) of what is carried, each directory first."""

    def failed(error: OSError) -> None:
        raise UsageError(f"--share {error.filename} cannot be read: {error.strerror}") from error

    for where, folders, names in os.walk(folder, onerror=failed):
        for name in sorted([*folders, *names]):
            path = os.path.join(where, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                yield path, os.path.relpath(path, folder), status


def unpack(share: Share, archive: IO[bytes]) -> Taken:
    """Bring the guest's files back. Nothing is removed; what is the same already stays untouched.

    Names that lead out of the folder, links that do, and what is no file, directory or link are
    left out. Raises OutputError where the archive is damaged, larger than the limit, or can't be
    written.
    """
    taken = _Taking(os.open(share.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), share)
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                taken.member(tar, member)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise OutputError(
            f"--share {share.folder}: what the guest sent back is damaged: {error}"
        ) from error
    except OSError as error:
        raise OutputError(
            f"--share {share.folder} could not be written: {error.strerror}"
        ) from error
    finally:
        os.close(taken.top)
    return Taken(taken.written, taken.refused)


class _Taking:
    def __init__(self, top: int, share: Share) -> None:
        self.top = top
        self.written = 0
        self.refused: list[str] = []
        self._share = share
        self._bytes = 0
        self._count = 0
        self._files: dict[str, tarfile.TarInfo] = {}  # that hard links may be other names of

    def member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._count += 1
        self._count_bytes(member.size)
        parts = _normal(member.name).split("/") if _normal(member.name) else []
        if not parts:
            return
        fits = not member.name.startswith("/") and ".." not in parts and len(parts) <= _DEPTH
        try:
            if not fits or not self._take(tar, member, parts):
                self.refused.append(member.name)
        except OSError as error:
            # A link or a file where a directory should be, a name that no file can have.
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
                raise
            self.refused.append(member.name)

    def _count_bytes(self, size: int) -> None:
        self._bytes += max(size, 0)
        if self._bytes > self._share.limit or self._count > MOST_FILES:
            raise OutputError(
                f"--share {self._share.folder}: the guest's files are more than "
                f"{size_text(self._share.limit)}, or than {MOST_FILES}; add size=SIZE"
            )

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str]) -> bool:
        with self._folder(parts[:-1]) as folder:
            name = parts[-1]
            if member.isdir():
                _make_folder(folder, name)
            elif member.issym():
                if not _stays_inside(parts, member.linkname):
                    return False
                self._link(folder, name, member.linkname)
            elif member.isreg() or member.islnk():
                content = self._files.get(_normal(member.linkname)) if member.islnk() else member
                source = None if content is None else tar.extractfile(content)
                if content is None or source is None:
                    return False
                if member.islnk():
                    self._count_bytes(content.size)
                else:
                    self._files["/".join(parts)] = member
                self._file(folder, name, content, source)
            else:
                return False
        return True

    @contextlib.contextmanager
    def _folder(self, parts: list[str]) -> Iterator[int]:
        """The directory of these names below the top, made where it is missing."""
        fd = os.dup(self.top)
        try:
            for part in parts:
                _make_folder(fd, part)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(part, flags, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _link(self, folder: int, name: str, target: str) -> None:
        with contextlib.suppress(OSError):
            if os.readlink(name, dir_fd=folder) == target:
                return
        temporary = _temporary_name()
        os.symlink(target, temporary, dir_fd=folder)
        self._put(folder, temporary, name)

    def _file(self, folder: int, name: str, member: tarfile.TarInfo, source: IO[bytes]) -> None:
        mode = member.mode & 0o777
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(name, dir_fd=folder, follow_symlinks=False)
            same = stat.S_ISREG(now.st_mode) and now.st_size == member.size
            if same and int(now.st_mtime) == int(member.mtime):
                return
        temporary = _temporary_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            try:
                while piece := source.read(_PIECE):
                    write_all(fd, piece)
                os.fchmod(fd, mode)
                if 0 <= member.mtime < _LATEST:
                    os.utime(fd, (member.mtime, member.mtime))
            finally:
                os.close(fd)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        self._put(folder, temporary, name)

    def _put(self, folder: int, temporary: str, name: str) -> None:
        try:
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(temporary, dir_fd=folder)
            raise
        self.written += 1


def _make_folder(folder: int, name: str) -> None:
    """Whatever has the name already stays; who goes through it finds out what it is."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=folder)


def _normal(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _stays_inside(parts: list[str], target: str) -> bool:
    """Whether a link at `parts` leads to a place below the top.

    ".." may only come first, where it leaves real directories: behind a name it would leave
    whatever that name leads to.
    """
    words = [part for part in target.split("/") if part not in ("", ".")]
    ups = 0
    while ups < len(words) and words[ups] == "..":
        ups += 1
    return not target.startswith("/") and ups < len(parts) and ".." not in words[ups:]


def _temporary_name() -> str:
    return f".pyvmm-{os.urandom(8).hex()}.tmp"
