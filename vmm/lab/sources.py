"""Where this machine gets its Debian packages: a reader of apt's source lists.

Both formats are read (one line per source, and deb822). The lab takes the archive's address
and keyring from here, so that no mirror is named anywhere in the project.
Format: sources.list(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Debian's archive carries all its releases at one address: any one of them found in the
# sources vouches for the others. Ubuntu's and derivatives' archives have other suites.
DEBIAN_SUITES = frozenset(
    {
        "oldoldstable",
        "oldstable",
        "stable",
        "testing",
        "unstable",
        "sid",
        "bullseye",
        "bookworm",
        "trixie",
        "forky",
        "duke",
    }
)
_REMOTE = ("http:", "https:", "mirror:", "mirror+http:", "mirror+https:", "file:", "copy:")


@dataclass(frozen=True, slots=True)
class Source:
    """One archive as apt is told of it: addresses, suites, and the keyrings that vouch for it."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: tuple[str, ...] = ()


def read_sources(etc: Path) -> list[Source]:
    """All enabled binary sources below `etc` (normally /etc/apt), in apt's reading order."""
    found: list[Source] = []
    for path in _source_files(etc):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # unreadable to this user: apt would not have used it either
        found.extend(parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text))
    return found


def _source_files(etc: Path) -> Iterator[Path]:
    yield from (p for p in [etc / "sources.list"] if p.is_file())
    parts = etc / "sources.list.d"
    if parts.is_dir():
        yield from sorted(p for p in parts.iterdir() if p.suffix in (".list", ".sources"))


def parse_one_line(text: str) -> list[Source]:
    """`deb [option=value ...] uri suite component...`, one source a line."""
    found = []
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        match = re.match(r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<rest>.+)$", line)
        if not match:
            continue
        words = match["rest"].split()
        if len(words) < 2:
            continue
        options = dict(o.split("=", 1) for o in (match["options"] or "").split() if "=" in o)
        keys = tuple(options.get("signed-by", "").replace(",", " ").split())
        found.append(Source((words[0],), (words[1],), tuple(words[2:]), keys))
    return found


def parse_deb822(text: str) -> list[Source]:
    """Stanzas of `Field: value`, continued lines begin with a blank."""
    return [s for stanza in _stanzas(text) if (s := _source_of_stanza(stanza))]


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0] in " \t":
            if last:
                fields[last] += "\n" + line.strip()
        elif ":" in line:
            last, value = line.split(":", 1)
            last = last.strip().lower()
            fields[last] = value.strip()


def _source_of_stanza(fields: dict[str, str]) -> Source | None:
    if "deb" not in fields.get("types", "").split():
        return None
    if fields.get("enabled", "yes").strip().lower() in ("no", "false", "0"):
        return None
    signed_by = fields.get("signed-by", "")
    # A key may also be embedded in the stanza; the lab then falls back on apt's trusted keys.
    keys = () if "BEGIN PGP" in signed_by else tuple(signed_by.replace(",", " ").split())
    return Source(
        tuple(fields.get("uris", "").split()),
        tuple(fields.get("suites", "").split()),
        tuple(fields.get("components", "").split()),
        keys,
    )


def debian_archive(sources: Iterable[Source]) -> Source | None:
    """Debian's main archive with its one address and the suites used here, or None.

    The security archive is passed over: it doesn't hold whole releases.
    """
    for source in sources:
        if "main" not in source.components:
            continue
        if not any(suite in DEBIAN_SUITES for suite in source.suites):
            continue
        for uri in source.uris:
            if uri.startswith(_REMOTE) and "security" not in uri.rstrip("/").rsplit("/", 1)[-1]:
                suites = tuple(s for s in source.suites if s in DEBIAN_SUITES)
                keyrings = tuple(k for k in source.signed_by if k.startswith("/"))
                return Source((uri,), suites, ("main",), keyrings)
    return None
