"""Tables in files: the numbers of a table in memory, there for other processes and afterwards."""

from __future__ import annotations

import copy
import functools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.guides import table_file
from tests.models import factor_analysis

N = 9
ADAM = functools.partial(torch.optim.Adam, lr=0.1, fused=True)


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    return model, model.data(N)


def make(setting, storage=None, **options):
    model, x = setting
    return pv.LocalGuide(model, num_data=N, example=x, storage=storage, **options)


def trained(setting, guide, **options):
    model, x = setting
    options = {"optim": ADAM, "batch_size": 4, "progress": False, "epochs": 3} | options
    pv.fit(model, guide, x, **options)
    return guide


@pytest.mark.parametrize("compile", [False, "replay"])
def test_training_on_disk_is_training_in_memory(setting, tmp_path, compile):
    """To the bit; the file is an array of NumPy with the numbers of the last step in it."""
    path = tmp_path / "table.npy"
    inside = trained(setting, make(setting), compile=compile)
    outside = trained(setting, make(setting, path), compile=compile)
    assert torch.equal(outside.table, inside.table)
    assert table_file.file_of(outside.table) == path
    np.testing.assert_array_equal(np.load(path), inside.table.detach().numpy())
    model, x = setting
    bounds = [
        pv.elbo(model, guide, x, num_particles=20, seed=0).value for guide in (inside, outside)
    ]
    assert torch.equal(*bounds)


def test_a_file_that_is_there_is_gone_on_with(setting, tmp_path):
    path = tmp_path / "table.npy"
    first = trained(setting, make(setting, path))
    numbers = first.table.detach().clone()
    first.flush()
    del first
    again = make(setting, path, init_scale=0.1)
    assert torch.equal(again.table, numbers)
    assert os.listdir(tmp_path) == ["table.npy"]


def test_another_process_sees_the_numbers_at_once(setting, tmp_path):
    path = tmp_path / "table.npy"
    guide = make(setting, path)
    with torch.no_grad():
        guide.table[3] = 7.5
    code = f"import numpy; print(float(numpy.load({os.fspath(path)!r})[3].min()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) == 7.5


def test_moments_and_copies_are_on_disk_and_leave_no_file(setting, tmp_path):
    path, made = tmp_path / "table.npy", []
    guide = make(setting, path)

    def begin(parameters):
        made.append(ADAM(parameters))
        return made[0]

    trained(setting, guide, optim=begin)
    state = made[0].state[guide.table]
    for name in ("exp_avg", "exp_avg_sq"):
        assert table_file.file_of(state[name]).parent == tmp_path
        assert state[name].abs().sum() > 0
    assert os.listdir(tmp_path) == ["table.npy"]
    twin = table_file.copy_of(guide.table)
    assert table_file.file_of(twin).parent == tmp_path
    assert torch.equal(twin, guide.table)
    twin.zero_()
    assert bool(guide.table.abs().sum() > 0)
    assert os.listdir(tmp_path) == ["table.npy"]


def test_training_resumes_to_the_bit(setting, tmp_path):
    whole = trained(setting, make(setting), epochs=6)
    path, checkpoint = tmp_path / "table.npy", tmp_path / "checkpoint"
    trained(setting, make(setting, path), epochs=3, checkpoint=checkpoint)
    again, made = make(setting, path), []

    def begin(parameters):
        made.append(ADAM(parameters))
        return made[0]

    trained(setting, again, epochs=6, checkpoint=checkpoint, optim=begin)
    assert torch.equal(again.table, whole.table)
    assert table_file.file_of(made[0].state[again.table]["exp_avg"]).parent == tmp_path


def test_a_copy_of_a_guide_is_in_memory_and_a_table_of_its_own(setting, tmp_path):
    path = tmp_path / "table.npy"
    guide = make(setting, path)
    twin = copy.deepcopy(guide)
    assert table_file.file_of(twin.table) is None
    with torch.no_grad():
        twin.table += 1
    assert torch.equal(guide.table, torch.from_numpy(np.load(path)))
    assert not torch.equal(guide.table, twin.table)
    guide.load_state_dict(twin.state_dict())
    np.testing.assert_array_equal(np.load(path), twin.table.detach().numpy())


def test_a_table_that_leaves_its_file_says_so(setting, tmp_path, caplog):
    guide = make(setting, tmp_path / "table.npy")
    with caplog.at_level(logging.WARNING):
        guide.float()
    assert "table.npy keeps the numbers of before" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make(setting).float()
    assert caplog.text == ""


def save(path, array):
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((N - 1, 3, 2)),
            r"holds float64 \[8, 3, 2\], and the table .* is float64 \[9, 3, 2\]",
        ),
        (np.zeros((N, 3, 2), np.float32), r"holds float32 \[9, 3, 2\]"),
        (np.zeros((N, 4)), r"holds float64 \[9, 4\]"),
        (np.asfortranarray(np.ones((N, 3, 2))), "column by column"),
        (np.array(["a"] * N), "holds <U1"),
    ],
)
def test_a_file_of_another_table_is_refused(setting, tmp_path, array, message):
    path = save(tmp_path / "table.npy", array)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        make(setting, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 3, 60, 200])
def test_a_file_that_is_cut_off_is_refused(setting, tmp_path, cut):
    path = save(tmp_path / "table.npy", np.zeros((N, 3, 2)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"table.npy' is no array of NumPy, or cut off"):
        make(setting, path)


def test_objects_in_a_file_are_never_loaded(setting, tmp_path):
    path = tmp_path / "table.npy"
    np.save(path, np.array([{}] * N, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"table.npy' is no array of NumPy, or cut off. Give"):
        make(setting, path)
    np.savez(tmp_path / "several", np.zeros(3))
    with pytest.raises(ValueError, match=r"several.npz'"):
        make(setting, tmp_path / "several.npz")


def test_a_folder_that_is_not_there_is_refused(setting, tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        make(setting, tmp_path / "nowhere" / "table.npy")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        make(setting, tmp_path)


def test_a_disk_that_is_full_is_an_error_and_leaves_no_file(setting, tmp_path, monkeypatch):
    def full(handle, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        make(setting, tmp_path / "table.npy")
    assert os.listdir(tmp_path) == []


def test_many_rows_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(table_file, "_PART", 8)
    row = torch.tensor([1.0, 2.0, 3.0])
    table = table_file.open_table(tmp_path / "t.npy", row, 7)
    assert torch.equal(table, row.expand(7, 3))


def test_tensors_in_memory_are_copied_there():
    table = torch.ones(3)
    assert table_file.file_of(table) is None
    twin = table_file.copy_of(table)
    assert twin is not table
    assert torch.equal(twin, table)
    assert torch.equal(table_file.full_like(table, 2.0), torch.full((3,), 2.0))
    table_file.write_out(table)  # nothing to wait for
