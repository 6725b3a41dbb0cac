"""Every command and snippet of README.md and vmm/docs: run, or at least read by what would run it.

vmm/docs/README.md says how a page marks its blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.command_lines import parse, pyvmm_commands
from tests.docs.markdown import ROOT, Block, blocks, commands, name_of, pages
from tests.docs.session import RUN, Session, agrees, check_head
from tests.lab.reruns import again_after_an_emulators_fault
from tests.lab.slow import slow
from vmm.arch import architecture
from vmm.core.errors import HostError, UsageError
from vmm.host.kvm import open_kvm

BLOCKS = [block for page in pages() for block in blocks(page)]
LINES = [
    (f"{name_of(block.page)}:{command.line}", words)
    for block in BLOCKS
    if block.language == "console"
    for command in commands(block)
    for words in pyvmm_commands(command.text)
]


def _marked(page: Path) -> Iterator[pytest.MarkDecorator]:
    if any("kvm" in block.words for block in blocks(page)):
        yield pytest.mark.kvm


def _pages(word: str | None = None) -> list[object]:
    """Pages with something to run (in a block with that word) as pytest's parameters."""
    return [
        pytest.param(page, id=name_of(page), marks=list(_marked(page)))
        for page in pages()
        if any(
            block.language in RUN and (word is None or word in block.words)
            for block in blocks(page)
        )
    ]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    for name in ("reader", "bin"):
        (tmp_path / name).mkdir()
    return Session(tmp_path / "reader", tmp_path / "bin")


def _no_kvm() -> str | None:
    """What keeps this machine's /dev/kvm from running the embedded payload."""
    try:
        open_kvm(architecture()).close()
    except (HostError, OSError) as error:
        return str(error)
    return None


def follow(page: Path, session: Session, *, lab: bool) -> None:
    for block in blocks(page):
        if "parse" in block.words or ("lab" in block.words and not lab):
            session.read(block)
            continue
        if "kvm" in block.words and block.language in RUN and (reason := _no_kvm()):
            pytest.skip(f"{block}: from here on the page needs a usable /dev/kvm: {reason}")
        session.carry_out(block)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_says_how_it_is_tested(block: Block) -> None:
    check_head(block)


@pytest.mark.parametrize(("where", "words"), LINES, ids=[where for where, _ in LINES])
def test_pyvmm_command_is_one_that_pyvmm_takes(where: str, words: list[str]) -> None:
    parse(words)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", _pages())
def test_page_followed_to_the_letter_works(page: Path, session: Session) -> None:
    follow(page, session, lab=False)


@pytest.mark.lab
@pytest.mark.timeout(1800)
@again_after_an_emulators_fault
@slow
@pytest.mark.parametrize("page", _pages("lab"))
def test_page_followed_to_the_letter_works_in_the_lab(page: Path, session: Session) -> None:
    follow(page, session, lab=True)


# -- the READMEs of rooms, whose commands are indented ---------------------------------------------

ROOMS = [ROOT / "vmm" / name for name in ("README.md", "bench/README.md", "lab/kernel/README.md")]
INDENTED = [
    (f"{name_of(page)}: {line[:60]}", words)
    for page in ROOMS
    for line in re.findall(r"^    (pyvmm .*)$", page.read_text(), re.MULTILINE)
    for words in pyvmm_commands(line)
]


@pytest.mark.parametrize(("where", "words"), INDENTED, ids=[where for where, _ in INDENTED])
def test_command_in_a_rooms_readme_is_one_that_pyvmm_takes(where: str, words: list[str]) -> None:
    parse(words)


# -- the tests' own tools: they find what is wrong -------------------------------------------------


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    "line", ["lab --hots stock", "report --htlm x t", "bench --quik", "--kernal x", "check --jsn",
             "ctl path", "labb"],
)  # fmt: skip
def test_misspelt_command_is_found(line: str) -> None:
    with pytest.raises(UsageError):
        parse(line.split())


def test_pyvmm_commands_of_a_shell_line_are_found() -> None:
    line = (
        "cd x && FOO=1 pyvmm check --json 2>&1 >out | head; printf 'pyvmm no' | pyvmm lab \\\n -h &"
    )

    assert pyvmm_commands(line) == [["check", "--json"], ["lab", "-h"]]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```console\n$ false\n```\n", "status 1"),
        ("```console\n$ echo one\ntwo\n```\n", "said:\none"),
        ("```console\n$ exit 3\n$ echo on\n```\n", "not reached"),
        ("```console\n$ cat there.txt\n```\n```text there.txt\n```\n", "status 1"),
        ("```python\nraise ValueError('no')\n```\n", "ValueError: no"),
    ],
)  # fmt: skip
def test_page_that_does_not_work_fails(
    text: str, fault: str, tmp_path: Path, session: Session
) -> None:
    page = page_of(tmp_path, text)

    with pytest.raises(AssertionError, match=fault):
        follow(page, session, lab=False)


def test_page_is_one_session_in_one_folder(tmp_path: Path, session: Session) -> None:
    text = (
        "```text there.txt\nhello\n```\n"
        "```console\n$ cd . && cat there.txt\nhello\n$ false\n$ echo $?\n1\n"
        "$ printf 'a 17 b\\nx\\ny\\nend\\n' \\\n  | cat\na ... b\n...\nend\n$ sleep 60 &\n```\n"
        "```python\nassert open('there.txt').read() == 'hello\\n'\n```\n"
        "```console parse\n$ false\n```\n```python lab\nnothing.at.all\n```\n"
    )

    follow(page_of(tmp_path, text), session, lab=False)


@pytest.mark.parametrize("head", ["pyhton", "console klm", ""])
def test_head_that_nobody_knows_is_refused(head: str, tmp_path: Path) -> None:
    (block,) = blocks(page_of(tmp_path, f"```{head}\n```\n"))

    with pytest.raises(ValueError, match=r"page\.md:1: .*use one of"):
        check_head(block)


def test_block_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.md:2: the block isn't closed"):
        blocks(page_of(tmp_path, "text\n```python\n"))


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        (("a",), "a\n", True),
        (("a",), "a", True),
        (("a",), "a\nb\n", False),
        (("a", "..."), "a\nb\nc\n", True),
        (("a", "...", "d"), "a\nd\n", True),
        (("took ... s",), "took 12.5 s\n", True),
        (("took ... s",), "took 12.5\ns\n", False),
        (("...",), "", True),
    ],
)
def test_output_agrees_with_what_is_shown(shown: tuple[str, ...], said: str, same: bool) -> None:
    assert agrees(shown, said) is same
