"""Nothing is hidden: pages and examples are in the lists that readers look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.markdown import DOCS, ROOT, links, name_of

EXAMPLES = ROOT / "vmm" / "examples"


def linked(page: Path) -> set[Path]:
    return {(page.parent / target.partition("#")[0]).resolve() for _, target in links(page)}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name_of)
def test_page_is_in_the_index(page: Path) -> None:
    index = DOCS / "README.md"

    assert page == index or page in linked(index)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("[!_]*.py")), ids=name_of)
def test_example_is_in_the_list(example: Path) -> None:
    assert example in linked(EXAMPLES / "README.md")
