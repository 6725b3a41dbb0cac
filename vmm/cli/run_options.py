"""The options of `pyvmm [run]`: one table, which argparse reads for help and errors.

A command line without any of that is read right here: importing argparse and filling it takes
longer than KVM takes to make a VM.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from vmm.core.lean_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

_DESCRIPTION = """\
Runs a virtual machine whose memory is private: the guest decides page by page what the host may
see, by sharing and unsharing, and a policy decides whether it may. Without --kernel the embedded
payload runs, which tries all of this out and says what it saw.
"""

EPILOG = """\
examples:
  pyvmm --private-mem                         try private memory on this host
  pyvmm --kernel bzImage --private-mem        boot a stock kernel with private memory
  pyvmm lab --kernel bzImage --private-mem    the same under full emulation, where the host's
                                              KVM can't do it or there is none
  pyvmm help lab                              the lab's own options (help COMMAND for others)
  pyvmm ctl --help                            asking a running pyvmm (--control)
  pyvmm check                                 what this host can do, and what is missing
  pyvmm selftest                              whether its KVM and pyvmm do it right
  pyvmm bench --quick                         how fast all of it is, beside QEMU and bare C
  pyvmm report DIR                            what a run with --trace DIR did
  pyvmm measure --kernel bzImage ...          what a strict guest's launch measures (see README)
  pyvmm replay DIR --policy MODULE:CLASS      what another policy would have made of it
  pyvmm sweep FILE.toml                       many runs, over policies, kernels and workloads
  pyvmm completion bash                       a shell's completion script (zsh, fish)

A SIZE is in bytes, or has a unit: 64K, 512M, 2G; so are --policy-arg's numbers.
While the guest runs on a terminal, Ctrl-A x quits.
exit status: 0 guest powered off, 1 guest failed, 2 bad usage or input, 3 the host cannot do it;
with --exec the command's, or 125 where none can be passed on
"""

_FLAG = {"action": "store_const", "const": True, "default": False}
_SEVERAL = {"action": "append", "default": []}
_POLICIES = "policies"
"""--policy and --policy-arg, which depend on each other, are argparse's business alone."""

DEFAULT_SIZES = "512M", "1"
"""--mem and --cpus."""

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "the guest": {
        "--kernel": {"metavar": "FILE", "help": "a Linux bzImage or vmlinux (x86-64)"},
        "--initrd": {"metavar": "FILE", "help": "its initial RAM disk"},
        "--append": {
            "metavar": "TEXT",
            "default": "",
            "help": "more kernel command line, after 'console=ttyS0 panic=-1'",
        },
        "--root": {
            "metavar": "FILE[,part=N][,ro]|UUID=...|LABEL=...",
            "help": "boot from this disk image: FILE becomes the first disk (its settings are "
            "--disk's), or the file system is looked for on the disks by its UUID, its label, or "
            "its partition's (PARTUUID=, PARTLABEL=); without --initrd one is made, with the "
            "modules that lie beside the kernel",
        },
        "--exec": {
            "metavar": "COMMAND",
            "help": "run this in the guest, by /bin/sh -c, instead of its init: standard input, "
            "output and error are pyvmm's, and so is the exit status (125: there is none to pass "
            "on, one line says why); the root is --root, or the --initrd",
        },
        "--share": {
            "metavar": "DIR[,size=SIZE]",
            "help": "with --exec: the command starts in /mnt with a copy of DIR, and what it "
            "writes there comes back (SIZE at most, default 256M; nothing is removed)",
        },
        "--mem": {
            "metavar": "SIZE",
            "default": DEFAULT_SIZES[0],
            "help": "guest RAM, as in 512M or 2G (default 512M)",
        },
        "--cpus": {
            "metavar": "N",
            "default": DEFAULT_SIZES[1],
            "help": "number of vCPUs (default 1)",
        },
        "--disk": {
            "metavar": "FILE[,ro][,serial=TEXT][,queues=N][,io=ENGINE][,format=raw][,share=on]"
            "[,process]|vhost-user=SOCKET[,queues=N]",
            **_SEVERAL,
            "help": "a raw disk image or block device as virtio-blk; with several queues each is "
            "served by a thread of its own; may be given several times; ENGINE: auto (default), "
            "pread (through a buffer), fd2fd (inside the kernel), hva (by the kernel, to and from "
            "KVM's mapping), mmap (memcpy); an image is locked against other machines (share=on: "
            "not), one in another format is refused "
            "(format=raw: not); process: in a process of its own, which has no guest memory; "
            "vhost-user=: a disk that another program serves, such as "
            "qemu-storage-daemon, which maps the shared side of guest memory",
        },
        "--allow-mapped-io": {
            **_FLAG,
            "help": "let a disk have io=mmap, the yardstick that reads and writes guest memory "
            "itself",
        },
    },
    "more devices, all virtio over PCI": {
        "--net": {
            "metavar": "tap=NAME|passt=SOCKET[,mac=MAC][,process]",
            **_SEVERAL,
            "help": "a network card on a tap interface, or behind a passt that runs already (passt "
            "--socket SOCKET; needs no privileges); may be given several times",
        },
        "--fs": {
            "metavar": "TAG,vhost-user=SOCKET",
            **_SEVERAL,
            "help": "a directory of the host's, as a virtiofsd serves it that listens on SOCKET; "
            "in the guest: mount -t virtiofs TAG /mnt; may be given several times",
        },
        "--vsock": {
            "metavar": "path=PATH[,cid=N][,process]",
            "help": "sockets between guest and host: a program that connects to PATH and writes "
            "'CONNECT PORT' reaches that port of the guest, the guest reaches the listener of "
            "PATH_PORT by connecting to port PORT of CID 2 (the guest's own CID: 3); process: in a "
            "process of its own, which has no guest memory",
        },
        "--console": {
            "metavar": "pty|file=FILE[,size=SIZE]|socket=PATH[,name=TEXT][,process]",
            **_SEVERAL,
            "help": "a console, hvc0 and so on; with name=, a plain port /dev/vport*: on a new "
            "pseudo-terminal, a file for its output (SIZE at most, default 1G), or a socket that "
            "pyvmm listens on; may be given several times; process: in a process of its own",
        },
        "--rng": {**_FLAG, "help": "the host's random numbers"},
        "--balloon": {
            "nargs": "?",
            "const": "",
            "metavar": "size=SIZE,control=PATH",
            "help": "a balloon that takes SIZE from the guest (default 0) and gives free memory "
            "back to the host; the socket PATH takes 'size SIZE' and 'stats'",
        },
        "--iommu": {
            **_FLAG,
            "help": "a virtual IOMMU in front of all of these but the balloon: they reach what the "
            "guest's driver has mapped for them and nothing else, and private pages without a "
            "bounce buffer (needs --kernel; x86-64)",
        },
    },
    "your own code": {
        "--device": {
            "metavar": "NAME|MODULE:CLASS|FILE.py:CLASS[,ARG=VALUE...]",
            **_SEVERAL,
            "help": "a device of your own: a subclass of vmm.PortDevice, vmm.PciDevice or "
            "vmm.VirtioDevice, or the name that a distribution registers; may be given several "
            "times",
        },
        "--exit-handler": {
            "metavar": "NAME|MODULE:CLASS|FILE.py:CLASS",
            **_SEVERAL,
            "help": "a subclass of vmm.ExitHandler that sees vCPUs' exits before pyvmm does",
        },
    },
    "private memory": {
        "--private-mem": {
            "nargs": "?",
            "const": "auto",
            "metavar": "auto|guest_memfd|guest_memfd-mmap|memfd|...",
            "help": "give the guest private memory; the value picks what stands behind it; with "
            "guest_memfd the host's kernel keeps the host out, and a kernel loads itself; for "
            "experiments also guest_memfd-plain, guest_memfd-in-place, memfd-sealed, memfd-hugetlb "
            "(default auto: the strongest that this host has and the guest can use)",
        },
        "--scheme": {
            "metavar": "auto|attributes|in-place|cbit|remap",
            "default": "auto",
            "help": "how private and shared pages are told apart (default auto: the first of "
            "these that this host has and the guest can use; pyvmm check says why)",
        },
    },
    _POLICIES: {
        "--debug-shell": {
            **_FLAG,
            "help": "when a policy raises, open a Python prompt with the event, the view, the "
            "policy and the exception before the run ends",
        },
    },
    "how it is run": {
        "--config": {
            "metavar": "FILE",
            "help": 'take options from this TOML file, as in mem = "2G", disk = ["a.img"], '
            "rng = true; those on the command line replace them, paths are relative to it",
        },
        "--restore": {
            "metavar": "DIR",
            "help": "go on from what pyvmm ctl PATH snapshot DIR has saved: memory, processors and "
            "private memory are in there; name the disks and other devices again",
        },
        "-S": {
            **_FLAG,
            "help": "don't let the guest run yet: pyvmm ctl PATH resume does (needs --control)",
        },
    },
    "output": {
        "--report": {
            "metavar": "FILE",
            "help": "write what happened to FILE (-: stdout) as JSON when the run ends",
        },
        "--trace": {
            "metavar": "DIR",
            "help": "record conversions, faults, I/O and exits in a folder, for pyvmm report and "
            "replay",
        },
        "--status": {
            **_FLAG,
            "help": "keep one line up to date: on stderr where that is a terminal of its own, "
            "else as the title of the guest's terminal (SIGUSR1 prints the page states at any "
            "time)",
        },
        "--control": {
            "metavar": "PATH",
            "help": "listen on a Unix socket for JSON lines: status, pause, resume, dump-state, "
            "convert, follow, quit; pyvmm ctl PATH COMMAND sends one",
        },
        "--memory-file": {
            "metavar": "DIR",
            "help": "guest memory as a file, DIR/memory, for other programs of yours: what is "
            "shared can be read and written, all else is refused (needs pip install "
            "'pyvmm[fuse]')",
        },
        "--gdb": {
            "metavar": "PORT|PATH",
            "help": "have the guest wait for gdb (target remote :PORT, or PATH): on a TCP port of "
            "this machine's loopback address, where every local user may connect, or on a Unix "
            "socket of your own",
        },
        "--gdb-sees-private": {
            **_FLAG,
            "help": "in a rehearsal, let gdb read and write private pages too; else it is refused, "
            "as every host access is",
        },
        "--core-dumps": {
            **_FLAG,
            "help": "with private memory, let the process leave core files and be debugged; guest "
            "memory itself is in no core file in any case",
        },
        "--sandbox": {
            "metavar": "auto|on|off",
            "default": "auto",
            "help": "before the guest runs, pyvmm gives up opening files, starting programs, "
            "connecting and so on (seccomp and Landlock), its policies too; on: refuse to run "
            "where the kernel can't take all of that away (default auto: what it can)",
        },
        "--allow-path": {
            "metavar": "PATH",
            **_SEVERAL,
            "help": "a file or folder that a policy may still open in the sandbox, to read and "
            "write; may be given several times",
        },
        "--uid": {
            "metavar": "USER|UID:GID",
            "help": "become this user once everything is open, on all threads and without any "
            "capability; what has to be done with paths at the end keeps its rights",
        },
        "--debug": {**_FLAG, "help": "show a traceback for errors, for bug reports"},
    },
}
"""By group and name, what argparse is told of each."""


def parse(words: Sequence[str]) -> SimpleNamespace | argparse.Namespace:
    """The options' values by argparse's names for them. Raises UsageError; ends after --help."""
    return read_plain(words) or build_parser().parse_args(words)


def read_plain(words: Sequence[str]) -> SimpleNamespace | None:
    """What argparse makes of `words`; None where that is more than the table tells."""
    options = {name: about for group in OPTIONS.values() for name, about in group.items()}
    values: dict[str, Any] = {name: about.get("default") for name, about in options.items()}
    rest = list(reversed(words))
    while rest:
        name, equals, given = rest.pop().partition("=")
        about = options.get(name)
        if about is None:
            return None
        is_flag = about.get("action") == "store_const"
        value: object = given
        if not equals:
            has_value = not is_flag and rest and not rest[-1].startswith("-")
            value = rest.pop() if has_value else about.get("const")
        if value is None or (equals and (is_flag or given[:1] in ("", "-"))):
            return None
        values[name] = [*values[name], value] if about.get("action") == "append" else value
    found = {name.lstrip("-").replace("-", "_"): value for name, value in values.items()}
    return SimpleNamespace(**found, policy=[], policy_arg=None)


def build_parser() -> argparse.ArgumentParser:
    """argparse's parser of all options."""
    import argparse

    from vmm.cli.parser import Parser, Version, add_policy_options

    parser = Parser(
        prog="pyvmm",
        usage="pyvmm [run] [options]   or   "
        "pyvmm check|selftest|bench|lab|ctl|report|replay|sweep|measure|completion|help [options]",
        description=_DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        if title == _POLICIES:
            add_policy_options(group)
        for name, about in options.items():
            group.add_argument(name, **about)
    parser.add_argument("--version", action=Version, help="say which pyvmm this is, and exit")
    return parser
