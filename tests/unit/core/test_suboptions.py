"""Settings inside an option's value."""

from __future__ import annotations

import re

import pytest

from vmm.core.errors import UsageError
from vmm.core.suboptions import Suboptions, byte_size, size_text


def words(text: str) -> Suboptions:
    return Suboptions("--thing", text, "FILE[,n=N]")


def test_suboptions_are_handed_out_once_each() -> None:
    given = words("a,,b,flag,n=5,path=x=y,,z")

    assert given.first("file") == "a,b"
    assert given.flag("flag") and not given.flag("other")
    assert given.take_number("n", 1, 5) == 5
    assert given.take("path") == "x=y,z"
    assert given.take("path") is None
    given.finish()


def test_suboptions_first_word_may_look_like_a_setting() -> None:
    assert words("a=b,n=1").first("file") == "a=b"


@pytest.mark.parametrize(
    ("text", "use", "message"),
    [
        ("", lambda w: w.first("file"), "it names no file"),
        (",x", lambda w: w.first("file"), "it names no file"),
        ("a,x", lambda w: (w.first("file"), w.finish()), "unknown option 'x'"),
        ("x=1", lambda w: w.flag("x"), "'x' takes no value"),
        ("x", lambda w: w.take("x"), "'x' has no value"),
        ("x=", lambda w: w.take("x"), "'x' has no value"),
        ("n=-1", lambda w: w.take_number("n", 0, 9), "n=-1 is no number"),
        ("n=\u0663", lambda w: w.take_number("n", 0, 9), "is no number"),
        ("n=10", lambda w: w.take_number("n", 0, 9), "n=10 is not in the range 0 to 9"),
        ("w=c", lambda w: w.take_word("w", ("a", "b")), "w=c is none of a, b"),
        ("s=1Q", lambda w: w.take_size("s"), "s=1Q is no size such as 64M"),
        ("a=1,b=2", lambda w: w.one_of(("a", "b")), "exactly one of a, b is needed"),
        ("c", lambda w: w.one_of(("a", "b")), "exactly one of a, b is needed"),
    ],
)
def test_suboptions_that_do_not_fit_say_what_to_write(text: str, use: object, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--thing {text}: ")) as caught:
        use(words(text))  # type: ignore[operator]

    assert message in str(caught.value)
    assert str(caught.value).endswith("; write --thing FILE[,n=N]")


def test_suboptions_given_twice_are_refused() -> None:
    with pytest.raises(UsageError, match="'n' is given twice"):
        words("a,n=1,n=2")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 << 20), ("1g", 1 << 30), ("4K", 4096), ("7", 7), ("64KiB", 64 << 10),
        ("64kb", 64 << 10), ("x", None), ("", None),
    ],
)  # fmt: skip
def test_byte_size_is_bytes_unless_it_says_so(text: str, size: int | None) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"), (1000, "1000"), (300 << 10, "300K"), (4 << 20, "4M"), ((4 << 20) + 4096, "4100K"),
        (512 << 20, "512M"), (2 << 30, "2G"), (2560 << 20, "2560M"),
    ],
)  # fmt: skip
def test_size_text_is_what_byte_size_reads(size: int, text: str) -> None:
    assert size_text(size) == text
    assert byte_size(text) == size
