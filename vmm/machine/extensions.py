"""What is the user's own in a machine: devices, exit handlers, a scheme, a backing.

A program gives them to `vmm.Machine` as objects; options name them, as MODULE:CLASS, FILE.py:CLASS
or by the name of an entry point. Only machines that have any import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vmm.conversion.matrix import BACKINGS, SCHEMES, UNTOLD
from vmm.core import plugins
from vmm.core.errors import UsageError
from vmm.core.own_code import called
from vmm.devices.bus import PORT_SPACE
from vmm.devices.own import LARGEST_BAR, PciDevice, PortDevice
from vmm.exits.own import ExitHandler
from vmm.machine.peripherals import require_slots
from vmm.policy.loader import load_named

if TYPE_CHECKING:
    from vmm.conversion.scheme import Scheme
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.machine.config import MachineConfig
    from vmm.memory.backing import Backing

    OwnDevice = PortDevice | PciDevice | VirtioDevice

_SCHEME_METHODS = ("install", "apply", "revert")
_SCHEME_FIELDS = ("name", "alias", "shared_alias", "told", "converts_on_fault", "side_by_side")
_BACKING_METHODS = (
    "pread", "pwrite", "preadv", "pwritev", "read_many", "write_many", "transfer_in",
    "transfer_out", "punch", "allocate", "resident_bytes",
)  # fmt: skip
_VIRTIO_METHODS = ("start", "activate", "process", "config", "write_config", "reset", "close")


class Extensions:
    """Those of one machine."""

    def __init__(
        self,
        devices: Sequence[OwnDevice] = (),
        exits: Sequence[ExitHandler] = (),
        scheme: type[Scheme] | None = None,
        backing: Callable[[int], Backing] | None = None,
    ) -> None:
        """Raises UsageError for what can't be one."""
        self.exits = tuple(_handler(each) for each in exits)
        self.scheme = scheme
        self.backing = backing
        self.scheme_like = None if scheme is None else _scheme_like(scheme)
        self.backing_like = None if backing is None else _backing_like(backing)
        self.virtio: dict[str, VirtioDevice] = {}
        self.plain: dict[str, PortDevice | PciDevice] = {}
        """By the names that reports have."""
        for device in devices:
            self._add(device)

    def _add(self, device: OwnDevice) -> None:
        from vmm.devices.virtio.device import VirtioDevice

        name = getattr(device, "name", "") or type(device).__name__.lower()
        taken = [*self.virtio, *self.plain]
        if name in taken:
            if getattr(device, "name", ""):
                raise UsageError(f"two devices are named {name}; give one of them another name")
            name += str(sum(one.rstrip("0123456789") == name for one in taken))
        if isinstance(device, VirtioDevice):
            _require_virtio(device)
            guard(device, _VIRTIO_METHODS)
            self.virtio[name] = device
        elif isinstance(device, PortDevice | PciDevice):
            _require_registers(device)
            self.plain[name] = device
        else:
            raise UsageError(
                f"{device!r} is no device: derive it from vmm.PortDevice, vmm.PciDevice or "
                "vmm.VirtioDevice, and give an instance"
            )

    @property
    def functions(self) -> list[str]:
        """Names of the register devices with a PCI function, which follow the virtio devices."""
        return [name for name, one in self.plain.items() if isinstance(one, PciDevice)]

    def join(
        self, virtio: dict[str, VirtioDevice], config: MachineConfig, owner: ExitStack
    ) -> None:
        """Put the virtio devices behind pyvmm's, and let `owner` close all devices.

        Raises UsageError for a name that one of pyvmm's has, and too many PCI functions.
        """
        for name in [*self.virtio, *self.plain]:
            if name in virtio:
                raise UsageError(f"a device of pyvmm's is named {name}, too; give yours another")
        if config.iommu and self.functions:
            raise UsageError(
                f"{self.functions[0]}: the virtual IOMMU translates for no PciDevice yet; "
                "run without --iommu, or write a VirtioDevice"
            )
        for device in [*self.virtio.values(), *self.plain.values()]:
            owner.callback(called, device, "close", device.close)
        virtio.update(self.virtio)
        require_slots(len(virtio) + len(self.functions))

    def as_ours(self, config: MachineConfig) -> MachineConfig:
        """The configuration with the names of ours that stand for the user's own."""
        if self.scheme_like is not None:
            config = config._replace(scheme=self.scheme_like)
        if self.backing_like is not None:
            config = config._replace(private_memory=self.backing_like)
        return config

    def make_scheme(self, *given: Any) -> Scheme:
        """The user's scheme, made as the one that it is like."""
        assert self.scheme is not None
        factory: Callable[..., Scheme] = self.scheme
        made = called(self.scheme, "its constructor", factory, *given)
        for field in _SCHEME_FIELDS:
            if not hasattr(made, field):
                raise UsageError(f"scheme {self.scheme.__name__} has no {field}; see Scheme")
        guard(made, _SCHEME_METHODS, OSError)
        return made

    @property
    def make_backing(self) -> Callable[[int], Backing] | None:
        """Makes the private backing of a size; None where it is none of the user's."""
        factory = self.backing
        if factory is None:
            return None

        def make(size: int) -> Backing:
            made = called(factory, "its constructor", factory, size, passing=OSError)
            guard(made, _BACKING_METHODS, OSError)
            return made

        return make


def guard(of: object, names: Sequence[str], passing: type[Exception] | tuple[()] = ()) -> None:
    """Have what the user's own methods of these names raise end the run, but for `passing`, which
    is an answer; those that are inherited from pyvmm stay as they are."""
    for name in names:
        method = getattr(of, name)
        if not _is_ours(getattr(method, "__module__", "")):
            setattr(of, name, _guarded(of, name, method, passing))


def _guarded(
    of: object, name: str, method: Callable[..., Any], passing: type[Exception] | tuple[()]
) -> Callable[..., Any]:
    def guarded(*given: Any, **named: Any) -> Any:
        return called(of, name, method, *given, passing=passing, **named)

    return guarded


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("vmm", "kvm_bindings") and "examples" not in module


# -- what can be one ------------------------------------------------------------------------------


def _handler(handler: ExitHandler) -> ExitHandler:
    if not isinstance(handler, ExitHandler):
        raise UsageError(f"{handler!r} is not an instance of a subclass of vmm.ExitHandler")
    if not handler.exits and not handler.hypercalls:
        name = type(handler).__name__
        raise UsageError(f"{name} handles nothing: give it exits, or hypercalls")
    if type(handler).handle is ExitHandler.handle:
        raise UsageError(f"{type(handler).__name__} has no handle(vcpu, exit); write one")
    return handler


def _require_virtio(device: VirtioDevice) -> None:
    name = type(device).__name__
    number = getattr(device, "device_id", None)
    if not isinstance(number, int) or not 1 <= number <= 63:
        raise UsageError(f"{name}.device_id is {number!r}; use 1 to 63 (virtio 1.2, section 5)")
    if not hasattr(device, "statistics"):
        raise UsageError(f"{name}.__init__ has to call super().__init__()")
    sizes = list(device.queue_sizes)
    if not sizes or any(size & (size - 1) or not 1 <= size <= 32768 for size in sizes):
        raise UsageError(f"{name}.queue_sizes are {sizes}; use powers of two up to 32768")


def _require_registers(device: PortDevice | PciDevice) -> None:
    name = type(device).__name__
    if isinstance(device, PortDevice):
        ports = getattr(device, "ports", None)
        if not isinstance(ports, range) or ports.step != 1 or not ports:
            raise UsageError(f"{name}.ports is {ports!r}; use a range as in range(0x510, 0x514)")
        if ports.start < 0 or ports.stop > PORT_SPACE:
            raise UsageError(f"{name}.ports end at {ports.stop - 1:#x}; the last port is 0xffff")
        return
    size, most = device.bar_size, LARGEST_BAR[device.in_memory]
    if size & (size - 1) or not 4 <= size <= most:
        raise UsageError(f"{name}.bar_size is {size}; use a power of two from 4 to {most}")


def _scheme_like(scheme: type[Scheme]) -> str:
    like = getattr(scheme, "like", None) or getattr(scheme, "name", None)
    usable = [name for name in SCHEMES if name not in UNTOLD]
    if like not in usable:
        name = getattr(scheme, "__name__", repr(scheme))
        raise UsageError(
            f"scheme {name}.like is {like!r}; name the scheme whose VM and guests it is for: "
            f"{', '.join(usable)}"
        )
    return str(like)


def _backing_like(backing: Callable[[int], Backing]) -> str:
    like = getattr(backing, "like", "memfd")
    usable = [name for name, schemes in BACKINGS.items() if not set(schemes) & set(UNTOLD)]
    if like not in usable:
        name = getattr(backing, "__name__", repr(backing))
        raise UsageError(
            f"backing {name}.like is {like!r}; name the backing whose schemes take it: "
            f"{', '.join(usable)}"
        )
    return str(like)


# -- by name --------------------------------------------------------------------------------------


def named_extensions(config: MachineConfig, given: Extensions | None = None) -> Extensions:
    """What the configuration's options name that is not pyvmm's own, behind what is `given` as
    objects. Raises UsageError."""
    devices = [_made("--device", plugins.DEVICES, spec) for spec in config.devices]
    exits = [_made("--exit-handler", plugins.EXITS, spec) for spec in config.exit_handlers]
    scheme, backing = own_scheme(config.scheme), own_backing(config.private_memory)
    if given is None:
        return Extensions(devices, exits, scheme, backing)
    return Extensions(
        [*given.virtio.values(), *given.plain.values(), *devices],
        [*given.exits, *exits],
        given.scheme or scheme,
        given.backing or backing,
    )


def own_scheme(name: str) -> type[Scheme] | None:
    """The user's scheme of that name; None for those of pyvmm, and for names that nobody knows."""
    if name in ("auto", *SCHEMES):
        return None
    found: type[Scheme] | None = _named("--scheme", plugins.SCHEMES, name)
    return found


def own_backing(name: str | None) -> Callable[[int], Backing] | None:
    """As `own_scheme`, of private backings."""
    if name in (None, "auto", *BACKINGS):
        return None
    assert name is not None
    found: Callable[[int], Backing] | None = _named("--private-mem", plugins.BACKINGS, name)
    return found


def _named(option: str, group: str, name: str) -> Any:
    if ":" in name:
        return load_named(option, group, name)
    return plugins.find_registered(option, group, name)


def as_ours(config: MachineConfig) -> MachineConfig:
    """The configuration with pyvmm's names in the place of the user's own scheme and backing."""
    own = Extensions(scheme=own_scheme(config.scheme), backing=own_backing(config.private_memory))
    return own.as_ours(config)


def _made(option: str, group: str, text: str) -> Any:
    """An instance of what SPEC[,NAME=VALUE...] names."""
    from vmm.policy.arguments import bind

    spec, *words = text.split(",")
    what = f"{option} {spec}"
    found = load_named(option, group, spec)
    if not isinstance(found, type):
        raise UsageError(f"{what}: {found!r} is not a class")
    try:
        return found(**bind(found, words, lambda name, inner: load_named(option, group, name)))
    except UsageError as error:
        raise UsageError(f"{what}: {str(error).removeprefix('--policy-arg ')}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what}: {found.__name__}() failed: {error!r}") from error
