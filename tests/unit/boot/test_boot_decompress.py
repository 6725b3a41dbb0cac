"""Payloads: every codec, its trailer, its damage, its limits."""

from __future__ import annotations

import lzma
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import CODECS, LZ4_BLOCK, compress, memfd
from vmm.boot.decompress import decompress_payload
from vmm.boot.errors import ImageError
from vmm.boot.isolate import IsolatedWork
from vmm.boot.source import DEFAULT_LIMIT, Source, open_source
from vmm.core.errors import HostError

# Longer than a chunk, compressible, not periodic in any chunk size.
PLAIN = b"\x7fELF" + random.Random(7).randbytes(110_000) * 10


def unpack(payload: bytes, limit: int = 64 << 20, lead: int = 5) -> bytes:
    """Decompress a payload that lies between other bytes of a file."""
    file = memfd(b"#" * lead + payload + b"#" * 9)
    try:
        with open_source(file, "kernel") as source:
            fd, size = decompress_payload(source, lead, len(payload), limit)
        try:
            assert os.fstat(fd).st_size == size
            return os.pread(fd, size + 1, 0)
        finally:
            os.close(fd)
    finally:
        os.close(file)


@pytest.mark.parametrize("codec", CODECS)
def test_payload_each_codec_gives_the_bytes_back(codec: str) -> None:
    assert unpack(compress(PLAIN, codec)) == PLAIN


@pytest.mark.parametrize("codec", [c for c in CODECS if c not in ("none", "gzip")])
def test_payload_without_appended_size_is_tolerated(codec: str) -> None:
    assert unpack(compress(PLAIN, codec)[:-4]) == PLAIN


@pytest.mark.parametrize("codec", [c for c in CODECS if c not in ("none", "gzip")])
def test_payload_with_wrong_appended_size_is_refused(codec: str) -> None:
    wrong = compress(PLAIN, codec)[:-4] + struct.pack("<I", len(PLAIN) + 1)

    with pytest.raises(ImageError, match="were announced"):
        unpack(wrong)


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "none"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_payload_cut_off_is_refused(codec: str, kept: float) -> None:
    payload = compress(PLAIN, codec)

    with pytest.raises(ImageError, match="damaged"):
        unpack(payload[: int(len(payload) * kept)])


@pytest.mark.parametrize("codec", ["gzip", "bzip2", "lzma", "xz", "zstd"])
def test_payload_that_is_only_a_magic_is_refused(codec: str) -> None:
    with pytest.raises(ImageError, match="damaged"):
        unpack(compress(PLAIN, codec)[:6])


@pytest.mark.parametrize("codec", CODECS)
def test_payload_that_gives_more_than_the_limit_is_refused(codec: str) -> None:
    bomb = compress(b"\x7fELF" + bytes(20 << 20), codec)

    with pytest.raises(ImageError, match=r"more than 1048576 bytes|larger than the 1048576"):
        unpack(bomb, limit=1 << 20)


@pytest.mark.parametrize("codec", CODECS)
def test_payload_of_exactly_the_limit_is_accepted(codec: str) -> None:
    # Zeros, so that what is compressed stays below the limit too.
    plain = b"\x7fELF" + bytes(3 << 20)

    assert len(unpack(compress(plain, codec), limit=len(plain))) == len(plain)


def test_payload_lz4_of_several_blocks_is_joined() -> None:
    plain = b"\x7fELF" + bytes(2 * LZ4_BLOCK) + b"end"

    assert unpack(compress(plain, "lz4")) == plain


def lz4_blocks(*blocks: bytes) -> bytes:
    return bytes.fromhex("02214c18") + b"".join(struct.pack("<I", len(b)) + b for b in blocks)


LZ4_MAGIC = bytes.fromhex("02214c18")


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (LZ4_MAGIC + struct.pack("<I", 0) + b"12345678", "a block of 0 bytes"),
        (LZ4_MAGIC + struct.pack("<I", 0xFFFFFFFF) + b"1234", "a block of 4294967295 bytes"),
        (LZ4_MAGIC + struct.pack("<I", 100) + b"12345678", "a block of 100 bytes where 8"),
        (LZ4_MAGIC + struct.pack("<I", 9 << 20) + bytes(9 << 20), "a block of 9437184 bytes"),
        (LZ4_MAGIC * 100, "a block of"),
        (lz4_blocks(b"\xff" * 40), "damaged"),
        (lz4_blocks(b"\x10A", b"\x10B", b"\x10C"), "follow its last block"),
    ],
    ids=["empty", "huge", "past-end", "over-bound", "magics", "no-lz4", "short-blocks"],
)
def test_payload_lz4_bad_framing_is_refused(payload: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        unpack(payload)


def test_payload_zstd_window_over_128_mib_is_refused() -> None:
    # Frame header: no content size, window 2**28; then one raw last block of 4 bytes.
    frame = bytes.fromhex("28b52ffd") + b"\x00\x90" + struct.pack("<I", 4 << 3 | 1)[:3] + b"\x7fELF"

    with pytest.raises(ImageError, match="zstd payload is damaged"):
        unpack(frame)


def test_payload_lzma_dictionary_of_gigabytes_is_refused() -> None:
    stream = bytearray(lzma.compress(PLAIN, lzma.FORMAT_ALONE))
    stream[1:5] = struct.pack("<I", 0x80000000)

    with pytest.raises(ImageError, match="lzma payload is damaged"):
        unpack(bytes(stream))


def test_payload_xz_dictionary_of_gigabytes_is_refused() -> None:
    # The block header at 12: its size, flags, filter 0x21, 1 property, the dictionary (40 stands
    # for 4 GiB), padding, CRC.
    stream = bytearray(lzma.compress(PLAIN, lzma.FORMAT_XZ))
    stream[16] = 40
    stream[20:24] = struct.pack("<I", zlib.crc32(stream[12:20]))

    with pytest.raises(ImageError, match="xz payload is damaged: Memory usage limit"):
        unpack(bytes(stream))


@pytest.mark.parametrize(
    ("magic", "words"),
    [
        ("894c5a4f000d0a1a0a", r"LZO \(magic 89 4c 5a 4f"),
        ("04224d18", r"LZ4 frame \(magic 04 22 4d 18\)"),
        ("0102030405060708", r"unknown compression \(magic 01 02 03"),
    ],
)
def test_payload_unsupported_compression_is_named(magic: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        unpack(bytes.fromhex(magic) + bytes(100))


def test_payload_refused_leaves_no_file_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))

    with pytest.raises(ImageError):
        unpack(compress(PLAIN, "zstd")[:100])

    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "none"])
def test_payload_each_codec_imports_no_other_codec(codec: str, tmp_path: Path) -> None:
    modules = {"gzip": "zlib", "bzip2": "bz2", "lzma": "lzma", "xz": "lzma", "lz4": "lz4.block"}
    allowed = modules.get(codec, "backports.zstd compression.zstd")
    path = tmp_path / "payload"
    path.write_bytes(compress(PLAIN, codec))
    script = (
        "import sys; import vmm.boot.decompress as d; from vmm.boot.source import open_source\n"
        "import vmm.boot.isolate as i; i.os.listdir = lambda _: ['1', '2']  # do it right here\n"
        "before = set(sys.modules)\n"
        f"s = open_source({str(path)!r}, 'kernel'); d.decompress_payload(s, 0, s.size)\n"
        "watched = {'bz2', 'lzma', 'lz4.block', 'backports.zstd', 'compression.zstd', 'zlib'}\n"
        "print(*sorted(watched & (set(sys.modules) - before)))"
    )

    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{script}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )

    assert set(done.stdout.split()) <= set(allowed.split()), done.stdout


def test_isolated_work_leaves_parent_memory_alone() -> None:
    seen: list[int] = []

    def work() -> int:
        seen.append(os.getpid())
        return 12345678901

    assert IsolatedWork(work, "kernel x").result() == 12345678901
    assert seen == []


def raise_image_error() -> int:
    raise ImageError("kernel x: wrong; do right")


def kill_oneself() -> int:
    os.kill(os.getpid(), 9)
    return 0


def divide() -> int:
    return 1 // 0


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (raise_image_error, "^kernel x: wrong; do right$"),
        (kill_oneself, "killed by signal 9"),
        (divide, "ZeroDivisionError"),
    ],
)
def test_isolated_work_that_fails_is_an_image_error(work: Callable[[], int], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        IsolatedWork(work, "kernel x").result()


def test_isolated_work_fork_refused_is_a_host_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)

    with pytest.raises(HostError, match="temporarily unavailable"):
        IsolatedWork(lambda: 1, "kernel x")


def test_isolated_work_closed_early_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children = []
    fork = os.fork

    def noted() -> int:
        children.append(fork())
        return children[-1]

    def wait_for_ever() -> int:
        signal.pause()
        return 0

    monkeypatch.setattr(os, "fork", noted)
    work = IsolatedWork(wait_for_ever, "kernel x")

    work.close()

    (child,) = children  # there may be others, of other tests
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


def test_payload_write_failure_says_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)

    with pytest.raises(ImageError, match="no room for the uncompressed kernel"):
        unpack(compress(PLAIN, "gzip"))


def test_payload_file_that_shrinks_is_refused() -> None:
    file = memfd(compress(PLAIN, "gzip"))
    source = Source(file, len(PLAIN), "kernel x")
    os.ftruncate(file, 5000)

    with source, pytest.raises(ImageError, match="shrank"):
        decompress_payload(source, 0, 9000)


def test_default_limit_is_a_gibibyte() -> None:
    assert DEFAULT_LIMIT == 1 << 30
