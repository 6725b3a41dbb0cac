"""What the tests read of a page: its fenced blocks, links, headings and sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "vmm" / "docs"

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)\s*(.*)$")


class Block(NamedTuple):
    """A fenced block: ```language words, and the lines in it."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block is the content of: the word with a dot in it."""
        return next((word for word in self.words if "." in word), None)


class Command(NamedTuple):
    """A line of a console block, and the output shown below it (empty: none is shown)."""

    line: int
    text: str
    output: tuple[str, ...]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def pages() -> list[Path]:
    """README.md, every page of vmm/docs, and the examples'."""
    return [README, *sorted(DOCS.rglob("*.md")), ROOT / "vmm" / "examples" / "README.md"]


def blocks(page: Path) -> list[Block]:
    """Raises ValueError for a block that isn't closed."""
    found: list[Block] = []
    fence, start, head = "", 0, [""]
    inside: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        match = _FENCE.match(line)
        if fence:
            if match and match[1].startswith(fence) and not match[2]:
                text = "".join(f"{each}\n" for each in inside)
                found.append(Block(page, start, head[0], tuple(head[1:]), text))
                fence = ""
            else:
                inside.append(line)
        elif match:
            fence, start, inside = match[1], number, []
            head = match[2].split() or [""]
    if fence:
        raise ValueError(f"{name_of(page)}:{start}: the block isn't closed")
    return found


def commands(block: Block) -> list[Command]:
    """The lines that begin with `$ `, each with what follows it.

    A command that ends with a backslash goes on in the next line. Raises ValueError where output
    comes before the first command.
    """
    found: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if goes_on:
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line}")
        elif line.startswith("$ "):
            found.append(Command(number, line[2:], ()))
        elif found:
            found[-1] = found[-1]._replace(output=(*found[-1].output, line))
            continue
        else:
            raise ValueError(
                f"{name_of(block.page)}:{number}: {line!r}: a command begins with '$ '"
            )
        goes_on = line.endswith("\\")
    return found


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of what is outside of fenced and indented blocks."""
    fence = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        match = _FENCE.match(line)
        if match and (not fence or match[1].startswith(fence)):
            fence = "" if fence else match[1]
        elif not fence and not line.startswith("    "):
            yield number, line


def anchors(page: Path) -> set[str]:
    """What a link can name after '#': the headings, as GitHub makes anchors of them."""
    found: set[str] = set()
    for _, line in prose(page):
        if line.startswith("#"):
            base = anchor(line.lstrip("#").strip())
            name, count = base, 0
            while name in found:
                count += 1
                name = f"{base}-{count}"
            found.add(name)
    return found


def anchor(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading).lower())
    return kept.replace(" ", "-")


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(line number, target) of links and pictures, those in code aside."""
    for number, line in prose(page):
        bare = re.sub(r"`+[^`]*`+", "", line)
        for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", bare):
            yield number, target
        for target in re.findall(r"(?:src|srcset|href)=\"([^\"\s]+)\"", bare):
            yield number, target


def sentences(page: Path) -> Iterator[tuple[int, str]]:
    """(line number, sentence) of the prose; a table's cell, an item and a heading end one."""
    for start, paragraph in _paragraphs(page):
        plain = re.sub(r"`+[^`]*`+", "code", paragraph)
        plain = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", plain)
        for sentence in re.split(r"(?<=[.?!])[*_)\"']*\s+", plain):
            if sentence.strip():
                yield start, sentence.strip()


def _paragraphs(page: Path) -> Iterator[tuple[int, str]]:
    start, collected = 0, ""
    last = 0
    for number, line in prose(page):
        stripped = line.strip()
        own = stripped.startswith(("|", "#", "- ", "* ", "> ")) or bool(
            re.match(r"\d+\. ", stripped)
        )
        if collected and (not stripped or own or number != last + 1):
            yield start, collected
            collected = ""
        last = number
        if stripped.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", stripped.strip("|")):
                yield number, cell
        elif stripped:
            start = start if collected else number
            collected = f"{collected} {stripped}".strip()
    if collected:
        yield start, collected
