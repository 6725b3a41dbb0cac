"""What runs in a Dask worker: cells in processes of their own, and the contents they need.

Everything goes in and out as text or bytes: Dask's workers may run another Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from typing import Any

from vmm.sweeps import content, versions
from vmm.sweeps.pool import Place, Runner, Stopped

Piece = tuple[str, int, bytes]
"""Of a content's file: its name, the offset, the bytes."""

_lock = threading.Lock()
_idle: list[Runner] = []
_busy: dict[Runner, str] = {}
"""With the sweep whose cell each carries out."""
_places: dict[str, Place] = {}
_ended: set[str] = set()
"""Sweeps whose cells are not wanted any more."""


def described() -> dict[str, str]:
    """This worker's versions, and where it runs."""
    return {**versions.described(), "distributed": versions.dask_version()}


def run_batch(text: str) -> str:
    """Carry out the jobs of `{"sweep", "code", "jobs": [[key, words]...]}`, one after another.

    The answer has `unfit` where this worker's sources of pyvmm are others than `code`, or
    `missing`, digests of contents that it hasn't got, and then nothing was carried out; else
    `answers`, [key, answer] each, as far as it got before the sweep was ended.
    """
    from distributed import get_worker

    request = json.loads(text)
    worker = get_worker().address
    if request.get("code", versions.code_digest()) != versions.code_digest():
        return json.dumps({"worker": worker, "unfit": True})
    needed = content.needed([words for _, words in request["jobs"]])
    with _lock:
        missing = sorted(needed - _places.keys())
    if missing:
        return json.dumps({"worker": worker, "missing": missing})
    answers: list[tuple[str, Mapping[str, Any]]] = []
    with contextlib.suppress(Stopped):
        for key, words in request["jobs"]:
            if request["sweep"] in _ended:
                break
            answers.append((key, _run(words, request["sweep"])))
    return json.dumps({"worker": worker, "answers": answers})


def _run(words: Mapping[str, Any], sweep: str) -> dict[str, Any]:
    with _lock:
        runner = _idle.pop() if _idle else Runner()
        _busy[runner] = sweep
        places = dict(_places)
    try:
        answer = runner.run(words, places)
    except BaseException:
        with _lock:
            del _busy[runner]
        runner.release()
        raise
    with _lock:
        del _busy[runner]
        _idle.append(runner)
    return answer


def receive(sweep: str, digest: str, pieces: list[Piece], dask_worker: Any = None) -> str | None:
    """Pieces of a content's files; what is wrong, if anything."""
    try:
        _keep(sweep, digest, pieces, dask_worker)
    except OSError as error:
        return _not_kept(error, dask_worker)
    return None


def _not_kept(error: OSError, dask_worker: Any) -> str:
    return (
        f"{socket.gethostname()} can't keep it in {_folder(dask_worker)}: {error.strerror}; start "
        "the worker there with another --local-directory"
    )


def _keep(sweep: str, digest: str, pieces: list[Piece], dask_worker: Any) -> None:
    for name, offset, data in pieces:
        path = os.path.join(_folder(dask_worker), f"{digest}.{sweep}", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)


def complete(sweep: str, digest: str, names: list[str], dask_worker: Any = None) -> str | None:
    """All of a content has come; what is wrong with it, if anything."""
    try:
        return _completed(sweep, digest, names, dask_worker)
    except OSError as error:
        return _not_kept(error, dask_worker)


def _completed(sweep: str, digest: str, names: list[str], dask_worker: Any) -> str | None:
    folder = os.path.join(_folder(dask_worker), digest)
    part = f"{folder}.{sweep}"
    if digest in _places:  # of another sweep: a cell may be reading it
        shutil.rmtree(part, ignore_errors=True)
        return None
    os.makedirs(part, exist_ok=True)
    found, _ = content.digest_of({name: os.path.join(part, name) for name in names})
    if found != digest:
        shutil.rmtree(part, ignore_errors=True)
        return "it has changed since the sweep looked at it; start the sweep again"
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    with _lock:
        _places[digest] = (folder, names)
    return None


def dismiss(sweep: str, at_once: bool) -> None:
    """The sweep is over: begin none of its cells; `at_once`: break off those under way."""
    with _lock:
        _ended.add(sweep)
        idle = list(_idle)
        busy = [runner for runner, of in _busy.items() if of == sweep] if at_once else []
        _idle.clear()
    for runner in idle:
        runner.close()
        runner.release()
    for runner in busy:
        runner.close()


def _folder(dask_worker: Any) -> str:
    """Dask removes it with the worker."""
    return os.path.join(str(dask_worker.local_directory), "pyvmm-sweep")
