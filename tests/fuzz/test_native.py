"""The bindings' C code under AddressSanitizer and UBSan: on hostile rings, and in each target."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import native
from tests.fuzz.corpora import corpus

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CC", "cc")


@pytest.fixture(scope="module")
def sanitizers() -> str:
    """What has to be loaded before Python is: the compiler's sanitizers."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no C compiler {COMPILER}; set CC")
    found = []
    for name in ("libasan.so", "libubsan.so"):
        told = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        path = Path(told.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{COMPILER} has no {name}; install the compiler's sanitizers, or set CC")
        found.append(str(path))
    return " ".join(found)


def replayed(name: str, folder: Path, bindings: Path) -> subprocess.CompletedProcess[str]:
    """The target on its seeds, its corpus and what chance makes of them."""
    turns = native.NATIVE[name].runs
    program = folder / name
    inputs = []
    for number, data in enumerate([*native.NATIVE[name].seeds(), *corpus(name)]):
        path = folder / f"{name}-{number}"
        path.write_bytes(data)
        inputs.append(str(path))
    native.compile_with(
        COMPILER, native.NATIVE[name].source, program, str(native.FOLDER / "replay.c"),
        bindings=bindings,
    )  # fmt: skip
    return subprocess.run(
        [str(program), str(turns), *inputs], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", native.NATIVE)
def test_inputs_near_the_corpus_are_survived(name: str, sanitizers: str, tmp_path: Path) -> None:
    ended = replayed(name, tmp_path, native.BINDINGS)

    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("check", "instead"),
    [
        ("if (head >= size)", "if (0)"),
        ("one.size % 16 ||", ""),
        ("one.size > 16 * MAX_INDIRECT ||", ""),
        ("if (one.size > indirect_size)", "if (0)"),
        ("if (room - used < 3)", "if (0)"),
        ("if (room - used < 2)", "if (0)"),
        ("if (index >= entries)", "if (0)"),
        ("one.gpa + one.size < one.gpa || total", "total"),
        ("total >= 1ull << 32", "0"),
        ("number < count && descriptors < most_descriptors && bytes", "number <= count && bytes"),
        ("chains[4] != 16 ||", ""),
        ("writable == 1 && may_write", "writable == 1"),
        ("size % 512 || sector > limit / 512 ||", ""),
        ("size > limit - position ||", ""),
        ("+ each + size > most)", "+ size > most)"),
        ("move[gpa - 3] + move[-1] == piece[0] &&", ""),
        ("plan[is_read ? BYTES_READ : BYTES_WRITTEN]", "plan[BYTES_READ]"),
        ("chains = end + 2;", "chains = end;"),
    ],
)
def test_rings_without_a_check_are_found(
    check: str, instead: str, sanitizers: str, tmp_path: Path
) -> None:
    source = (native.BINDINGS / "virtqueue.c").read_text()
    assert check in source
    (tmp_path / "virtqueue.c").write_text(source.replace(check, instead))

    assert replayed("rings-c", tmp_path, tmp_path).returncode


PROGRAM = """
import contextlib, io, sys
from tests.fuzz.corpora import corpus
from tests.fuzz.targets import TARGETS
for name in sys.argv[1:] or TARGETS:
    with contextlib.redirect_stderr(io.StringIO()):
        for data in (*corpus(name), *TARGETS[name].seeds()):
            TARGETS[name].run(data)
    print(name)
"""


def with_sanitizers(
    folder: Path, sanitizers: str, names: list[str], change: tuple[str, str] = ("", "")
) -> subprocess.CompletedProcess[str]:
    """Replay targets where the extension was compiled with them, in a copy of the bindings."""
    bindings = folder / "kvm_bindings"
    shutil.copytree(ROOT / "kvm_bindings", bindings, ignore=shutil.ignore_patterns("*.so"))
    source = bindings / "virtqueue.c"
    source.write_text(source.read_text().replace(*change) if change[0] else source.read_text())
    for name in ("vmm", "tests", "firmware"):
        (folder / name).symlink_to(ROOT / name)
    flags = " ".join(native.SANITIZE)
    subprocess.run(
        [sys.executable, "kvm_bindings/build.py"], cwd=folder, check=True, capture_output=True,
        env={**os.environ, "CC": COMPILER, "CFLAGS": flags, "LDFLAGS": flags},
    )  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizers,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves much to its end
        "PYTHONMALLOC": "malloc",  # each object with memory of its own
        "PYTHONPATH": str(folder),
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_corpora_of_all_targets_show_the_sanitizers_nothing(
    sanitizers: str, tmp_path: Path
) -> None:
    from tests.fuzz.targets import TARGETS

    ended = with_sanitizers(tmp_path, sanitizers, [])

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == list(TARGETS)


def test_access_behind_a_ring_is_shown_by_the_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    behind = ("ring + 2 *", "ring + 18 * size + 2 *")

    ended = with_sanitizers(tmp_path, sanitizers, ["queue"], behind)

    assert "AddressSanitizer" in ended.stderr
    assert ended.returncode
