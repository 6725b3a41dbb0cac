"""What one run carries into the lab machine and brings back: files, disks, the command's words.

Files keep their absolute paths inside (links to where the job image is mounted), so that the
command and its messages read the same as outside. Disks become block devices; their paths are
rewritten. Results come back as a tar archive on a raw drive.
"""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from vmm.core.disk_image import check_raw, in_use, is_read_only_device, lock
from vmm.core.errors import UsageError
from vmm.core.root_disk import TAGS
from vmm.core.share import Share, pack, parse_share, take_back
from vmm.lab.devices import VIRTIO, Devices

# Drives in front of the user's disks: root, project, job, results.
FIXED_DRIVES = 4
_MOUNT = "/lab/job"
_STATUS = "lab/status"
RESULTS_BYTES = 8 << 30  # sparse: costs what is written

_OWN_CODE = ("--policy", "--device", "--exit-handler", "--scheme", "--private-mem")
"""Options that may name a class of the user's, in a file."""
_INPUT_OPTIONS = ("--kernel", "--initrd")
_OUTPUT_OPTIONS = ("--report", "--trace")
_OUTPUTS_OF = {
    "selftest": ("--json", "--emit-c"),
    "bench": ("--json", "--html"),
}  # of these commands only
# Directories that the kernel makes inside too: what lies there is not carried.
_NOT_CARRIED = ("/dev", "/proc", "/sys")


@dataclass(frozen=True, slots=True)
class Drive:
    """A user's disk: attached to the lab machine as it lies, so that writes reach it."""

    path: Path
    read_only: bool
    shared: bool = False  # others may write it too


@dataclass(slots=True)
class SharedFolder:
    """A folder for --share: an archive of it goes in, one comes back. Both are in `scratch`."""

    share: Share
    scratch: Path

    @property
    def packed(self) -> Path:
        return self.scratch / "share-in.tar"

    @property
    def returned(self) -> Path:
        return self.scratch / "share-out.tar"

    def take_back(self) -> None:
        """Raises OutputError; nothing where the machine had nothing to give back."""
        if self.returned.exists():
            with open(self.returned, "rb") as archive:
                take_back(self.share, archive)


@dataclass(slots=True)
class Job:
    """One command with everything it needs, ready to be laid out as an image."""

    words: list[str]
    directory: Path
    inputs: list[Path] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    drives: list[Drive] = field(default_factory=list)
    first_drive: int = FIXED_DRIVES
    share: SharedFolder | None = None

    def devices(self) -> list[str]:
        """The block devices that the disks are inside, in their order."""
        return [VIRTIO.drive(self.first_drive + i) for i in range(len(self.drives))]


def job_from_arguments(
    words: Sequence[str],
    directory: Path,
    *,
    first_drive: int = FIXED_DRIVES,
    is_program: bool = False,
) -> Job:
    """Finds the files that the words name: `--option VALUE` and `--option=VALUE` alike.

    Of a program's words nothing is known, so there only existing files are taken along.
    """
    job = Job([], directory, first_drive=first_drive)
    outputs = (*_OUTPUT_OPTIONS, *_OUTPUTS_OF.get(words[0] if words else "", ()))
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if is_program:
            _carry_if_file(job, word)
            _carry_if_file(job, value)
            job.words.append(word)
        elif equals and name.startswith("--"):
            job.words.append(f"{name}={_take(job, name, value, outputs)}")
        elif option:
            job.words.append(_take(job, option, word, outputs))
        else:
            _carry_if_file(job, word)
            job.words.append(word)
        option = word if word.startswith("--") and not equals else ""
    return job


def _share(job: Job, text: str) -> None:
    """Packs the folder, once."""
    share = parse_share(text)
    share = share._replace(folder=str(_absolute(job, share.folder)))
    job.share = SharedFolder(share, Path(tempfile.mkdtemp(prefix="pyvmm-share-")))
    with open(job.share.packed, "wb") as archive:
        pack(share, archive)
    job.inputs.append(job.share.packed)
    job.outputs.append(job.share.returned)


def _take(job: Job, option: str, value: str, outputs: Sequence[str]) -> str:
    """Notes what the option's value names; returns the value as it is to be inside."""
    if option == "--disk" and value.startswith("vhost-user="):
        return value  # a socket in the lab machine
    if option == "--disk" or (option == "--root" and value.partition("=")[0] not in TAGS):
        return attach(job, value, option)
    if option == "--share":
        _share(job, value)
        return value
    if option in outputs:
        job.outputs.append(_absolute(job, value))
        return value
    if option == "--console" and value.startswith("file="):
        job.outputs.append(_absolute(job, value.removeprefix("file=").split(",")[0]))
        return value
    if option in _INPUT_OPTIONS:
        path = _absolute(job, value)
        if not path.exists():
            raise UsageError(f"{option} {value}: no such file")
        if not os.access(path, os.R_OK):
            raise UsageError(f"{option} {value}: no permission to read it")
    if not value.startswith("--"):
        _carry_if_file(job, value)
    if option in _OWN_CODE:
        _carry_imports(job, _absolute(job, value.rpartition(":")[0]))
    return value


def attach(job: Job, value: str, option: str) -> str:
    """Adds FILE[,ro][,...] as a drive; returns the value with the block device's name inside.

    It is looked at here as pyvmm does inside, where a drive has whole sectors in any case.
    """
    first, *words = value.replace(",,", "\0").split(",")  # a comma in a name is written twice
    name = first.replace("\0", ",")
    path = _absolute(job, name)
    read_only, shared = "ro" in words, "share=on" in words
    wanted = os.R_OK if read_only else os.R_OK | os.W_OK
    if not path.exists():
        raise UsageError(f"{option} {name}: no such file; make one with truncate -s SIZE FILE")
    if not (path.is_file() or path.is_block_device()):
        raise UsageError(f"{option} {name}: neither a file nor a block device")
    if not os.access(path, wanted):
        rest = "" if read_only else "; add ,ro to attach it read-only"
        raise UsageError(f"{option} {name}: no permission{rest}")
    fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        check_raw(fd, option, name, raw="format=raw" in words)
        if not read_only and is_read_only_device(fd):
            raise UsageError(f"{option} {name} is a read-only device; add ,ro")
        # Let go again: the emulator takes its own lock.
        if not shared and not lock(fd, write=not read_only):
            raise in_use(option, name, write=not read_only)
    finally:
        os.close(fd)
    for drive in job.drives:
        both_read = read_only and drive.read_only
        if not (shared or both_read) and os.path.samefile(path, drive.path):
            raise in_use(option, name, write=not read_only)
    job.drives.append(Drive(path, read_only, shared))
    return ",".join([job.devices()[-1], *(word.replace("\0", ",,") for word in words)])


def _carry_if_file(job: Job, value: str) -> None:
    """A value may be FILE or FILE:CLASS; anything that names no regular file is left alone."""
    for name in dict.fromkeys((value, value.rpartition(":")[0])):
        path = _absolute(job, name)
        inside_kernel = str(path).startswith(tuple(f"{p}/" for p in _NOT_CARRIED))
        if name and "\0" not in name and not inside_kernel and _is_file(path):
            if path not in job.inputs:
                job.inputs.append(path)
            return


def _carry_imports(job: Job, source: Path) -> None:
    """A policy file brings the modules and packages beside it that it imports, and theirs."""
    if source.suffix != ".py" or not _is_file(source):
        return
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # the command inside says what is wrong with it
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    for name in dict.fromkeys(name.partition(".")[0] for name in names):
        module, package = source.parent / f"{name}.py", source.parent / name
        if (package / "__init__.py").is_file() and package not in job.inputs:
            job.inputs.append(package)
        elif module.is_file() and module not in job.inputs:
            job.inputs.append(module)
            _carry_imports(job, module)


def _is_file(path: Path) -> bool:
    """Whether there is such a regular file; what is too long for a name (a program) is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _absolute(job: Job, value: str) -> Path:
    """Without resolving links: the path inside must be the one that was written."""
    return Path(os.path.normpath(job.directory / value))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the command finds around it inside: variables, and a terminal if there is one here."""

    environment: dict[str, str]
    path: str
    token: str  # ends the output streams; must not occur in the output
    terminal: tuple[int, int] | None = None  # rows, columns
    qemu_drive: str | None = None
    names: Devices = VIRTIO


def lay_out(job: Job, surroundings: Surroundings, folder: Path) -> None:
    """Fills `folder`, which becomes the job image: the files and the script `run`."""
    links = []
    for number, source in enumerate(job.inputs):
        inside = folder / "files" / str(number) / source.name
        inside.parent.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, inside, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, inside)
            inside.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)
        links.append((str(source), f"{_MOUNT}/files/{number}/{source.name}"))
    (folder / "run").write_text(_script(job, surroundings, links))


def _script(job: Job, surroundings: Surroundings, links: list[tuple[str, str]]) -> str:
    quote = shlex.quote
    devices = surroundings.names
    lines = [f"export PATH={quote(surroundings.path)}"]
    lines += [f"export {name}={quote(value)}" for name, value in surroundings.environment.items()]
    lines.append(f"TOKEN={quote(surroundings.token)}")
    lines.append(_SETUP)
    if surroundings.qemu_drive is not None:
        lines.append(f"mount -t ext4 -o ro,noatime {surroundings.qemu_drive} /lab/qemu")
    for path, target in links:
        lines.append(f"mkdir -p {quote(str(PurePosixPath(path).parent))}")
        lines.append(f"[ -e {quote(path)} ] || ln -s {quote(target)} {quote(path)}")
    for output in job.outputs:
        lines.append(f"mkdir -p {quote(str(output.parent))}")
    lines.append(f"mkdir -p {quote(str(job.directory))}; cd {quote(str(job.directory))}")
    if job.share is not None:
        folder, packed = quote(job.share.share.folder), quote(str(job.share.packed))
        lines.append(f"mkdir -p {folder}; tar -x -f {packed} -C {folder}")
    lines.append(_SIGNALS.format(serial=devices.serial))
    words = " ".join([_NOTING_ITS_PROCESS, *(quote(word) for word in job.words)])
    if surroundings.terminal is not None:
        rows, columns = surroundings.terminal
        lines.append(
            _ON_TERMINAL.format(words=words, rows=rows, columns=columns, device=devices.console)
        )
    else:
        script = _ON_SERIAL_LINES if devices.is_serial else _ON_PORTS
        lines.append(
            script.format(
                words=words, input=devices.input, output=devices.output, error=devices.error
            )
        )
    if job.share is not None:
        returned = quote(str(job.share.returned))
        lines.append(f"tar -c -f {returned} -C {folder} .")
    names = " ".join(quote(f"./{str(p).lstrip('/')}") for p in job.outputs)
    lines.append(
        _FINISH.format(
            names=names,
            device=devices.drive(FIXED_DRIVES - 1),
            status=_STATUS,
            serial=devices.serial,
        )
    )
    return "\n".join(lines)


_SETUP = """\
mkdir -p /dev/pts /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
ip link set lo up
hostname lab
"""
# While the command runs, the host's words on the serial line are signals for it.
_SIGNALS = """\
while read -r signal; do kill -"$signal" "$(cat /lab/pid)"; done <{serial} 2>/dev/null & signals=$!
"""
_NOTING_ITS_PROCESS = """sh -c 'echo $$ >/lab/pid; exec "$@"' sh"""
_ON_PORTS = """\
while [ ! -c {error} ]; do usleep 20000; done
exec 5<{input} 6>{output} 7>{error}
echo pyvmm-lab: running >/dev/console
{words} <&5 >&6 2>&7 5<&- 6>&- 7>&-
echo $? >/lab/status
printf %s "$TOKEN" >&6
printf %s "$TOKEN" >&7
"""
# The command gets pipes, not terminals. Input comes in pieces, each asked for and with its length
# in front (vmm.lab.streams.Pieces).
_ON_SERIAL_LINES = """\
for line in {input} {output} {error}; do stty -F $line raw -echo 115200; done
exec 5<>{input} 6>{output} 7>{error}
echo pyvmm-lab: running >/dev/console
mkfifo /lab/input /lab/output /lab/error
cat </lab/output >&6 & output=$!
cat </lab/error >&7 & error=$!
while printf . >&5 && read -r count <&5 && [ "$count" -gt 0 ]; do
    dd bs=1 count="$count" <&5 2>/dev/null
done >/lab/input & input=$!
{words} </lab/input >/lab/output 2>/lab/error 5<&- 6>&- 7>&-
echo $? >/lab/status
kill $input 2>/dev/null
wait $output $error
printf %s "$TOKEN" >&6
printf %s "$TOKEN" >&7
"""
# The shell in between is the session's leader: when a leader ends, its terminal is hung up and
# what wasn't sent yet is lost. stty waits until everything is (it sets with TCSADRAIN).
_ON_TERMINAL = """\
while [ ! -c {device} ]; do usleep 20000; done
echo pyvmm-lab: running >/dev/console
setsid -c sh -c '
    trap : INT QUIT HUP
    stty rows {rows} cols {columns}
    token=$1
    shift
    "$@"
    echo $? >/lab/status
    stty raw -echo
    printf %s "$token"
    stty raw -echo
' sh "$TOKEN" {words} <{device} >{device} 2>&1
"""
# The token tells the host that a stream is complete; the host's answer, that it has read it.
_FINISH = """\
kill $signals 2>/dev/null
cd /
set -- ./{status}
for name in {names}; do
    [ -e "$name" ] && set -- "$@" "$name"
done
tar -c -f {device} "$@" || echo "pyvmm-lab: failed: writing the results"
sync
echo pyvmm-lab: finished >/dev/console
read -t 20 answer <{serial}
poweroff -f
sleep 60
"""


@dataclass(slots=True)
class Results:
    """What came back: the command's status, and the outputs written to their places here."""

    status: int | None
    written: list[Path]


def unpack_results(drive: Path, outputs: Sequence[Path]) -> Results:
    """Reads the results drive; files go to the paths of `outputs` and nowhere else.

    What is on the drive was written by the machine inside, so its names are not trusted.
    """
    results = Results(None, [])
    with open(drive, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    _take_member(archive, member, outputs, results)
        except tarfile.TarError:
            return results  # nothing, or not all, was written: the status tells
    return results


def _take_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, outputs: Sequence[Path], results: Results
) -> None:
    path = Path(os.path.normpath("/" + member.name))
    if path == Path("/" + _STATUS):
        content = archive.extractfile(member)
        text = content.read(16).strip() if content is not None else b""
        results.status = int(text) if text.isdigit() else None
        return
    if not any(path == output or output in path.parents for output in outputs):
        return
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    source = archive.extractfile(member) if member.isfile() else None
    if source is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as target:
        _copy(source, target)
    results.written.append(path)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    shutil.copyfileobj(source, target, 1 << 20)
