"""`pyvmm measure`: what a strict guest's launch measures, from the files and options alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import closing

from vmm.arch import architecture
from vmm.cli.output import printing
from vmm.cli.parsers import measure_parser as parser
from vmm.core.errors import UsageError, one_line
from vmm.core.lean_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmm.machine.config import MachineConfig

_STRICT = "--private-mem=guest_memfd"
_C_BITS = range(32, 52)


def words_of(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Its own options, and those of the run that is to be measured. Raises UsageError."""
    options, words = parser().parse_known_args(arguments)
    if options.c_bit not in _C_BITS:
        raise UsageError(f"--c-bit {options.c_bit}: use {_C_BITS.start} to {_C_BITS.stop - 1}")
    return options, [*words, _STRICT]


def run(arguments: Sequence[str], configuration: Callable[[Sequence[str]], MachineConfig]) -> int:
    """Measure and print; the exit status. `configuration` reads a run's options."""
    options, words = words_of(arguments)
    launch = measure(configuration(words), options.c_bit)
    with printing():
        if options.json:
            print(json.dumps(launch, indent=2))
        else:
            print("\n".join(lines(launch)))
    return 0


def measure(config: MachineConfig, bit: int) -> dict[str, Any]:
    """The report's `launch` for such a run. Raises UsageError, ImageError."""
    from vmm.machine.images import OpenedImages
    from vmm.machine.peripherals import device_names

    arch = architecture()
    with closing(OpenedImages(arch, config)) as images:
        options = images.config.guest_options()
        if images.kernel is None:
            guest = arch.payload_guest(options)
        else:
            guest = arch.linux_guest(options, images.kernel, images.initrd)
        with closing(guest):
            ram = arch.ram_ranges(config.memory)
            return arch.measure(guest, ram, device_names(config), bit)


def lines(launch: dict[str, Any]) -> list[str]:
    """The measurement, then one line for each part."""
    parts = [
        f"  {part['sha256']}  {part['bytes']:>10} bytes at {part['gpa']:#010x}  {part['name']}"
        for part in launch["parts"]
    ]
    return [f"measurement {launch['measurement']}", *map(one_line, parts)]
