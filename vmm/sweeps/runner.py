"""The process that carries out cells, one at a time: `python -m vmm.sweeps.runner IN OUT`.

Requests and answers are lines of JSON on two pipes; what a policy prints goes to standard output
and error, which whoever started this reads as well. It ends with its standard input's other end:
nobody is left to want an answer then, whatever a policy's hook is doing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from vmm.core.errors import PyvmmError, UsageError
from vmm.sweeps import content
from vmm.sweeps.cells import Cells, log_of


class _Runner:
    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._folders: dict[str, str] = {}
        self._unchecked: dict[str, dict[str, str]] = {}
        self._cells = Cells(waits=lambda: self._now("waiting"), begins=lambda: self._now("running"))

    def _now(self, what: str) -> None:
        self._say({"now": what})

    def _say(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(self._answers, data) :]

    def serve(self, line: bytes) -> None:
        """Carry out one request, and answer it."""
        request = json.loads(line)
        if "places" in request:
            for digest, (folder, names) in request["places"].items():
                self._folders[digest] = folder
                self._unchecked[digest] = {name: os.path.join(folder, name) for name in names}
            return
        began = time.perf_counter()
        self._now("running")
        try:
            answer = self._carried_out(request)
        except KeyboardInterrupt as error:  # a policy may raise it; nobody presses Ctrl-C here
            answer = {"error": "a policy raised KeyboardInterrupt", "log": log_of(error)}
        except PyvmmError as error:
            answer = {"error": self._theirs(str(error)), "log": self._theirs(log_of(error))}
        except MemoryError:
            answer = {"error": "the process ran out of memory", "log": ""}
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}"
            answer = {"error": self._theirs(sentence), "log": self._theirs(log_of(error))}
        answer["seconds"] = time.perf_counter() - began
        self._say(answer)

    def _carried_out(self, request: dict[str, Any]) -> dict[str, Any]:
        if "check" in request:
            modules: dict[str, str] = {}
            for part in request["check"]:
                modules |= self._cells.check(self._placed(part))
            return {"modules": modules}
        words = request["run"]
        modules = words.pop("modules")
        done = self._cells.run({**self._placed(words), "modules": modules})
        return {"figures": done.figures, "ended": done.ended}

    def _placed(self, words: Any) -> Any:
        """The words with paths in them. Raises UsageError for files that have changed."""
        for digest in content.needed(words):
            self._require_unchanged(digest)
        return content.placed(words, self._folders)

    def _require_unchanged(self, digest: str) -> None:
        """Once in this process: the files that were hashed are the files that are here."""
        files = self._unchecked.get(digest)
        if files is None:
            return
        found, _ = content.digest_of(files)
        if found != digest:
            raise UsageError(
                f"{os.path.commonpath(list(files.values()))} has changed since the sweep looked at "
                "it; start the sweep again"
            )
        del self._unchecked[digest]

    def _theirs(self, text: str) -> str:
        """Paths as the user knows them."""
        for folder in self._folders.values():
            text = text.replace(f"{folder.rstrip(os.sep)}{os.sep}", "")
        return text


def main(requests: int, answers: int) -> None:
    """Serve until the requests end."""

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        os._exit(0)

    threading.Thread(target=watch, name="watch", daemon=True).start()
    runner = _Runner(answers)
    with open(requests, "rb") as lines:
        for line in lines:
            runner.serve(line)
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
