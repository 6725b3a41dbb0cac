"""How a lab machine's kernel is compiled, with a small make and small sources. No apt is run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cpio import entries
from tests.unit.lab.test_guest_kernel import FILES, Archive
from tests.unit.lab.test_kvm_build import Noted
from tests.unit.lab.test_kvm_change import git_diff, mail, patch_file
from tests.unit.lab.test_packages import bzimage
from vmm.core.errors import HostError, UsageError
from vmm.lab import built_kernels, guest_kernel
from vmm.lab.built_kernels import BuiltKernels
from vmm.lab.cache import Cache
from vmm.lab.host_kernel import KERNELS
from vmm.lab.initramfs import host_initramfs
from vmm.lab.kernel_build import SmallKernel
from vmm.lab.kvm_change import KvmChange, kernel_files, kernel_part
from vmm.lab.machine import Lab
from vmm.lab.options import LabOptions
from vmm.lab.packages import MissingFiles, Packages
from vmm.lab.work_folder import WorkFolder

VERSION = "7.3.4-1~bpo13+1"
# Configures by taking the wanted options as they are; compiles one file, unless that is done.
MAKE = """
arguments=$ARGUMENTS
while [ $# -gt 0 ]; do
    case "$1" in -C) cd "$2"; shift;; ARCH=*) arch=${1#*=};; esac
    echo "$1" >>"$arguments"
    last=$1
    shift
done
case "$last" in
    KCONFIG_ALLCONFIG=*) cp "${last#*=}" .config; $CONFIGURED;;
    *Image) $BEFORE
            [ kernel/fork.o -nt kernel/fork.c ] || { echo "  CC      kernel/fork.o"
                                                     cp kernel/fork.c kernel/fork.o; }
            mkdir -p arch/$arch/boot; cat kernel/fork.o init/m.c 2>&1 >arch/$arch/boot/$last;;
esac
"""
needs_patch = pytest.mark.skipif(shutil.which("patch") is None, reason="patch(1) is not here")


class Sources(Archive):
    """Gives a patch(1), too, and the stock kernel, which says its version."""

    __slots__ = ()

    def package_names(self, pattern: str) -> list[str]:
        return ["linux-image-7.3.4+deb13-cloud-amd64"]

    def download_closure(self, packages: object, suite: str, into: Path) -> None:
        super().download_closure(["tools"], suite, into)
        (into / "usr" / "bin" / "patch").symlink_to(shutil.which("patch") or "/nowhere")

    def download(self, packages: object, into: Path) -> None:
        if "linux-source" in str(packages):
            super().download(["sources"], into)
        else:
            into.mkdir(parents=True)
            bzimage(into / "vmlinuz", f"7.3.4 (x@y) #1 SMP Debian {VERSION} (2026-11-15)")


@pytest.fixture
def progress() -> Noted:
    return Noted()


@pytest.fixture
def archive(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "apt")


@pytest.fixture
def packages(tmp_path: Path, progress: Noted, archive: Sources) -> Packages:
    return Packages(Cache(tmp_path / "cache"), progress, archive)


Builder = Callable[..., Path]


@pytest.fixture
def build(packages: Packages, archive: Sources, tmp_path: Path) -> Builder:
    def with_change(change: KvmChange, before: str = ":", configured: str = ":") -> Path:
        text = MAKE.replace("$ARGUMENTS", str(tmp_path / "arguments"))
        text = text.replace("$BEFORE", before).replace("$CONFIGURED", configured)
        archive.make = text
        tools = packages.cache.path("packages/kernel-tools-1/usr/bin/make")
        if tools.exists():
            tools.write_text(f"#!/bin/sh\n{text}")
        return BuiltKernels(packages, None).host(change).image

    return with_change


def whole(*patches: Path, **more: object) -> KvmChange:
    return KvmChange(patches=patches, kernel="x86", **more)  # type: ignore[arg-type]


def compiled(progress: Noted) -> list[str]:
    return [text for text in progress.told if " files of about " in text]


def fork_patch(tmp_path: Path, new: str = "another", old: str = FILES[0]) -> Path:
    body = f"@@ -1 +1 @@\n-{old}\n\\ No newline at end of file\n+{new}\n"
    return patch_file(tmp_path, git_diff(FILES[0], body), f"{new}.patch")


def test_kernel_without_a_change_is_debians_sources_compiled_small(
    build: Builder, tmp_path: Path, archive: Sources
) -> None:
    image = build(whole())

    assert image.read_text() == FILES[0] + FILES[3]
    assert {path.name for path in image.parent.iterdir()} == {"bzImage", "config"}
    assert image.parent.name.startswith("host-kernel-x86-")
    words = (tmp_path / "arguments").read_text().splitlines()
    assert "ARCH=x86" in words and "CROSS_COMPILE=" in words
    options = (image.parent / "config").read_text().splitlines()
    assert "CONFIG_KVM_AMD=y" in options
    assert "CONFIG_KVM_SW_PROTECTED_VM=y" not in options

    archive.asked.clear()
    assert build(whole(), "exit 1") == image
    assert archive.asked == []


@needs_patch
def test_changed_file_alone_is_compiled_anew(
    build: Builder, tmp_path: Path, progress: Noted
) -> None:
    build(whole())
    progress.told.clear()

    same_file = build(whole(symbols=("KVM_XEN",)))
    assert compiled(progress) == []
    image = build(whole(fork_patch(tmp_path)))

    assert same_file.read_text() == FILES[0] + FILES[3]
    assert image.read_text() == "another\n" + FILES[3]
    assert len(compiled(progress)) == 1


@needs_patch
def test_file_that_is_patched_no_longer_is_compiled_as_it_was(
    build: Builder, tmp_path: Path, progress: Noted
) -> None:
    build(whole(fork_patch(tmp_path)))
    progress.told.clear()

    image = build(whole())

    assert image.read_text() == FILES[0] + FILES[3]
    assert len(compiled(progress)) == 1


@needs_patch
def test_cached_sources_stay_as_they_are(build: Builder, tmp_path: Path) -> None:
    build(whole(fork_patch(tmp_path)))

    sources = tmp_path / "cache" / "packages" / f"linux-sources-{VERSION}-1"
    assert (sources / FILES[0]).read_text() == FILES[0]
    assert not (sources / "kernel/fork.o").exists()


@needs_patch
def test_patch_that_does_not_apply_is_told_before_anything_is_compiled(
    build: Builder, tmp_path: Path
) -> None:
    path = fork_patch(tmp_path, old="something else")

    with pytest.raises(
        UsageError, match=rf"--kvm-patch {path} does not apply: hunk 1 of {FILES[0]}"
    ):
        build(whole(path))

    assert not (tmp_path / "arguments").exists()


@needs_patch
@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("kernel/fork.c:7:1: error: no such thing", "kernel/fork.c:7:1: error: no such thing"),
        ("ld: fork.o: undefined reference to 'nothing'", "undefined reference to 'nothing'"),
    ],
)
def test_users_kernel_that_does_not_compile_is_told_by_its_first_fault(
    said: str, told: str, build: Builder, tmp_path: Path
) -> None:
    words = (
        f"echo CC; echo \"{said.replace('`', chr(92) + '`')}\"; echo 'make: *** Error 2'; exit 2"
    )

    with pytest.raises(UsageError) as caught:
        build(whole(fork_patch(tmp_path)), words)

    assert str(caught.value).startswith("your kernel does not compile: ")
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_debians_kernel_that_does_not_compile_is_not_the_users_to_mend(build: Builder) -> None:
    with pytest.raises(
        HostError, match=r"from Debian's Linux .* failed: a\.c:1:1: error: no; --lab"
    ):
        build(whole(), "echo 'a.c:1:1: error: no'; exit 2")


def test_full_disk_is_told_as_that(build: Builder, tmp_path: Path) -> None:
    path = fork_patch(tmp_path)

    with pytest.raises(HostError, match=r"no space left on device; .*--lab-cache DIR") as caught:
        build(
            whole(path), "echo 'a.c:1:1: fatal error: writing a.s: No space left on device'; exit 2"
        )

    assert not isinstance(caught.value, UsageError)


def test_option_that_kconfig_does_not_take_is_named(build: Builder) -> None:
    with pytest.raises(UsageError, match=r"--kvm-config: Debian's Linux .* take NOWHERE: there is"):
        build(whole(symbols=("NOWHERE",)), configured="sed -i /NOWHERE/d .config")


def test_options_of_the_host_reach_the_configuration(build: Builder) -> None:
    image = build(whole(sw_protected=True, symbols=("KVM_XEN",)))

    options = (image.parent / "config").read_text().splitlines()
    assert "CONFIG_KVM_SW_PROTECTED_VM=y" in options and "CONFIG_KVM_XEN=y" in options


@pytest.mark.parametrize(("during", "goes_on"), [("part", True), ("take_over", False)])
def test_interrupted_build_goes_on_unless_its_sources_were_half_there(
    during: str,
    goes_on: bool,
    build: Builder,
    tmp_path: Path,
    progress: Noted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patching:
        owner = progress if during == "part" else WorkFolder
        patching.setattr(owner, during, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(whole())
    (work,) = (tmp_path / "cache" / "kvm-work").iterdir()
    (work / "linux" / "half").touch()

    assert build(whole()).read_text() == FILES[0] + FILES[3]

    assert (work / "linux" / "half").exists() == goes_on


def test_place_where_nothing_can_be_linked_is_named(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "cp").write_text("#!/bin/sh\necho 'cp: no links here' >&2; exit 1\n")
    (programs / "cp").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    with pytest.raises(HostError, match=r"laying out .*linux failed: cp: no links here; --lab-cac"):
        build(whole())


@needs_patch
def test_file_that_a_patch_removes_is_gone(build: Builder, tmp_path: Path) -> None:
    body = f"@@ -1 +0,0 @@\n-{FILES[3]}\n\\ No newline at end of file\n"
    text = f"diff --git a/{FILES[3]} b/{FILES[3]}\ndeleted file mode 100644\n"
    path = patch_file(tmp_path, f"{text}--- a/{FILES[3]}\n+++ /dev/null\n{body}")

    with pytest.raises(HostError, match=r"cat: init/m\.c: No such file"):
        build(whole(path))


# -- a tree of the user's own


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "linux"
    names = ("Makefile", "virt/kvm/kvm_main.c", "kernel/fork.c", "init/m.c", "arch/x86/Kconfig")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"my {name}\n")
    return root


def test_users_tree_is_compiled_and_only_read(
    build: Builder, tree: Path, archive: Sources, progress: Noted
) -> None:
    before = set(tree.rglob("*"))

    image = build(whole(source=tree))
    progress.told.clear()
    (tree / "init" / "m.c").write_text("changed\n")
    second = build(whole(source=tree))

    assert image.read_text() == "my kernel/fork.c\nmy init/m.c\n"
    assert second.read_text() == "my kernel/fork.c\nchanged\n"
    assert compiled(progress) == []  # the file that make compiles is as it was
    assert set(tree.rglob("*")) == before
    assert "sources" not in archive.asked


def test_file_that_the_users_tree_no_longer_has_is_gone(
    build: Builder, tree: Path, tmp_path: Path
) -> None:
    (tree / "kernel" / "extra.c").touch()
    build(whole(source=tree))
    (tree / "kernel" / "extra.c").unlink()

    build(whole(source=tree))

    (work,) = (tmp_path / "cache" / "kvm-work").iterdir()
    assert not (work / "linux" / "kernel" / "extra.c").exists()


def test_users_tree_without_a_needed_option_is_the_users_to_mend(
    build: Builder, tree: Path
) -> None:
    with pytest.raises(UsageError, match=rf"{tree} doesn't take KVM_AMD of host-kernel\.config"):
        build(whole(source=tree), configured="sed -i /KVM_AMD=/d .config")


def test_folder_that_is_only_kvm_is_no_whole_tree(tree: Path) -> None:
    (tree / "Makefile").unlink()

    KvmChange(source=tree).check()
    with pytest.raises(UsageError, match=r"no kernel tree there \(Makefile is missing\)"):
        whole(source=tree).check()


def test_what_builds_and_git_leave_in_a_tree_is_not_taken(tree: Path) -> None:
    names = {str(path.relative_to(tree)) for path in kernel_files(tree, "x86")}
    others = (
        *("kernel/fork.o", "vmlinux", "vmlinux.map", ".config", ".git/HEAD", "kernel/.fork.o.cmd"),
        *("include/generated/autoconf.h", "arch/x86/include/generated/asm/a.h", "arch/arm/mm.c"),
        *("sound/core.c", "arch/x86/boot/bzImage", "Documentation/kbuild/Kconfig.rst.gz"),
    )
    taken = ("sound/Kconfig", "arch/x86/kernel/vmlinux.lds.S", "include/linux/config.h")
    for name in (*others, *taken):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    (tree / "include" / "link").symlink_to("linux")

    found = {str(path.relative_to(tree)) for path in kernel_files(tree, "x86")}

    assert found == names | set(taken) | {"include/link"}


# -- which parts of patches


@pytest.mark.parametrize(
    "name", ["kernel/fork.c", "arch/x86/kernel/kvm.c", "tools/objtool/check.c", "sound/Kconfig"]
)
def test_patch_outside_of_kvm_is_compiled_with_a_whole_kernel(name: str, tmp_path: Path) -> None:
    path = patch_file(tmp_path, git_diff(name))

    assert kernel_part(path, "x86") == (git_diff(name).encode(), [])


def test_what_the_kernel_has_not_is_left_out_and_told(tmp_path: Path) -> None:
    others = [
        *("Documentation/a.rst", "tools/testing/b.c", "arch/arm64/kvm/arm.c", "sound/core.c"),
        *("drivers/gpu/drm/a.c", "MAINTAINERS"),
    ]
    path = patch_file(tmp_path, mail(*map(git_diff, [*others, "mm/slub.c"])))

    part, left_out = kernel_part(path, "x86")

    assert part.decode() == git_diff("mm/slub.c")
    assert left_out == others
    assert "arch/arm64/kvm/arm.c" not in kernel_part(path, "arm64")[1]


def test_patch_with_nothing_of_the_kernel_is_refused(tmp_path: Path) -> None:
    path = patch_file(tmp_path, git_diff("arch/arm64/kvm/arm.c"))

    with pytest.raises(UsageError, match=r"nothing of the lab's x86 kernel .* only arch/arm64"):
        whole(path).check()


def test_renamed_file_is_among_those_that_a_patch_touches(tmp_path: Path) -> None:
    renamed = "similarity index 100%\nrename from mm/a.c\nrename to mm/b.c\n"
    path = patch_file(tmp_path, f"diff --git a/mm/a.c b/mm/b.c\n{renamed}")

    assert whole(path).touched() == {"mm/a.c", "mm/b.c"}


def test_name_in_the_cache_follows_the_whole_tree(tree: Path) -> None:
    before = whole(source=tree).name()
    kvm_before = KvmChange(source=tree).name()

    (tree / "kernel" / "fork.c").write_text("changed\n")

    assert whole(source=tree).name() != before
    assert KvmChange(source=tree).name() == kvm_before


# -- lab machines with such a kernel


@pytest.mark.parametrize(
    ("host", "asked", "kernel"),
    [
        ("stock", True, "x86"),
        ("stock", False, None),
        ("arm64", False, "arm64"),
        ("pkvm", True, "arm64"),
    ],
)
def test_whole_kernel_is_compiled_when_asked_for_and_where_kvm_is_no_module(
    host: str, asked: bool, kernel: str | None, tmp_path: Path
) -> None:
    path = patch_file(tmp_path, git_diff("virt/kvm/kvm_main.c"))

    lab = Lab(LabOptions(host=host, kvm_patches=[path], kernel_build=asked, cache=tmp_path / "c"))

    assert lab.kvm_change.kernel == kernel


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "bochs"}, "--kernel-build: the small kernel has no drivers for Bochs"),
        ({"host_kernel": "debian:7.3"}, "leave --lab-host-kernel .* out .debian:7.3"),
        ({"host_modules": "/m"}, "leave .*--lab-host-modules out ./m"),
    ],
)
def test_what_does_not_go_with_a_kernel_of_its_own_is_refused(
    options: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        Lab(LabOptions(kernel_build=True, cache=tmp_path, **options))  # type: ignore[arg-type]


def test_machine_whose_kernel_has_no_modules_says_when_it_has_no_kvm(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"[\0[[\0sh\0\0")

    archive = {entry.name: entry for entry in entries(host_initramfs(busybox, None))}

    assert not [name for name in archive if name.startswith("modules/")]
    script = archive["init"].content.decode()
    assert '[ -c /dev/kvm ] || fail "the kernel started no KVM; ' in script
    assert subprocess.run(["sh", "-n"], input=script.encode(), check=False).returncode == 0


def test_kernels_of_the_past_are_dropped(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built_kernels, "_KEPT", 1)

    first = build(whole())
    second = build(whole(symbols=("KVM_XEN",)))

    assert second.exists() and not first.exists()


# -- configurations


@pytest.mark.parametrize("kernel", [*KERNELS.values(), guest_kernel.KERNEL], ids=lambda k: k.name)
def test_what_a_kernel_has_to_have_is_asked_for_once(kernel: SmallKernel) -> None:
    lines = kernel.configuration(KvmChange()).splitlines()
    asked = [line for line in lines if line.startswith("CONFIG_")]

    assert {f"CONFIG_{name}=y" for name in kernel.required} <= set(asked)
    assert len({line.partition("=")[0] for line in asked}) == len(asked)


def test_offline_without_sources_says_what_is_missing(tmp_path: Path, archive: Sources) -> None:
    cache = Cache(tmp_path / "cache")
    Packages(cache, Noted(), archive).host_kernel(None, None)
    packages = Packages(cache, Noted(), archive, offline=True)

    with pytest.raises(MissingFiles, match=r"a compiler and Linux's sources .*--lab-offline"):
        BuiltKernels(packages, None).host(whole())
