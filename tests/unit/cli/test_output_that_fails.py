"""Output that can't be written: one line, status 1 (not 3, which is about the host's KVM), and
what was there stays."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_bindings import KvmError
from tests.support.trace import Events
from vmm.cli.main import _explain
from vmm.core.errors import UsageError, in_words
from vmm.core.output import Output
from vmm.core.unix_listener import UnixListener
from vmm.memory.backings.memfd import MemfdBacking
from vmm.trace.layout import Kind

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    events = Events((0, 64, "private"))
    events.add(Kind.EXIT, 3, "io", gpa=0x3F8)
    return events.write(tmp_path / "t")


def shell(tmp_path: Path, words: str) -> subprocess.CompletedProcess[str]:
    """A line of sh, in which pyvmm is the command."""
    script = f'pyvmm() {{ "{sys.executable}" -m vmm "$@"; }}; {words}'
    return subprocess.run(
        ["sh", "-c", script], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("option", ["--html", "--chrome"])
def test_full_device_is_named(tmp_path: Path, option: str) -> None:
    result = shell(tmp_path, f"pyvmm report t {option} /dev/full")

    assert result.stderr == (
        f"pyvmm: {option} /dev/full could not be written: No space left on device; make room, or "
        "give a path on another file system\n"
    )
    assert result.returncode == 1


@pytest.mark.usefixtures("folder")
def test_page_that_does_not_fit_leaves_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("the earlier one")

    result = shell(tmp_path, "ulimit -f 1; pyvmm report t --html page")

    assert "--html page could not be written: File too large" in result.stderr
    assert result.returncode == 1
    assert (tmp_path / "page").read_text() == "the earlier one"
    assert sorted(os.listdir(tmp_path)) == ["page", "t"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "words", ["report t", "report t --json", "replay t", "--help", "report -h"]
)
def test_standard_output_that_is_full_is_told(tmp_path: Path, words: str) -> None:
    result = shell(tmp_path, f"pyvmm {words} > /dev/full")

    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("pyvmm: standard output could not be written: No space left")
    assert result.returncode == 1


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", ["report t", "replay t", "--help", "report nowhere"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_descriptor_that_is_closed_is_no_error(
    tmp_path: Path, words: str, closed: str
) -> None:
    result = shell(tmp_path, f"pyvmm {words} {closed}")

    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert result.returncode == (2 if "nowhere" in words else 0)


def test_full_disk_anywhere_else_is_not_the_hosts_kvm() -> None:
    status, sentence = _explain(OSError(errno.ENOSPC, "No space left on device", "some/file"))

    assert status == 1
    assert sentence == "output could not be written: some/file: No space left on device; make room"


def test_memory_that_ran_out_is_said_in_words() -> None:
    status, sentence = _explain(MemoryError())

    assert (status, sentence[:30]) == (1, "pyvmm itself ran out of memory")


@pytest.mark.usefixtures("folder")
def test_file_size_limit_is_named_with_its_remedy(tmp_path: Path) -> None:
    result = shell(tmp_path, "ulimit -f 1; pyvmm report t --html x.html")

    assert result.stderr.startswith("pyvmm: --html x.html could not be written: File too large; a ")
    assert result.stderr.endswith(" bytes: raise `ulimit -f`\n")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)


def test_guest_memory_beyond_the_file_size_limit_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="File too large") as caught:
        MemfdBacking(64 << 20)

    assert in_words(caught.value) == (
        "64 MiB of guest memory: File too large; a file of this process may have 1024 bytes: "
        "raise `ulimit -f`"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EMFILE, "Too many open files", "x"),
         "x: Too many open files; this process may have 64 open: raise `ulimit -n`"),
        (KvmError("KVM_CREATE_VM", errno.EMFILE, "type=0"),
         "KVM_CREATE_VM(type=0) failed: EMFILE (Too many open files); "
         "this process may have 64 open: raise `ulimit -n`"),
        (KvmError("mmap", errno.ENOMEM, "fd=5"),
         "mmap(fd=5) failed: ENOMEM (Cannot allocate memory); "
         "this process may map 64 bytes: raise `ulimit -v`"),
        (OSError(errno.ENOENT, "No such file or directory", "x"), "x: No such file or directory"),
    ],
)  # fmt: skip
def test_limit_of_open_files_is_named_where_it_was_met(
    error: OSError, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))

    assert in_words(error) == sentence


def test_no_limit_is_named_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)

    assert in_words(OSError(errno.EFBIG, "File too large")) == "File too large"


def test_limit_of_open_files_is_named_where_an_output_or_a_socket_meets_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "eventfd", refuse)
    for make in (
        lambda: Output("--report r", str(tmp_path / "r")),
        lambda: UnixListener("--control ", str(tmp_path / "s")),
    ):
        with pytest.raises(UsageError, match=r"may have 64 open: raise `ulimit -n`$"):
            make()


def test_limit_without_a_file_to_spare_for_its_number_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)

    assert in_words(OSError(errno.EMFILE, "Too many open files")).endswith("; raise `ulimit -n`")


def test_module_that_cannot_be_opened_for_want_of_files_is_the_limits_fault() -> None:
    error = ImportError("x.so: cannot open shared object file: Too many open files")

    status, sentence = _explain(error)

    assert status == 3
    assert sentence.startswith("the host refused: Too many open files; ")


def test_output_named_minus_is_stdout_and_no_file(tmp_path: Path, folder: Path) -> None:
    result = shell(tmp_path, f"pyvmm report {folder} --html - | head -c 15")

    assert (result.stdout.lower(), result.stderr) == ("<!doctype html>", "")
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    "words", ["--version", "help lab", "ctl --help", "--help", "completion zsh"]
)
def test_reader_that_has_gone_is_no_error_where_output_is_not_buffered(
    tmp_path: Path, words: str
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)

    done = subprocess.run(
        [sys.executable, "-m", "vmm", *words.split()], cwd=tmp_path, stdout=write_end,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip

    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
