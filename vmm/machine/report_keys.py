"""The report's keys, once and for all: what `machine.report` is for a type checker, what
`build_report` has to return, and what the JSON Schema in the documentation is compared with.

Numbers are counts, bytes, or seconds as their names say. None is "not known", or "not there".
Keys may be added; those that are here stay.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints


class Tally(TypedDict):
    """Requests of one direction: all, bytes that changed state, refused by a policy, and those that
    were invalid or of which the host's kernel refused a step."""

    calls: int
    bytes: int
    denied: int
    failed: int


class Conversions(TypedDict):
    """Requests by direction."""

    share: Tally
    unshare: Tally


class Refinements(TypedDict):
    """What policies made of requests beyond yes and no."""

    partial: int
    widened: int
    deferred_bytes: int
    reclaimed_bytes: int
    discards_failed: int


class Backings(TypedDict):
    """What stands behind each side."""

    private: str | None
    shared: str


class HostAccess(TypedDict):
    """How the host reaches each side; `private` is what an access there meets."""

    private: str | None
    launch: str | None
    shared: str


class End(TypedDict):
    """How the run ended: Outcome's word and sentence."""

    exit: str
    reason: str


class Observed(TypedDict):
    """What trying a few pages has shown, where the host isn't told of their states."""

    tried: int
    private: int
    reached: int


class Pages(TypedDict):
    """RAM by state at the end, in bytes; None where the host is not told."""

    ram_bytes: int
    private_bytes: int | None
    shared_bytes: int | None
    deferred_bytes: int | None
    common_bytes: int
    lent_bytes: NotRequired[int]
    observed: NotRequired[Observed]


class Residency(TypedDict):
    """Bytes of host memory behind each side."""

    private_bytes: int | None
    shared_bytes: int | None
    other_side_bytes: NotRequired[int | None]
    donated_bytes: NotRequired[int]
    resident_bytes: NotRequired[int]


class EngineCounts(TypedDict):
    """How bytes went between a disk and guest memory."""

    name: str
    bytes: dict[str, int]
    fallbacks: int


class ProcessCounts(TypedDict):
    """A device's process: its id, how often it was lost and started anew, how the last one that was
    lost ended, and its sandbox (the filter of system calls, Landlock's version)."""

    pid: int
    deaths: int
    restarts: int
    last_end: str | None
    seccomp: bool
    landlock: int


class DeviceCounts(TypedDict):
    """What one device did; a device of the user's own may have more keys."""

    requests: int
    bytes_read: int
    bytes_written: int
    flushes: int
    errors: int
    refused: int
    engine: NotRequired[EngineCounts]
    engine_lent: NotRequired[EngineCounts]
    process: NotRequired[ProcessCounts]
    inflated: NotRequired[int]
    deflated: NotRequired[int]
    reported: NotRequired[int]
    size: NotRequired[int]
    faults: NotRequired[int]
    events_dropped: NotRequired[int]


class SandboxKept(TypedDict):
    """What the process gave up before the guest ran: system calls, files (Landlock's version, 0
    without it), and the paths that the user gave back."""

    seccomp: bool
    landlock: int
    paths: list[str]


class Debugging(TypedDict):
    """A debugger's connections, stops, and accesses to memory: by kind, and to private pages."""

    attached: int
    stops: int
    sees_private: bool
    served: dict[str, int]
    refused: dict[str, int]
    private_bytes: int


class FileUse(TypedDict):
    """What other programs did with guest memory as a file."""

    opens: int
    reads: int
    writes: int
    bytes_read: int
    bytes_written: int
    refused: int


class BackEndUse(TypedDict):
    """A device's back end in another process: what of the shared memory it was given (bytes, and
    [gpa, size] each), since when (seconds), what holds it to page states, and how often it was
    lost and another took over."""

    socket: str
    memory_bytes: int
    regions: list[Any]
    since_s: float | None
    page_states: str
    connected: bool
    lost: int
    restarts: int


class Report(TypedDict):
    """What a run did (`--report`)."""

    scheme: str
    schemes_not_taken: dict[str, str]
    doorbell: str | None
    backings: Backings
    host_access: HostAccess
    isolation: str
    states: str
    guest: End
    conversions: Conversions | None
    pages: Pages
    refinements: Refinements | None
    residency: Residency
    io: dict[str, DeviceCounts]
    exits: dict[str, int]
    io_ports: dict[str, int]
    wall_s: float
    launch: NotRequired[dict[str, Any]]
    """Of a guest that loads itself: what its launch measures."""
    iommu: NotRequired[dict[str, Any]]
    """What the guest has lent to its devices."""
    gdb: NotRequired[Debugging]
    """What a debugger did (`--gdb`)."""
    memory_file: NotRequired[FileUse]
    """What other programs did with guest memory (`--memory-file`)."""
    vhost_user: NotRequired[dict[str, BackEndUse]]
    """Of devices that other processes serve (vhost-user)."""
    sandbox: NotRequired[SandboxKept | None]
    """Of a run in a sandbox; None where it ended before that."""


def objection(value: object, kind: Any = Report, where: str = "report") -> str | None:
    """Why `value` is not of the type `kind` (a report's, by default); None where it is.

    Keys that the type doesn't have are no reason.
    """
    if kind is Any:
        return None
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        return objection(value, arguments[0], where)
    if origin is Union or type(kind).__name__ == "UnionType":
        found = [objection(value, each, where) for each in arguments]
        return None if None in found else found[0]
    if origin is dict:
        if not isinstance(value, dict):
            return f"{where} is {value!r:.60}, not an object"
        inner = (objection(one, arguments[1], f"{where}[{key!r}]") for key, one in value.items())
        return next(filter(None, inner), None)
    if hasattr(kind, "__required_keys__"):
        return _object_objection(value, kind, where)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        return f"{where} is {value!r:.60}, not {getattr(kind, '__name__', kind)}"
    return None


def _object_objection(value: object, kind: Any, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} is {value!r:.60}, not an object"
    for key, inner in keys_of(kind).items():
        if key in value:
            found = objection(value[key], inner, f"{where}.{key}")
            if found is not None:
                return found
        elif get_origin(inner) is not NotRequired:
            return f"{where} has no {key}"
    return None


def keys_of(kind: Any) -> dict[str, Any]:
    """The keys of one of these types, each with its type; NotRequired[...] where it may lack."""
    return get_type_hints(kind, include_extras=True)
