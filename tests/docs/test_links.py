"""Links of the documents lead somewhere: the file is there, and so is the heading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, anchor, anchors, links, name_of, pages

EVERY = sorted({*pages(), *(ROOT / "vmm").rglob("*.md")})


def dead(page: Path) -> list[str]:
    """What the page's links name and nobody finds; other machines are not asked."""
    found = []
    for line, target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            found.append(f"{name_of(page)}:{line}: {target}: no such file")
        elif heading and heading not in anchors(path):
            found.append(f"{name_of(page)}:{line}: {target}: no such heading")
    return found


@pytest.mark.parametrize("page", EVERY, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead(page)


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[here](#a-heading) [not](#none) [gone](gone.md) `[code](x)`\n"
        "![picture](none.svg)\n```text\n[code](none)\n```\n"
    )

    assert [each.split(": ", 1)[1] for each in dead(page)] == [
        "#none: no such heading", "gone.md: no such file", "none.svg: no such file",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("What a guest can have written", "what-a-guest-can-have-written"),
        ("`--iommu`: a virtual IOMMU", "--iommu-a-virtual-iommu"),
        ("[The lab](lab.md) & more", "the-lab--more"),
    ],
)
def test_anchor_is_made_as_github_does_it(heading: str, expected: str) -> None:
    assert anchor(heading) == expected
