"""A folder that goes into a guest and comes back from one that means ill."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.core import share as sharing
from vmm.core.errors import OutputError, UsageError
from vmm.core.share import Share, Taken, pack, parse_share, unpack

Member = tuple[str, bytes | str | None, bytes]
FILE, LINK, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shared one; what is beside it must not change."""
    (tmp_path / "outside").write_text("untouched")
    made = tmp_path / "shared"
    made.mkdir()
    return made


def archive(*members: Member) -> io.BytesIO:
    """(name, content of a file or target of a link, type)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:", format=tarfile.GNU_FORMAT) as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.mode = 0o4755
            if isinstance(content, str):
                member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content or b"")
                tar.addfile(member, io.BytesIO(content or b""))
    made.seek(0)
    return made


def back(folder: Path, *members: Member, limit: int = 1 << 20) -> Taken:
    return unpack(Share(str(folder), limit), archive(*members))


def beside(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.parent.iterdir() if p != folder}


def test_folder_packed_and_unpacked_is_the_same(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(b"x" * 5000)
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "link").symlink_to("sub/file")
    os.link(folder / "run", folder / "same")
    os.mkfifo(folder / "fifo")
    packed = io.BytesIO()
    pack(Share(str(folder)), packed)
    packed.seek(0)
    other = tmp_path / "other"
    other.mkdir()

    taken = unpack(Share(str(other)), packed)

    assert taken.refused == []
    assert (other / "sub" / "file").read_bytes() == b"x" * 5000
    assert os.access(other / "run", os.X_OK) and (other / "same").read_text() == "#!/bin/sh\n"
    assert os.readlink(other / "link") == "sub/file"
    assert not (other / "fifo").exists()


def test_unchanged_file_is_not_written_again(folder: Path) -> None:
    (folder / "old").write_text("old")
    packed = io.BytesIO()
    pack(Share(str(folder)), packed)
    before = (folder / "old").stat().st_ino
    packed.seek(0)

    assert unpack(Share(str(folder)), packed).written == 0
    assert (folder / "old").stat().st_ino == before


def test_changed_file_replaces_the_old_one_without_its_special_bits(folder: Path) -> None:
    (folder / "f").write_text("old")

    assert back(folder, ("./f", b"newer", FILE)).written == 1
    assert (folder / "f").read_text() == "newer"
    assert (folder / "f").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "a/../../outside", "./../outside", "/".join("d" * 70)]
)
def test_name_that_leads_out_is_left_out(folder: Path, name: str) -> None:
    assert back(folder, (name, b"evil", FILE)).refused == [name]
    assert beside(folder) == {"outside": "untouched"}


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "sub/../../outside", "a/.."])
def test_link_that_leads_out_is_left_out(folder: Path, target: str) -> None:
    assert back(folder, ("link", target, LINK)).refused == ["link"]
    assert list(folder.iterdir()) == []


def test_links_that_lead_out_together_are_left_out(folder: Path) -> None:
    members: list[Member] = [("a/b/up", "../..", LINK), ("way", "a/b/up/..", LINK)]

    assert back(folder, *members).refused == ["way"]


@pytest.mark.parametrize("kind", [FILE, FOLDER])
def test_nothing_is_written_through_a_link(folder: Path, kind: bytes) -> None:
    (folder / "here").symlink_to("..")

    taken = back(folder, ("here/outside", b"evil" if kind == FILE else None, kind))

    assert taken.refused == ["here/outside"]
    assert beside(folder) == {"outside": "untouched"}


def test_file_in_the_place_of_a_link_replaces_the_link(folder: Path) -> None:
    (folder / "f").symlink_to("../outside")

    back(folder, ("f", b"mine", FILE))

    assert (folder / "f").read_bytes() == b"mine" and not (folder / "f").is_symlink()
    assert beside(folder) == {"outside": "untouched"}


@pytest.mark.parametrize(
    "kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=["chr", "blk", "fifo"]
)
def test_what_is_no_file_is_left_out(folder: Path, kind: bytes) -> None:
    assert back(folder, ("device", None, kind)).refused == ["device"]
    assert list(folder.iterdir()) == []


def test_hard_link_is_a_copy_of_a_file_in_the_archive_only(folder: Path) -> None:
    members: list[Member] = [
        ("./f", b"bytes", FILE),
        ("again", "f", tarfile.LNKTYPE),
        ("evil", "../outside", tarfile.LNKTYPE),
        ("absolute", "/etc/hostname", tarfile.LNKTYPE),
    ]

    assert back(folder, *members).refused == ["evil", "absolute"]
    assert (folder / "again").read_bytes() == b"bytes"
    assert (folder / "again").stat().st_nlink == 1


def test_more_than_the_limit_is_refused(folder: Path) -> None:
    with pytest.raises(OutputError, match="more than 4K"):
        back(folder, ("big", bytes(5000), FILE), limit=4096)
    with pytest.raises(OutputError, match="more than 8K"):
        members: list[Member] = [("f", bytes(5000), FILE), ("g", "f", tarfile.LNKTYPE)]
        back(folder, *members, limit=8192)


def test_more_files_than_there_may_be_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MOST_FILES", 3)

    with pytest.raises(OutputError, match="than 3"):
        back(folder, *((str(n), b"", FILE) for n in range(4)))


def test_folder_over_a_file_and_file_over_a_folder_are_left_out(folder: Path) -> None:
    (folder / "file").write_text("x")
    (folder / "dir").mkdir()

    assert back(folder, ("file/below", b"", FILE), ("dir", b"", FILE)).refused == [
        "file/below",
        "dir",
    ]
    assert [p.name for p in folder.rglob("*") if ".tmp" in p.name] == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.binary(max_size=2048), at=st.integers(0, 1500))
def test_damaged_archive_is_an_error_or_harmless(folder: Path, data: bytes, at: int) -> None:
    whole = bytearray(archive(("f", b"content", FILE), ("l", "f", LINK)).getvalue())
    whole[at : at + len(data)] = data

    try:
        unpack(Share(str(folder)), io.BytesIO(bytes(whole)))
    except OutputError:
        pass
    assert beside(folder) == {"outside": "untouched"}


def test_long_chain_of_long_names_is_damage_and_no_crash(folder: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    piece = header.tobuf(tarfile.GNU_FORMAT) + b"n\0".ljust(512, b"\0")

    with pytest.raises(OutputError, match="damaged"):
        unpack(Share(str(folder)), io.BytesIO(piece * 3000))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: folder.rmdir(), "no such directory"),
        (lambda folder: (folder / "f").write_bytes(bytes(9000)), "more than 8K"),
    ],
)
def test_folder_that_can_not_be_carried_is_refused(
    folder: Path, prepare: Callable[[Path], object], words: str
) -> None:
    prepare(folder)

    with pytest.raises(UsageError, match=words):
        pack(Share(str(folder), 8192), io.BytesIO())


def test_value_is_a_folder_and_a_size() -> None:
    assert parse_share("d,size=1M") == Share("d", 1 << 20)
    with pytest.raises(UsageError, match="unknown option"):
        parse_share("d,ro")
