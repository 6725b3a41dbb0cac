"""Options that carry settings, as in `--disk FILE,ro` or `--net tap=tap0,mac=...`: one reader.

And sizes, which are written the same everywhere: a number of bytes, or one with a unit.
"""

from __future__ import annotations

from collections.abc import Collection

from vmm.core.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MOST_DIGITS = 15


def byte_size(text: str) -> int | None:
    """A size in bytes: a number of them, or one with K, M, G or T (powers of 1024; KB and KiB say
    the same); None for all else.

    All options, policy arguments and sockets read sizes so: a number alone is never MiB here and
    bytes there.
    """
    word = text.strip()
    if not word.isascii():
        return None
    word = word.upper()
    if word.endswith("B"):
        word = word[:-1].removesuffix("I")
    digits = word.rstrip("KMGT")
    unit = word[len(digits) :]
    if not digits.isdigit() or len(digits) > _MOST_DIGITS or unit not in _UNITS:
        return None
    return int(digits) * _UNITS[unit]


def size_text(size: int) -> str:
    """A number of bytes as a user would write it, and exact: 300K, 512M, 2G, 1000."""
    for unit in "GMK":
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def unit_hint(size: int) -> str:
    """What to say where so few bytes were asked for that MiB were meant; else nothing."""
    return f"; {size} without a unit is bytes, write {size}M for MiB" if 0 < size < 1 << 17 else ""


class Suboptions:
    """The settings of one option's value; a comma in a value is written twice.

    `take` hands each out once; `finish` raises UsageError for what nobody took.
    """

    def __init__(self, option: str, text: str, syntax: str) -> None:
        """`syntax` is what the user is told to write, without the option's name."""
        self.option = option
        self.text = text
        self.syntax = syntax
        self._settings: dict[str, str | None] = {}
        self._known: set[str] = set()
        for word in text.replace(",,", "\0").split(",") if text else ():
            key, equals, value = word.replace("\0", ",").partition("=")
            if key in self._settings:
                raise self.error(f"{key!r} is given twice")
            self._settings[key] = value if equals else None

    def error(self, what: str) -> UsageError:
        """What is wrong with the value, as an error to raise."""
        return UsageError(f"{self.option} {self.text}: {what}; write {self.option} {self.syntax}")

    def first(self, what: str) -> str:
        """The first word as it stands, which names `what` (a file)."""
        word = next(iter(self._settings), "")
        value = self._settings.pop(word, None)
        name = word if value is None else f"{word}={value}"
        if not name:
            raise self.error(f"it names no {what}")
        return name

    def flag(self, key: str) -> bool:
        """Whether the word `key` is there, which takes no value."""
        self._known.add(key)
        if key not in self._settings:
            return False
        value = self._settings.pop(key)
        if value is not None:
            raise self.error(f"{key!r} takes no value")
        return True

    def take(self, key: str) -> str | None:
        """The value of `key=VALUE`; None when it isn't there."""
        self._known.add(key)
        if key not in self._settings:
            return None
        value = self._settings.pop(key)
        if not value:
            raise self.error(f"{key!r} has no value")
        return value

    def take_number(self, key: str, least: int, most: int) -> int | None:
        """The value of `key=N` as a decimal number in that range."""
        value = self.take(key)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 20):
            raise self.error(f"{key}={value} is no number")
        if not least <= int(value) <= most:
            raise self.error(f"{key}={value} is not in the range {least} to {most}")
        return int(value)

    def take_word(self, key: str, words: Collection[str]) -> str | None:
        """The value of `key=WORD`, one of `words`."""
        value = self.take(key)
        if value is not None and value not in words:
            raise self.error(f"{key}={value} is none of {', '.join(words)}")
        return value

    def take_size(self, key: str) -> int | None:
        """The value of `key=SIZE` in bytes."""
        value = self.take(key)
        if value is None:
            return None
        size = byte_size(value)
        if size is None:
            raise self.error(f"{key}={value} is no size such as 64M")
        return size

    def one_of(self, keys: Collection[str]) -> str:
        """Which of `keys` is there: exactly one has to be."""
        self._known.update(keys)
        found = [key for key in keys if key in self._settings]
        if len(found) != 1:
            raise self.error(f"exactly one of {', '.join(sorted(keys))} is needed")
        return found[0]

    def finish(self) -> None:
        """Raises UsageError when settings are left that nobody knows."""
        for key in self._settings:
            from vmm.core.near import did_you_mean  # of a mistake only

            near = did_you_mean(key, self._known)
            raise self.error(f"unknown option {key!r}{f' ({near})' if near else ''}")
