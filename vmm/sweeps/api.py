"""`vmm.sweep`: a sweep from a program."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from vmm.core.errors import UsageError
from vmm.policy import Policy
from vmm.sweeps import definition, running
from vmm.sweeps.results import Results
from vmm.sweeps.running import Progress
from vmm.sweeps.store import Store


def sweep(
    what: str | os.PathLike[str] | Mapping[str, Any],
    *,
    store: str | os.PathLike[str] | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Run a sweep, as `pyvmm sweep` does, and give its results.

    `what` is a TOML file, or a mapping with the same words, in which a policy's `use` may be a
    class. `store` is the file with the results, by default the TOML file's name with .sqlite; for a
    mapping it is `sweep.sqlite`. Cells that have a result there are not run again. `scheduler` is
    the address of a Dask scheduler, else `workers` processes of this machine do it. `progress` is
    called now and then, on this thread.

    Raises UsageError for what is no good, before anything has run. KeyboardInterrupt, and whatever
    else ends it early, leaves the results so far in the store.
    """
    if isinstance(what, Mapping):
        named = definition.parse(_by_name(what), "the sweep", "sweep", "")
        default = "sweep.sqlite"
    else:
        path = os.fspath(what)
        named = definition.read(path)
        default = default_store(path)
    with (
        closing(running.Prepared(named)) as prepared,
        closing(Store(os.fspath(store or default), named.name)) as opened,
    ):
        return running.run(
            prepared,
            opened,
            scheduler=scheduler,
            workers=workers,
            retry_failed=retry_failed,
            told=progress or (lambda progress: None),
        )


def default_store(path: str) -> str:
    """The store of a TOML file: beside it."""
    return f"{os.path.splitext(path)[0]}.sqlite"


def _by_name(value: Any) -> Any:
    """The mapping with policy classes as MODULE:CLASS or FILE.py:CLASS. Raises UsageError."""
    if isinstance(value, type):
        return _spec(value)
    if isinstance(value, Mapping):
        return {name: _by_name(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_by_name(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _spec(made: type) -> str:
    if not issubclass(made, Policy):
        raise UsageError(f"the sweep: {made.__name__} is not a subclass of vmm.Policy")
    if (
        made.__qualname__ != made.__name__
        or getattr(sys.modules.get(made.__module__), made.__name__, None) is not made
    ):
        raise UsageError(
            f"the sweep: {made.__qualname__} is defined inside something else, where no other "
            "process finds it; define it at the top of a module"
        )
    if "." in made.__module__:
        return f"{made.__module__}:{made.__name__}"
    # By its file, which goes to other machines as well.
    try:
        file = inspect.getsourcefile(made)
    except (TypeError, OSError):
        file = None
    if file is None or not os.path.isfile(file):
        raise UsageError(
            f"the sweep: {made.__name__} was typed in, and no other process finds it; put it in a "
            "file"
        )
    return f"{file}:{made.__name__}"
