"""Builds the embedded payload and the bench guest from their assembly source with GNU binutils.

`python firmware/build.py` writes the committed images, `--check` compares them with fresh builds.
The output depends on the sources alone: no build id, no time stamps, no paths.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE_DIRECTORY = Path(__file__).resolve().parent / "x86_64"
TOOLS = ("as", "ld", "objcopy")


class BuildError(Exception):
    """The payload cannot be built here; the text says why."""


def find_binutils() -> dict[str, str]:
    """Paths of the x86-64 tools by name; raises BuildError naming what is missing."""
    prefixes = ["x86_64-linux-gnu-"]
    if platform.machine() in ("x86_64", "AMD64"):
        prefixes.append("")
    for prefix in prefixes:
        found = {tool: shutil.which(prefix + tool) for tool in TOOLS}
        paths = {tool: path for tool, path in found.items() if path is not None}
        if len(paths) == len(TOOLS):
            return paths
    raise BuildError(
        f"GNU binutils for x86-64 not found (as, ld, objcopy; prefixes tried: {prefixes}); "
        "install the package binutils, or binutils-x86-64-linux-gnu on another architecture"
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr.strip()}")


def build(source_directory: Path = SOURCE_DIRECTORY) -> bytes:
    """The embedded payload, a flat image linked at 0x100000; raises BuildError."""
    return _link(source_directory, "payload.ld", flat=True)


def build_bench(source_directory: Path = SOURCE_DIRECTORY) -> bytes:
    """The bench guest, an ELF with a PVH note; raises BuildError."""
    return _link(source_directory / "bench", "bench.ld", flat=False)


IMAGES = {"payload.bin": build, "bench/bench.elf": build_bench}
"""The committed images below the source directory, and what builds each."""


def _link(directory: Path, script: str, *, flat: bool) -> bytes:
    """All sources of a directory, linked; raises BuildError."""
    tools = find_binutils()
    with tempfile.TemporaryDirectory(prefix="pyvmm-firmware-") as scratch:
        objects = []
        # Sorted, so that the order of the directory listing is not part of the image.
        for source in sorted(directory.glob("*.S")):
            target = str(Path(scratch) / f"{source.stem}.o")
            include = ["-I", str(directory)]
            _run([tools["as"], "--64", "--fatal-warnings", *include, "-o", target, str(source)])
            objects.append(target)
        linked = str(Path(scratch) / "linked.elf")
        flags = ["-m", "elf_x86_64", "-static", "-nostdlib", "--build-id=none", "-z", "noexecstack"]
        flags += ["-z", "max-page-size=4096", "-s", "--no-warn-rwx-segments"]
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
        "--source", type=Path, default=SOURCE_DIRECTORY, help="directory of the sources and images"
    )
    options = parser.parse_args(arguments)
    status = 0
    for name, build_image in IMAGES.items():
        try:
            image = build_image(options.source)
        except BuildError as error:
            print(f"firmware: {error}", file=sys.stderr)
            return 2
        status |= _finish(options.source / name, image, check=options.check)
    return status


def _finish(target: Path, image: bytes, *, check: bool) -> int:
    """Write the image, or compare it with the one that is there; an exit status."""
    if not check:
        target.write_bytes(image)
        print(f"firmware: {target.name}, {len(image)} bytes")
        return 0
    committed = target.read_bytes() if target.exists() else b""
    if committed != image:
        print(
            f"firmware: {target.name} ({len(committed)} bytes) is not what its sources build "
            f"({len(image)} bytes); run python firmware/build.py",
            file=sys.stderr,
        )
        return 1
    print(f"firmware: {target.name} is what its sources build, {len(image)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
