"""apt's source lists in both formats, and the choice of Debian's archive among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.lab.sources import (
    Source,
    debian_archive,
    parse_deb822,
    parse_one_line,
    read_sources,
)

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://archive.invalid/debian
Suites: trixie
 trixie-updates
Components: main contrib
Signed-By: /keys/one.gpg

Types: deb-src
URIs: http://sources.invalid/debian
Suites: trixie
Components: main

Enabled: no
Types: deb
URIs: http://off.invalid/debian
Suites: trixie
Components: main
"""


def test_one_line_source_is_parsed() -> None:
    (source,) = parse_one_line("deb http://archive.invalid/debian trixie main contrib # comment\n")

    assert source == Source(("http://archive.invalid/debian",), ("trixie",), ("main", "contrib"))


def test_one_line_source_with_options_keeps_its_keyring() -> None:
    (source,) = parse_one_line(
        "deb [ arch=amd64 signed-by=/k/a.gpg,/k/b.gpg ] http://a.invalid s m"
    )

    assert source.signed_by == ("/k/a.gpg", "/k/b.gpg")
    assert source.uris == ("http://a.invalid",)


@pytest.mark.parametrize(
    "line", ["# deb http://a.invalid s m", "deb-src http://a.invalid s m", "deb"]
)
def test_one_line_that_is_no_binary_source_is_passed_over(line: str) -> None:
    assert parse_one_line(line) == []


def test_deb822_reads_continued_lines_and_skips_disabled_and_source_stanzas() -> None:
    (source,) = parse_deb822(DEB822)

    assert source.suites == ("trixie", "trixie-updates")
    assert source.components == ("main", "contrib")
    assert source.signed_by == ("/keys/one.gpg",)


def test_deb822_key_within_the_stanza_gives_no_keyring() -> None:
    text = "Types: deb\nURIs: http://a.invalid\nSuites: trixie\nComponents: main\nSigned-By:\n"
    text += " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"

    (source,) = parse_deb822(text)

    assert source.signed_by == ()


def test_read_sources_takes_both_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://one.invalid a main\n")
    (tmp_path / "sources.list.d" / "b.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "c.list.off").write_text("deb http://not.invalid a main\n")

    uris = [s.uris[0] for s in read_sources(tmp_path)]

    assert uris == ["http://one.invalid", "http://archive.invalid/debian"]


def test_debian_archive_passes_over_security_and_other_archives() -> None:
    sources = parse_one_line(
        "deb http://tools.invalid/apt stable-tools main\n"
        "deb http://a.invalid/debian-security trixie-security main\n"
        "deb http://a.invalid/debian-security/ trixie main\n"
        "deb [signed-by=/k/d.gpg] http://a.invalid/debian bookworm main\n"
    )

    archive = debian_archive(sources)

    assert archive is not None
    assert archive.uris == ("http://a.invalid/debian",)
    assert (archive.suites, archive.signed_by) == (("bookworm",), ("/k/d.gpg",))


def test_debian_archive_without_a_debian_source_is_none() -> None:
    assert debian_archive(parse_one_line("deb http://u.invalid/ubuntu noble main\n")) is None
