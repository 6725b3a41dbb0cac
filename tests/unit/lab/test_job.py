"""What a job takes along and brings back: argument rewriting, the script, the results."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.devices.virtio.block_file import open_disk
from vmm.lab.devices import VIRTIO
from vmm.lab.job import (
    Drive,
    Surroundings,
    job_from_arguments,
    lay_out,
    unpack_results,
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("kernel", "initrd", "disk.img", "policy.py", "a,b"):
        (tmp_path / name).write_bytes(b"x" * 512)
    return tmp_path


def test_files_keep_their_names_and_are_taken_along(files: Path) -> None:
    words = ["--kernel", "kernel", f"--initrd={files}/initrd", "--policy", "policy.py:Mine"]

    job = job_from_arguments(words, files)

    assert job.words == words
    assert job.inputs == [files / "kernel", files / "initrd", files / "policy.py"]


def test_policy_brings_the_modules_beside_it_that_it_imports(files: Path) -> None:
    (files / "policy.py").write_text("import os, near\nfrom pack.inner import x\nimport absent\n")
    (files / "near.py").write_text("from nearer import y\nimport policy\n")
    (files / "nearer.py").write_text("def broken(:\n")
    (files / "unused.py").touch()
    (files / "pack").mkdir()
    (files / "pack" / "__init__.py").touch()

    job = job_from_arguments(["--policy", "policy.py:Mine", "--policy=vmm.policy:Policy"], files)

    assert job.inputs == [files / name for name in ("policy.py", "near.py", "nearer.py", "pack")]


@pytest.mark.parametrize(
    "words",
    [
        ["--device", "policy.py:Mine,size=1M"],
        ["--exit-handler=policy.py:Mine"],
        ["--scheme", "policy.py:Mine"],
        ["--private-mem=policy.py:Mine"],
    ],
)
def test_other_code_of_the_users_brings_its_modules_too(words: list[str], files: Path) -> None:
    (files / "policy.py").write_text("import near\n")
    (files / "near.py").touch()

    job = job_from_arguments(words, files)

    assert job.inputs == [files / "policy.py", files / "near.py"]


def test_word_that_is_too_long_for_a_file_name_is_left_alone(files: Path) -> None:
    words = ["python3", "-c", "print(1)\n" * 100]

    job = job_from_arguments(words, files)

    assert (job.words, job.inputs) == (words, [])


def test_root_disk_is_a_drive_and_keeps_its_words(files: Path) -> None:
    words = ["--root", "disk.img,part=1,ro", "--root=UUID=12"]

    job = job_from_arguments(words, files)

    assert job.words == ["--root", f"{job.devices()[0]},part=1,ro", "--root=UUID=12"]
    assert job.drives == [Drive(files / "disk.img", True)]


def test_shared_folder_goes_in_and_comes_back_and_nothing_else(files: Path) -> None:
    folder = files / "work"
    folder.mkdir()
    (folder / "in").write_text("in")
    job = job_from_arguments(["--share", "work", "--exec", "true"], files)
    assert job.share is not None
    with tarfile.open(job.share.returned, "w") as tar:
        for name in ("./out", "../escaped"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))

    job.share.take_back()

    with tarfile.open(job.share.packed) as tar:
        assert tar.getnames() == ["in"]
    assert job.share.packed in job.inputs and job.share.returned in job.outputs
    assert sorted(p.name for p in folder.iterdir()) == ["in", "out"]
    assert not (files / "escaped").exists()
    shutil.rmtree(job.share.scratch)


def test_script_unpacks_the_folder_before_and_packs_it_after_the_command(files: Path) -> None:
    (files / "work").mkdir()
    job = job_from_arguments(["--share", "work"], files)
    assert job.share is not None

    lay_out(job, Surroundings({}, "/bin", "token"), files / "job")

    script = (files / "job" / "run").read_text()
    unpacks, runs, packs = map(
        script.index, (f"-C {files}/work\n", "running >", f"tar -c -f {job.share.returned}")
    )
    assert unpacks < runs < packs
    shutil.rmtree(job.share.scratch)


def test_file_named_twice_is_taken_once(files: Path) -> None:
    job = job_from_arguments(["--kernel", "kernel", "--kernel", "./kernel"], files)

    assert job.inputs == [files / "kernel"]


def test_disk_becomes_a_drive_and_its_path_a_device(files: Path) -> None:
    words = ["--disk", "disk.img,ro,serial=a", f"--disk={files}/kernel"]

    job = job_from_arguments(words, files)

    assert job.words == ["--disk", "/dev/vde,ro,serial=a", "--disk=/dev/vdf"]
    assert job.drives == [Drive(files / "disk.img", True), Drive(files / "kernel", False)]
    assert job.inputs == []


def test_disk_name_with_a_comma_is_written_twice(files: Path) -> None:
    (files / "a,ro").write_bytes(bytes(512))

    job = job_from_arguments(["--disk", "a,,ro,serial=x,,y"], files)

    assert job.words == ["--disk", "/dev/vde,serial=x,,y"]
    assert job.drives == [Drive(files / "a,ro", False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--disk", "odd.img"], "--disk odd.img: 1535 bytes are no multiple of the 512"),
        (["--disk", "odd.img,ro"], "--disk odd.img: 1535 bytes are no multiple of the 512"),
        (["--disk", "vm.qcow2"], "--disk vm.qcow2 is a qcow2 image"),
        (["--disk", "disk.img", "--disk", "disk.img"], "in use by another machine, or given twice"),
        (["--disk", "disk.img,ro", "--disk", "disk.img"], "in use by another machine"),
        (["--disk", "kernel"], "--disk kernel is in use by another machine"),
    ],
)
def test_disk_that_would_lose_something_is_refused(
    files: Path, words: list[str], message: str
) -> None:
    (files / "odd.img").write_bytes(bytes(1535))
    (files / "vm.qcow2").write_bytes(b"QFI\xfb" + bytes(508))
    held = open_disk(str(files / "kernel"))  # by a machine of ours

    with pytest.raises(UsageError, match=message):
        job_from_arguments(words, files)

    held.close()


def test_disk_that_is_shared_may_be_given_twice(files: Path) -> None:
    job = job_from_arguments(["--disk", "disk.img", "--disk", "disk.img,share=on"], files)

    assert [drive.shared for drive in job.drives] == [False, True]


def test_drives_begin_where_the_fixed_ones_end(files: Path) -> None:
    job = job_from_arguments(["--disk", "disk.img"], files, first_drive=5)

    assert job.words == ["--disk", "/dev/vdf"] and job.devices() == ["/dev/vdf"]


def test_report_and_trace_come_back_and_are_not_taken_along(files: Path) -> None:
    (files / "r.json").write_text("old")

    job = job_from_arguments(["--report", "r.json", "--trace=t"], files)

    assert job.outputs == [files / "r.json", files / "t"]
    assert job.inputs == []


def test_console_output_comes_back(files: Path) -> None:
    words = ["--console", "file=out,name=x", "--console=pty"]

    job = job_from_arguments(words, files)

    assert job.words == words
    assert job.outputs == [files / "out"]


def test_programs_words_are_left_alone_but_for_their_files(files: Path) -> None:
    words = ["cat", "kernel", "--disk", "disk.img", "--trace", "--x=initrd"]

    job = job_from_arguments(words, files, is_program=True)

    assert (job.words, job.drives, job.outputs) == (words, [], [])
    assert job.inputs == [files / "kernel", files / "disk.img", files / "initrd"]


def test_what_the_kernel_makes_inside_too_is_not_taken_along(files: Path) -> None:
    job = job_from_arguments(["cat", "/proc/version", "/dev/null"], files, is_program=True)

    assert job.inputs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kernel", "absent"], "--kernel absent: no such file"),
        (["--initrd=absent"], "--initrd absent: no such file"),
        (["--disk", "absent,ro"], "--disk absent: no such file"),
        (["--disk", "."], "--disk .: neither a file nor a block device"),
    ],
)
def test_missing_file_is_refused_before_anything_boots(
    files: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        job_from_arguments(words, files)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("index", "name"), [(0, "/dev/vda"), (25, "/dev/vdz"), (26, "/dev/vdaa"), (701, "/dev/vdzz")]
)
def test_drive_names_follow_linux(index: int, name: str) -> None:
    assert VIRTIO.drive(index) == name


def test_script_quotes_words_and_links_files(files: Path, tmp_path: Path) -> None:
    job = job_from_arguments(["echo", "it's $HOME", "kernel"], files, is_program=True)
    folder = tmp_path / "stage"
    folder.mkdir()

    lay_out(job, Surroundings({"A": "b c"}, "/bin", "<token>"), folder)

    script = (folder / "run").read_text()
    assert "echo 'it'\"'\"'s $HOME' kernel <&5" in script
    assert "export A='b c'" in script
    assert f"ln -s /lab/job/files/0/kernel {files}/kernel" in script
    assert (folder / "files" / "0" / "kernel").read_bytes() == b"x" * 512


def results(tmp_path: Path, members: dict[str, bytes]) -> Path:
    drive = tmp_path / "results"
    with tarfile.open(drive, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with open(drive, "ab") as file:
        file.truncate(1 << 20)  # as on a drive: zeros follow
    return drive


def test_results_give_the_status_and_the_wanted_files(tmp_path: Path) -> None:
    wanted = tmp_path / "out" / "trace"
    name = f".{wanted}/events"
    drive = results(tmp_path, {"./lab/status": b"3\n", name: b"data"})

    found = unpack_results(drive, [wanted])

    assert found.status == 3
    assert found.written == [wanted / "events"]
    assert (wanted / "events").read_bytes() == b"data"


def test_results_elsewhere_than_wanted_are_not_written(tmp_path: Path) -> None:
    wanted = tmp_path / "out"
    stray = tmp_path / "stray"
    drive = results(
        tmp_path, {"./lab/status": b"0\n", f".{stray}": b"x", f".{wanted}/../stray": b"y"}
    )

    found = unpack_results(drive, [wanted])

    assert found.written == [] and not stray.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"nonsense" * 600])
def test_results_drive_that_was_not_written_has_no_status(tmp_path: Path, content: bytes) -> None:
    drive = tmp_path / "results"
    drive.write_bytes(content)

    assert unpack_results(drive, []).status is None


def test_selftests_json_comes_back_and_that_of_check_names_no_file(files: Path) -> None:
    selftest = job_from_arguments(["selftest", "--json", "m.json", "--emit-c", "c"], files)
    check = job_from_arguments(["check", "--json"], files)
    report = job_from_arguments(["report", "--json", "kernel"], files)

    assert selftest.outputs == [files / "m.json", files / "c"]
    assert check.outputs == report.outputs == []
    assert report.inputs == [files / "kernel"]
