"""What the user may ask for: sizes, counts, and combinations that make no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.x86 import X86
from vmm.core.errors import UsageError
from vmm.machine.config import MachineConfig, parse_count, parse_size

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        ("536870912", 512 * MIB),
        ("2G", 2 * GIB),
        ("2GiB", 2 * GIB),
        ("2GB", 2 * GIB),
        ("4096K", 4 * MIB),
        ("1T", 1024 * GIB),
        (" 64M ", 64 * MIB),
        ("0", 0),
    ],
)
def test_size_with_a_unit_is_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "M", "-1", "+1", "1.5G", "1e3", "0x10", "1_000", "512 M", "512P", "5l2M", "٣M",
     "512\u212a", "1M\0", "9" * 16, "9" * 5000, "\x1b[31m", "nan"],
)  # fmt: skip
def test_size_of_hostile_text_is_refused_with_the_text_and_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)

    assert f"--mem '{text}'" in str(caught.value)
    assert "512M" in str(caught.value)


@given(st.text())
def test_size_of_any_text_is_a_number_or_a_usage_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except UsageError:
        return


@pytest.mark.parametrize(("text", "count"), [("1", 1), ("16", 16), ("0", 0), (" 2", 2)])
def test_count_of_digits_is_a_number(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1_0", "٣", "1.0", "9" * 7, "9" * 5000])
def test_count_of_hostile_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--cpus"):
        parse_count(text)


PRIVATE = MachineConfig(private_memory="auto")
KERNEL = MachineConfig(kernel="vmlinuz")


@pytest.mark.parametrize(
    "config",
    [
        MachineConfig(),
        PRIVATE,
        KERNEL,
        KERNEL._replace(initrd="initrd", append="quiet", private_memory="guest_memfd-mmap"),
        PRIVATE._replace(private_memory="guest_memfd"),
        PRIVATE._replace(private_memory="guest_memfd-plain", scheme="attributes"),
        PRIVATE._replace(scheme="remap"),
        KERNEL._replace(private_memory="memfd-sealed", scheme="cbit"),
        PRIVATE._replace(private_memory="memfd", scheme="cbit", policies=(("m:C", ()),)),
        MachineConfig(memory=4 * MIB),
        MachineConfig(memory=256 * GIB),
    ],
)
def test_sensible_configuration_is_accepted(config: MachineConfig) -> None:
    config.validate(X86)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MachineConfig(memory=4 * MIB + 1), "--mem 4194305 bytes is not a multiple of 4096"),
        (MachineConfig(memory=3 * MIB), "--mem 3M is out of range; use 4M to 256G"),
        (MachineConfig(memory=256 * GIB + 4096), "out of range"),
        (MachineConfig(memory=0), "--mem 0 is out of range"),
        (MachineConfig(cpus=0), "--cpus 0.*use 1 to 64"),
        (MachineConfig(cpus=65), "--cpus 65.*use 1 to 64"),
        (MachineConfig(private_memory="tmpfs"), "--private-mem=tmpfs is unknown; use one of auto"),
        (MachineConfig(private_memory=""), "is unknown"),
        (
            PRIVATE._replace(scheme="tdx"),
            "--scheme tdx is unknown; use one of auto, attributes, in-place, cbit, remap",
        ),
        (
            KERNEL._replace(private_memory="auto", scheme="remap"),
            "--scheme remap: Linux tells private .* by an address bit; use --scheme cbit",
        ),
        (
            PRIVATE._replace(private_memory="memfd", scheme="attributes"),
            "--scheme attributes does not take --private-mem=memfd; use --private-mem=auto .it "
            "takes guest_memfd-plain., or --scheme cbit or remap",
        ),
        (
            PRIVATE._replace(scheme="pkvm"),
            "--scheme pkvm does not exist on x86_64; use one of auto, attributes, in-place, cbit, "
            "remap$",
        ),
        (
            PRIVATE._replace(private_memory="memfd-protected"),
            "--private-mem=memfd-protected does not exist on x86_64; use one of auto, guest_memfd-",
        ),
        (MachineConfig(scheme="cbit"), "--scheme cbit needs --private-mem"),
        (MachineConfig(initrd="i"), "--initrd needs --kernel"),
        (MachineConfig(append="quiet"), "--append needs --kernel"),
        (MachineConfig(policies=(("m:C", ()),)), "--policy needs --private-mem"),
        (PRIVATE._replace(iommu=True), "--iommu needs --kernel: the embedded payload has"),
        (
            KERNEL._replace(private_memory="guest_memfd-plain"),
            "--private-mem=guest_memfd-plain: .*use --private-mem alone, .*, or one of "
            "guest_memfd-mmap, memfd, memfd-sealed, memfd-hugetlb$",
        ),
    ],
)
def test_senseless_configuration_is_refused_with_the_remedy(
    config: MachineConfig, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        config.validate(X86)


class Arm64:
    """An architecture's limits, with arm64's schemes."""

    name = "aarch64"
    largest_memory = 255 * GIB
    schemes = ("pkvm", "realm", "remap")


def test_iommu_is_x86s_so_far() -> None:
    KERNEL._replace(iommu=True).validate(X86)

    with pytest.raises(UsageError, match="--iommu: only x86-64 guests"):
        KERNEL._replace(iommu=True).validate(Arm64())


@pytest.mark.parametrize(
    "config",
    [
        KERNEL._replace(private_memory="auto", scheme="pkvm"),
        KERNEL._replace(private_memory="memfd-protected"),
        KERNEL._replace(private_memory="guest_memfd-mmap", scheme="realm"),
        PRIVATE._replace(private_memory="guest_memfd", scheme="remap"),
    ],
)
def test_sensible_configuration_of_arm64_is_accepted(config: MachineConfig) -> None:
    config.validate(Arm64())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PRIVATE._replace(scheme="cbit"),
            "--scheme cbit does not exist on arm64; use one of auto, pkvm, realm, remap$",
        ),
        (PRIVATE._replace(scheme="attributes"), "--scheme attributes does not exist on arm64"),
        (PRIVATE._replace(scheme="in-place"), "--scheme in-place does not exist on arm64"),
        (
            PRIVATE._replace(private_memory="guest_memfd-plain"),
            "--private-mem=guest_memfd-plain does not exist on arm64; use one of auto, memfd-prot",
        ),
        (
            KERNEL._replace(private_memory="guest_memfd"),
            "--private-mem=guest_memfd: .* or one of memfd-protected, guest_memfd-mmap, memfd,",
        ),
        (
            KERNEL._replace(private_memory="guest_memfd", scheme="pkvm"),
            "--private-mem=guest_memfd: .* or one of memfd-protected$",
        ),
        (
            PRIVATE._replace(private_memory="memfd", scheme="pkvm"),
            "--scheme pkvm does not take --private-mem=memfd; use --private-mem=auto .it takes "
            "memfd-protected., or --scheme realm or remap$",
        ),
        (
            PRIVATE._replace(private_memory="memfd-protected", scheme="realm"),
            "--scheme realm does not take --private-mem=memfd-protected; .* or --scheme pkvm$",
        ),
        (
            KERNEL._replace(private_memory="auto", scheme="remap"),
            "Linux tells .* or pKVM's hypercalls; use --scheme pkvm or realm, or run without",
        ),
        (MachineConfig(memory=256 * GIB), "use 4M to 255G"),
    ],
)
def test_senseless_configuration_of_arm64_is_refused_with_the_remedy(
    config: MachineConfig, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        config.validate(Arm64())
