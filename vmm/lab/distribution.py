"""Disk images of Debian, for --root: `pyvmm lab image debian:trixie`.

Made of Debian's packages without privileges: apt resolves and fetches them (vmm.lab.apt), they are
unpacked here, and dpkg configures them in a user namespace of its own, with that tree as its root.
One user is all that such a namespace has; fakeroot, from the same Debian, remembers whose files
they would be, and mke2fs writes that into the image. A second stage inside a lab machine would need
no namespace, and several minutes of emulation.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmm.core.errors import HostError, UsageError
from vmm.core.near import did_you_mean
from vmm.core.suboptions import byte_size, size_text
from vmm.lab.apt import Apt, PackagesUnavailable
from vmm.lab.architecture import HERE
from vmm.lab.cache import Cache, remove_tree
from vmm.lab.progress import Progress
from vmm.lab.tied import tied

RELEASES = ("trixie", "bookworm")
_DEBIAN = "debian:"
# Counts up when an image would come out differently, so that older cached ones aren't used.
_RECIPE = 1
_SMALLEST = 256 << 20
_DEFAULT_SIZE = 2 << 30
_KEPT = 4  # some 300 MiB each
# What a system needs to come up to a login on its serial line, besides Debian's essential packages.
_BASE = (
    *("systemd-sysv", "udev", "dbus", "login", "passwd", "mount", "kmod", "e2fsprogs"),
    *("iproute2", "procps", "libpam-runtime"),
)
_TOOLS = ("unshare", "chroot", "tar", "dpkg-deb")
# Nothing in a lab is served by these, and each costs a boot some of its time: a second or more.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "systemd-pstore.service", "getty@tty1.service"),
    *("kmod-static-nodes.service", "modprobe@.service", "systemd-udev-load-credentials.service"),
    *("systemd-random-seed.service", "systemd-journal-flush.service", "dev-hugepages.mount"),
    *("dev-mqueue.mount", "sys-fs-fuse-connections.mount", "sys-kernel-config.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "proc-sys-fs-binfmt_misc.automount"),
)
# What udev is told of at boot, of several hundred devices: those that a system waits for. All of
# them keep it at work for so long that the wait for the serial line's login ends before (90 s).
_COLDPLUGGED = ("block", "net", "input", "virtio-ports")
_COLDPLUG = """\
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=all --action=add {subsystems}
ExecStart=-udevadm trigger --type=all --action=add --sysname-match=ttyS0 --sysname-match=hvc*
"""
_FULL = "No space left on device"

# Runs in namespaces of its own, as their root; $1 is the tree, $2 the packages' folder, $3 where
# the image goes. No device of this machine is in reach but those that every program has.
_ENTER = """\
set -e
mkdir -p "$1/dev" "$1/proc" "$1/run" "$1/mnt"
mount -t tmpfs -o mode=755 none "$1/dev"
for name in null zero full random urandom tty; do
    : >"$1/dev/$name"
    mount --bind "/dev/$name" "$1/dev/$name"
done
mkdir "$1/dev/shm" "$1/dev/pts"
ln -s /proc/self/fd "$1/dev/fd"
mount -t proc none "$1/proc"
mount -t tmpfs none "$1/run"
mkdir "$1/run/debs" "$1/run/out" "$1/run/fakeroot"
mount --bind "$2" "$1/run/debs"
mount --bind "$3" "$1/run/out"
cp -r "$2/../fakeroot/." "$1/run/fakeroot"
cp "$2/../configure" "$1/run/configure"
exec chroot "$1" /bin/sh /run/configure
"""
_CONFIGURE = """\
set -e
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true LC_ALL=C HOME=/root
export PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_OFFLINE=1
faked=$(/run/fakeroot/usr/bin/faked-sysv)
# It calls chown itself, too, which one user's namespace refuses with another error than it expects.
export FAKEROOTDONTTRYCHOWN=1 FAKEROOTKEY="${{faked%%:*}}"
export LD_PRELOAD=/run/fakeroot/usr/lib/{triplet}/libfakeroot/libfakeroot-sysv.so
trap 'kill "${{faked##*:}}"' EXIT
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates
: >/var/lib/dpkg/status
echo "step: unpacking"
dpkg --force-depends --force-unsafe-io --install /run/debs/base-passwd_*.deb
dpkg --force-depends --force-unsafe-io --unpack /run/debs/*.deb
echo "step: configuring"
dpkg --force-unsafe-io --configure -a
rm -f /usr/sbin/policy-rc.d
echo {name} >/etc/hostname
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' >/etc/hosts
echo '# The root file system is mounted by the initramfs.' >/etc/fstab
passwd -d root
for unit in {masked}; do ln -sf /dev/null "/etc/systemd/system/$unit"; done
# What systemd would do at the first boot, some of it slowly: caches of libraries, messages and
# hardware. It goes by the time of /usr, and is told that all of that is done.
ldconfig
journalctl --update-catalog || true
systemd-hwdb update || true
# Under emulation everything takes longer than those who chose the time limits thought of.
mkdir -p /etc/systemd/system.conf.d
mkdir -p /etc/systemd/system/systemd-udev-trigger.service.d /etc/systemd/journald.conf.d
cat >/etc/systemd/system/systemd-udev-trigger.service.d/few.conf <<'end'
{coldplug}end
printf '[Journal]\\nStorage=volatile\\n' >/etc/systemd/journald.conf.d/volatile.conf
printf '[Manager]\\nDefaultDeviceTimeoutSec=15min\\n' >/etc/systemd/system.conf.d/emulated.conf
[ -s /etc/machine-id ] || systemd-machine-id-setup
rm -rf /var/cache/apt/*.bin /var/log/dpkg.log /var/log/alternatives.log /var/cache/debconf/*-old
touch -r /usr /etc/.updated /var/.updated
echo "step: writing the file system"
# Without what is mounted on it.
mount --bind / /mnt
mke2fs -q -F -t ext4 -b 4096 -J size=16 -m 0 -L {name} -E lazy_itable_init=1 -d /mnt \\
    /run/out/entry {blocks}
"""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What `pyvmm lab image` is asked for; `size` is in bytes."""

    release: str
    include: tuple[str, ...] = ()
    output: Path | None = None
    size: int = _DEFAULT_SIZE

    @property
    def name(self) -> str:
        return f"debian-{self.release}"

    @property
    def target(self) -> Path:
        return self.output or Path(f"{self.name}.ext4")


def parse_request(words: Sequence[str]) -> ImageRequest:
    """What follows `pyvmm lab image`. Raises UsageError."""
    usage = "write pyvmm lab image debian:trixie [--include PACKAGES] [--output FILE] [--size SIZE]"
    rest = list(words)
    names: list[str] = []
    include: list[str] = []
    output, size = None, _DEFAULT_SIZE
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if not word.startswith("-"):
            names.append(word)
            continue
        if word not in ("--include", "--output", "--size"):
            near = did_you_mean(word, ("--include", "--output", "--size"))
            raise UsageError(f"lab image {word}: no such option; {near or usage}")
        if not equals:
            if not rest:
                raise UsageError(f"lab image {word}: its value is missing; {usage}")
            value = rest.pop(0)
        if word == "--include":
            include += [name for name in value.split(",") if name]
        elif word == "--output":
            output = Path(value)
        else:
            number = byte_size(value)
            if number is None or number < _SMALLEST:
                raise UsageError(
                    f"--size {value}: a size of at least {size_text(_SMALLEST)} is needed, as in 2G"
                )
            size = number
    release = names[0].removeprefix(_DEBIAN) if names else ""
    if len(names) != 1 or not names[0].startswith(_DEBIAN):
        raise UsageError(f"lab image{''.join(f' {n}' for n in names)}: {usage}")
    if release not in RELEASES:
        near = did_you_mean(release, RELEASES)
        raise UsageError(
            f"lab image {names[0]}: there are {' and '.join(_DEBIAN + r for r in RELEASES)}"
            f"{f'; {near}' if near else ''}"
        )
    wrong = [name for name in include if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name)]
    if wrong:
        raise UsageError(f"--include {wrong[0]}: not a package's name")
    return ImageRequest(release, tuple(sorted(set(include))), output, size)


@dataclass(frozen=True, slots=True)
class ImageMaker:
    """Makes images, each once for what is in it."""

    cache: Cache
    apt: Apt
    progress: Progress
    offline: bool = False

    def make(self, request: ImageRequest) -> Path:
        """The image at the place that was asked for, which must be free; cached beside that.

        Raises UsageError for a package that doesn't exist, HostError for what can't be done here.
        """
        target = request.target
        if target.exists():
            raise UsageError(
                f"{target} is there already, and may be somebody's root disk; remove it, or give "
                "another --output FILE"
            )
        if not target.absolute().parent.is_dir():
            raise UsageError(f"--output {target}: there is no such directory")
        image = self.cached(request)
        self._run(["cp", "--sparse=always", "--reflink=auto", str(image), str(target)], f"{target}")
        target.chmod(0o644)
        return target

    def cached(self, request: ImageRequest) -> Path:
        """The cache's own copy; not to be written."""
        text = f"{' '.join(request.include)} {request.size} {_RECIPE} {_CONFIGURE} {_BASE}"
        text += f" {_MASKED} {_COLDPLUG} {_COLDPLUGGED}"
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        prefix = f"images/{request.name}-"

        def build(path: Path) -> None:
            if self.offline:
                raise HostError(
                    f"an image of Debian {request.release} with {', '.join(request.include)}: not "
                    f"in the cache {self.cache.root}, and not to be made (--lab-offline)"
                )
            self._build(request, path)

        entry = self.cache.entry(f"{prefix}{key}.ext4", build)
        self.cache.prune(prefix, keep=_KEPT)
        return entry

    def _build(self, request: ImageRequest, path: Path) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            raise HostError(f"{', '.join(missing)} not found; images are made with it")
        work = path.parent
        debs, tree, out = work / "debs", work / "tree", work / "out"
        for folder in (tree, out):
            folder.mkdir()
        self._download(request, debs, work / "fakeroot")
        self.progress.step(f"unpacking {len(list(debs.iterdir()))} packages")
        for package in sorted(debs.glob("*.deb")):
            # What dpkg needs to run in there; it unpacks all of it once more, with its owners.
            self._pipe(package, tree)
        script = _CONFIGURE.format(
            triplet=HERE.triplet,
            name=request.name,
            masked=" ".join(map(shlex.quote, _MASKED)),
            coldplug=_COLDPLUG.format(
                subsystems=" ".join(f"--subsystem-match={name}" for name in _COLDPLUGGED)
            ),
            blocks=request.size // 4096,
        )
        (work / "configure").write_text(script)
        self.progress.step("configuring them (a minute or two)")
        try:
            self._enter(tree, debs, out)
            os.rename(out / "entry", path)
        finally:
            remove_tree(tree)

    def _download(self, request: ImageRequest, debs: Path, fakeroot: Path) -> None:
        self.progress.step(f"downloading packages of Debian {request.release}")
        essential = f"?narrow(?codename(^{request.release}$),?essential)"
        try:
            with self.cache.lock("apt"):
                if request.include:
                    self._require_known(request)
                self.apt.archives([essential, *_BASE, *request.include], request.release, debs)
                self.apt.download(
                    [f"{name}/{request.release}" for name in ("fakeroot", "libfakeroot")], fakeroot
                )
        except PackagesUnavailable as error:
            raise HostError(
                f"an image of Debian {request.release} is made of Debian's packages, which are "
                f"not to be had: {error}"
            ) from error

    def _require_known(self, request: ImageRequest) -> None:
        known = set(self.apt.all_names())
        for name in request.include:
            if name not in known:
                near = did_you_mean(name, known)
                raise UsageError(
                    f"--include {name}: Debian has no such package; "
                    f"{near or 'apt-cache search finds names'}"
                )

    def _pipe(self, package: Path, tree: Path) -> None:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as unpacking:
            taken = subprocess.run(
                ["tar", "-x", "-C", str(tree), "--no-same-owner", "--keep-directory-symlink"],
                stdin=unpacking.stdout,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        if unpacking.returncode or taken.returncode:
            raise self._failed(f"unpacking {package.name}", taken.stderr)

    def _enter(self, tree: Path, debs: Path, out: Path) -> None:
        command = [
            shutil.which("unshare") or "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "--ipc",
            "--pid",
            "--fork",
        ]
        probe = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise HostError(
                f"images are made in a user namespace, which this machine refuses: {reason}; allow "
                "them (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or "
                "kernel.unprivileged_userns_clone=1), or make the image elsewhere"
            )
        words = [*command, "--kill-child", "sh", "-c", _ENTER, "sh", str(tree), str(debs), str(out)]
        log: list[str] = []
        with subprocess.Popen(
            tied(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                log.append(line.rstrip())
                if line.startswith("step: "):
                    self.progress.part(line.removeprefix("step: ").strip())
        if process.returncode:
            kept = self.cache.path("image.log")
            kept.write_text("\n".join(log) + "\n")
            raise self._failed("configuring the packages", "\n".join(log), kept)

    def _run(self, command: list[str], what: str) -> None:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise self._failed(f"writing {what}", result.stderr)

    def _failed(self, what: str, output: str, log: Path | None = None) -> HostError:
        """With the first complaint; a disk that is full explains all others."""
        if _FULL in output:
            return HostError(
                f"{what} failed: {_FULL}; make room in {self.cache.root}, or name another "
                "directory with --lab-cache DIR"
            )
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\berror\b|cannot|failed", line, re.I)]
        reason = (errors or lines[-1:] or ["no reason given"])[0].strip()
        return HostError(f"{what} failed: {reason}{f'; all of it is in {log}' if log else ''}")
