"""A bzImage's payload to an uncompressed ELF in a memfd, in bounded memory.

The codec is told by the payload's magic, and only that one is imported. Output is limited, so a
decompression bomb is an ImageError. The kernel's build appends the uncompressed size (u32, little
endian) to every payload but gzip's, whose own last field it is; where it stands it must agree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

from vmm.boot.isolate import IsolatedWork
from vmm.boot.source import DEFAULT_LIMIT, Source
from vmm.core.lean_typing import NamedTuple, Protocol

CHUNK = 1 << 20
# The kernel's build gives xz and zstd windows of up to 128 MiB; memory is touched only as far as
# output goes. A stream that asks for more than this is refused before it gets any.
MAX_WINDOW_LOG = 27
MAX_XZ_MEMORY = (1 << MAX_WINDOW_LOG) + (32 << 20)

LZ4_MAGIC = bytes.fromhex("02214c18")
LZ4_BLOCK = 8 << 20
LZ4_BOUND = LZ4_BLOCK + LZ4_BLOCK // 255 + 16  # LZ4_compressBound(): the most a block can take
SIZE_BYTES = 4

CORRUPT = "the image is corrupt, get a fresh copy"


class Decoder(Protocol):
    """The interface that bz2, lzma and zstd decompressors of the standard library have."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib's decompressor (which checks CRC and size) behind the interface of the others."""

    __slots__ = ("_object", "_pending")

    def __init__(self) -> None:
        import zlib

        self._object = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._pending = b""

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def needs_input(self) -> bool:
        return not self._pending and not self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._object.decompress(self._pending + data, max_length)
        self._pending = self._object.unconsumed_tail
        return out


OpenDecoder = Callable[[], tuple[Decoder, type[Exception]]]


def _gzip() -> tuple[Decoder, type[Exception]]:
    import zlib

    return _GzipDecoder(), zlib.error


def _bzip2() -> tuple[Decoder, type[Exception]]:
    import bz2

    return bz2.BZ2Decompressor(), OSError


def _xz() -> tuple[Decoder, type[Exception]]:
    import lzma

    # FORMAT_XZ handles the x86 BCJ filter that the kernel's build puts before LZMA2.
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY), lzma.LZMAError


def _lzma() -> tuple[Decoder, type[Exception]]:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_XZ_MEMORY), lzma.LZMAError


def _zstd() -> tuple[Decoder, type[Exception]]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
    return zstd.ZstdDecompressor(options=options), zstd.ZstdError


class Codec(NamedTuple):
    """A compression known by its magic; `open` is None where it is framed here or unsupported."""

    name: str
    magic: bytes
    open: OpenDecoder | None = None
    supported: bool = True


ELF = Codec("uncompressed", b"\x7fELF")
LZ4 = Codec("LZ4 legacy", LZ4_MAGIC)
CODECS = (
    ELF,
    LZ4,
    Codec("gzip", bytes.fromhex("1f8b08"), _gzip),
    Codec("bzip2", b"BZh", _bzip2),
    Codec("xz", bytes.fromhex("fd377a585a00"), _xz),
    Codec("lzma", bytes.fromhex("5d0000"), _lzma),
    Codec("zstd", bytes.fromhex("28b52ffd"), _zstd),
    Codec("LZO", bytes.fromhex("894c5a4f000d0a1a0a"), supported=False),
    Codec("LZ4 frame", bytes.fromhex("04224d18"), supported=False),
)
SUPPORTED = "gzip, bzip2, lzma, xz, LZ4 legacy or zstd"


def find_codec(prefix: bytes) -> Codec | None:
    """The codec whose magic starts `prefix` (9 bytes are enough), or None."""
    return next((codec for codec in CODECS if prefix.startswith(codec.magic)), None)


class _Payload:
    """A cursor over the payload's bytes in the file."""

    __slots__ = ("end", "position", "source")

    def __init__(self, source: Source, position: int, end: int) -> None:
        self.source = source
        self.position = position
        self.end = end

    @property
    def remaining(self) -> int:
        return self.end - self.position

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the payload's end."""
        size = min(size, self.remaining)
        data = self.source.read(self.position, size, "the payload")
        self.position += size
        return data


class Decompression:
    """`length` bytes at `offset` of a file on their way, uncompressed, into a memfd.

    A child does the work from the constructor on; `finish` waits for it.
    """

    def __init__(
        self, source: Source, offset: int, length: int, limit: int = DEFAULT_LIMIT
    ) -> None:
        """Raises ImageError where the payload's size or compression rules it out at once."""
        if length > limit:
            raise source.error(
                f"its payload of {length} bytes is larger than the {limit} it may unpack to",
                CORRUPT,
            )
        payload = _Payload(source, offset, offset + length)
        codec = _codec_of(source, offset, length)
        self._fd = os.memfd_create("pyvmm-kernel", os.MFD_CLOEXEC)
        try:
            self._work = IsolatedWork(
                lambda: _decompress_into(self._fd, payload, codec, limit), source.name
            )
        except BaseException:
            os.close(self._fd)
            raise

    def finish(self) -> tuple[int, int]:
        """(memfd, size), the memfd the caller's.

        Raises ImageError where the payload is truncated, corrupt, or gives too much.
        """
        try:
            size = self._work.result()
        except BaseException:
            self.close()
            raise
        fd, self._fd = self._fd, -1
        return fd, size

    def close(self) -> None:
        """Give up what isn't finished; any number of times."""
        self._work.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def decompress_payload(
    source: Source, offset: int, length: int, limit: int = DEFAULT_LIMIT
) -> tuple[int, int]:
    """A whole `Decompression`: (memfd, size), the memfd the caller's. Raises ImageError."""
    return Decompression(source, offset, length, limit).finish()


def _codec_of(source: Source, offset: int, length: int) -> Codec:
    """The payload's compression, by its magic; ImageError for one that can't be unpacked."""
    magic = source.read(offset, min(16, length), "the payload's magic")
    codec = find_codec(magic)
    if codec is None:
        raise source.error(
            f"its payload has an unknown compression (magic {magic[:8].hex(' ')})",
            f"use a kernel compressed with {SUPPORTED}",
        )
    if not codec.supported:
        raise source.error(
            f"its payload's compression, {codec.name} (magic {codec.magic.hex(' ')}), is not "
            "supported",
            f"use a kernel compressed with {SUPPORTED}",
        )
    return codec


def _decompress_into(fd: int, payload: _Payload, codec: Codec, limit: int) -> int:
    """Write the uncompressed bytes to `fd`; returns how many."""
    size = 0
    for piece in _pieces(payload, codec):
        if size + len(piece) > limit:
            raise payload.source.error(
                f"its {codec.name} payload gives more than {limit} bytes",
                "the image is corrupt or a decompression bomb, get a fresh copy",
            )
        _write_all(payload.source, fd, piece, size)
        size += len(piece)
    _check_trailer(payload, codec, size)
    return size


def _pieces(payload: _Payload, codec: Codec) -> Iterator[bytes]:
    """The payload's uncompressed bytes; leaves the cursor after the compressed stream."""
    if codec is ELF:
        return _copy(payload)
    if codec is LZ4:
        return _lz4_blocks(payload)
    return _stream(payload, codec)


def _copy(payload: _Payload) -> Iterator[bytes]:
    while payload.remaining:
        yield payload.take(CHUNK)


def _stream(payload: _Payload, codec: Codec) -> Iterator[bytes]:
    """Through a decoder object, at most CHUNK bytes in and CHUNK bytes out at a time."""
    assert codec.open is not None
    decoder, failure = codec.open()
    while not decoder.eof:
        data = payload.take(CHUNK) if decoder.needs_input else b""
        starved = decoder.needs_input and not data
        try:
            piece = b"" if starved else decoder.decompress(data, CHUNK)
        except (failure, EOFError, MemoryError) as exc:
            raise _corrupt(payload, codec, str(exc) or type(exc).__name__) from exc
        if not piece and not data and not decoder.eof and (starved or not decoder.needs_input):
            raise _corrupt(payload, codec, "it ends in the middle of the stream")
        yield piece
    # Give back what the decoder read but didn't use.
    payload.position -= len(decoder.unused_data)


def _lz4_blocks(payload: _Payload) -> Iterator[bytes]:
    """The legacy LZ4 framing: a magic, then blocks of a u32 length and 8 MiB of output each.

    Only the last block gives less. There is no end mark: the payload's end is the end, or its last
    four bytes, the uncompressed size that the kernel's build appends.
    """
    from lz4 import block

    payload.take(len(LZ4_MAGIC))
    given = LZ4_BLOCK
    while payload.remaining > SIZE_BYTES:
        if given != LZ4_BLOCK:
            raise _corrupt(payload, LZ4, f"{payload.remaining} bytes follow its last block")
        size = int.from_bytes(payload.take(SIZE_BYTES), "little")
        if size == 0 or size > LZ4_BOUND or size > payload.remaining:
            raise _corrupt(
                payload, LZ4, f"a block of {size} bytes where {payload.remaining} are left"
            )
        try:
            piece = block.decompress(payload.take(size), uncompressed_size=LZ4_BLOCK)
        except (block.LZ4BlockError, ValueError, MemoryError) as exc:
            raise _corrupt(payload, LZ4, str(exc) or type(exc).__name__) from exc
        given = len(piece)
        yield piece


def _check_trailer(payload: _Payload, codec: Codec, size: int) -> None:
    """What follows the compressed stream: nothing, or the uncompressed size."""
    if codec is ELF or payload.remaining == 0:
        return
    if payload.remaining < SIZE_BYTES:
        raise _corrupt(payload, codec, f"{payload.remaining} bytes follow the stream")
    # The kernel's build looks at the last four bytes alone (mkpiggy.c), and so do we.
    payload.position = payload.end - SIZE_BYTES
    told = int.from_bytes(payload.take(SIZE_BYTES), "little")
    if told != size & 0xFFFF_FFFF:
        raise _corrupt(payload, codec, f"it gives {size} bytes, {told} were announced")


def _corrupt(payload: _Payload, codec: Codec, reason: str) -> Exception:
    return payload.source.error(f"its {codec.name} payload is damaged: {reason}", CORRUPT)


def _write_all(source: Source, fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        try:
            done = os.pwrite(fd, view, offset)
        except OSError as exc:
            raise source.error(
                f"no room for the uncompressed kernel at byte {offset}: {exc.strerror}",
                "free host memory",
            ) from exc
        view = view[done:]
        offset += done
