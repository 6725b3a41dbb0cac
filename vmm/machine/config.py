"""What the user asked for, validated before anything on the host is touched."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.conversion import matrix
from vmm.conversion.matrix import BACKINGS, FOR_LINUX, LOADABLE, backings_of
from vmm.core.errors import UsageError
from vmm.core.lean_typing import TYPE_CHECKING, NamedTuple, Protocol
from vmm.core.ranges import PAGE_SIZE
from vmm.core.suboptions import byte_size, size_text, unit_hint

if TYPE_CHECKING:
    from vmm.arch.options import GuestOptions

_FOR_PEOPLE = {"aarch64": "arm64"}
SMALLEST_MEMORY = 4 << 20
MAX_CPUS = 64
KNOWN_SCHEMES = ("auto", *matrix.SCHEMES)
KNOWN_BACKINGS = (None, "auto", *BACKINGS)
SANDBOXES = ("auto", "on", "off")
VHOST_USER = "vhost-user="
"""A disk's settings begin so where another process serves it, at a socket."""


def parse_size(text: str) -> int:
    """A memory size in bytes: a number with K, M, G or T, or of bytes.

    Raises UsageError for anything else.
    """
    size = byte_size(text)
    if size is None:
        raise UsageError(
            f"--mem '{text}' is not a memory size; write a number with a unit, as in 512M"
        )
    return size


def parse_count(text: str) -> int:
    """A number of vCPUs. Raises UsageError for anything but a few decimal digits."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
        raise UsageError(f"--cpus '{text}' is not a number of vCPUs; use 1 to {MAX_CPUS}")
    return int(digits)


class Limits(Protocol):
    """What bounds a configuration: the guest's architecture (vmm.arch.Architecture)."""

    name: str
    largest_memory: int

    @property
    def schemes(self) -> Sequence[str]: ...


class MachineConfig(NamedTuple):
    """One run: what the command's options say (`pyvmm --help`). Sizes are bytes; None is "not
    given"."""

    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    memory: int = 512 << 20
    cpus: int = 1
    private_memory: str | None = None
    """None: an ordinary VM; else "auto" or a backing of vmm.conversion.matrix."""
    scheme: str = "auto"
    disks: tuple[str, ...] = ()
    nets: tuple[str, ...] = ()
    file_systems: tuple[str, ...] = ()
    """Directories of the host's, each served by a virtiofsd: TAG,vhost-user=SOCKET."""
    consoles: tuple[str, ...] = ()
    vsock: str | None = None
    rng: bool = False
    balloon: str | None = None
    iommu: bool = False
    """Whether a virtual IOMMU stands between the guest's memory and its devices."""
    allow_mapped_io: bool = False
    """Whether a disk may ask for io=mmap, which reads and writes guest memory through a mapping."""
    policies: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """What --policy names, in order, each with its --policy-arg NAME=VALUE words."""
    report: str | None = None
    trace: str | None = None
    debug_shell: bool = False
    status: bool = False
    control: str | None = None
    memory_file: str | None = None
    """A folder in which guest memory is to be a file."""
    devices: tuple[str, ...] = ()
    """The user's own devices, as --device names them: SPEC[,NAME=VALUE...]."""
    exit_handlers: tuple[str, ...] = ()
    restore: str | None = None
    """A snapshot's folder that the machine comes from: kernel, memory, processors, private memory
    and scheme are there, devices are named again (`vmm.machine.restoring`)."""
    paused: bool = False
    """Whether the guest waits for a resume before its first instruction."""
    gdb: str | None = None
    """Where a debugger connects: a TCP port's number on the loopback address, or a path for a Unix
    socket. The guest stands still until one has it go on."""
    gdb_sees_private: bool = False
    """Whether a debugger may touch private pages, which only a rehearsal can allow."""
    root: str | None = None
    """Where the root file system is: "" on the first disk, "part=N", or "UUID=..." and the like on
    any (`vmm.core.root_disk`). Without an initrd the guest gets one that mounts it."""
    execute: str | None = None
    """A command that the guest runs instead of its init, for a shell; see vmm.machine.execution."""
    share: str | None = None
    """DIR[,size=SIZE]: a folder that the command finds and changes."""
    core_dumps: bool = True
    """False: once guest memory is there, the process forbids core dumps of itself and debuggers
    of its own user. The command asks for that with private memory, unless it is told not to."""

    sandbox: str = "off"
    """What the process gives up before the guest runs: "auto" (what the kernel can take away),
    "on" (all of it, or the run is refused), "off". The command says "auto"; a program that a
    machine is a part of keeps its rights."""
    allowed_paths: tuple[str, ...] = ()
    """Files and folders that stay within reach in the sandbox, to read and write."""
    user: str | None = None
    """USER or UID:GID: who the process becomes once everything is open (`vmm.sandbox.user`). For
    a process of its own: all its threads change. `validate` refuses it where that may not be."""

    @property
    def has_back_ends(self) -> bool:
        """Whether other processes serve devices (vhost-user): they map the shared side."""
        return bool(self.file_systems) or any(disk.startswith(VHOST_USER) for disk in self.disks)

    def guest_options(self) -> GuestOptions:
        """What the guest's architecture has to know of it."""
        from vmm.arch.options import GuestOptions  # not before there is a guest

        return GuestOptions(
            self.memory,
            self.cpus,
            self.append,
            is_private=self.private_memory is not None,
            iommu=self.iommu,
        )

    def as_ours(self) -> MachineConfig:
        """With pyvmm's names in the place of a scheme's and a backing's that are the user's own:
        of those that they are like. Raises UsageError for one that can't be imported."""
        if self.has_known_names:
            return self
        from vmm.machine.extensions import as_ours  # most runs have only pyvmm's

        return as_ours(self)

    @property
    def has_known_names(self) -> bool:
        """Whether scheme and private memory are pyvmm's own."""
        return self.scheme in KNOWN_SCHEMES and self.private_memory in KNOWN_BACKINGS

    def validate(self, limits: Limits) -> None:
        """Raises UsageError with the value and the remedy."""
        if not self.has_known_names:
            # What is in a file is looked at when the machine is made.
            scheme = "auto" if ":" in self.scheme else self.scheme
            memory = self.private_memory
            memory = "auto" if memory is not None and ":" in memory else memory
            ours = self._replace(scheme=scheme, private_memory=memory).as_ours()
            if ours != self:
                ours.validate(limits)
                return
        if not SMALLEST_MEMORY <= self.memory <= limits.largest_memory:
            raise UsageError(
                f"--mem {size_text(self.memory)} is out of range; "
                f"use {SMALLEST_MEMORY >> 20}M to {limits.largest_memory >> 30}G"
                f"{unit_hint(self.memory)}"
            )
        if self.memory % PAGE_SIZE:
            raise UsageError(
                f"--mem {self.memory} bytes is not a multiple of {PAGE_SIZE}; write "
                f"{size_text(-(-self.memory // PAGE_SIZE) * PAGE_SIZE)}"
            )
        if not 1 <= self.cpus <= MAX_CPUS:
            raise UsageError(f"--cpus {self.cpus} is out of range; use 1 to {MAX_CPUS}")
        self._validate_names(limits)
        if self.scheme != "auto" and self.private_memory is None:
            raise UsageError(f"--scheme {self.scheme} needs --private-mem")
        if self.initrd is not None and self.kernel is None:
            raise UsageError("--initrd needs --kernel: the embedded payload takes no initrd")
        if self.append and self.kernel is None:
            raise UsageError("--append needs --kernel: the embedded payload has no command line")
        self._validate_boot()
        if self.restore is not None:
            self._validate_restore(limits)
            return  # what depends on private memory is looked at once that is known
        if self.policies and self.private_memory is None:
            raise UsageError("--policy needs --private-mem: an ordinary VM converts no pages")
        if self.debug_shell and not self.policies:
            raise UsageError("--debug-shell needs --policy: it opens where a policy raises")
        self._validate_private_memory(limits)
        self._validate_sandbox()
        if self.gdb is not None or self.gdb_sees_private:
            self._validate_gdb()
        if self.iommu:
            self._validate_iommu(limits)
        if self.has_back_ends:
            self._validate_back_ends()

    def _validate_restore(self, limits: Limits) -> None:
        """What the machine is, is in the snapshot."""
        if limits.name != "x86_64":
            raise UsageError("--restore: only x86-64 guests can be restored so far")
        given = {
            "--kernel": self.kernel,
            "--private-mem": self.private_memory,
            "--scheme": None if self.scheme == "auto" else self.scheme,
            "--iommu": self.iommu or None,
            "--device": self.devices or None,
            "--exit-handler": self.exit_handlers or None,
        }
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"--restore {self.restore} and {option}: the snapshot says what the machine "
                    "is; leave the other out"
                )

    def _validate_sandbox(self) -> None:
        if self.sandbox not in SANDBOXES:
            raise UsageError(f"--sandbox={self.sandbox} is unknown; use {', '.join(SANDBOXES)}")
        if self.allowed_paths and self.sandbox == "off":
            raise UsageError("--allow-path: nothing is out of reach with --sandbox=off")
        if self.user is not None:
            from vmm.sandbox.user import user_named  # most runs stay who they are

            user_named(self.user)

    def _validate_back_ends(self) -> None:
        """They map one file, the shared side; there has to be one."""
        if self.iommu:
            raise UsageError(
                "--iommu with vhost-user=: behind an IOMMU devices use lent private pages, which "
                "no other process is given; run without --iommu, or without vhost-user="
            )

    def _validate_gdb(self) -> None:
        from vmm.control.gdb.server import port_of

        if self.gdb is None:
            raise UsageError("--gdb-sees-private needs --gdb")
        port_of(self.gdb)
        if self.gdb_sees_private and self.private_memory is None:
            raise UsageError("--gdb-sees-private needs --private-mem: nothing is private without")

    def _validate_boot(self) -> None:
        """A root disk and a command are for kernels."""
        for option, value in (("--root", self.root), ("--exec", self.execute)):
            if value is not None and self.kernel is None:
                raise UsageError(f"{option} needs --kernel: the embedded payload is all there is")
        if self.share is not None and self.execute is None:
            raise UsageError(
                "--share needs --exec: the folder is brought back when the command has ended"
            )

    def _validate_iommu(self, limits: Limits) -> None:
        if limits.name != "x86_64":
            raise UsageError("--iommu: only x86-64 guests are told of one so far; run without it")
        if self.kernel is None:
            raise UsageError("--iommu needs --kernel: the embedded payload has no driver for it")

    def _validate_names(self, limits: Limits) -> None:
        """Scheme and backing have to be known, and to exist on this architecture."""
        people = _FOR_PEOPLE.get(limits.name, limits.name)
        backings = ("auto", *backings_of(limits.schemes))
        if self.private_memory not in (None, *backings):
            known = self.private_memory in BACKINGS
            what = f"does not exist on {people}" if known else "is unknown"
            raise UsageError(
                f"--private-mem={self.private_memory} {what}; use one of {', '.join(backings)}"
            )
        schemes = ("auto", *limits.schemes)
        if self.scheme not in schemes:
            known = self.scheme in matrix.SCHEMES
            what = f"does not exist on {people}" if known else "is unknown"
            raise UsageError(f"--scheme {self.scheme} {what}; use one of {', '.join(schemes)}")

    def _validate_private_memory(self, limits: Limits) -> None:
        """Scheme, backing and guest have to go together on any host."""
        backing, scheme = self.private_memory, self.scheme
        if backing is None:
            return
        if self.kernel is not None and scheme not in ("auto", *FOR_LINUX):
            ways = [name for name in limits.schemes if name in FOR_LINUX]
            by = "an address bit" if "pkvm" not in ways else "an address bit or pKVM's hypercalls"
            raise UsageError(
                f"--scheme {scheme}: Linux tells private from shared pages by {by}; "
                f"use --scheme {' or '.join(ways)}, or run without --kernel"
            )
        loads_itself = backing == "guest_memfd" and limits.name == "x86_64"
        if self.kernel is not None and backing not in ("auto", *LOADABLE) and not loads_itself:
            schemes = limits.schemes if scheme == "auto" else (scheme,)
            takers = [name for name in schemes if name in FOR_LINUX]
            loadable = [name for name in backings_of(takers) if name in LOADABLE]
            raise UsageError(
                f"--private-mem={backing}: the host cannot load a kernel into memory that it "
                "cannot reach; use --private-mem alone, which takes the strongest that it can, or "
                f"one of {', '.join(loadable)}"
            )
        if "auto" not in (backing, scheme) and scheme not in BACKINGS[backing]:
            takes = [name for name, schemes in BACKINGS.items() if scheme in schemes]
            takers = [name for name in BACKINGS[backing] if name in limits.schemes]
            raise UsageError(
                f"--scheme {scheme} does not take --private-mem={backing}; use "
                f"--private-mem=auto (it takes {', '.join(takes)}), or --scheme "
                f"{' or '.join(takers)}"
            )
