"""Builds the payload, the bench guest and the loader from assembly source with GNU binutils,
and the init of guests from C with GCC.

`python firmware/build.py` writes the committed images, `--check` compares them with fresh builds.
The output depends on the sources alone: no build id, no time stamps, no paths. What a compiler
makes depends on its version, too: the init has a digest of its source in it, which is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
TOOLS = ("as", "ld", "objcopy")


class Target(NamedTuple):
    """What the tools have to be told for an architecture."""

    triplet: str
    """The tools' prefix where they aren't this machine's own, and their Debian package's end."""
    assembler: tuple[str, ...]
    emulation: str
    """ld's."""


TARGETS = {
    "x86_64": Target("x86_64-linux-gnu", ("--64",), "elf_x86_64"),
    "aarch64": Target("aarch64-linux-gnu", (), "aarch64linux"),
}
"""By what `uname -m` says."""


class BuildError(Exception):
    """The payload cannot be built here; the text says why."""


def find_binutils(architecture: str = "x86_64") -> dict[str, str]:
    """Paths of the architecture's tools by name; raises BuildError naming what is missing."""
    triplet = TARGETS[architecture].triplet
    prefixes = [f"{triplet}-"]
    if platform.machine().replace("AMD64", "x86_64") == architecture:
        prefixes.append("")
    for prefix in prefixes:
        found = {tool: shutil.which(prefix + tool) for tool in TOOLS}
        paths = {tool: path for tool, path in found.items() if path is not None}
        if len(paths) == len(TOOLS):
            return paths
    raise BuildError(
        f"GNU binutils for {architecture} not found (as, ld, objcopy; prefixes tried: {prefixes}); "
        f"install the package binutils-{triplet.replace('_', '-')}, or binutils on such a machine"
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()}")


def build(source_directory: Path | None = None, architecture: str = "x86_64") -> bytes:
    """The embedded payload, a flat image linked at its place (payload.ld); raises BuildError."""
    directory = source_directory or SOURCES / architecture
    return _link(directory, "payload.ld", architecture, flat=True)


def build_bench(source_directory: Path | None = None, architecture: str = "x86_64") -> bytes:
    """The bench guest, an ELF with a PVH note; raises BuildError."""
    directory = source_directory or SOURCES / architecture
    return _link(directory / "bench", "bench.ld", architecture, flat=False)


def build_loader(source_directory: Path | None = None, architecture: str = "x86_64") -> bytes:
    """The strict guest's loader, a flat image that runs anywhere (loader.ld); raises BuildError."""
    directory = source_directory or SOURCES / architecture
    return _link(directory / "loader", "loader.ld", architecture, flat=True)


INIT_SOURCE = SOURCES / "init" / "init.c"
INIT = "init.elf"
_INIT_OPTIONS = (
    *("-Os", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-builtin"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-pic", "-no-pie"),
    *("-nostdlib", "-static", "-s"),
    "-Wl,--build-id=none,-z,noexecstack,-z,max-page-size=4096",
)
_INIT_MACHINE_OPTIONS = {
    "x86_64": ("-fcf-protection=none", "-mno-sse"),
    "aarch64": ("-mno-outline-atomics", "-mgeneral-regs-only"),
}


def build_init(architecture: str = "x86_64", source: Path = INIT_SOURCE) -> bytes:
    """The init of guests, a static ELF; raises BuildError."""
    names = [f"{TARGETS[architecture].triplet}-gcc"]
    if platform.machine() == architecture:
        names.append("gcc")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise BuildError(
            f"no C compiler for {architecture} found ({' or '.join(names)}); "
            f"install the package gcc-{TARGETS[architecture].triplet.replace('_', '-')}"
        )
    with tempfile.TemporaryDirectory(prefix="pyvmm-firmware-") as scratch:
        output = Path(scratch) / INIT
        options = [*_INIT_OPTIONS, *_INIT_MACHINE_OPTIONS[architecture]]
        digest = f'-DSOURCE_DIGEST="{init_digest(source)}"'
        _run([compiler, *options, digest, "-o", str(output), str(source)])
        return output.read_bytes()


def init_digest(source: Path = INIT_SOURCE) -> str:
    """What an init that is built from this source has in it."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


IMAGES = {
    "x86_64": {
        "payload.bin": build,
        "bench/bench.elf": build_bench,
        "loader/loader.bin": build_loader,
    },
    "aarch64": {"payload.bin": build},
}
"""Each architecture's committed images below its source directory, and what builds them."""


def _link(directory: Path, script: str, architecture: str, *, flat: bool) -> bytes:
    """All sources of a directory, linked; raises BuildError."""
    tools, target = find_binutils(architecture), TARGETS[architecture]
    with tempfile.TemporaryDirectory(prefix="pyvmm-firmware-") as scratch:
        objects = []
        # Sorted, so that the order of the directory listing is not part of the image.
        for source in sorted(directory.glob("*.S")):
            output = str(Path(scratch) / f"{source.stem}.o")
            options = [*target.assembler, "--fatal-warnings", "-I", str(directory)]
            _run([tools["as"], *options, "-o", output, str(source)])
            objects.append(output)
        linked = str(Path(scratch) / "linked.elf")
        flags = ["-m", target.emulation, "-static", "-nostdlib", "--build-id=none"]
        flags += ["-z", "noexecstack", "-z", "max-page-size=4096", "-s", "--no-warn-rwx-segments"]
        _run([tools["ld"], *flags, "-T", str(directory / script), "-o", linked, *objects])
        if not flat:
            return Path(linked).read_bytes()
        image = Path(scratch) / "flat.bin"
        _run([tools["objcopy"], "-O", "binary", linked, str(image)])
        return image.read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the guests that ship with pyvmm.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument(
        "--architecture",
        choices=tuple(TARGETS),
        action="append",
        help="those to build for (default: all)",
    )
    parser.add_argument(
        "--source", type=Path, help="directory of the sources and images, of one architecture"
    )
    options = parser.parse_args(arguments)
    architectures = options.architecture or list(TARGETS)
    if options.source is not None and len(architectures) != 1:
        parser.error("--source needs one --architecture")
    status = 0
    for architecture in architectures:
        directory = options.source or SOURCES / architecture
        for name, build_image in IMAGES[architecture].items():
            try:
                image = build_image(directory, architecture)
            except BuildError as error:
                print(f"firmware: {error}", file=sys.stderr)
                return 2
            status |= _finish(directory / name, image, check=options.check)
        if options.source is None:
            status |= _finish_init(architecture, check=options.check)
    return status


def _finish_init(architecture: str, *, check: bool) -> int:
    """Write the init, or look whether the one that is there is of its source; an exit status."""
    target = SOURCES / architecture / INIT
    if not check:
        try:
            target.write_bytes(build_init(architecture))
        except BuildError as error:
            print(f"firmware: {error}", file=sys.stderr)
            return 2
        print(f"firmware: {_name(target)}, {target.stat().st_size} bytes")
        return 0
    committed = target.read_bytes() if target.exists() else b""
    if init_digest().encode() not in committed:
        print(
            f"firmware: {_name(target)} was not built from what init.c is now; "
            "run python firmware/build.py",
            file=sys.stderr,
        )
        return 1
    print(f"firmware: {_name(target)} is of its source, {len(committed)} bytes")
    return 0


def _finish(target: Path, image: bytes, *, check: bool) -> int:
    """Write the image, or compare it with the one that is there; an exit status."""
    if not check:
        target.write_bytes(image)
        print(f"firmware: {_name(target)}, {len(image)} bytes")
        return 0
    committed = target.read_bytes() if target.exists() else b""
    if committed != image:
        print(
            f"firmware: {_name(target)} ({len(committed)} bytes) is not what its sources build "
            f"({len(image)} bytes); run python firmware/build.py",
            file=sys.stderr,
        )
        return 1
    print(f"firmware: {_name(target)} is what its sources build, {len(image)} bytes")
    return 0


def _name(target: Path) -> str:
    return f"{target.parent.name}/{target.name}"


if __name__ == "__main__":
    sys.exit(main())
