"""Images of Debian: what is asked for, and each way in which one can't be made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vmm.core.errors import HostError, UsageError
from vmm.lab import distribution
from vmm.lab.apt import PackagesUnavailable
from vmm.lab.cache import Cache
from vmm.lab.distribution import ImageMaker, ImageRequest, parse_request
from vmm.lab.progress import Silent


class FakeApt:
    """Knows three packages; `archives` makes files of their names."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = None

    def all_names(self) -> list[str]:
        return ["fio", "stress-ng", "strace"]

    def archives(self, packages: Sequence[str], suite: str, into: Path) -> None:
        if self.error is not None:
            raise self.error
        self.asked = [suite, *packages]
        into.mkdir()

    def download(self, packages: Sequence[str], into: Path) -> None:
        into.mkdir()


@pytest.fixture
def apt() -> FakeApt:
    return FakeApt()


@pytest.fixture
def maker(tmp_path: Path, apt: FakeApt, monkeypatch: pytest.MonkeyPatch) -> ImageMaker:
    """Its second stage only writes a file."""

    def enter(self: ImageMaker, tree: Path, debs: Path, out: Path) -> None:
        (out / "entry").write_bytes(b"image" + bytes(1 << 20))

    monkeypatch.setattr(ImageMaker, "_enter", enter)
    monkeypatch.chdir(tmp_path)
    typed: Any = apt
    return ImageMaker(Cache(tmp_path / "cache"), typed, Silent())


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (["debian:trixie"], ImageRequest("trixie")),
        (["debian:trixie", "--include", "fio,gdb"], ImageRequest("trixie", ("fio", "gdb"))),
        (["--include=b1,a1", "debian:bookworm"], ImageRequest("bookworm", ("a1", "b1"))),
        (
            ["debian:trixie", "--output", "x", "--size", "1G"],
            ImageRequest("trixie", (), Path("x"), 1 << 30),
        ),
    ],
)  # fmt: skip
def test_line_says_what_is_to_be_in_the_image(words: list[str], request_: ImageRequest) -> None:
    assert parse_request(words) == request_


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "write pyvmm lab image debian:trixie"),
        (["trixie"], "write pyvmm lab image debian:trixie"),
        (["debian:trixie", "debian:bookworm"], "write pyvmm lab image"),
        (["debian:trixy"], "did you mean trixie"),
        (["debian:woody"], "there are debian:trixie and debian:bookworm"),
        (["debian:trixie", "--includes", "fio"], "did you mean --include"),
        (["debian:trixie", "--include"], "its value is missing"),
        (["debian:trixie", "--include", "a b"], "not a package's name"),
        (["debian:trixie", "--include", "--purge"], "not a package's name"),
        (["debian:trixie", "--size", "10M"], "at least 256M"),
        (["debian:trixie", "--size", "big"], "at least 256M"),
    ],
)
def test_damaged_line_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_request(words)


def test_image_is_made_once_and_copied_each_time(maker: ImageMaker, apt: FakeApt) -> None:
    first = maker.make(ImageRequest("trixie", ("fio",)))
    asked, apt.asked = apt.asked, []
    second = maker.make(ImageRequest("trixie", ("fio",), Path("other.ext4")))

    assert first == Path("debian-trixie.ext4")
    assert second.read_bytes() == first.read_bytes()
    assert asked[0] == "trixie" and "fio" in asked and "systemd-sysv" in asked
    assert apt.asked == []


def test_other_packages_make_another_image(maker: ImageMaker, apt: FakeApt) -> None:
    maker.make(ImageRequest("trixie", ("fio",)))

    maker.make(ImageRequest("trixie", ("strace",), Path("other.ext4")))

    assert "strace" in apt.asked


def test_file_that_is_there_is_not_replaced(maker: ImageMaker) -> None:
    Path("debian-trixie.ext4").write_text("my disk")

    with pytest.raises(UsageError, match="is there already"):
        maker.make(ImageRequest("trixie"))
    assert Path("debian-trixie.ext4").read_text() == "my disk"


def test_folder_that_is_not_there_is_refused_before_anything_is_made(
    maker: ImageMaker, apt: FakeApt
) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        maker.make(ImageRequest("trixie", (), Path("absent/x.ext4")))
    assert apt.asked == []


def test_package_that_does_not_exist_is_refused_with_what_was_meant(maker: ImageMaker) -> None:
    with pytest.raises(UsageError, match=r"--include stress-nq: .*did you mean stress-ng\?"):
        maker.make(ImageRequest("trixie", ("stress-nq",)))
    assert not list(maker.cache.path("images").glob("debian-*"))


def test_packages_that_can_not_be_had_are_named(maker: ImageMaker, apt: FakeApt) -> None:
    apt.error = PackagesUnavailable("no Debian archive among the apt sources")

    with pytest.raises(HostError, match=r"Debian's packages.*no Debian archive"):
        maker.make(ImageRequest("trixie"))


def test_offline_gives_only_what_is_cached(maker: ImageMaker, apt: FakeApt) -> None:
    maker.make(ImageRequest("trixie"))
    typed: Any = apt
    offline = ImageMaker(maker.cache, typed, Silent(), offline=True)

    assert offline.make(ImageRequest("trixie", (), Path("again"))).exists()
    with pytest.raises(HostError, match="--lab-offline"):
        offline.make(ImageRequest("trixie", ("fio",), Path("other")))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH for programs of the test's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_namespaces_that_are_refused_are_named_with_the_remedy(
    tmp_path: Path, apt: FakeApt, commands: Path
) -> None:
    refusal = "unshare: unshare failed: Operation not permitted"
    program(commands, "unshare", f"echo '{refusal}' >&2; exit 1")
    typed: Any = apt
    maker = ImageMaker(Cache(tmp_path / "cache"), typed, Silent())

    with pytest.raises(HostError, match=r"user namespace.*Operation not permitted; allow them"):
        maker.cached(ImageRequest("trixie"))


def test_second_stage_on_a_full_disk_says_so(tmp_path: Path, apt: FakeApt, commands: Path) -> None:
    full = "echo 'dpkg: error: cannot write: No space left on device'; exit 2"
    program(commands, "unshare", f'case "$*" in *"--fork true") exit 0 ;; esac; {full}')
    typed: Any = apt
    maker = ImageMaker(Cache(tmp_path / "cache"), typed, Silent())

    with pytest.raises(HostError, match=r"No space left on device; make room in .*/cache"):
        maker.cached(ImageRequest("trixie"))
    assert not list(maker.cache.path("images").glob("debian-*"))


def test_second_stage_that_fails_is_told_by_its_first_complaint(
    tmp_path: Path, apt: FakeApt, commands: Path
) -> None:
    said = "echo Setting up x; echo 'dpkg: error processing x'; echo more; exit 1"
    program(commands, "unshare", f'case "$*" in *"--fork true") exit 0 ;; esac; {said}')
    typed: Any = apt
    maker = ImageMaker(Cache(tmp_path / "cache"), typed, Silent())

    complaint = "failed: dpkg: error processing x; all of it is in"
    with pytest.raises(HostError, match=complaint) as error:
        maker.cached(ImageRequest("trixie"))
    assert "more" in Path(str(error.value).rpartition(" ")[2]).read_text()


def test_script_of_the_second_stage_is_one_that_a_shell_reads() -> None:
    script = distribution._CONFIGURE.format(
        triplet="t", name="n", masked="m", blocks=1, coldplug=""
    )

    for text in (script, distribution._ENTER):
        subprocess.run(["sh", "-n", "-c", text], check=True)
