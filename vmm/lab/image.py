"""The lab machine's disk images: the root with Python in it, the project, a QEMU, a job.

Each is an ext4 image made by `mke2fs -d`, which needs no privileges. They are cached by what
goes into them; the project is an image of its own, so that editing it costs a second or two.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vmm.core.errors import HostError
from vmm.lab import initramfs
from vmm.lab.architecture import HERE
from vmm.lab.cache import Cache, remove_tree
from vmm.lab.closure import libraries_of
from vmm.lab.devices import VIRTIO, Devices
from vmm.lab.packages import Qemu
from vmm.lab.progress import Progress
from vmm.lab.python import LabPython

# Counts up when the layout of an image changes, so that older cached ones aren't used.
_LAYOUT = 1
PROJECT_PACKAGES = ("vmm", "kvm_bindings")
_PROJECT_EXTRAS = ("firmware", "tests", "pyproject.toml")
_MIB = 1 << 20
_LAUNCHER = """\
import sys

from vmm.cli.main import entry_point

sys.exit(entry_point())
"""
_QEMU_DATA = ("*.bin", "*.rom", "keymaps/en-us")


def root_image(cache: Cache, progress: Progress, busybox: Path, python: LabPython) -> Path:
    """busybox, a Python, and the distributions that pyvmm and its tests import."""
    key = f"{python.key()}-{_file_key(busybox)}-{_LAYOUT}"

    def build(path: Path) -> None:
        progress.step("building the root image (once for this Python)")
        with _staging(path) as stage:
            _lay_out_system(stage, busybox, python)
            python.fill(stage, stage / "lab" / "site")
            python.compile(stage)
            make_ext4(stage, path)

    image = cache.entry(f"images/root-{key}.ext4", build)
    cache.prune("images/root-", keep=4)
    return image


def project_image(cache: Cache, progress: Progress, python: LabPython) -> Path:
    """pyvmm itself, from wherever it is running, with its tests where they are beside it."""
    sources = project_sources()
    key = f"{_tree_key(sources)}-{python.bytecode}-{python.key()[:8]}-{_LAYOUT}"

    def build(path: Path) -> None:
        progress.step("building the project image")
        with _staging(path) as stage:
            for source in sources:
                if source.is_dir():
                    shutil.copytree(source, stage / source.name, ignore=_no_caches)
                else:
                    shutil.copy2(source, stage / source.name)
            python.add_extension(stage / "kvm_bindings")
            (stage / "pyvmm").write_text(_LAUNCHER)
            python.compile(stage)
            make_ext4(stage, path)

    image = cache.entry(f"images/project-{key}.ext4", build)
    cache.prune("images/project-", keep=6)
    return image


def qemu_image(cache: Cache, progress: Progress, qemu: Qemu) -> Path:
    """A QEMU to run inside the lab (as a yardstick): program, libraries, firmware."""
    key = f"{_file_key(qemu.program)}-{_LAYOUT}"

    def build(path: Path) -> None:
        progress.step("building the QEMU image")
        with _staging(path) as stage:
            _lay_out_qemu(stage, qemu)
            make_ext4(stage, path)

    image = cache.entry(f"images/qemu-{key}.ext4", build)
    cache.prune("images/qemu-", keep=2)
    return image


def fio_image(cache: Cache, progress: Progress, tree: Path) -> Path:
    """Debian's fio, unpacked in `tree`, as a guest's disk: mounted at /fio, /fio/run starts it."""
    program = tree / "usr" / "bin" / "fio"

    def build(path: Path) -> None:
        progress.step("building the fio image")
        folder = HERE.libraries(tree)
        loader = folder / HERE.loader
        lister = [str(loader), "--library-path", f"{folder}:{folder / 'ceph'}", "--list"]
        with _staging(path) as stage:
            lay_out_program(stage, program, lister, loader, "/fio")
            make_ext4(stage, path)

    image = cache.entry(f"images/fio-{_file_key(program)}-{_LAYOUT}.ext4", build)
    cache.prune("images/fio-", keep=2)
    return image


def project_sources() -> list[Path]:
    """The project's packages, and its tests when it runs from a source tree."""
    found = []
    for name in PROJECT_PACKAGES:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec is not None else []
        found += [Path(p) for p in places[:1]]
    tree = found[0].parent
    if (tree / "pyproject.toml").is_file():
        found += [tree / n for n in _PROJECT_EXTRAS if (tree / n).exists()]
    return found


def make_ext4(folder: Path, image: Path) -> None:
    """An ext4 image holding what lies below `folder`, with root as the owner of it all."""
    program = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if program is None:
        raise HostError("mke2fs not found; the lab builds its images with it (package e2fsprogs)")
    sizes = [max(p.lstat().st_size, 4096) for p in folder.rglob("*")]
    # Blocks are 4 KiB; inodes, bitmaps and directories take the rest.
    size = sum(-(-s // 4096) * 4096 for s in sizes) * 11 // 10 + 512 * len(sizes) + 8 * _MIB
    command = [program, "-q", "-F", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0"]
    command += ["-b", "4096", "-I", "256", "-N", str(len(sizes) + 64)]
    command += ["-E", "root_owner=0:0,lazy_itable_init=1", "-d", str(folder), str(image)]
    result = subprocess.run(
        [*command, f"{size // 1024}k"], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HostError(f"mke2fs of {image.name} ({size >> 20} MiB) failed: {reason}")


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    stage = path.parent / "stage"
    stage.mkdir()
    try:
        yield stage
    finally:
        remove_tree(stage)


def _lay_out_system(stage: Path, busybox: Path, python: LabPython) -> None:
    for name in ("dev", "proc", "sys", "tmp", "run", "root", "etc", "var/tmp", "usr/local/bin"):
        (stage / name).mkdir(parents=True, exist_ok=True)
    for name in ("project", "job", "qemu", "site"):
        (stage / "lab" / name).mkdir(parents=True)
    python.lay_out_links(stage)
    tools = stage / "lab" / "bin"
    tools.mkdir()
    shutil.copy2(busybox, tools / "busybox")
    for name in initramfs.applets(busybox):
        (tools / name).symlink_to("busybox")
    shell = stage / "bin" / "sh"
    shell.symlink_to("/lab/bin/busybox")
    env = stage / "usr" / "bin" / "env"
    env.parent.mkdir(parents=True, exist_ok=True)
    env.symlink_to("/lab/bin/busybox")
    pyvmm = stage / "usr" / "local" / "bin" / "pyvmm"
    pyvmm.write_text(f'#!/bin/sh\nexec {python.executable} -sP /lab/project/pyvmm "$@"\n')
    pyvmm.chmod(0o755)
    wrapper = stage / "usr" / "local" / "bin" / HERE.qemu_program
    wrapper.symlink_to("/lab/qemu/run")
    (stage / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (stage / "etc" / "group").write_text("root:x:0:\n")
    (stage / "etc" / "hosts").write_text("127.0.0.1 localhost\n")


def lay_out_program(
    stage: Path,
    program: Path,
    lister: Sequence[str],
    loader: Path | None,
    place: str,
    arguments: str = "",
) -> None:
    """The program, its libraries, and a script `run` that starts it, once `stage` is at `place`."""
    libraries = stage / "lib"
    libraries.mkdir()
    shutil.copy2(program, stage / program.name)
    for library in {*libraries_of([program], lister), *filter(None, [loader])}:
        shutil.copy2(library, libraries / library.name)
    script = stage / "run"
    script.write_text(
        f"#!/bin/sh\nexec {place}/lib/{HERE.loader} --library-path {place}/lib "
        f'{place}/{program.name} {arguments}"$@"\n'
    )
    script.chmod(0o755)


def _lay_out_qemu(stage: Path, qemu: Qemu) -> None:
    if qemu.loader is not None:
        lister = [str(qemu.loader), "--library-path", str(qemu.libraries), "--list"]
    else:
        lister = ["ldd"]
    lay_out_program(stage, qemu.program, lister, qemu.loader, "/lab/qemu", "-L /lab/qemu/data ")
    data = stage / "data"
    data.mkdir()
    folders = qemu.data or (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
    for folder in folders:
        for pattern in _QEMU_DATA:
            for file in folder.glob(pattern):
                target = data / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                if file.is_file() and not target.exists():
                    shutil.copy2(file, target)


def _no_caches(folder: str, names: list[str]) -> set[str]:
    del folder
    return {n for n in names if n == "__pycache__" or (n.startswith(".") and n != ".coveragerc")}


def _file_key(path: Path) -> str:
    status = path.resolve().stat()
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def initramfs_key(
    busybox: Path, modules: Path | None, kvm: Path | None = None, devices: Devices = VIRTIO
) -> str:
    """Packages are unpacked once and never change, so their paths stand for them."""
    text = f"{_file_key(busybox)} {modules} {initramfs.SCRIPTS} {devices}"
    for folder in (modules, kvm):
        if folder is not None:
            text += f" {folder.resolve()} {folder.resolve().stat().st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tree_key(sources: Iterable[Path]) -> str:
    """Of the contents: an edit that is undone finds its old image again."""
    digest = hashlib.sha256()
    for source in sources:
        files = [source] if source.is_file() else sorted(_project_files(source))
        for file in files:
            digest.update(f"{source.name}/{file.relative_to(source)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _project_files(folder: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in _no_caches(path, folders)]
        yield from (Path(path) / n for n in names if n not in _no_caches(path, names))
