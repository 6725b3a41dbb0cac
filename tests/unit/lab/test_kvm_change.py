"""What may be changed in the lab's KVM, and what is said where it can't. Runs GNU patch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vmm.core.errors import HostError, UsageError
from vmm.lab import hosts, kvm_change
from vmm.lab.kvm_change import ADDITIONS, KvmChange, kvm_part, split_patch

MAIN = "virt/kvm/kvm_main.c"
BEFORE = "".join(f"line {number}\n" for number in range(20))
needs_patch = pytest.mark.skipif(shutil.which("patch") is None, reason="patch(1) is not here")


def hunk(old: str = "line 9", new: str = "another line") -> str:
    return f"@@ -8,5 +8,5 @@\n line 7\n line 8\n-{old}\n+{new}\n line 10\n line 11\n"


def git_diff(name: str = MAIN, body: str | None = None) -> str:
    body = hunk() if body is None else body
    return f"diff --git a/{name} b/{name}\nindex 1..2 100644\n--- a/{name}\n+++ b/{name}\n{body}"


def plain_diff(name: str = MAIN) -> str:
    return f"--- linux.orig/{name}\t2026-01-01\n+++ linux/{name}\t2026-01-02\n{hunk()}"


def mail(*diffs: str) -> str:
    head = "From 0123 Mon Sep 17 00:00:00 2001\nFrom: A <a@example.org>\nSubject: [PATCH] KVM\n\n"
    return f"{head}Why.\n---\n {MAIN} | 2 +-\n\n{''.join(diffs)}-- \n2.47\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A kernel's sources, as far as they matter."""
    for name in (MAIN, "arch/x86/kvm/x86.c"):
        (tmp_path / "linux" / name).parent.mkdir(parents=True)
        (tmp_path / "linux" / name).write_text(BEFORE)
    return tmp_path / "linux"


def patch_file(tmp_path: Path, text: str, name: str = "my.patch") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@needs_patch
@pytest.mark.parametrize("form", [git_diff(), plain_diff(), mail(git_diff())])
def test_patch_of_each_form_is_applied(form: str, tree: Path, tmp_path: Path) -> None:
    change = KvmChange(patches=(patch_file(tmp_path, form),))

    change.check()
    left_out = change.apply(tree, ["patch"])

    assert left_out == []
    assert (tree / MAIN).read_text() == BEFORE.replace("line 9\n", "another line\n")


@needs_patch
def test_patches_are_applied_in_their_order(tree: Path, tmp_path: Path) -> None:
    first = patch_file(tmp_path, git_diff(), "1.patch")
    second = patch_file(tmp_path, git_diff(body=hunk("another line", "a third")), "2.patch")

    KvmChange(patches=(first, second)).apply(tree, ["patch"])

    assert "a third\n" in (tree / MAIN).read_text()


@needs_patch
def test_patch_that_does_not_apply_names_file_and_hunk(tree: Path, tmp_path: Path) -> None:
    good, bad = hunk("line 9"), hunk("what is not there").replace("-8,5 +8,5", "-14,5 +14,5")
    path = patch_file(tmp_path, git_diff(body=good + bad))

    with pytest.raises(UsageError) as caught:
        KvmChange(patches=(path,)).apply(tree, ["patch"])

    message = str(caught.value)
    assert message.startswith(f"--kvm-patch {path} does not apply: hunk 2 of {MAIN}, at line 14")
    assert caught.value.exit_status == 2


@needs_patch
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (git_diff("virt/kvm/nowhere.c"), "there is no file virt/kvm/nowhere.c"),
        (git_diff(body=hunk("x", "line 9")), f"{MAIN} has it already|hunk 1 of {MAIN}"),
        (git_diff(body="@@ nonsense @@\n x\n"), "garbage|malformed"),
        (
            git_diff(body="@@ -1 +1,3 @@\n line 0\n+a\n\nno mark\n"),
            "apply: malformed patch at line",
        ),
    ],
)
def test_other_failures_of_patch_are_one_line(
    text: str, said: str, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        KvmChange(patches=(patch_file(tmp_path, text),)).apply(tree, ["patch"])

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["kernel/fork.c", "arch/x86/kernel/kvm.c", "include/linux/mm.h", "virt/../mm/slub.c"]
)
def test_patch_outside_of_kvm_is_refused_by_the_files_name(name: str, tmp_path: Path) -> None:
    path = patch_file(tmp_path, git_diff() + git_diff(name))

    with pytest.raises(UsageError) as caught:
        KvmChange(patches=(path,)).check()

    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_concerns_no_lab_machine_is_left_out_and_told(tmp_path: Path) -> None:
    others = ["Documentation/virt/kvm/api.rst", "tools/testing/selftests/kvm/a.c"]
    path = patch_file(tmp_path, mail(*map(git_diff, [others[0], MAIN, others[1]])))

    part, left_out = kvm_part(path)

    assert part.decode() == git_diff()
    assert left_out == others


def test_lines_within_a_hunk_are_not_taken_for_a_file() -> None:
    body = "@@ -1,3 +1,3 @@\n a\n--- b\n+++ c\n d\n"

    files = list(split_patch(git_diff(body=body).encode()))

    assert [file.name for file in files] == [MAIN]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not a patch\n", "no patch"),
        (git_diff("Documentation/x.rst"), "nothing of x86's KVM"),
    ],
)
def test_file_without_a_patch_for_kvm_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        KvmChange(patches=(patch_file(tmp_path, text),)).check()


def test_missing_patch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--kvm-patch .*nowhere: No such file"):
        KvmChange(patches=(tmp_path / "nowhere",)).check()


def test_name_in_the_cache_follows_the_contents(tree: Path, tmp_path: Path) -> None:
    path = patch_file(tmp_path, git_diff())
    changes = [
        KvmChange(),
        KvmChange(sw_protected=True),
        KvmChange(patches=(path,)),
        KvmChange(sw_protected=True, patches=(path,)),
        KvmChange(source=tree),
        KvmChange(symbols=("KVM_XEN",)),
    ]
    before = [change.name() for change in changes]

    path.write_text(git_diff(body=hunk(new="something else")))
    (tree / MAIN).write_text("int other;\n")
    after = [change.name() for change in changes]

    assert len(set(before)) == len(changes)
    assert [old == new for old, new in zip(before, after, strict=True)] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    same = patch_file(tmp_path, path.read_text(), "renamed.patch")
    assert KvmChange(patches=(same,)).name() == after[2]


def test_tree_of_the_users_takes_kvms_place_without_objects(tree: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for name in (MAIN, "virt/kvm/old.c", "arch/x86/kvm/x86.c", "mm/slub.c"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text("old\n")
    for name in ("virt/kvm/kvm_main.o", "virt/kvm/Makefile.kvm", "arch/x86/kvm/Makefile"):
        (tree / name).write_text("")

    KvmChange(source=tree).apply(sources, ["patch"])

    assert (sources / MAIN).read_text() == BEFORE
    assert (sources / "mm/slub.c").read_text() == "old\n"
    assert {path.name for path in (sources / "virt/kvm").iterdir()} == {
        "kvm_main.c",
        "Makefile.kvm",
    }


def test_folder_that_is_no_kernel_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--kvm-source .*: no kernel tree.*kvm_main\.c"):
        KvmChange(source=tmp_path).check()


@needs_patch
def test_addition_that_does_not_fit_the_users_tree_says_so(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours" / "one" / "tree" / "virt" / "kvm").mkdir(parents=True)
    (tmp_path / "ours" / "one" / "hooks.patch").write_text(git_diff(body=hunk("no such line")))
    monkeypatch.setattr(kvm_change, "ADDITIONS", tmp_path / "ours")
    sources = tmp_path / "sources"
    shutil.copytree(tree, sources)

    with pytest.raises(HostError, match="does not apply: hunk 1"):
        KvmChange(additions=("one",)).apply(sources, ["patch"])
    with pytest.raises(UsageError, match="--host sw-protected takes your KVM"):
        KvmChange(additions=("one",), source=tree).apply(sources, ["patch"])


def test_every_addition_has_its_page_its_licence_and_small_hooks() -> None:
    folders = {path.name for path in ADDITIONS.iterdir() if path.is_dir()}

    assert set(hosts.HOSTS["experimental"].additions) == folders
    for folder in folders:
        assert (ADDITIONS / folder / "README.md").read_text().startswith("# ")
        assert len((ADDITIONS / folder / "hooks.patch").read_text().splitlines()) < 250
        for path in (ADDITIONS / folder / "tree").rglob("*.[ch]"):
            assert "SPDX-License-Identifier: GPL-2.0-only" in path.read_text().splitlines()[0]
        files = split_patch((ADDITIONS / folder / "hooks.patch").read_bytes())
        assert all(kvm_change._OURS.match(file.name) for file in files)


def test_patch_that_lies_in_the_tree_is_well_formed() -> None:
    for hooks in ADDITIONS.glob("*/hooks.patch"):
        counted = subprocess.run(
            ["git", "apply", "--stat", str(hooks)], capture_output=True, text=True, check=False
        )
        assert counted.returncode == 0, counted.stderr
