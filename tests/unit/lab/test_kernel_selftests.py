"""The kernel's self-tests: built from a tree that isn't written to, and told in a line each.

The tree here is a makefile or two; the rest is as in the kernel's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.lab.cache import Cache
from vmm.lab.kernel_selftests import RUNNER, TESTS, KernelSelftests
from vmm.lab.options import parse
from vmm.lab.progress import Silent

KVM = Path("tools/testing/selftests/kvm")
# Tests need the headers, and are "compiled" by copying; `#error` is an error.
_TOP = "headers:\n\tmkdir -p usr/include && touch usr/include/made\n"
_KVM = """\
$(OUTPUT)/%: %.c
\ttest -e ../../../../usr/include/made
\t@! grep -n '#error' $< || { echo "$<:1:2: error: $$(cat $<)"; false; }
\tmkdir -p $(dir $@) && cp $< $@
"""
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("make", "cc", "ld")),
    reason="a C compiler, binutils and make are needed",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A kernel tree with three of the four tests."""
    root = tmp_path / "linux"
    (root / KVM / "x86").mkdir(parents=True)
    (root / "Makefile").write_text(_TOP)
    (root / KVM / "Makefile").write_text(_KVM)
    for name in ("guest_memfd_test", "pre_fault_memory_test", "x86/private_mem_conversions_test"):
        (root / KVM / f"{name}.c").write_text(f"source of {name}\n")
    return root


def selftests(tree: Path, tmp_path: Path, *names: str) -> KernelSelftests:
    return KernelSelftests(tree, names, Cache(tmp_path / "cache"), Silent())


def files(tree: Path) -> list[Path]:
    return sorted(tree.rglob("*"))


@needs_tools
def test_tests_of_the_tree_are_built_and_what_it_lacks_is_told(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tree)

    programs = selftests(tree, tmp_path).programs()

    assert [path.name for path in programs] == [TESTS[0], *TESTS[2:]]
    assert programs[1].read_text() == "source of x86/private_mem_conversions_test\n"
    assert files(tree) == before
    assert capsys.readouterr().err == f"pyvmm: {TESTS[1]}: not in {tree}\n"


@needs_tools
def test_tests_of_an_unchanged_tree_are_not_built_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = selftests(tree, tmp_path, TESTS[0]).programs()
    (tree / KVM / "guest_memfd_test.o").write_bytes(b"an object of the user's own build")
    (tree / KVM / "guest_memfd_test").write_bytes(b"\x7fELF and its program")
    monkeypatch.setattr(shutil, "which", lambda tool: None)

    assert selftests(tree, tmp_path, TESTS[0]).programs() == first


@needs_tools
def test_changed_test_is_built_anew(tree: Path, tmp_path: Path) -> None:
    selftests(tree, tmp_path, TESTS[0]).programs()
    (tree / KVM / "guest_memfd_test.c").write_text("other\n")

    (program,) = selftests(tree, tmp_path, TESTS[0]).programs()

    assert program.read_text() == "other\n"


@needs_tools
def test_test_that_does_not_compile_is_told_by_the_first_error(tree: Path, tmp_path: Path) -> None:
    (tree / KVM / "guest_memfd_test.c").write_text("#error here\n")

    with pytest.raises(UsageError) as caught:
        selftests(tree, tmp_path).programs()

    assert "they don't build: guest_memfd_test.c:1:2: error: #error here" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_kernel_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no kernel tree there"):
        selftests(tmp_path, tmp_path).programs()


def test_named_test_that_the_tree_lacks_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no test 'nonsense' there"):
        selftests(tree, tmp_path, "nonsense").programs()


def test_each_test_is_a_line_and_the_output_of_a_failing_one_follows(tmp_path: Path) -> None:
    programs = []
    for name, text in (
        ("good", "echo '# Totals: pass:2 fail:0'"),
        ("idle", "echo '1..0 # SKIP no such thing'; exit 4"),
        ("bad", "echo '==== Test Assertion Failure ===='; echo why; exit 254"),
    ):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        programs.append(str(path))

    result = subprocess.run(
        ["sh", "-c", RUNNER.replace("/tmp/selftest", str(tmp_path / "out")), "sh", *programs],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert re.sub(r"\d+ s", "N s", result.stdout).splitlines() == [
        "good: pass, N s, # Totals: pass:2 fail:0",
        "idle: skip, N s, 1..0 # SKIP no such thing",
        "bad: FAIL, status 254, N s, ==== Test Assertion Failure ====",
        "    ==== Test Assertion Failure ====",
        "    why",
    ]


def test_the_rest_of_the_line_names_tests() -> None:
    command = parse(["--host", "experimental", "--kernel-selftests", "/linux", "dirty_log_test"])

    assert command.options.kernel_selftests == Path("/linux")
    assert command.arguments == ["dirty_log_test"]


@pytest.mark.parametrize("line", [["--lab-exec", "sh"], ["check", "--json"], ["../x"]])
def test_self_tests_with_something_else_to_run_are_refused(line: list[str]) -> None:
    with pytest.raises(UsageError, match="--kernel-selftests"):
        parse(["--kernel-selftests", "/linux", *line])
