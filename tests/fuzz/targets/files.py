"""Files and archives from elsewhere: options, modules, recordings, archives, device trees."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.drawing import Choices, recorded
from tests.fuzz.targets.registry import scratch_folder, target
from tests.support.cpio import entries
from tests.support.fdt import Read, read_tree
from vmm.arch.aarch64 import fdt
from vmm.cli.config_file import expanded
from vmm.cli.main import _configuration
from vmm.core.cpio import CpioWriter
from vmm.core.errors import OutputError, UsageError
from vmm.core.kernel_file import debian_version, kernel_release
from vmm.core.kmodules import ModuleTree, dependencies, without_signature
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.core.share import Share, unpack
from vmm.lab.kvm_change import split_patch
from vmm.lab.sources import debian_archive, read_sources
from vmm.lab.streams import EndMark
from vmm.scenario.recorded import scenario_of
from vmm.scenario.recording import SHARE, TO_GUEST, UNSHARE, Recorded, Recording, parse

# --- the configuration file, and the command line that it becomes ---


def _configs() -> list[bytes]:
    return [
        b'kernel = "vmlinuz"\nmem = "512M"\ncpus = 2\nprivate-mem = true\n',
        b'disk = ["a.img", "b.img,ro"]\nnet = "passt"\nconsole = ["file=x", "socket=y,name=z"]\n',
        b'[[policy]]\npolicy = "vmm.policy.builtin:Quota"\npolicy-arg = {limit = "1M", n = 1.5}\n',
        b'policy = "p.py:C"\n[lab]\nhost = "bochs"\n',
        b'root = "UUID=ab"\nexec = "true"\nshare = "d,size=1M"\niommu = true\nvsock = "path=v"\n',
        b'kernle = 1\n', b"a = ", b'mem = "-1"\n', b"cpus = 1e9\n", b"\xff\n",
        b'gdb = "1234"\nreport = "-"\ntrace = "t"\nballoon = "size=64K,control=b"\nrng = true\n',
    ]  # fmt: skip


@target("config", _configs, longest=600)
def config(data: bytes) -> None:
    """A TOML file: either one line about what is wrong, or words that the command line takes as
    it takes its own."""
    fd = os.memfd_create("config")
    path = f"/proc/self/fd/{fd}"
    try:
        os.write(fd, data)
        words = expanded(["--config", path])
        assert all(isinstance(word, str) and "\0" not in word for word in words)
        lab = expanded(["--config", path], lab=True)
        assert lab[len(lab) - len(words) :] == words
        _configuration(words, "x86_64")
    except UsageError as error:
        assert str(error) and "\n" not in str(error)[:1]
    except SystemExit:
        assert False, "a file made the command print its help"  # noqa: B011
    finally:
        os.close(fd)


def _command_lines() -> list[bytes]:
    lines = [
        "--kernel k --mem 64M --disk a,ro --disk b,direct,queues=2",
        "--private-mem=memfd --scheme cbit --cpus 4 --net tap=t,mac=02:00:00:00:00:01",
        "--policy m:C --policy-arg a=1 --balloon size=1M,control=x --vsock path=p,cid=3",
        "--exec true --share d,size=1M --root d.img,part=1", "run --gdb 99999", "--mem 1Q",
        "--console file=a,name=b --console socket=c --device m:D --trace t --report -",
        "--iommu --rng --control c -S --status=on --sandbox off --allow-path p --help-me",
    ]  # fmt: skip
    return [line.replace(" ", "\0").encode() for line in lines]


@target("options", _command_lines)
def options(data: bytes) -> None:
    """A command line, its words divided by NUL bytes: a configuration, or one line."""
    words = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
    # Help is a text of argparse's, and --config has a target of its own.
    words = [w for w in words if not w.startswith(("-h", "--h", "--v", "--c")) or w[:5] == "--con"]
    words = [w for w in words if not w.startswith("--config")]
    try:
        _configuration(words, "aarch64" if len(words) % 2 else "x86_64")
    except UsageError as error:
        assert str(error)
    except SystemExit:
        return


# --- kernel modules ---


def _modules() -> list[bytes]:
    info = b"\0license=GPL\0depends=kvm,irq-bypass\0name=kvm_amd\0"
    signature = bytes(20)
    trailer = bytes(8) + struct.pack(">I", len(signature)) + b"~Module signature appended~\n"
    x86 = bytes(0x202) + b"HdrS" + bytes(8) + struct.pack("<H", 0x20) + bytes(0x10)
    return [
        b"\0\x7fELF" + info, b"\0\x7fELF" + info + signature + trailer,
        b"\1" + gzip.compress(info, mtime=0), b"\2\xfd7zXZ\0", b"\3BZh9", b"\4zstd",
        b"\5" + x86 + b"6.12.1-cloud (a@b) #1 SMP Debian 6.12.1-1 (2025)\0",
        b"\5" + bytes(0x38) + b"ARM\x64" + b"Linux version 6.12.1 (x) # Debian 1.2\n",
    ]  # fmt: skip


@target("modules", _modules)
def modules(data: bytes) -> None:
    """A byte that picks a packing, then a module (or a kernel): its needs, what it is without a
    signature, and one line where it can't be unpacked."""
    kind, content = data[:1], data[1:]
    suffix = (".ko", ".ko.gz", ".ko.xz", ".ko.bz2", ".ko.zst", "")[(kind or b"\0")[0] % 6]
    without = without_signature(content)
    assert content.startswith(without)
    assert sum(map(len, dependencies(content))) <= len(content)
    with scratch_folder() as folder:
        path = Path(folder, f"first{suffix}")
        path.write_bytes(content)
        if not suffix:
            release, version = kernel_release(path), debian_version(path)
            for word in filter(None, (release, version)):
                assert len(word.split()) == 1 and len(word) <= 256
            return
        try:
            found = ModuleTree(Path(folder)).in_order(["first", "second"])
        except UsageError as error:
            assert str(path) in str(error)
            return
        assert [name for name, _ in found] == ["first"]


# --- apt's sources, patches, marks in streams ---


def _sources() -> list[bytes]:
    return [
        b"\0deb [arch=amd64 signed-by=/k.gpg] http://k/d trixie main # x\n",
        b"\1Types: deb\nURIs: http://k/d\nSuites: trixie\n sid\nComponents: main\n"
        b"Signed-By: /usr/share/k.gpg\n\nTypes: deb-src\n",
        b"\1Types: deb\nEnabled: no\n\n# c\n x\nSigned-By:\n -----BEGIN PGP\n",
    ]  # fmt: skip


@target("apt-sources", _sources)
def apt_sources(data: bytes) -> None:
    """A byte for the format, then a file of apt's: at most one archive, with all that it needs."""
    with scratch_folder() as folder:
        parts = Path(folder, "sources.list.d")
        parts.mkdir()
        name = "a.sources" if data[:1] > b"\0" else "a.list"
        (parts / name).write_bytes(data[1:])
        sources = read_sources(Path(folder))
    archive = debian_archive(sources)
    if archive is not None:
        assert len(archive.uris) == 1 and archive.suites and archive.components == ("main",)
        assert all(key.startswith("/") for key in archive.signed_by)


def _patch_files() -> list[bytes]:
    return [
        b"diff --git a/arch/x86/kvm/x86.c b/arch/x86/kvm/x86.c\n--- a/arch/x86/kvm/x86.c\n"
        b"+++ b/arch/x86/kvm/x86.c\n@@ -1,2 +1,3 @@\n a\n+b\n c\n",
        b"--- a/virt/kvm/kvm_main.c\t2026\n+++ b/virt/kvm/kvm_main.c\n@@ -1 +1 @@\n-a\n+b\n",
        b"diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n"
        b"@@ -0,0 +1 @@\n+x\n",
        b"From x\nSubject: [PATCH]\n\n---\n f | 1 +\n\ndiff --git a/f b/f\nrename from f\n",
    ]


@target("patches", _patch_files)
def patch_files(data: bytes) -> None:
    """A patch of a kernel: its files, each with its own part of the text."""
    total = 0
    for part in split_patch(data):
        total += len(part.text)
    assert total <= len(data) + 1


@target("end-mark", lambda: [b"\3ENDxabcENDxdef", b"\3ENDxabEN", b"\2\0\1a\0\1b", b"\1xx"])
def end_mark(data: bytes) -> None:
    """A mark, then a stream: in any pieces what comes out is what was before the mark."""
    size = 1 + data[0] % 8 if data else 1
    mark, text = data[1 : 1 + size], data[1 + size :]
    if not mark:
        return
    for step in (1, 2, 3, max(len(text), 1)):
        reader, out = EndMark(mark), b""
        for at in range(0, len(text), step):
            if not reader.complete:
                out += reader.feed(text[at : at + step])
        before, found, _ = text.partition(mark)
        assert reader.complete == bool(found)
        assert out + (b"" if found else reader.rest()) == before


# --- archives ---


def _cpio(choices: Choices) -> None:
    writer = CpioWriter()
    wanted: dict[str, bytes] = {}
    for _ in range(12):
        if choices.spent:
            break
        words = [
            choices.choice(("a", "b", "lib", "ü", "x" * 90))
            for _ in range(1 + choices.randrange(3))
        ]
        name = "/".join(words)
        if any(name == n or n.startswith(f"{name}/") or name.startswith(f"{n}/") for n in wanted):
            continue
        content = choices.randbytes(choices.choice((0, 1, 3, 512, 5000)))
        kind = choices.randrange(4)
        if kind == 0:
            writer.directory(name, 0o700)
        elif kind == 1:
            writer.symlink(name, "target")
            wanted[name] = b"target"
        elif kind == 2:
            writer.character_device(name, choices.randrange(256), choices.randrange(1 << 20))
            wanted[name] = b""
        else:
            writer.file(name, content, choices.randrange(0o1000))
            wanted[name] = content
    archive = writer.finish()
    assert len(archive) % 512 == 0
    found = {entry.name: entry.content for entry in entries(archive)}
    assert found.items() >= wanted.items()
    for name in found:
        parent = name.rpartition("/")[0]
        assert not parent or parent in found


@target("cpio", lambda: [recorded(_cpio, seed, most=120) for seed in range(4)])
def cpio(data: bytes) -> None:
    """An initramfs of some files: a reader of the format finds them, and each one's folder."""
    _cpio(Choices(data))


_BLOCK = 512


def _with_sums(archive: bytes) -> bytes:
    """The checksum of every block that may be a header: else hardly a change would be read."""
    out = bytearray(archive)
    for at in range(0, len(out) - _BLOCK + 1, _BLOCK):
        block = out[at : at + _BLOCK]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


_NAMES = ("a", "d/f", "d/../x", "../outside/f", "/etc/x", "out/f", "d", "./a", "a/b", "in",
          "d/in/f",
          "x" * 300, ".", "", "in/../../f", "out", "d//f", "caf\u00e9")  # fmt: skip
_TYPES = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
          tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"x", b"g", b"Q")  # fmt: skip


def _archive(choices: Choices) -> bytes:
    out = io.BytesIO()
    formats = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=out, mode="w", format=choices.choice(formats)) as tar:
        for _ in range(6):
            if choices.spent:
                break
            member = tarfile.TarInfo(choices.choice(_NAMES))
            member.type = choices.choice(_TYPES)
            member.linkname = choices.choice(_NAMES)
            member.mode = choices.getrandbits(12)
            member.mtime = choices.choice((0, 1, 10**9, 1 << 32, 1 << 34))
            size = choices.choice((0, 0, 1, 700))
            member.size = size if member.isreg() else 0
            try:
                tar.addfile(member, io.BytesIO(choices.randbytes(size)))
            except (ValueError, OSError):
                continue  # the format has no room for that name
    return out.getvalue()


def _link(name: str, linked: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, linked
        tar.addfile(member)
    return out.getvalue()


def _shares() -> Iterator[bytes]:
    for seed in range(8):
        made: list[bytes] = []

        def make(choices: Choices, made: list[bytes] = made) -> None:
            made.append(_archive(choices))

        yield b"\0" + recorded(make, seed, most=60)
        if seed < 3:
            yield b"\1" + gzip.compress(made[0], mtime=0)
    for name, linked in (("x", "../outside"), ("d/y", "/etc"), ("z", "in/../../outside")):
        yield b"\1" + gzip.compress(_link(name, linked), mtime=0)


_LIMIT = 4096


@target("share", _shares, longest=1024)
def share(data: bytes) -> None:
    """What a guest sends back: a tar archive made by choices (0), or in gzip as it is (1). Nothing
    outside of the folder changes, and what is in it keeps to the limit."""
    if data[:1] == b"\1":
        try:
            archive = gzip.decompress(data[1:])[: 64 << 10]
        except (OSError, EOFError, ValueError, struct.error):
            archive = data[1:]
        except Exception as error:  # zlib.error is no OSError
            assert type(error).__name__ == "error"
            archive = data[1:]
    else:
        archive = _archive(Choices(data[1:]))
    with scratch_folder() as base:
        folder, outside = Path(base, "folder"), Path(base, "outside")
        for each in (folder, outside):
            each.mkdir()
            (each / "f").write_bytes(b"mine")
        (folder / "out").symlink_to("../outside")
        (folder / "in").symlink_to("d")
        before = _looked_at(outside)
        try:
            taken = unpack(Share(str(folder), _LIMIT), io.BytesIO(_with_sums(archive)))
        except OutputError as error:
            assert str(error)
        else:
            assert taken.written <= 200
        assert _looked_at(outside) == before and set(os.listdir(base)) == {"folder", "outside"}
        size = 0
        for path in folder.rglob("*"):
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            assert kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), path
            assert not path.name.startswith(".pyvmm-"), "a temporary file is left"
            if kind == stat.S_IFREG:
                assert not status.st_mode & 0o7000, "set-user-ID"
                size += status.st_size
            if kind == stat.S_IFLNK and path != folder / "out":
                target_path = os.path.normpath(os.path.join(path.parent, os.readlink(path)))
                assert f"{target_path}/".startswith(f"{folder}/"), (path, os.readlink(path))
        assert size <= _LIMIT + 8


def _looked_at(folder: Path) -> list[tuple[str, bytes, int]]:
    return [(path.name, path.read_bytes(), path.lstat().st_mtime_ns) for path in folder.iterdir()]


# --- recordings, which scenarios play ---


def _recordings() -> list[bytes]:
    events = [
        Recorded(UNSHARE, 10, 0, 4 * PAGE_SIZE, 0, ""),
        Recorded(SHARE, 5, PAGE_SIZE, PAGE_SIZE, 22, ""),
        Recorded(TO_GUEST, 0, PAGE_SIZE + 5, 100, 0, "blk0"),
    ]
    ram = [Range(0, 16 * PAGE_SIZE), Range(1 << 20, PAGE_SIZE)]
    made = Recording({"kernel": "6.12", "host": "lab"}, ram, [Range(0, PAGE_SIZE)], events)
    text = gzip.decompress(made.dump())
    empty = gzip.decompress(Recording({}, ram, [], []).dump())
    return [text, empty, text.replace(b'"suo"', b'"sux"'), text[:50]]


@target("recording", _recordings, longest=1024)
def recording(data: bytes) -> None:
    """A recording's JSON: what can be read can be written again as it was, and is a scenario."""
    try:
        found = parse(gzip.compress(data, 1, mtime=0), "r")
    except UsageError as error:
        assert str(error)
        return
    again = parse(found.dump(), "again")
    assert json.dumps(again) == json.dumps(found)
    try:
        made = scenario_of("r", found)
    except UsageError:
        return
    assert made.ram


# --- device trees ---


def _tree(choices: Choices) -> None:
    count = 0

    def node(name: str, depth: int) -> fdt.Node:
        nonlocal count
        made = fdt.Node(name)
        for _ in range(choices.randrange(4)):
            key = choices.choice(("reg", "compatible", "#address-cells", "x", "status"))
            made.properties[key] = choices.choice(
                (None, choices.getrandbits(32), choices.randbytes(choices.randrange(9)), "ok",
                 ["a", "bc"], [choices.getrandbits(32), 1], [],
                 fdt.cells64(choices.getrandbits(64)))
            )  # fmt: skip
        if depth < 4:
            for number in range(choices.randrange(3)):
                count += 1
                made.children.append(node(f"n{number}@{count:x}", depth + 1))
        return made

    root = node("", 0)
    areas = [Range(choices.getrandbits(40) + 1, 1 + choices.getrandbits(20))
             for _ in range(choices.randrange(3))]  # fmt: skip
    found, reserved = read_tree(fdt.flatten(root, areas))
    assert reserved == [tuple(area) for area in areas]
    _same(root, found)


def _same(node: fdt.Node, found: Read) -> None:
    assert found.properties == {name: fdt.encode(value) for name, value in node.properties.items()}
    assert list(found.children) == [child.name for child in node.children]
    for child in node.children:
        _same(child, found.children[child.name])


@target("device-tree", lambda: [recorded(_tree, seed, most=100) for seed in range(6)])
def device_tree(data: bytes) -> None:
    """A tree written and read again by a reader that shares no code with the writer."""
    _tree(Choices(data))
