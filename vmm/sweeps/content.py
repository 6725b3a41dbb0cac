"""What a cell needs besides its words: files, known by their content.

A `Content` is a set of files with one digest for all of them. A job names a file in it as
`{@DIGEST}/NAME`; whoever runs the job puts the folder's path there, wherever he has it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vmm.core.errors import UsageError
from vmm.core.given import Unusable, open_given, read_given

MOST_SOURCE = 16 << 20
MOST_FILE = 64 << 30
MOST_FILES = 10_000
_CHUNK = 1 << 20
_PLACE = re.compile(r"\{@([0-9a-f]{64})\}")


class Content(NamedTuple):
    """Files by their name inside, with where they are here."""

    digest: str
    name: str
    """What messages call it: the path that the user gave."""
    files: Mapping[str, str]
    bytes: int
    folder: str | None
    """Where all of them are, by their names. None for sources, which may be edited while a sweep
    runs: they are copied before the first cell."""


def place(digest: str, name: str) -> str:
    """How a job names a file of a content."""
    return f"{{@{digest}}}/{name}"


def needed(job: Any) -> set[str]:
    """The digests that a job's words name."""
    return {digest for text in _texts(job) for digest in _PLACE.findall(text)}


def _texts(job: Any) -> Iterator[str]:
    if isinstance(job, str):
        yield job
    elif isinstance(job, dict | list | tuple):
        for each in job.values() if isinstance(job, dict) else job:
            yield from _texts(each)


def placed(job: Any, folders: Mapping[str, str]) -> Any:
    """The job with paths for the contents it names. Raises KeyError for one that isn't here."""
    if isinstance(job, str):
        return _PLACE.sub(lambda found: folders[found[1]], job)
    if isinstance(job, dict):
        return {name: placed(value, folders) for name, value in job.items()}
    if isinstance(job, list | tuple):
        return [placed(value, folders) for value in job]
    return job


def file_digest(path: str, name: str, most: int = MOST_FILE) -> tuple[str, int]:
    """SHA-256 and size of a regular file. Raises UsageError that calls it `name`."""
    fd = open_given(path, name, "give a file that can be read", most=most)
    found, size = hashlib.sha256(), 0
    with open(fd, "rb", buffering=0) as file:
        try:
            while piece := file.read(_CHUNK):
                found.update(piece)
                size += len(piece)
        except OSError as error:
            raise UsageError(f"{name} cannot be read: {error.strerror}") from None
    return found.hexdigest(), size


def digest_of(files: Mapping[str, str]) -> tuple[str, int]:
    """One digest, and the bytes, of files by name. Raises UsageError."""
    whole, size = hashlib.sha256(), 0
    for name in sorted(files):
        digest, length = file_digest(files[name], files[name])
        whole.update(f"{digest} {length} {name}\0".encode("utf-8", "surrogateescape"))
        size += length
    return whole.hexdigest(), size


def _content(name: str, files: Mapping[str, str], folder: str | None) -> Content:
    digest, size = digest_of(files)
    return Content(digest, name, dict(files), size, folder)


def of_file(path: str, name: str) -> Content:
    """A single file. Raises UsageError."""
    return _content(name, {os.path.basename(path): path}, os.path.dirname(os.path.abspath(path)))


def of_folder(path: str, name: str) -> Content:
    """All regular files below a folder, a trace's for example. Raises UsageError."""
    files: dict[str, str] = {}
    for folder, _, names in os.walk(path):
        for each in names:
            full = os.path.join(folder, each)
            if stat.S_ISREG(os.lstat(full).st_mode):
                files[os.path.relpath(full, path)] = full
        if len(files) > MOST_FILES:
            raise UsageError(f"{name} holds more than {MOST_FILES} files: it is no trace")
    return _content(name, files, os.path.abspath(path))


def of_policy(path: str, name: str, more: Mapping[str, str]) -> Content:
    """A policy's file with the modules beside it that it imports, and theirs, and `more` files.

    Raises UsageError for a file that can't be read. One that is no Python is left to whoever loads
    it, who has more to say about it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    files = {**_imported(folder, os.path.basename(path), name), **more}
    return _content(name, files, None)


def _imported(folder: str, first: str, name: str, top: str = "") -> dict[str, str]:
    """The module `first` and all that it imports from `folder`, as its source says; with `top`
    only what is in that package."""
    found: dict[str, str] = {}
    todo = [first]
    while todo:
        each = todo.pop()
        if each in found:
            continue
        full = os.path.join(folder, each)
        found[each] = full
        called = name if each == first else full
        try:
            source = read_given(full, called, "give FILE.py", most=MOST_SOURCE)
        except Unusable as error:
            raise UsageError(f"loading {called} failed: it {error.reason}") from None
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        package = os.path.dirname(each)
        todo += [
            there
            for dotted in _names(tree, package)
            for there in _modules(folder, dotted)
            if there not in found and there.startswith(top)
        ]
    return found


def _names(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a module imports; its own package is a path below the folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(os.sep) if package else []
            if node.level:
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, node.module or ""]).strip(".")
            else:
                base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


def _modules(folder: str, dotted: str) -> Iterator[str]:
    """The files in the folder that importing a dotted name runs: packages on the way, too."""
    parts = [part for part in dotted.split(".") if part.isidentifier()]
    for length in range(1, len(parts) + 1):
        stem = os.path.join(*parts[:length])
        for name in (f"{stem}.py", os.path.join(stem, "__init__.py")):
            if os.path.isfile(os.path.join(folder, name)):
                yield name


def of_module(root: str, file: str, name: str) -> str:
    """The digest of a module's file below `root`, with what it imports of its own package."""
    package = file.split(os.sep, maxsplit=1)[0]
    return digest_of(_imported(root, file, name, f"{package}{os.sep}"))[0]
