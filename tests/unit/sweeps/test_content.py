"""What a job needs, known by its content: the files of a policy, and when they have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.sweeps import content


def policy(folder: Path, **more: str) -> content.Content:
    return content.of_policy(str(folder / "p.py"), "p.py", more)


def test_policy_comes_with_the_modules_it_imports_and_theirs(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("import helper\nfrom pack.inner import x\nimport json\n")
    (tmp_path / "helper.py").write_text("def f():\n    from further import y\n")
    (tmp_path / "further.py").write_text("")
    (tmp_path / "unrelated.py").write_text("")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "inner.py").write_text("from . import beside\nfrom .third import z\n")
    (tmp_path / "pack" / "beside.py").write_text("")
    (tmp_path / "pack" / "third.py").write_text("")

    assert sorted(policy(tmp_path).files) == [
        "further.py", "helper.py", "p.py", "pack/__init__.py", "pack/beside.py", "pack/inner.py",
        "pack/third.py",
    ]  # fmt: skip


def test_digest_changes_with_a_module_it_imports_and_with_no_other(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("")
    before = policy(tmp_path).digest

    (tmp_path / "unrelated.py").write_text("x = 1\n")
    same = policy(tmp_path).digest
    (tmp_path / "helper.py").write_text("x = 1\n")
    changed = policy(tmp_path).digest

    assert same == before
    assert changed != before


def test_modules_that_import_each_other_are_taken_once(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("import q\n")
    (tmp_path / "q.py").write_text("import p\n")

    assert sorted(policy(tmp_path).files) == ["p.py", "q.py"]


def test_policy_that_is_no_python_is_left_to_its_loader(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("def (")

    assert list(policy(tmp_path).files) == ["p.py"]


def test_files_beside_a_policy_count(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("")
    (tmp_path / "w.json").write_text("1")

    before = policy(tmp_path, **{"weights.json": str(tmp_path / "w.json")})
    (tmp_path / "w.json").write_text("2")
    after = policy(tmp_path, **{"weights.json": str(tmp_path / "w.json")})

    assert sorted(before.files) == ["p.py", "weights.json"]
    assert before.digest != after.digest


def test_folder_content_goes_by_names_and_bytes_not_by_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_text("same")
    first, second = (content.of_folder(str(tmp_path / name), name) for name in ("a", "b"))
    (tmp_path / "b" / "sub" / "x").rename(tmp_path / "b" / "sub" / "y")

    assert first.digest == second.digest
    assert content.of_folder(str(tmp_path / "b"), "b").digest != first.digest


def test_place_in_a_job_is_found_and_filled_in() -> None:
    digest = "0" * 63 + "a"
    job = {"a": [f"--kernel={content.place(digest, 'bzImage')}", 5], "b": {"c": "{@no}"}}

    assert content.needed(job) == {digest}
    assert content.placed(job, {digest: "/there"}) == {
        "a": ["--kernel=/there/bzImage", 5], "b": {"c": "{@no}"},
    }  # fmt: skip


def test_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"/vmlinuz cannot be read: No such file or directory; "):
        content.of_file(str(tmp_path / "vmlinuz"), "vmlinuz")
