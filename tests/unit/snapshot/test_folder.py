"""A snapshot's folder: whole or not there, and refused with one line when it is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.core.saved import BadState
from vmm.snapshot import folder
from vmm.snapshot.folder import SnapshotFolder, checksums, new_file, new_folder, packed, unpacked

PAGE = 4096
STATE = {"state": {"cpus": 1}, "pages": [[0, PAGE, "shared"]]}


def write(path: Path, contents: bytes, runs: list[list[int]], **more: Any) -> Path:
    """A folder with such a memory."""
    with new_folder(str(path)) as making:
        fd = new_file(making, folder.MEMORY)
        os.pwrite(fd, contents, 0)
        state = {**STATE, "memory": checksums(fd, runs), **more}
        os.close(fd)
        Path(making, folder.STATE).write_bytes(packed(state))
    return path


def contents(path: Path) -> dict[Range, bytes]:
    opened = SnapshotFolder(str(path))
    try:
        return dict(opened.contents(opened.state, folder.MEMORY))
    finally:
        opened.close()


def test_contents_come_back_in_pieces(tmp_path: Path) -> None:
    size = folder.PIECE + 3 * PAGE
    data = os.urandom(size)

    found = contents(write(tmp_path / "saved", data, [[0, size]]))

    assert list(found) == [Range(0, folder.PIECE), Range(folder.PIECE, 3 * PAGE)]
    assert b"".join(found.values()) == data


def test_only_its_owner_may_look_into_it(tmp_path: Path) -> None:
    path = write(tmp_path / "saved", bytes(PAGE), [[0, PAGE]])

    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / folder.MEMORY).stat().st_mode) == 0o600


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError), new_folder(str(tmp_path / "saved")) as making:
        Path(making, "half").write_bytes(b"done")
        raise OSError(28, "No space left on device")

    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"), new_folder(str(tmp_path)):
        pytest.fail("nothing is made")


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(deadline=None)
def test_bit_that_flips_is_found(at: int, bit: int) -> None:
    data = bytearray(packed(STATE))
    data[at % len(data)] ^= 1 << bit

    with pytest.raises(BadState):
        unpacked(bytes(data), "state")


@given(size=st.integers(0, 10_000))
@settings(deadline=None)
def test_state_that_is_cut_short_is_refused(size: int) -> None:
    whole = packed(STATE)

    with pytest.raises(BadState):
        unpacked(whole[: size % len(whole)], "state")


@given(data=st.binary(max_size=300))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(BadState):
        unpacked(data, "state")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"1" * 5000, b"[]", b"null", b"\xff", b"{", b'{"a": NaN}x']
)
def test_json_that_is_none_of_ours_is_refused(text: bytes) -> None:
    line = f"pyvmm-snapshot 2 {hashlib.sha256(text).hexdigest()} {len(text)}\n".encode()

    with pytest.raises(BadState) as refusal:
        unpacked(line + text, "state")

    assert "\n" not in str(refusal.value)


def test_other_version_is_named() -> None:
    data = packed(STATE).replace(b"pyvmm-snapshot 2 ", b"pyvmm-snapshot 1 ")

    with pytest.raises(BadState, match="version '1' of the format, and this pyvmm reads version 2"):
        unpacked(data, "state")


def test_memory_that_is_cut_short_or_damaged_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "saved", bytes(2 * PAGE), [[0, 2 * PAGE]])
    os.truncate(path / "memory", PAGE)
    with pytest.raises(BadState, match="is cut short: it ends before 0x2000"):
        contents(path)

    os.truncate(path / "memory", 2 * PAGE)
    with (path / "memory").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(BadState, match="damaged"):
        contents(path)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, PAGE, "x"], [0, PAGE, "x"]],  # twice
        [[1, PAGE, "x"]],
        [[0, PAGE - 1, "x"]],
        [[0, 0, "x"]],
        [[0, 1 << 40, "x"]],
        [[-PAGE, PAGE, "x"]],
        [[1 << 60, PAGE, "x"]],
        [[0, PAGE]],
        [[0, PAGE, 1]],
        [[True, PAGE, "x"]],
        ["x"],
        [None],
        "x",
        None,
    ],
)
def test_list_of_memory_that_makes_no_sense_is_refused(tmp_path: Path, rows: Any) -> None:
    path = write(tmp_path / "saved", bytes(PAGE), [])
    right = hashlib.sha256(bytes(PAGE)).hexdigest()
    text = json.dumps(rows).replace('"x"', f'"{right}"')
    state = {**STATE, "memory": json.loads(text)}
    (path / "state").write_bytes(packed(state))

    with pytest.raises(BadState):
        contents(path)


@pytest.mark.parametrize("kind", ["nothing", "folder", "fifo", "link"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved"
    path.mkdir()
    if kind == "folder":
        (path / "state").mkdir()
    elif kind == "fifo":
        os.mkfifo(path / "state")
    elif kind == "link":
        (path / "state").symlink_to("/dev/zero")

    with pytest.raises(BadState, match=f"--restore {path}"):
        SnapshotFolder(str(path))


def test_packed_state_is_a_line_and_json() -> None:
    line, _, text = packed(STATE).partition(b"\n")

    assert line.split()[:2] == [b"pyvmm-snapshot", b"2"]
    assert json.loads(text) == STATE
