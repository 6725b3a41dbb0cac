"""The two initramfs archives: the lab machine's own, and one for guests that bring none.

Both are busybox, a few modules and a script. The lab machine's script mounts the images that
vmm.lab.image builds and hands over to the job's script; the guest's ends in a shell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vmm.core.cpio import CpioWriter
from vmm.core.errors import HostError
from vmm.core.guest_init import add_init
from vmm.core.kmodules import ModuleTree, without_signature
from vmm.lab import heartbeat
from vmm.lab.architecture import AMD64, LabArchitecture
from vmm.lab.devices import VIRTIO, Devices

# Loaded before anything can be mounted, and while the mounts are being made.
_FILE_SYSTEMS = ("ext4", "overlay")
_NET_MODULES = ("tun",)  # for pyvmm's --net tap=
_GUEST_MODULES = ("virtio_pci", "virtio_blk", "ext4")
# Loaded where a device of that PCI id is there: each costs a boot some time.
_GUEST_DEVICES = {
    "0x1041": "virtio_net",
    "0x1043": "virtio_console",
    "0x1044": "virtio_rng",
    "0x1045": "virtio_balloon",
    "0x1053": "vmw_vsock_virtio_transport",
    "0x105a": "virtiofs",
    # Other devices wait for it, where the machine says that it is in front of them.
    "0x1057": "virtio_iommu",
}

# What the lab machine says when it waits for what is the run's own.
READY = "pyvmm-lab: ready"
_HOST_INIT = """\
#!/bin/sh
fail() {{
    echo "pyvmm-lab: failed: $*"
    poweroff -f
    sleep 60
}}
# Those of a module on the kernel's command line: kvm.name=value.
parameters() {{
    for word in $(cat /proc/cmdline); do
        case "$word" in "$1".*) echo "${{word#*.}}" ;; esac
    done
}}
load() {{
    for module in "$@"; do
        said=$(insmod "/modules/$module.ko" $(parameters "$module") 2>&1) && continue
        kernel=$(dmesg | grep "$module" | tail -n 1)
        fail "loading module $module: ${{said##*: }}${{kernel:+; $kernel}}"
    done
}}
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
while :; do echo {alive}; sleep {seconds}; done &
load {storage}
load {kvm} & kvm=$!
load {net} & net=$!
until [ -b {drives}a ]; do usleep 10000; done
mkdir -p /lower /project /writes /root
mount -t ext4 -o ro,noatime {drives}a /lower || fail "mounting the root image"
mount -t tmpfs -o size=75% none /writes
mkdir /writes/upper /writes/work /writes/project-upper /writes/project-work
mount -t overlay -o lowerdir=/lower,upperdir=/writes/upper,workdir=/writes/work none /root \\
    || fail "mounting the writable layer"
wait $kvm $net
{check}
# All that is the same in every run is done. The host may keep the machine as it is now, and gives
# it the rest of its drives; what it says is the time, and noise for those that draw lots.
stty -F {serial} -echo
echo {ready}
read -r now noise <{serial}
stty -F {serial} echo
date -s "@$now" >/dev/null
echo "$noise" >/dev/urandom
until [ -b {drives}c ]; do usleep 10000; done
mount -t ext4 -o ro,noatime {drives}b /project || fail "mounting the project image"
mount -t overlay -o lowerdir=/project,upperdir=/writes/project-upper,workdir=/writes/project-work \\
    none /root/lab/project || fail "mounting the project's writable layer"
mount -t ext4 -o ro,noatime {drives}c /root/lab/job || fail "mounting the job image"
mount -o move /dev /root/dev
mount -o move /proc /root/proc
mount -o move /sys /root/sys
exec chroot /root /bin/sh /lab/job/run
"""

# Where KVM is a module its loading tells.
_BUILT_IN_CHECK = (
    '[ -c /dev/kvm ] || fail "the kernel started no KVM; $(dmesg | grep -i kvm | tail -n 1)"'
)
_GUEST_INIT = """\
#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
load() {{
    for module in "$@"; do
        [ -e "/sys/module/$module" ] || insmod "/modules/$module.ko"
    done
}}
load {modules}
for id in $(cat /sys/bus/pci/devices/*/device); do
    case $id in
{devices}    esac
done
# Functions behind an IOMMU have waited for its driver, and come up by themselves then.
functions=$(grep -l 0x1af4 /sys/bus/pci/devices/*/vendor | wc -l) tries=100
while [ -e /sys/module/virtio_iommu ] && [ $((tries -= 1)) -gt 0 ] \\
    && [ "$(ls /sys/bus/virtio/devices | wc -l)" -lt "$functions" ]; do usleep 50000; done
mkdir -p /dev/pts /mnt /tmp /root
mount -t devpts none /dev/pts
export HOME=/root PATH=/bin TERM=vt100
# A session of its own on the serial line, so that Ctrl-C reaches the shell's children.
tty=/dev/ttyS0
[ -c "$tty" ] || tty=/dev/console
echo "Linux $(uname -r), {count} module(s) loaded; \\`poweroff -f\\` ends the guest."
setsid -c sh <"$tty" >"$tty" 2>&1
poweroff -f
"""
_FIRST_APPLETS = b"[\0[[\0"
# What a cached archive depends on besides its files.
SCRIPTS = f"{_HOST_INIT}{_GUEST_INIT}{_FILE_SYSTEMS}{_NET_MODULES}{_GUEST_MODULES}{_GUEST_DEVICES}"


def host_initramfs(
    busybox: Path,
    modules: Path | None,
    kvm_modules: Path | None = None,
    devices: Devices = VIRTIO,
    architecture: LabArchitecture = AMD64,
) -> bytes:
    """The lab machine's: `modules` is lib/modules/RELEASE of its kernel, `kvm_modules`
    a directory with other KVM modules for it. Without modules all is built into the kernel.
    """
    tree = ModuleTree(modules, instead=kvm_modules)
    storage = tree.in_order((*devices.modules, *_FILE_SYSTEMS))
    loaded = {name for name, _ in storage}
    kvm = [
        (name, data) for name, data in tree.in_order(architecture.kvm_modules) if name not in loaded
    ]
    net = [(name, data) for name, data in tree.in_order(_NET_MODULES) if name not in loaded]
    for name in architecture.kvm_modules[-1:]:
        if modules is not None and name not in tree:
            raise HostError(f"no module {name} below {modules}; the lab's kernel needs it")
    script = _HOST_INIT.format(
        storage=" ".join(name for name, _ in storage),
        kvm=" ".join(name for name, _ in kvm),
        net=" ".join(name for name, _ in net),
        drives=devices.drives,
        alive=heartbeat.WORDS,
        seconds=heartbeat.SECONDS,
        serial=devices.serial,
        ready=READY,
        check="" if modules is not None else _BUILT_IN_CHECK,
    )
    loaded_bare = [(name, without_signature(data)) for name, data in [*storage, *kvm, *net]]
    return _archive(busybox, script, loaded_bare)


def guest_initramfs(busybox: Path, modules: Path | None) -> bytes:
    """A guest's: to a shell on ttyS0, with its kernel's own virtio modules when they are given."""
    tree = None if modules is None else ModuleTree(modules)
    found = {} if tree is None else dict(tree.in_order(_GUEST_MODULES))
    script_modules, devices = " ".join(found), ""
    for identity, module in _GUEST_DEVICES.items():
        needed = {} if tree is None else dict(tree.in_order([module]))
        devices += f"    {identity}) load {' '.join(needed)} ;;\n" if needed else ""
        found |= needed
    script = _GUEST_INIT.format(
        modules=script_modules, devices=devices, count=len(script_modules.split())
    )
    return _archive(busybox, script, found.items())


def own_initramfs(init: bytes, modules: Sequence[tuple[str, bytes]], busybox: Path | None) -> bytes:
    """A guest's that mounts its root disk or runs a command (firmware/init); with `busybox` there
    is a shell for that."""
    archive = CpioWriter()
    if busybox is not None:
        _add_busybox(archive, busybox)
    add_init(archive, init, modules)
    return archive.finish()


def _archive(busybox: Path, script: str, modules: Iterable[tuple[str, bytes]]) -> bytes:
    # Not compressed: the emulated CPU copies faster than it decompresses.
    archive = CpioWriter()
    for folder in ("dev", "proc", "sys"):
        archive.directory(folder)
    archive.character_device("dev/console", 5, 1)
    _add_busybox(archive, busybox)
    for name, content in modules:
        archive.file(f"modules/{name}.ko", content)
    archive.file("init", script.encode(), 0o755)
    return archive.finish()


def _add_busybox(archive: CpioWriter, busybox: Path) -> None:
    archive.directory("bin")
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for name in applets(busybox):
        archive.symlink(f"bin/{name}", "busybox")


def applets(busybox: Path) -> list[str]:
    """The commands that this busybox knows, read from its own table of names.

    It is not run: it may be for another architecture. The table (applet_names in applets.h of
    busybox) is sorted, each name ends with a NUL, and one more NUL ends it.
    """
    content = busybox.read_bytes()
    at = content.find(_FIRST_APPLETS)
    names = content[at : content.find(b"\0\0", at)].split(b"\0") if at >= 0 else []
    if b"sh" not in names:
        raise HostError(f"{busybox} has no table of commands; the lab needs a busybox with a shell")
    return [n.decode("ascii", "replace") for n in names if n != b"busybox" and b"/" not in n]
