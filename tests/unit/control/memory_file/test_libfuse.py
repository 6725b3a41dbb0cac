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
