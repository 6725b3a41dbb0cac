"""What a request comes to whose work raises."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmm.control.memory_file.libfuse import Files, Library, Session

REQUEST, HANDLE = 7, 3


@pytest.mark.parametrize(
    ("raised", "code", "is_told"),
    [
        (OSError(errno.EACCES, "private"), errno.EACCES, False),
        (OSError("without a number"), errno.EIO, False),
        (ZeroDivisionError("a mistake"), errno.EIO, True),
        (KeyboardInterrupt(), errno.EIO, True),
    ],
)
def test_request_that_raises_is_answered_and_a_mistake_is_told(
    raised: BaseException, code: int, is_told: bool
) -> None:
    answers: list[tuple[int, int]] = []
    told: list[BaseException] = []

    def read(*_: Any) -> None:
        raise raised

    library = SimpleNamespace(new=lambda *_: 1, error=lambda *answer: answers.append(answer))
    files = SimpleNamespace(read=read, failed=told.append)
    session = Session(cast(Library, library), cast(Files, files), "")

    session._read(REQUEST, 2, 4096, 0, SimpleNamespace(contents=SimpleNamespace(handle=HANDLE)))

    assert answers == [(REQUEST, code)]
    assert told == ([raised] if is_told else [])


class Looping:
    """A library whose session's loop comes back with one of `results` after the other."""

    def __init__(self, *results: int) -> None:
        self.results = list(results)
        self.exits = 0
        self.unanswered: Any = None

    def new(self, *_: object) -> int:
        return 1

    def loop(self, session: int) -> int:
        return self.results.pop(0)

    def exit(self, session: int) -> None:
        self.exits += 1


def session_of(library: Looping) -> Session:
    return Session(cast(Library, library), cast(Files, SimpleNamespace()), "")


def test_request_that_could_not_be_read_is_not_the_last() -> None:
    library = Looping(-errno.ENOMEM, -errno.EIO, 0)

    session_of(library).serve()

    assert library.results == []


def test_requests_that_can_never_be_read_end_the_session() -> None:
    library = Looping(*[-errno.EIO] * 1000)

    with pytest.raises(OSError) as caught:
        session_of(library).serve()

    assert caught.value.errno == errno.EIO
    assert 900 < len(library.results) < 1000


def test_caller_without_an_answer_ends_the_session() -> None:
    """libfuse forgets the request, and its caller would wait for ever."""
    library = Looping(0)
    session = session_of(library)
    library.unanswered(errno.EINVAL)

    with pytest.raises(OSError) as caught:
        session.serve()

    assert caught.value.errno == errno.EINVAL
    assert library.exits == 1


@pytest.mark.parametrize(
    ("result", "told"),
    [(0, []), (-errno.ENOENT, []), (-errno.EFAULT, []), (-errno.ENOMEM, [errno.ENOMEM])],
)
def test_reply_that_the_kernel_has_not_taken_is_told(result: int, told: list[int]) -> None:
    library = Library.__new__(Library)
    heard: list[int] = []
    library.unanswered = heard.append

    assert library._replied(result, None, ()) == result

    assert heard == told
