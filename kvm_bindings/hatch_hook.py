"""Hatchling's build hook: the wheel carries the compiled extension, the sdist its sources."""

from __future__ import annotations

import runpy
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OLDEST = "cp311"
"""The first CPython that the wheel is for, as requires-python has it: cffi's limited API goes back
further."""

IMAGES = (".bin", ".elf")
"""What a wheel has of firmware/, besides the module that finds them."""


class CffiBuildHook(BuildHookInterface[Any]):
    """Compiles the extension and puts it into the wheel, with the guests' images and the manual
    page."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the extension: beside the sources for an editable install, else apart."""
        if self.target_name != "wheel":
            return
        package = Path(self.root) / "kvm_bindings"
        build = runpy.run_path(str(package / "build.py"))
        compile_extension = build["compile_extension"]
        build_data["pure_python"] = False
        if build["LIMITED_API"]:
            machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"{OLDEST}-abi3-{machine}"
        else:
            build_data["infer_tag"] = True
        if version == "editable":
            compile_extension(package)
            return
        firmware = Path(self.root) / "firmware"
        for path in sorted(firmware.rglob("*")):
            if path.suffix in IMAGES or path == firmware / "__init__.py":
                place = f"vmm/_firmware/{path.relative_to(firmware)}"
                build_data["force_include"][str(path)] = place
        self._scratch = tempfile.TemporaryDirectory(prefix="pyvmm-wheel-")
        built = compile_extension(Path(self._scratch.name))
        build_data["force_include"][str(built)] = f"kvm_bindings/{built.name}"
        page = Path(self._scratch.name) / "pyvmm.1"
        page.write_text(self._manual(), encoding="utf-8")
        build_data["shared_data"][str(page)] = "share/man/man1/pyvmm.1"

    def _manual(self) -> str:
        """The manual page, made by a process of its own from the parsers of this tree."""
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); from vmm.cli.manual import manual; "
            "sys.stdout.write(manual(sys.argv[2]))"
        )
        words = [sys.executable, "-I", "-c", program, self.root, self.metadata.version]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, encoding="utf-8")
        return done.stdout

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        scratch = getattr(self, "_scratch", None)
        if scratch is not None:
            scratch.cleanup()
