"""Sealed files: whole or not at all, any change is seen, and no code is run to read one."""

from __future__ import annotations

import errno
import os
import pickle
import resource
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from pyro_vae.training import sealed

CONTENT = {
    "kind": 2,
    "tensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int8)},
    "numbers": [1, 2.5, True, None, "text", (1, 2), {3}],
    "counts": Counter("aab"),
    "ordered": OrderedDict(b=1, a=2),
}


def written(path, content=CONTENT):
    sealed.write(content, path)
    return path


def read(path):
    return sealed.read(path, {"kind": 2}, "a file of a test", {"kind": 1})


def test_what_is_written_comes_back(tmp_path):
    found = read(written(tmp_path / "a"))
    assert torch.equal(found["tensors"]["a"], CONTENT["tensors"]["a"])
    assert found["tensors"]["b"].dtype == torch.int8
    for name in ("numbers", "counts", "ordered"):
        assert found[name] == CONTENT[name]
        assert type(found[name]) is type(CONTENT[name])
    assert torch.load(tmp_path / "a", weights_only=True)["numbers"] == CONTENT["numbers"]


def test_numpy_s_numbers_become_plain_ones(tmp_path):
    """As a learning rate that a callback computes with NumPy: it could not be read back."""
    content = {"kind": 2, "rate": np.float64(0.5), "n": np.int32(3), "x": np.arange(3.0)}
    found = read(written(tmp_path / "a", content))
    assert type(found["rate"]) is float
    assert type(found["n"]) is int
    assert torch.equal(found["x"], torch.arange(3.0, dtype=torch.float64))


def test_a_view_is_written_alone(tmp_path):
    large = torch.zeros(10**6)
    assert written(tmp_path / "a", {"kind": 2, "x": large[:3]}).stat().st_size < 10**4
    shared = {"kind": 2, "x": large, "y": large}
    assert written(tmp_path / "a", shared).stat().st_size < 5 * 10**6


@pytest.mark.parametrize("value", [object(), len, lambda: 0, np.array(["a"]), Exception()])
def test_what_could_not_be_read_is_refused_by_its_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"a\['x'\]\[1\] is of type"):
        sealed.write({"kind": 2, "x": [0, value]}, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_every_bit_counts(tmp_path):
    """A flip in any byte is seen: in the tensors, the names, the checksum itself."""
    path = written(tmp_path / "a")
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"damaged|not a file of a test|cut off"):
            read(path)


def test_every_length_counts(tmp_path):
    path = written(tmp_path / "a")
    good = path.read_bytes()
    for length in [*range(0, len(good), 97), *range(len(good) - 100, len(good))]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"not a file of a test|cut off"):
            read(path)
    path.write_bytes(good + b"x")
    with pytest.raises(ValueError, match="cut off"):
        read(path)


def test_the_seal_alone_is_missing(tmp_path):
    path = written(tmp_path / "a")
    path.write_bytes(path.read_bytes()[: -sealed._SEAL_SIZE])
    with pytest.raises(ValueError, match="cut off: its last bytes, the checksum, are missing"):
        read(path)


@pytest.mark.parametrize("kind", [None, "2", True, 0, -1, 2.0, [2]])
def test_another_kind(tmp_path, kind):
    with pytest.raises(ValueError, match="is not a file of a test"):
        read(written(tmp_path / "a", {"kind": kind}))
    with pytest.raises(ValueError, match="is not a file of a test"):
        read(written(tmp_path / "a", {"other": 2}))


def test_a_newer_one(tmp_path):
    told = r"newer version of pyro_vae \(format 3, and this one reads up to 2\): update pyro_vae"
    with pytest.raises(ValueError, match=told):
        read(written(tmp_path / "a", {"kind": 3}))


def test_the_first_format_has_no_seal(tmp_path):
    torch.save({"kind": 1, "x": torch.ones(2)}, tmp_path / "a")
    assert read(tmp_path / "a")["kind"] == 1


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save", "fsync", "replace", "before", "seal"])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, error, where):
    path = written(tmp_path / "a")
    real = torch.save

    def broken(*args):
        if where == "save":
            real(*args)  # something was written already
        raise error

    if where == "seal":
        monkeypatch.setattr(sealed._Hashed, "digest", broken)
    elif where != "before":
        monkeypatch.setattr(torch if where == "save" else os, where, broken)
    with pytest.raises(type(error)):
        sealed.write({"kind": 2, "new": 1}, path, broken if where == "before" else None)
    monkeypatch.undo()
    assert "new" not in read(path)
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_is_full_is_an_os_error_wherever_it_becomes_so(tmp_path):
    """PyTorch's writer raises a RuntimeError of its own, where it had begun a piece."""
    path = tmp_path / "a"
    content = {"kind": 1, "x": torch.arange(2000.0), "text": "words " * 50}
    sealed.write(content, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, len(before) - 1, 97):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                sealed.write(content, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == before


def test_a_link_keeps_its_target(tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "folder" / "target")
    written(path)
    assert path.is_symlink()
    assert read(tmp_path / "folder" / "target")["kind"] == 2


def test_what_a_killed_process_left(tmp_path):
    for name in (".a[1].x7.tmp", ".a[1].link.tmp", ".a1.x.tmp", "a[1]", ".a[1].tmp.kept"):
        (tmp_path / name).write_text("")
    sealed.remove_leftovers(tmp_path / "a[1]")
    assert sorted(os.listdir(tmp_path)) == [".a1.x.tmp", ".a[1].tmp.kept", "a[1]"]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("sealing", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_reading_runs_no_code(tmp_path, zipped, sealing):
    """Not even of a file with a checksum that is right."""
    victim, path = tmp_path / "victim", tmp_path / "evil"
    content = {"kind": 2, "x": Payload(os.fspath(victim))}
    with path.open("wb") as file:
        hashed = sealed._Hashed(file)
        torch.save(content, hashed if zipped else file, _use_new_zipfile_serialization=zipped)
        if sealing and zipped:
            file.write(sealed._SEAL % hashed.digest())
    with pytest.raises(ValueError, match="is not a file of a test"):
        read(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(content)).clear()  # it would have, unguarded
    assert victim.exists()
