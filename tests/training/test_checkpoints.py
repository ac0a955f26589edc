"""Checkpoints: whole or not at all, and no code is run to read one."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch

from pyro_vae.training import checkpoints


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "run.pt"
    content = {"weights": {"w": torch.randn(3, dtype=torch.float64)}, "step": 3, "best": None}
    checkpoints.save(content, path)
    found = checkpoints.load(path)
    assert torch.equal(found["weights"]["w"], content["weights"]["w"])
    assert found["step"] == 3
    assert found["best"] is None


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_a_broken_write_leaves_the_old_file(tmp_path, monkeypatch, error, where):
    path = tmp_path / "run.pt"
    checkpoints.save({"step": 1}, path)
    real = torch.save

    def broken(*args):
        if where == "save":
            real(*args)  # something was written already
        raise error

    monkeypatch.setattr(torch if where == "save" else os, where, broken)
    with pytest.raises(type(error)):
        checkpoints.save({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoints.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["run.pt"]


def truncated() -> bytes:
    buffer = io_bytes({"pyro_vae_checkpoint": 1, "x": torch.zeros(100)})
    return buffer[: len(buffer) // 2]


def io_bytes(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"some text",
        b"R\x80\x02",
        b"e",
        truncated(),
        io_bytes({"model": torch.zeros(2)}),
        io_bytes({"pyro_vae_checkpoint": 999}),
        io_bytes([1, 2]),
    ],
)
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other.pt is not a checkpoint of pyro_vae.fit"):
        checkpoints.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoints.load(tmp_path / "nowhere.pt")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_reading_runs_no_code(tmp_path, zipped):
    victim, path = tmp_path / "victim", tmp_path / "evil.pt"
    content = {"pyro_vae_checkpoint": 1, "x": Payload(os.fspath(victim))}
    path.write_bytes(io_bytes(content, _use_new_zipfile_serialization=zipped))
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoints.load(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(content)).clear()  # it would have, unguarded
    assert victim.exists()
