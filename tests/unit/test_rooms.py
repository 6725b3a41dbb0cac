"""Every package says in its docstring what the room is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(
    path.relative_to(ROOT)
    for top in ("vmm", "kvm_bindings", "firmware", "tests")
    for path in (ROOT / top).rglob("__init__.py")
)


@pytest.mark.parametrize("path", PACKAGES, ids=str)
def test_package_docstring_is_there(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))
