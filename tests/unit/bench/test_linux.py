"""The sessions with a shell: times of each piece of work, and a shell that fails."""

from __future__ import annotations

import sys

import pytest

from vmm.bench import linux
from vmm.core.errors import HostError

SHELL = """
import sys
print("Linux booted\\r\\n/ # ", end="", flush=True)
for line in sys.stdin:
    answer = {answer}
    print(line.strip() + "\\r\\n" + answer + "/ # ", end="", flush=True)
"""


def test_session_times_the_boot_and_each_piece_of_work() -> None:
    shell = SHELL.format(answer='"42\\r\\n"')

    taken = linux._session([sys.executable, "-c", shell])

    assert len(taken) == 1 + len(linux.WORK)
    assert all(seconds > 0 for seconds in taken)


@pytest.mark.parametrize("answer", ['"sh: dd: not found\\r\\n"', 'sys.exit("died")'])
def test_session_whose_shell_fails_is_no_measurement(answer: str) -> None:
    with pytest.raises(HostError, match=r"did not do|did not come to a prompt"):
        linux._session([sys.executable, "-c", SHELL.format(answer=answer)])
