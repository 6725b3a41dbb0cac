"""Builds the embedded payload from its assembly source with GNU binutils.

`python firmware/build.py` writes the committed image, `--check` compares it with a fresh build.
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
    """The flat image, linked at 0x100000; raises BuildError."""
    tools = find_binutils()
    with tempfile.TemporaryDirectory(prefix="pyvmm-firmware-") as scratch:
        objects = []
        # Sorted, so that the order of the directory listing is not part of the image.
        for source in sorted(source_directory.glob("*.S")):
            target = str(Path(scratch) / f"{source.stem}.o")
            include = ["-I", str(source_directory)]
            _run([tools["as"], "--64", "--fatal-warnings", *include, "-o", target, str(source)])
            objects.append(target)
        linked = str(Path(scratch) / "payload.elf")
        flat = Path(scratch) / "payload.bin"
        script = ["-T", str(source_directory / "payload.ld")]
        flags = ["-m", "elf_x86_64", "-static", "-nostdlib", "--build-id=none", "-z", "noexecstack"]
        _run([tools["ld"], *flags, *script, "-o", linked, *objects])
        _run([tools["objcopy"], "-O", "binary", linked, str(flat)])
        return flat.read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the embedded payload.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument(
        "--source", type=Path, default=SOURCE_DIRECTORY, help="directory of the sources and image"
    )
    options = parser.parse_args(arguments)
    target = options.source / "payload.bin"
    try:
        image = build(options.source)
    except BuildError as error:
        print(f"firmware: {error}", file=sys.stderr)
        return 2
    if not options.check:
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
