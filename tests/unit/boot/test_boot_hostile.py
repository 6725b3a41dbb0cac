"""Generated headers and mutated images: an ImageError of one line or a sane image, nothing else.

The decoders run in this process here (in a run they have one of their own), so that an exception
which nobody foresaw shows itself instead of being reported by the parent as a damaged image.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.images import (
    CODECS,
    ELF_FIELDS,
    HEADER_FIELDS,
    FakeMemory,
    build_bzimage,
    build_elf,
    compress,
    memfd,
    patch,
)
from vmm.arch.x86_64.kernel import load_kernel_image
from vmm.boot import decompress
from vmm.boot.errors import ImageError
from vmm.core.ranges import Range

BOUNDED = settings(
    max_examples=300,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RAM = Range(0, 4 << 20)
BZIMAGE = build_bzimage(codec="gzip")
ELF = build_elf()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def __init__(self, work: Callable[[], int], _name: str) -> None:
            self.result = work

        def close(self) -> None:
            """Nothing runs elsewhere."""

    monkeypatch.setattr(decompress, "IsolatedWork", Here)


def boot(image: bytes) -> None:
    """Take an image as far as guest memory; FakeMemory fails where a transfer leaves RAM."""
    fd = memfd(image)
    try:
        with load_kernel_image(fd) as kernel:
            kernel.check_fits([RAM])
            kernel.load(FakeMemory(RAM.size, step=1 << 20))
    except ImageError as exc:
        assert str(exc).isprintable()
    finally:
        os.close(fd)


def numbers(form: str) -> st.SearchStrategy[int]:
    """Any value of a field, the edges more often."""
    bits = 8 * struct.calcsize(form)
    edges = [(1 << n) + d for n in range(bits + 1) for d in (-1, 0, 1)]
    usable = [e for e in edges if 0 <= e < 1 << bits]
    return st.sampled_from(usable) | st.integers(0, (1 << bits) - 1)


def some_of(fields: dict[str, tuple[int, str]]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries(
        {}, optional={name: numbers(form) for name, (_, form) in fields.items()}
    )


mutations = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)))


def mutate(image: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(image)
    for position, data in changes:
        start = position % len(image)
        changed[start : start + len(data)] = data
    return bytes(changed)


@BOUNDED
@given(some_of(HEADER_FIELDS))
def test_hostile_setup_header_fields_are_survived(values: dict[str, int]) -> None:
    boot(patch(BZIMAGE, **values))


@BOUNDED
@given(st.sampled_from(sorted(HEADER_FIELDS)), st.data())
def test_hostile_setup_header_single_field_is_survived(name: str, data: st.DataObject) -> None:
    boot(patch(BZIMAGE, **{name: data.draw(numbers(HEADER_FIELDS[name][1]))}))


@BOUNDED
@given(some_of(ELF_FIELDS))
def test_hostile_elf_fields_are_survived(values: dict[str, int]) -> None:
    boot(patch(ELF, **values))


@BOUNDED
@given(some_of(ELF_FIELDS))
def test_hostile_elf_inside_a_bzimage_is_survived(values: dict[str, int]) -> None:
    boot(build_bzimage(elf=patch(ELF, **values), codec="none"))


@BOUNDED
@given(st.sampled_from([BZIMAGE[:0x400], ELF[:200]]), mutations, st.integers(0, 1 << 16))
def test_mutated_and_cut_headers_are_survived(
    head: bytes, changes: list[tuple[int, bytes]], length: int
) -> None:
    rest = BZIMAGE[0x400:] if len(head) == 0x400 else ELF[200:]
    image = mutate(head, changes) + rest

    boot(image[: max(1, length % (2 * len(image)))])


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
@settings(BOUNDED, max_examples=80)
@given(changes=mutations, length=st.integers(0, 1 << 16))
def test_mutated_payloads_are_survived(
    codec: str, changes: list[tuple[int, bytes]], length: int
) -> None:
    payload = compress(ELF, codec)
    # The magic stays, so that it is the codec that gets the rest.
    payload = payload[:4] + mutate(payload[4:], changes)

    boot(build_bzimage(payload[: max(8, length % (2 * len(payload)))]))


@BOUNDED
@given(
    st.sampled_from([codec.magic for codec in decompress.CODECS]),
    st.binary(max_size=200),
)
def test_random_bytes_after_each_magic_are_survived(magic: bytes, data: bytes) -> None:
    boot(build_bzimage(magic + data))
    boot(magic + data)


@BOUNDED
@given(st.binary(min_size=1, max_size=0x500))
def test_random_files_are_survived(image: bytes) -> None:
    boot(image)
