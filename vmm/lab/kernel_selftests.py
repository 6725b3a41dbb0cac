"""The kernel's own self-tests of private memory, built from a tree of the user's, for the lab.

The tree is only read: what the tests are made of is copied, and built beside the copy with the
system's make and compiler. Programs are linked statically, since the lab machine has no C library
of this machine's but Python's. They are cached by the content of all that was copied.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError, UsageError, tell
from vmm.lab.cache import Cache
from vmm.lab.compiling import first_error, require_plain, running
from vmm.lab.progress import Progress

TESTS = (
    "guest_memfd_test",
    "guest_memfd_conversions_test",
    "private_mem_conversions_test",
    "pre_fault_memory_test",
)
"""Those of private memory; the second came with in-place conversion, and older trees lack it."""

# Count up when the programs would come out differently.
_RECIPE = 1
_KVM = "tools/testing/selftests/kvm"
# What headers and tests are built from, patterns below the tree; those that a tree lacks are
# passed over.
_PARTS = (
    "Makefile",
    "Kbuild",
    "scripts",
    "include/uapi",
    "include/asm-generic",
    "lib/*.[ch]",
    "arch/x86/Makefile*",
    "arch/x86/entry/syscalls",
    "arch/x86/include",
    "tools/include",
    "tools/arch/x86",
    "tools/build",
    "tools/lib",
    "tools/scripts",
    "mm/gup_test.h",
    "tools/testing/selftests/*.mk",
    "tools/testing/selftests/*.h",
    "tools/testing/selftests/*/*.h",
    "tools/testing/selftests/kselftest",
    "tools/testing/selftests/rseq",
    "tools/testing/selftests/cgroup",
    "tools/testing/selftests/vfio",
    _KVM,
)
_BUILT = (b"\x7fELF", b"!<arch>")  # programs, objects and libraries of an earlier build
_BUILT_FOLDERS = ("generated", ".git")
_BUILT_SUFFIXES = (".d", ".cmd", ".o", ".a")

# Runs each program and says in a line how it went; the output of those that fail follows.
# 4 is kselftest's KSFT_SKIP.
RUNNER = r"""
failed=0
for test in "$@"; do
    began=$(date +%s)
    timeout -s KILL 300 "$test" > /tmp/selftest 2>&1 < /dev/null
    status=$?
    took=$(($(date +%s) - began))
    why=$(grep -E -m 1 'SKIP|Test Assertion Failure|^# Totals' /tmp/selftest)
    case $status in
        0) word=pass; why=$(grep '^# Totals' /tmp/selftest) ;;
        4) word=skip ;;
        137) word="FAIL: no end within 300 s" ;;
        *) word="FAIL, status $status" ;;
    esac
    echo "${test##*/}: $word, $took s${why:+, $why}"
    case $word in FAIL*) failed=1; sed 's/^/    /' /tmp/selftest ;; esac
done
exit $failed
"""


@dataclass(frozen=True, slots=True)
class KernelSelftests:
    """Self-tests of the kernel tree `tree`: those named, else those of TESTS that it has."""

    tree: Path
    names: Sequence[str]
    cache: Cache
    progress: Progress

    def programs(self) -> list[Path]:
        """The tests, built; from the cache when nothing has changed.

        Raises UsageError for a tree or a name that is none, or does not compile.
        """
        sources = self._sources()
        require_plain(self.cache.root)
        digest = hashlib.sha256(repr(sorted(sources.values())).encode())
        for path in self._files():
            digest.update(str(path.relative_to(self.tree)).encode() + _content(path))
        name = f"packages/kernel-selftests-{digest.hexdigest()[:16]}-{_RECIPE}"
        built = self.cache.entry(name, lambda into: self._build(into, sources))
        return [built / name for name in sources]

    def _sources(self) -> dict[str, str]:
        """Each test's name, and its source below selftests/kvm without the suffix."""
        kvm = self.tree / _KVM
        if not (kvm / "Makefile").is_file():
            raise UsageError(
                f"--kernel-selftests {self.tree}: no kernel tree there ({_KVM}/Makefile is missing)"
            )
        found = {}
        for name in self.names or TESTS:
            places = (name, f"x86/{name}", f"x86_64/{name}")
            place = next((p for p in places if (kvm / f"{p}.c").is_file()), None)
            if place is not None:
                found[name] = place
            elif self.names:
                raise UsageError(
                    f"--kernel-selftests {self.tree}: no test {name!r} there ({_KVM}/{name}.c)"
                )
            else:
                tell(f"{name}: not in {self.tree}")
        if not found:
            raise UsageError(f"--kernel-selftests {self.tree}: none of {', '.join(TESTS)} is there")
        return found

    def _files(self) -> Iterator[Path]:
        """What the tests are made of: files and links, each once, in a settled order."""
        tops = {top for part in _PARTS for top in self.tree.glob(part)}
        found = set()
        for top in tops:
            for path in [top] if not top.is_dir() else top.rglob("*"):
                inside = path.relative_to(self.tree)
                if path.is_symlink() or path.is_file():
                    built = path.suffix in _BUILT_SUFFIXES or _BUILT_FOLDERS[0] in inside.parts
                    if not built and _BUILT_FOLDERS[1] not in inside.parts:
                        found.add(path)
        return (path for path in sorted(found) if not _content(path).startswith(_BUILT))

    def _build(self, into: Path, sources: dict[str, str]) -> None:
        missing = [tool for tool in ("make", "cc", "ld") if shutil.which(tool) is None]
        if missing:
            raise HostError(
                f"building the kernel's self-tests needs {', '.join(missing)}: install a C "
                "compiler, binutils and make"
            )
        copy, out = into.parent / "tree", into.parent / "out"
        self.progress.step("copying the kernel's self-tests")
        for path in self._files():
            target = copy / path.relative_to(self.tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target, follow_symlinks=False)
        self.progress.step("building the kernel's self-tests")
        self._make(copy, "headers")
        wanted = [str(out / place) for place in sources.values()]
        # The library's part for VFIO wants drivers' headers, and these tests want none of it.
        settings = [f"OUTPUT={out}", "EXTRA_CFLAGS=-static -g0", "LIBVFIO_O="]
        self._make(copy / _KVM, *settings, *wanted)
        into.mkdir()
        for name, place in sources.items():
            shutil.copy(out / place, into / name)

    def _make(self, folder: Path, *words: str) -> None:
        make = shutil.which("make") or "make"
        command = [make, f"-j{len(os.sched_getaffinity(0))}", "-C", str(folder), "ARCH=x86"]
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        output = []
        with running([*command, *words], {**kept, "LC_ALL": "C"}) as process:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line.strip())
                if " -c " in line:
                    self.progress.part(Path(line.split()[-1]).name)
        if process.returncode:
            raise UsageError(
                f"--kernel-selftests {self.tree}: they don't build: {first_error(output)}"
            )


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return os.readlink(path).encode()
    return path.read_bytes()
