"""Module order, packing and signatures, on small made-up modules."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.core.kmodules import ModuleTree, dependencies, without_signature


def module(name: str, depends: str = "") -> bytes:
    return f"\x7fELF..\0license=GPL\0depends={depends}\0name={name}\0".encode()


def write(root: Path, name: str, depends: str = "", suffix: str = ".ko") -> None:
    content = module(name, depends)
    folder = root / "kernel" / name
    folder.mkdir(parents=True)
    packed = lzma.compress(content) if suffix == ".ko.xz" else content
    (folder / f"{name}{suffix}").write_bytes(packed)


def test_dependencies_come_first_and_once(tmp_path: Path) -> None:
    write(tmp_path, "ring")
    write(tmp_path, "virtio", "ring")
    write(tmp_path, "virtio_blk", "virtio,ring", ".ko.xz")
    write(tmp_path, "virtio_pci", "virtio")

    order = ModuleTree(tmp_path).in_order(["virtio_pci", "virtio_blk"])

    assert [name for name, _ in order] == ["ring", "virtio", "virtio_pci", "virtio_blk"]
    assert dict(order)["virtio_blk"] == module("virtio_blk", "virtio,ring")


def test_dash_and_underscore_name_the_same_module(tmp_path: Path) -> None:
    write(tmp_path, "kvm")
    write(tmp_path, "kvm-amd", "kvm")

    order = ModuleTree(tmp_path).in_order(["kvm_amd"])

    assert [name for name, _ in order] == ["kvm", "kvm_amd"]


def test_module_that_is_built_in_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "overlay", "nothing_here")

    assert [n for n, _ in ModuleTree(tmp_path).in_order(["ext4", "overlay"])] == ["overlay"]


def test_unknown_packing_is_named(tmp_path: Path) -> None:
    write(tmp_path, "overlay", suffix=".ko.zst")

    with pytest.raises(UsageError, match=r"\.ko\.zst"):
        ModuleTree(tmp_path).in_order(["overlay"])


def test_dependencies_of_a_module_without_modinfo_are_none() -> None:
    assert dependencies(b"\x7fELF") == []


def test_signature_is_taken_off() -> None:
    signature = b"S" * 40
    trailer = bytes(8) + len(signature).to_bytes(4, "big") + b"~Module signature appended~\n"

    assert without_signature(b"body" + signature + trailer) == b"body"


@pytest.mark.parametrize(
    "data", [b"body", bytes(8) + b"\xff\xff\xff\xff~Module signature appended~\n"]
)
def test_module_without_a_whole_signature_stays_as_it_is(data: bytes) -> None:
    assert without_signature(data) == data
