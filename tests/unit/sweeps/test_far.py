"""What a worker is sent, as it is put together there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vmm.sweeps import content, dask_executor, far
from vmm.sweeps.dask_executor import _pieces

PIECE = 1000


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> content.Content:
    """Files of many sizes, in a folder `here`; pieces are small, no worker has any of them."""
    monkeypatch.setattr(dask_executor, "_PIECE", PIECE)
    monkeypatch.setattr(far, "_places", {})
    (tmp_path / "here" / "inner").mkdir(parents=True)
    for name, size in (("empty", 0), ("inner/small", 10), ("whole", PIECE), ("large", 3500)):
        (tmp_path / "here" / name).write_bytes(
            bytes(range(256)) * 14 if size > PIECE else b"x" * size
        )
    return content.of_folder(str(tmp_path / "here"), "here")


def test_content_in_pieces_is_whole_again_on_the_worker(
    sent: content.Content, tmp_path: Path
) -> None:
    worker = SimpleNamespace(local_directory=str(tmp_path / "there"))
    names = list(sent.files)

    pieces = list(_pieces(str(tmp_path / "here"), names))
    for each in pieces:
        far.receive("s", sent.digest, each, dask_worker=worker)
    wrong = far.complete("s", sent.digest, names, dask_worker=worker)

    assert wrong is None
    assert len(pieces) > 1
    assert all(len(data) <= PIECE for each in pieces for _, _, data in each)
    folder, known = far._places[sent.digest]
    assert sorted(known) == sorted(names)
    for name in names:
        assert (Path(folder) / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_content_that_changed_on_the_way_is_refused(sent: content.Content, tmp_path: Path) -> None:
    worker = SimpleNamespace(local_directory=str(tmp_path / "there"))
    names = list(sent.files)
    (tmp_path / "here" / "whole").write_bytes(b"other")

    for each in _pieces(str(tmp_path / "here"), names):
        far.receive("s", sent.digest, each, dask_worker=worker)
    wrong = far.complete("s", sent.digest, names, dask_worker=worker)

    assert wrong == "it has changed since the sweep looked at it; start the sweep again"
    assert far._places == {}
    assert list((tmp_path / "there" / "pyvmm-sweep").iterdir()) == []
