"""Hatchling's build hook: the wheel carries the compiled extension, the sdist its sources."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CffiBuildHook(BuildHookInterface[Any]):
    """Compiles the extension and puts it into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the extension: beside the sources for an editable install, else apart."""
        if self.target_name != "wheel":
            return
        package = Path(self.root) / "kvm_bindings"
        compile_extension = runpy.run_path(str(package / "build.py"))["compile_extension"]
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        if version == "editable":
            compile_extension(package)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="pyvmm-wheel-")
        built = compile_extension(Path(self._scratch.name))
        build_data["force_include"][str(built)] = f"kvm_bindings/{built.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        scratch = getattr(self, "_scratch", None)
        if scratch is not None:
            scratch.cleanup()
