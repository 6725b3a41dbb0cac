"""Documents read easily: no sentence that loses its reader, no code that escapes the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.markdown import README, ROOT, name_of, pages, sentences

MOST_WORDS = 44


def too_long(page: Path) -> list[str]:
    return [
        f"{name_of(page)}:{line}: {count} words: {sentence[:70]}..."
        for line, sentence in sentences(page)
        if (count := len(re.findall(r"\w[\w'.-]*", sentence))) > MOST_WORDS
    ]


@pytest.mark.parametrize(
    "page",
    [*pages(), *(ROOT / "vmm" / name for name in ("README.md", "bench/README.md"))],
    ids=name_of,
)
def test_sentences_are_short(page: Path) -> None:
    assert not too_long(page)


def test_long_sentence_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Short. {'word ' * 44}end.\n\n| {'cell ' * 44}| {'cell ' * 45}|\n")

    assert [each.split(":")[1] for each in too_long(page)] == ["1", "3"]


@pytest.mark.parametrize("page", [page for page in pages() if page != README], ids=name_of)
def test_code_is_in_fenced_blocks_alone(page: Path) -> None:
    """Indented code would go untested."""
    lines, fenced, blank = [], False, True
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and blank and line.startswith("    "):
            lines.append(f"{name_of(page)}:{number}: {line.strip()}")
        blank = not line.strip()

    assert not lines
