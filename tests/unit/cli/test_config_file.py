"""`--config FILE.toml`: the same words as the command line's, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Command
from vmm.cli import main as cli
from vmm.cli.config_file import expanded
from vmm.core.errors import UsageError
from vmm.machine.config import MachineConfig


def config(folder: Path, text: str, *words: str) -> MachineConfig:
    """What `pyvmm --config FILE WORDS` asks for, where the file says `text`."""
    (folder / "m.toml").write_text(text)
    return cli._configuration(["--config", str(folder / "m.toml"), *words])


def test_file_says_what_the_command_line_would(tmp_path: Path) -> None:
    text = """
        kernel = "bzImage"
        append = "-- quiet"
        mem = "1G"
        cpus = 2
        private-mem = true
        scheme = "cbit"
        disk = ["a.img,ro", "/b.img,serial=x"]
        rng = true
        status = false
        balloon = "size=64M,control=b.sock"
        console = "file=out,size=1M"
        vsock = "path=v,cid=9"
        trace = "t"
        report = "-"
        control = "c.sock"
        S = true
    """

    made = config(tmp_path, text)

    assert made == MachineConfig(
        kernel=f"{tmp_path}/bzImage",
        append="-- quiet",
        memory=1 << 30,
        cpus=2,
        private_memory="auto",
        sandbox="auto",
        scheme="cbit",
        disks=(f"{tmp_path}/a.img,ro", "/b.img,serial=x"),
        rng=True,
        balloon=f"size=64M,control={tmp_path}/b.sock",
        consoles=(f"file={tmp_path}/out,size=1M",),
        vsock=f"path={tmp_path}/v,cid=9",
        trace=f"{tmp_path}/t",
        report="-",
        control=f"{tmp_path}/c.sock",
        core_dumps=False,
        paused=True,
    )


def test_command_line_replaces_what_the_file_says(tmp_path: Path) -> None:
    text = 'mem = "1G"\ncpus = 2\ndisk = ["a", "b"]\nprivate-mem = "memfd"\n'

    made = config(tmp_path, text, "--mem", "2G", "--disk=c", "--private-mem")

    assert (made.memory, made.cpus, made.disks) == (2 << 30, 2, ("c",))
    assert made.private_memory == "auto"


def test_policies_have_their_arguments_beside_them(tmp_path: Path) -> None:
    text = """
        private-mem = true
        [[policy]]
        policy = "mine.py:Quota"
        policy-arg = {limit = "8M", hard = true, share = 0.5}
        [[policy]]
        policy = "vmm.policy.builtin.observe:Observe"
    """

    made = config(tmp_path, text, "--policy-arg", "late=1")

    assert made.policies == (
        (f"{tmp_path}/mine.py:Quota", ("limit=8M", "hard=yes", "share=0.5")),
        ("vmm.policy.builtin.observe:Observe", ("late=1",)),
    )


@pytest.mark.parametrize(
    "text", ['policy = "m:C"', 'policy = ["m:C"]', 'policy = {policy = "m:C"}']
)
def test_policy_alone_is_a_text(tmp_path: Path, text: str) -> None:
    assert config(tmp_path, f"private-mem = true\n{text}").policies == (("m:C", ()),)


def test_policy_of_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    made = config(tmp_path, 'private-mem = true\npolicy = "m:C"', "--policy", "n:D")

    assert made.policies == (("n:D", ()),)


def test_path_in_this_folder_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.toml").write_text('disk = "a,,b"')

    assert cli._configuration(["--config=m.toml"]).disks == ("a,,b",)


def test_comma_in_a_folders_name_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()

    made = config(tmp_path / "a,b", 'disk = "c,,d,ro"\nkernel = "k"')

    assert made.disks == (f"{tmp_path}/a,,b/c,,d,ro",)
    assert made.kernel == f"{tmp_path}/a,b/k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernal = 'x'", "kernal is no option; did you mean kernel?"),
        ("private_mem = true", "private_mem is no option; did you mean private-mem?"),
        ("zzz = 1", "zzz is no option; the keys are the options' names"),
        ("help = true", "help is no option"),
        ("config = 'other.toml'", "config is no option"),
        ("rng = 'yes'", "rng is 'yes'; write true or false"),
        ("mem = true", "mem is True; write a text or a whole number"),
        ("mem = ['1G']", "mem is ['1G']; write a text or a whole number"),
        ("cpus = 1.5", "cpus is 1.5; write a text or a whole number"),
        ("disk = [1.5]", "disk is 1.5; write a text or a whole number, or a list of them"),
        ("mem = 512", "--mem 512 is out of range.*write 512M for MiB"),
        ("policy = 5", 'policy is 5; write "MODULE:CLASS", or a table'),
        ("policy-arg = {a = 1}", "write it into a table [[policy]]"),
        ("[[policy]]\npolicy = 'm:C'\nargs = 1", "policy.args is no option"),
        ("[[policy]]\npolicy = 'm:C'\npolicy-arg = 1", "policy-arg is 1; write a table"),
        ("[lab]\nlab-mem = '1G'\nlab-cpu = 1", "lab.lab-cpu is no option; did you mean lab-cpus?"),
        ("lab = 1", "lab is 1; write a table"),
        ("mem = ", "is not TOML: Invalid value"),
        ("a = " + "[" * 5000, "is not TOML: it is nested too deep"),
    ],
)
def test_file_that_is_no_good_is_told_with_the_key(
    command: Command, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "m.toml").write_text(text)

    result = command("--config", "m.toml")

    assert all(part in result.complaint for part in message.split(".*"))
    assert result.status == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.toml", "--config nowhere.toml cannot be read: No such file"),
        (".", "--config . is a directory"),
        ("/dev/zero", "--config /dev/zero is a device"),
        ("", "argument --config: expected one argument"),
        ("binary", "--config binary is not TOML: it is not UTF-8"),
    ],
)
def test_file_that_cannot_be_read_is_told(
    command: Command, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    result = command(f"--config={name}")

    assert message in result.complaint
    assert result.status == 2


@pytest.mark.parametrize(
    ("root", "placed"),
    [("r.ext4,part=2", "/r.ext4,part=2"), ("UUID=1-2", None), ("PARTLABEL=my root", None)],
)
def test_root_disk_is_a_file_or_a_name(tmp_path: Path, root: str, placed: str | None) -> None:
    (tmp_path / "m.toml").write_text(f'root = "{root}"')

    wanted = root if placed is None else f"{tmp_path}{placed}"
    assert expanded(["--config", f"{tmp_path}/m.toml"]) == ["--root", wanted]


def test_socket_of_a_disks_back_end_is_placed(tmp_path: Path) -> None:
    text = 'disk = ["vhost-user=s,queues=2", "vhost-user"]\nfs = "home,vhost-user=f"'
    (tmp_path / "m.toml").write_text(text)

    assert expanded(["--config", f"{tmp_path}/m.toml"]) == [
        "--disk", f"vhost-user={tmp_path}/s,queues=2", "--disk", f"{tmp_path}/vhost-user",
        "--fs", f"home,vhost-user={tmp_path}/f",
    ]  # fmt: skip


def test_port_is_a_number_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("gdb = 1234")
    (tmp_path / "path").write_text('gdb = "s"')

    assert expanded(["--config", f"{tmp_path}/port"]) == ["--gdb", "1234"]
    assert expanded(["--config", f"{tmp_path}/path"]) == ["--gdb", f"{tmp_path}/s"]


def test_run_that_was_to_execute_a_command_fails_with_a_status_of_its_own(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "m.toml").write_text('exec = "true"\nkernel = "nowhere"')

    assert command("--config", "m.toml").status == cli.OWN_STATUS


def test_last_of_several_files_counts(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("cpus = 1")
    (tmp_path / "b").write_text("cpus = 2")

    assert expanded(["--config", f"{tmp_path}/a", f"--config={tmp_path}/b"]) == ["--cpus", "2"]


def lab_words(monkeypatch: pytest.MonkeyPatch, words: Sequence[str]) -> list[str]:
    """The words that the lab gets."""
    given: list[list[str]] = []

    def note(argv: list[str], **_: Any) -> int:
        given.append(argv)
        return 0

    monkeypatch.setattr("vmm.lab.command.run", note)
    assert cli.main(["lab", *words]) == 0
    return given[0]


def test_lab_gets_its_own_table_and_the_run_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.toml").write_text("""
        kernel = "debian:6.12"
        initrd = "i"
        cpus = 2
        [lab]
        host = "bochs"
        lab-mem = "4G"
        lab-file = ["a", "b"]
        lab-quiet = true
    """)

    words = lab_words(
        monkeypatch, ["run", "--config", f"{tmp_path}/m.toml", "--lab-mem", "1G", "--cpus", "1"]
    )

    assert words == [
        "run", "--host", "bochs", "--lab-file", f"{tmp_path}/a", "--lab-file", f"{tmp_path}/b",
        "--lab-quiet", "--kernel", "debian:6.12", "--initrd", f"{tmp_path}/i",
        "--lab-mem", "1G", "--cpus", "1",
    ]  # fmt: skip


def test_plain_run_leaves_the_labs_table_alone(tmp_path: Path) -> None:
    assert config(tmp_path, "cpus = 2\n[lab]\nhost = 'bochs'").cpus == 2


def test_words_of_a_program_in_the_lab_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--lab-quiet", "--lab-exec", "tool", "--config", "its.toml"]

    assert lab_words(monkeypatch, words) == words


def test_text_with_a_nul_is_refused_and_not_taken_for_a_comma(tmp_path: Path) -> None:
    for text in ('root = "a\\u0000b,part=1"', 'policy = "p.py\\u0000:C"'):
        with pytest.raises(UsageError, match="a text has a NUL character"):
            config(tmp_path, text)
