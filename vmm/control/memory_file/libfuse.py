"""libfuse 3's low-level interface, as much of it as a folder with a few files needs.

By ctypes on the system's library: a read is answered here straight out of the memory that it is
about. libfuse's high-level interface, and the Python libraries over it, have that memory copied
into a buffer of libfuse's first. That takes as long again as the reader's own copy.

Sources: include/fuse_lowlevel.h and fuse_common.h of libfuse 3.14 and 3.17, whose structures and
symbols are the same here; struct stat as <bits/struct_stat.h> has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

NAMES = ("libfuse3.so.4", "libfuse3.so.3")
ROOT = 1
"""The mount's own folder: FUSE_ROOT_ID."""

_DIRECT_IO, _NONSEEKABLE = 1 << 1, 1 << 4
_MOST_FAILURES, _APART_SECONDS = 16, 1.0
"""How often in a row no request could be read before none is expected any more; failures that are
so far apart are not in a row."""
_TAKEN = (0, -errno.ENOENT, -errno.EFAULT)
"""What a reply may come to: also that its caller is gone, or that the kernel couldn't reach the
bytes and has answered EIO itself (fs/fuse/dev.c, fuse_dev_do_write)."""
_STAT = {
    # dev ino nlink mode uid gid . rdev size blksize blocks, three times, .
    "x86_64": struct.Struct("=QQQIIIIQqqqqqqqqq24x"),
    # dev ino mode nlink uid gid rdev . size blksize . blocks, three times, .
    "aarch64": struct.Struct("=QQIIIIQQqiiqqqqqqq8x"),
}
_ENTRY = struct.Struct("=QQ")  # ino, generation; then a struct stat, then two doubles
_BLOCK = 1 << 20


class Attributes(NamedTuple):
    """What stat(2) says of a file, besides its owner: this process's user."""

    mode: int
    size: int = 0
    blocks: int = 0
    """Of 512 bytes, as st_blocks."""


class Answer(Protocol):
    """Takes what one read gives, once."""

    def data(self, data: bytes | bytearray | memoryview) -> None: ...

    def at(self, address: int, size: int) -> None:
        """Bytes that this process has mapped there: the kernel copies them, nobody else looks. The
        reader has EIO where the kernel can't reach them."""
        ...


class Files(Protocol):
    """What is asked for, on the session's thread. All but the first two may raise OSError."""

    began_ns: int
    """The files' times."""
    names: dict[bytes, int]
    """The folder's files, by name: their inode numbers, from 2 on."""

    def attributes(self, inode: int) -> Attributes: ...

    def open(self, inode: int, flags: int, process: int) -> int:
        """A handle, for those below."""
        ...

    def release(self, handle: int) -> None: ...

    def read(self, handle: int, size: int, offset: int, answer: Answer) -> None: ...

    def write(self, handle: int, data: memoryview, offset: int) -> int: ...

    def seek(self, handle: int, offset: int, whence: int) -> int: ...

    def poll(self, handle: int, waiter: int | None) -> int:
        """Which of POLLIN and POLLOUT hold. `waiter` is for `Library.notify`, and from now on the
        caller's to give back."""
        ...

    def failed(self, mistake: BaseException) -> None:
        """What one of them has raised that is no OSError; its caller gets EIO."""
        ...


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int),
        ("values", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    )


class _OpenFile(ctypes.Structure):
    """struct fuse_file_info, up to what is used of it."""

    _fields_ = (
        ("flags", ctypes.c_int32),
        ("bits", ctypes.c_uint32),
        ("padding", ctypes.c_uint32 * 2),
        ("handle", ctypes.c_uint64),
    )


class _Caller(ctypes.Structure):
    """struct fuse_ctx."""

    _fields_ = (
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("pid", ctypes.c_int32),
        ("umask", ctypes.c_uint32),
    )


_Request = ctypes.c_void_p
_Inode = ctypes.c_uint64
_Info = ctypes.POINTER(_OpenFile)
_Offset = ctypes.c_int64
_CALLBACKS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("init", ()),
    ("destroy", ()),
    ("lookup", (_Request, _Inode, ctypes.c_char_p)),
    ("forget", ()),
    ("getattr", (_Request, _Inode, _Info)),
    ("setattr", (_Request, _Inode, ctypes.c_void_p, ctypes.c_int, _Info)),
    *((name, ()) for name in ("readlink", "mknod", "mkdir", "unlink", "rmdir", "symlink")),
    *((name, ()) for name in ("rename", "link")),
    ("open", (_Request, _Inode, _Info)),
    ("read", (_Request, _Inode, ctypes.c_size_t, _Offset, _Info)),
    ("write", (_Request, _Inode, ctypes.c_void_p, ctypes.c_size_t, _Offset, _Info)),
    ("flush", ()),
    ("release", (_Request, _Inode, _Info)),
    *((name, ()) for name in ("fsync", "opendir")),
    ("readdir", (_Request, _Inode, ctypes.c_size_t, _Offset, _Info)),
    *((name, ()) for name in ("releasedir", "fsyncdir", "statfs", "setxattr", "getxattr")),
    *((name, ()) for name in ("listxattr", "removexattr", "access", "create", "getlk", "setlk")),
    *((name, ()) for name in ("bmap", "ioctl")),
    ("poll", (_Request, _Inode, _Info, ctypes.c_void_p)),
    *((name, ()) for name in ("write_buf", "retrieve_reply", "forget_multi", "flock")),
    *((name, ()) for name in ("fallocate", "readdirplus", "copy_file_range")),
    ("lseek", (_Request, _Inode, _Offset, ctypes.c_int, _Info)),
)
"""struct fuse_lowlevel_ops, in its order. Those without arguments here are left to libfuse."""


_TYPES: dict[str, Any] = {
    name: ctypes.CFUNCTYPE(None, *arguments) if arguments else ctypes.c_void_p
    for name, arguments in _CALLBACKS
}


class _Operations(ctypes.Structure):
    _fields_ = tuple(_TYPES.items())


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_no_log = _Log(lambda level, text, arguments: None)
"""libfuse would print to stderr, where each error is one line of ours."""


class Library:
    """The functions of libfuse. Raises OSError where the library isn't there."""

    def __init__(self) -> None:
        self._library = library = _load()
        self.unanswered: Callable[[int], None] = lambda error: None
        """Told, with the errno, of a caller whose reply the kernel hasn't taken, who waits."""
        with contextlib.suppress(AttributeError):  # since 3.7
            library.fuse_set_log_func(_no_log)
        self.notify = self._function("fuse_lowlevel_notify_poll", ctypes.c_void_p)
        """Wake the callers that poll."""
        self.give_back = self._function("fuse_pollhandle_destroy", ctypes.c_void_p)
        self.new = self._function(
            "fuse_session_new",
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
            result=ctypes.c_void_p,
        )
        self.mount = self._function("fuse_session_mount", ctypes.c_void_p, ctypes.c_char_p)
        self.loop = self._function("fuse_session_loop", ctypes.c_void_p)
        self.exit = self._function("fuse_session_exit", ctypes.c_void_p)
        self.unmount = self._function("fuse_session_unmount", ctypes.c_void_p)
        self.destroy = self._function("fuse_session_destroy", ctypes.c_void_p)
        self.caller = self._function("fuse_req_ctx", _Request, result=ctypes.POINTER(_Caller))
        self.error = self._reply("err", ctypes.c_int)
        self.entry = self._reply("entry", ctypes.c_char_p)
        self.attributes = self._reply("attr", ctypes.c_char_p, ctypes.c_double)
        self.opened = self._reply("open", _Info)
        self.written = self._reply("write", ctypes.c_size_t)
        self.data = self._reply("buf", ctypes.c_void_p, ctypes.c_size_t)
        self.offset = self._reply("lseek", _Offset)
        self.events = self._reply("poll", ctypes.c_uint)
        self.add_name = self._function(
            "fuse_add_direntry",
            *(_Request, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p),
            _Offset,
            result=ctypes.c_size_t,
        )

    def _function(self, name: str, *arguments: Any, result: Any = ctypes.c_int) -> Any:
        function = self._library[name]
        function.argtypes, function.restype = arguments, result
        return function

    def _reply(self, name: str, *arguments: Any) -> Any:
        function = self._function(f"fuse_reply_{name}", _Request, *arguments)
        function.errcheck = self._replied
        return function

    def _replied(self, result: int, function: Any, arguments: Any) -> int:
        if result not in _TAKEN:
            self.unanswered(-result)
        return result


def _load() -> ctypes.CDLL:
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reason = error
    raise reason


class Session:
    """One mount, from `mount` until `serve` returns."""

    def __init__(self, library: Library, files: Files, options: str) -> None:
        """`options` as for mount(8)'s -o. Raises OSError where libfuse refuses."""
        self._library = library
        self._files = files
        self._stat = _STAT[platform.machine()]
        words = (ctypes.c_char_p * 3)(b"pyvmm", b"-o", options.encode())
        self._kept = words, _Arguments(3, words, 0)
        self._operations = _Operations(
            **{
                name: _TYPES[name](getattr(self, f"_{name}"))
                for name, arguments in _CALLBACKS
                if arguments
            }
        )
        self._broken = 0
        library.unanswered = self._break
        self._session = library.new(
            ctypes.addressof(self._kept[1]),
            ctypes.addressof(self._operations),
            ctypes.sizeof(self._operations),
            None,
        )
        if not self._session:
            raise OSError(errno.EINVAL, "libfuse refuses its options")

    def mount(self, path: str) -> None:
        """Raises OSError where it can't be."""
        if self._library.mount(self._session, os.fsencode(path)):
            raise OSError(errno.EPERM, "mount(2), or fusermount3, refuses")

    def serve(self) -> None:
        """Answer until unmounted, or `leave` was called and one request more has come. Raises
        OSError where requests can't be read or answered any more; then only `close` is left."""
        failures, last = 0, 0.0
        while True:
            result = self._library.loop(self._session)
            if result < 0:
                # Of what it couldn't read the kernel tells the caller (EIO); the next may go well.
                now = time.monotonic()
                failures = 1 if now - last > _APART_SECONDS else failures + 1
                last = now
                if failures < _MOST_FAILURES:
                    continue
                self._broken = -result
            if self._broken:
                raise OSError(self._broken, os.strerror(self._broken))
            return

    def _break(self, error: int) -> None:
        """A caller has no answer, and libfuse has forgotten the request: only the end of the
        session has the kernel tell it."""
        self._broken = error
        self._library.exit(self._session)

    def leave(self) -> None:
        self._library.exit(self._session)

    def close(self) -> None:
        """Unmount what still is; nobody is in `serve`."""
        self._library.unmount(self._session)
        self._library.destroy(self._session)

    def abandon(self) -> None:
        """As `close`, but the mount stays: whoever waits for an answer, or asks for something yet,
        has an error (ECONNABORTED, ENOTCONN)."""
        self._library.destroy(self._session)

    # -- requests -----------------------------------------------------------------------------

    def _answered(self, request: int, work: Callable[[], None]) -> None:
        """Carry a request out; what it raises is its answer. Nothing may leave into C."""
        try:
            work()
        except OSError as error:
            self._library.error(request, error.errno or errno.EIO)
        except BaseException as mistake:
            self._library.error(request, errno.EIO)
            self._files.failed(mistake)

    def _packed(self, inode: int) -> bytes:
        about = self._files.attributes(inode)
        links = 2 if stat.S_ISDIR(about.mode) else 1
        owner = os.getuid(), os.getgid()
        moments = divmod(self._files.began_ns, 10**9) * 3
        head: tuple[int, ...]
        if self._stat is _STAT["x86_64"]:
            head = (0, inode, links, about.mode, *owner, 0, 0, about.size, _BLOCK, about.blocks)
        else:
            head = (
                *(0, inode, about.mode, links, *owner, 0, 0, about.size, _BLOCK, 0, about.blocks),
            )
        return self._stat.pack(*head, *moments)

    def _lookup(self, request: int, parent: int, name: bytes) -> None:
        def work() -> None:
            inode = self._files.names.get(name) if parent == ROOT else None
            if inode is None:
                raise OSError(errno.ENOENT, "no such file")
            # No time for which it holds: all is asked for again.
            found = _ENTRY.pack(inode, 0) + self._packed(inode) + bytes(16)
            self._library.entry(request, found)

        self._answered(request, work)

    def _getattr(self, request: int, inode: int, info: Any) -> None:
        self._answered(request, lambda: self._library.attributes(request, self._packed(inode), 0.0))

    def _setattr(self, request: int, inode: int, new: int, which: int, info: Any) -> None:
        self._library.error(request, errno.EPERM)  # memory has the size that it has

    def _open(self, request: int, inode: int, info: Any) -> None:
        def work() -> None:
            file = info.contents
            process = self._library.caller(request).contents.pid
            file.handle = self._files.open(inode, file.flags, process)
            # Nothing is cached: a page may be private the next moment. Nor can it be mapped, then.
            file.bits = file.bits & ~_NONSEEKABLE | _DIRECT_IO
            if self._library.opened(request, info):
                self._files.release(file.handle)  # its caller is gone

        self._answered(request, work)

    def _release(self, request: int, inode: int, info: Any) -> None:
        def work() -> None:
            self._files.release(info.contents.handle)
            self._library.error(request, 0)

        self._answered(request, work)

    def _read(self, request: int, inode: int, size: int, offset: int, info: Any) -> None:
        answer = _Answer(self._library, request)
        self._answered(
            request, lambda: self._files.read(info.contents.handle, size, offset, answer)
        )

    def _write(
        self, request: int, inode: int, buffer: int, size: int, offset: int, info: Any
    ) -> None:
        def work() -> None:
            data = memoryview((ctypes.c_char * size).from_address(buffer)).cast("B")
            done = self._files.write(info.contents.handle, data, offset)
            self._library.written(request, done)

        self._answered(request, work)

    def _lseek(self, request: int, inode: int, offset: int, whence: int, info: Any) -> None:
        def work() -> None:
            found = self._files.seek(info.contents.handle, offset, whence)
            self._library.offset(request, found)

        self._answered(request, work)

    def _poll(self, request: int, inode: int, info: Any, waiter: int | None) -> None:
        self._answered(
            request,
            lambda: self._library.events(
                request, self._files.poll(info.contents.handle, waiter or None)
            ),
        )

    def _readdir(self, request: int, inode: int, size: int, offset: int, info: Any) -> None:
        def work() -> None:
            names = [(b".", ROOT), (b"..", ROOT), *self._files.names.items()]
            buffer = ctypes.create_string_buffer(size)
            used = 0
            for number, (name, each) in enumerate(names[offset:], offset + 1):
                needed = self._library.add_name(
                    request,
                    ctypes.addressof(buffer) + used,
                    size - used,
                    name,
                    self._packed(each),
                    number,
                )
                if used + needed > size:
                    break
                used += needed
            self._library.data(request, ctypes.addressof(buffer), used)

        self._answered(request, work)


class _Answer:
    """See `Answer`."""

    __slots__ = ("_library", "_request")

    def __init__(self, library: Library, request: int) -> None:
        self._library = library
        self._request = request

    def data(self, data: bytes | bytearray | memoryview) -> None:
        if isinstance(data, bytes):
            self._library.data(self._request, data, len(data))
            return
        address = ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))
        self._library.data(self._request, address, len(data))

    def at(self, address: int, size: int) -> None:
        self._library.data(self._request, address, size)
