"""How KVM's modules are compiled, with a small make and a small source tree. No apt is run."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.unit.lab.test_packages import FakeApt, bzimage
from vmm.core.errors import HostError, UsageError
from vmm.core.kernel_file import debian_version
from vmm.lab.apt import PackagesUnavailable
from vmm.lab.cache import Cache
from vmm.lab.closure import libraries_of
from vmm.lab.compiling import run_by_own_loader
from vmm.lab.kvm_change import KvmChange
from vmm.lab.packages import Kernel, Packages
from vmm.lab.progress import Reporter, Silent

RELEASE = "7.3.4+deb13-cloud-amd64"
VERSION = "7.3.4-1~bpo13+1"
SW_PROTECTED = KvmChange(sw_protected=True)
GOOD_MAKE = """
for word in "$@"; do
    case "$word" in M=*) sources=${word#M=};; esac
    echo "$word" >>"$ARGUMENTS"
done
echo "  CC [M]  ../../../virt/kvm/kvm_main.o"
echo "  CC [M]  x86.o"
cat "$sources/x86.c" "$sources/../../../virt/kvm/kvm_main.c" >"$sources/kvm.ko"
echo amd >"$sources/kvm-amd.ko"
"""


class Archive(FakeApt):
    """Gives compiler, headers and sources: a make that is a script, an xz that unpacks nothing."""

    __slots__ = ("make",)

    def __init__(self, root: Path, make: str) -> None:
        super().__init__(root)
        self.make = make

    def download_closure(self, packages: Sequence[str], suite: str, into: Path) -> None:
        self.asked += packages
        programs, sources = into / "usr" / "bin", into / "usr" / "src"
        programs.mkdir(parents=True)
        for name, text in (("make", self.make), ("xz", 'exec cat "$3"\n')):
            (programs / name).write_text(f"#!/bin/sh\n{text}")
            (programs / name).chmod(0o755)
        for name in (f"linux-headers-{RELEASE}", "linux-headers-7.3.4+deb13-common"):
            (sources / name).mkdir(parents=True)
        makefile = sources / f"linux-headers-{RELEASE}" / "Makefile"
        makefile.write_text("include /usr/src/linux-headers-7.3.4+deb13-common/Makefile\n")
        with tarfile.open(sources / "linux-source-7.3.tar.xz", "w") as archive:
            for file in ("arch/x86/kvm/x86.c", "virt/kvm/kvm_main.c", "mm/slub.c"):
                member = tarfile.TarInfo(f"linux-source-7.3/{file}")
                member.size = len(file)
                archive.addfile(member, io.BytesIO(file.encode()))


class Noted(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self, text: str) -> None:
        self.told.append(text)

    part = step


Builder = Callable[..., Path]


@pytest.fixture
def progress() -> Noted:
    return Noted()


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    words = f"{RELEASE} (x@y) #1 SMP PREEMPT_DYNAMIC Debian {VERSION} (2026-11-15)"
    return Kernel(bzimage(tmp_path / "vmlinuz", words), None)


@pytest.fixture
def build(
    tmp_path: Path, progress: Noted, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> Builder:
    def with_make(make: str, change: KvmChange = SW_PROTECTED) -> Path:
        make = make.replace("$ARGUMENTS", str(tmp_path / "arguments"))
        make = make.replace("$FIFO", str(tmp_path / "fifo"))
        packages = Packages(Cache(tmp_path / "cache"), progress, Archive(tmp_path / "apt", make))
        return packages.changed_kvm(kernel, change, "--host sw-protected")

    return with_make


def left_in_cache(tmp_path: Path) -> list[Path]:
    """Modules, and whatever else is there beside the tree that they are built from."""
    entries = (tmp_path / "cache" / "packages").iterdir()
    return [path for path in entries if path.name != f"kvm-tree-{VERSION}-1"]


def test_modules_are_compiled_from_the_sources_and_nothing_else_is_kept(
    build: Builder, tmp_path: Path, progress: Noted
) -> None:
    entry = build(GOOD_MAKE)

    assert entry.name.startswith(f"kvm-sw-protected-{VERSION}")
    assert {p.name for p in entry.iterdir()} == {"kvm.ko", "kvm-amd.ko"}
    assert (entry / "kvm.ko").read_text() == "arch/x86/kvm/x86.cvirt/kvm/kvm_main.c"
    assert left_in_cache(tmp_path) == [entry]
    assert progress.told[-2:] == ["1 files, kvm_main.o", "2 files, x86.o"]


def test_symbol_reaches_both_make_and_the_compiler(build: Builder, tmp_path: Path) -> None:
    build(GOOD_MAKE)

    words = (tmp_path / "arguments").read_text().splitlines()
    (flags,) = (word for word in words if word.startswith("KCFLAGS="))
    for symbol in ("CONFIG_KVM_SW_PROTECTED_VM", "CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES"):
        assert f"{symbol}=y" in words
        assert f"-D{symbol}=1" in flags


def test_packages_of_the_kernels_own_version_are_asked_for(
    build: Builder, tmp_path: Path, kernel: Kernel
) -> None:
    archive = Archive(tmp_path / "apt", GOOD_MAKE.replace("$ARGUMENTS", "/dev/null"))
    packages = Packages(Cache(tmp_path / "cache"), Silent(), archive)

    packages.changed_kvm(kernel, SW_PROTECTED, "--host sw-protected")
    packages.changed_kvm(kernel, SW_PROTECTED, "--host sw-protected")

    assert archive.asked == [
        f"linux-headers-{RELEASE}={VERSION}",
        f"linux-source-7.3={VERSION}",
        "make",
        "patch",
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            "echo CC; echo 'x86.c:7:1: error: no such thing'; echo 'make: *** Error 2'; exit 2",
            "x86.c:7:1: error",
        ),
        ("echo 'make: *** [x86.o] Error 1'; exit 2", "make: *** [x86.o] Error 1"),
        ("exit 3", "make said nothing"),
        ("echo done", "done"),  # without a module
    ],
)
def test_compilation_that_fails_is_one_line_and_leaves_nothing(
    make: str, reason: str, build: Builder, tmp_path: Path
) -> None:
    with pytest.raises(HostError) as caught:
        build(make)

    message = str(caught.value)
    assert message.startswith(f"compiling KVM for Linux {RELEASE} failed: {reason}")
    assert "\n" not in message
    assert left_in_cache(tmp_path) == []


def test_sources_that_cannot_be_unpacked_say_so(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.lab.kvm_build.FOLDERS", ("arch/nowhere",))

    with pytest.raises(HostError, match=r"unpacking linux-source-7\.3\.tar\.xz failed: .*nowhere"):
        build(GOOD_MAKE)

    assert left_in_cache(tmp_path) == []


def test_interrupted_compilation_ends_all_of_its_processes(
    build: Builder, tmp_path: Path, progress: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "part", interrupt)
    reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(KeyboardInterrupt):
        build("exec 9>$FIFO; sleep 1000 & echo '  CC [M]  x86.o'; wait")

    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b""  # the last writer is gone
    os.close(reading)
    assert left_in_cache(tmp_path) == []


def test_leftovers_of_a_killed_build_are_cleared_away(build: Builder, tmp_path: Path) -> None:
    name = build(GOOD_MAKE).name
    shutil.rmtree(tmp_path / "cache" / "packages" / name)
    (tmp_path / "cache" / "packages" / f".new-{name}" / "build").mkdir(parents=True)

    entry = build(GOOD_MAKE)

    assert left_in_cache(tmp_path) == [entry]


# -- builds that follow others in the same folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A kernel tree of the user's own."""
    tree = tmp_path / "linux"
    for name in ("arch/x86/kvm/x86.c", "virt/kvm/kvm_main.c", "virt/kvm/extra.c"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"my {name}\n")
    return tree


def of(sources: Path) -> KvmChange:
    return KvmChange(sw_protected=True, source=sources)


def in_work(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "cache" / "kvm-work").glob(f"*/usr/src/*-common/{name}")
    return found


def test_second_change_replaces_only_the_files_that_differ(
    build: Builder, tmp_path: Path, sources: Path
) -> None:
    build(GOOD_MAKE, of(sources))
    names = ("arch/x86/kvm/x86.c", "virt/kvm/kvm_main.c")
    before = [in_work(tmp_path, name).stat() for name in names]
    (sources / names[0]).write_text("changed\n")

    entry = build(GOOD_MAKE, of(sources))

    after = [in_work(tmp_path, name).stat() for name in names]
    assert (entry / "kvm.ko").read_text() == f"changed\nmy {names[1]}\n"
    assert after[0].st_mtime_ns > before[0].st_mtime_ns
    assert after[1].st_mtime_ns == before[1].st_mtime_ns


def test_file_that_a_change_no_longer_has_is_gone(
    build: Builder, tmp_path: Path, sources: Path
) -> None:
    build(GOOD_MAKE, of(sources))
    extra = in_work(tmp_path, "virt/kvm/extra.c")
    (sources / "virt/kvm/extra.c").unlink()

    build(GOOD_MAKE, of(sources))

    assert not extra.exists()


def test_cached_tree_keeps_its_own_files(build: Builder, tmp_path: Path, sources: Path) -> None:
    build(GOOD_MAKE, of(sources))

    tree = tmp_path / "cache" / "packages" / f"kvm-tree-{VERSION}-1"
    (original,) = tree.glob("usr/src/*-common/arch/x86/kvm/x86.c")
    assert original.read_text() == "arch/x86/kvm/x86.c"


# Leaves an object, and says whether it found one.
_OBJECT_MAKE = GOOD_MAKE.replace(
    'cat "$sources', 'test -e "$sources/x.o" && echo kept >>"$ARGUMENTS"\n: >"$sources/x.o"\n'
    'cat "$sources', 1
)  # fmt: skip


def kept_objects(tmp_path: Path) -> int:
    return (tmp_path / "arguments").read_text().splitlines().count("kept")


def test_interrupted_build_is_begun_from_nothing(
    build: Builder,
    tmp_path: Path,
    sources: Path,
    progress: Noted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    build(_OBJECT_MAKE, of(sources))
    (sources / "virt/kvm/kvm_main.c").write_text("changed\n")
    with monkeypatch.context() as patching:
        patching.setattr(progress, "part", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(_OBJECT_MAKE, of(sources))
    (tmp_path / "arguments").unlink()

    build(_OBJECT_MAKE, of(sources))

    assert kept_objects(tmp_path) == 0


def test_build_after_a_compile_error_of_the_users_goes_on(
    build: Builder, tmp_path: Path, sources: Path
) -> None:
    complains = 'grep -q bad "$sources/x86.c" && { echo "x86.c:1:1: error: bad"; exit 2; }\n'
    make = _OBJECT_MAKE.replace('cat "$sources', f'{complains}cat "$sources', 1)
    build(make, of(sources))
    (sources / "arch/x86/kvm/x86.c").write_text("bad\n")
    with pytest.raises(UsageError, match=r"your KVM does not compile .*x86\.c:1:1: error: bad"):
        build(make, of(sources))
    (sources / "arch/x86/kvm/x86.c").write_text("good\n")

    build(make, of(sources))

    assert kept_objects(tmp_path) == 2


def test_build_that_only_fails_after_others_is_begun_from_nothing(
    build: Builder, tmp_path: Path, sources: Path
) -> None:
    make = GOOD_MAKE.replace('cat "$sources', 'mkdir "$sources/spoilt" || exit 2\ncat "$sources', 1)
    build(make, of(sources))
    (sources / "arch/x86/kvm/x86.c").write_text("changed\n")

    entry = build(make, of(sources))

    assert (entry / "kvm.ko").read_text().startswith("changed\n")


@pytest.mark.parametrize(
    "words", ["6.12.107+deb13-cloud-amd64 (x@y) #1 Debian 6.12.107-1", "7.3.4-mine (me) #1 SMP"]
)
def test_kernel_that_debian_has_no_sources_for_is_refused(words: str, tmp_path: Path) -> None:
    packages = Packages(Cache(tmp_path / "cache"), Silent(), FakeApt(tmp_path / "apt"))
    kernel = Kernel(bzimage(tmp_path / "vmlinuz", words), None)

    with pytest.raises(
        UsageError, match=r"sw-protected: .*Linux 7\.3 only, which .*vmlinuz is not"
    ):
        packages.changed_kvm(kernel, SW_PROTECTED, "--host sw-protected")


def test_version_that_left_the_archive_says_what_to_remove(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PackagesUnavailable("Version '7.3.4-1' was not found")

    packages = Packages(Cache(tmp_path / "cache"), Silent(), FakeApt(tmp_path / "apt"))
    monkeypatch.setattr(FakeApt, "download_closure", refuse)

    with pytest.raises(HostError, match=r"remove .*packages/linux-7\.3.*not found"):
        packages.changed_kvm(kernel, SW_PROTECTED, "--host sw-protected")


def test_offline_without_the_modules_names_what_is_missing(tmp_path: Path, kernel: Kernel) -> None:
    packages = Packages(Cache(tmp_path), Silent(), FakeApt(tmp_path / "apt"), offline=True)

    with pytest.raises(HostError, match=f"sources of Linux .*{tmp_path}.*--lab-offline"):
        packages.changed_kvm(kernel, SW_PROTECTED, "--host sw-protected")


def test_cache_whose_path_make_cannot_take_names_the_option(tmp_path: Path, kernel: Kernel) -> None:
    packages = Packages(Cache(tmp_path / "a b"), Silent(), Archive(tmp_path / "apt", GOOD_MAKE))

    with pytest.raises(HostError, match=r"blank or a colon.*--lab-cache DIR"):
        packages.changed_kvm(kernel, SW_PROTECTED, "--host sw-protected")


def test_debian_version_is_read_from_the_image(tmp_path: Path, kernel: Kernel) -> None:
    assert debian_version(kernel.image) == VERSION
    assert debian_version(bzimage(tmp_path / "other", "7.3.4-mine")) is None


def test_unpacked_programs_run_by_the_loader_beside_them(tmp_path: Path) -> None:
    # This machine's `echo` and its libraries, as if they had been unpacked there.
    program = tmp_path / "usr" / "bin" / "echo"
    libraries = tmp_path / "usr" / "lib" / "x86_64-linux-gnu"
    program.parent.mkdir(parents=True)
    libraries.mkdir(parents=True)
    shutil.copy2("/bin/echo", program)
    for library in libraries_of([Path("/bin/echo")]):
        shutil.copy2(library, libraries / library.name)

    run_by_own_loader(tmp_path)

    assert program.read_bytes().startswith(b"#!/bin/sh\n")
    assert subprocess.check_output([program, "it's", "a b"]) == b"it's a b\n"


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_parts_of_a_step_are_shown_on_a_terminal_only() -> None:
    shown = {}
    for terminal in (True, False):
        screen = Screen(terminal)
        reporter = Reporter(screen)
        reporter.step("compiling")
        reporter.part("7 files")
        reporter.done()
        shown[terminal] = screen.getvalue()

    assert "\r\x1b[Klab: compiling (7 files) ..." in shown[True]
    assert shown[True].endswith("\r\x1b[K")
    assert shown[False] == "lab: compiling\n"
