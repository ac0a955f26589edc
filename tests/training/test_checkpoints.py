"""Checkpoints of a run: which are kept, which one is good, what a failed write leaves."""

from __future__ import annotations

import errno
import logging
import os

import pytest
import torch

import pyro_vae as pv
from pyro_vae.training import checkpoints
from pyro_vae.training.checkpoints import Checkpoints
from tests.training.fits import equal_histories
from tests.training.runs import KINDS, X, trained


def content(step):
    return {"progress": {"step": step}, "x": torch.full((3,), float(step))}


def step_of(path):
    return checkpoints.load(path)["progress"]["step"]


def written(path, *steps, keep=3):
    files = Checkpoints(path, 1, keep)
    for step in steps:
        files.write(content(step), step)
    return files


def taken_up(path, keep=3, refuse=()):
    """Return the step that is resumed from, and the path of it."""
    found = []

    def take_up(content):
        if content["progress"]["step"] in refuse:
            raise ValueError("it is of another run")
        found.append(content["progress"]["step"])

    path = Checkpoints(path, 1, keep).resume(take_up)
    return (*found, path.name if path else None)


@pytest.mark.parametrize(("keep", "steps"), [(1, [5]), (2, [5, 4]), (3, [5, 4, 3]), (9, [5, 4])])
def test_the_last_ones_are_kept(tmp_path, keep, steps):
    written(tmp_path / "a", *([4, 5] if keep == 9 else range(1, 6)), keep=keep)
    names = ["a", *(f"a.prev{i}" for i in range(1, len(steps)))]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert [step_of(tmp_path / name) for name in names] == steps


def test_the_last_good_one_serves(tmp_path, caplog):
    path = tmp_path / "a"
    assert taken_up(path) == (None,)
    written(path, 1, 2, 3)
    assert taken_up(path) == (3, "a")
    assert caplog.text == ""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    assert taken_up(path) == (2, "a.prev1")
    assert "a is damaged: it is not what was written, by its checksum (it is now a.refused). " in (
        caplog.text
    )
    assert "Training goes on from" in caplog.text
    caplog.clear()
    assert taken_up(path) == (2, "a.prev1")
    assert "a is missing. Training goes on from" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["a.prev1", "a.prev2", "a.refused"]
    # The good one is not written over by the damaged one.
    written(path, 4)
    assert [step_of(tmp_path / name) for name in ("a", "a.prev1", "a.prev2")] == [4, 2, 1]


def test_where_all_are_refused_the_last_one_says_why(tmp_path):
    path = tmp_path / "a"
    written(path, 1, 2, 3)
    path.write_text("a poem")
    with pytest.raises(ValueError, match=r"a is not a checkpoint of pyro_vae.fit") as caught:
        taken_up(path, refuse=(1, 2))
    told = "\n".join(caught.value.__notes__)
    assert "a.prev1: it is of another run" in told
    assert "a.prev2: it is of another run" in told
    assert path.read_text() == "a poem", "nothing is moved where nothing serves"


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        Checkpoints(tmp_path / "no" / "a", None, 1)
    with pytest.raises(ValueError, match="checkpoint_keep=0"):
        Checkpoints(tmp_path / "a", None, 0)
    with pytest.raises(TypeError, match="checkpoint: the path of a file is needed, .* type int"):
        Checkpoints(3, None, 1)


@pytest.mark.parametrize("where", ["fsync", "replace", "link", "save"])
def test_a_full_disk(tmp_path, monkeypatch, caplog, where):
    """The first write must succeed; a later one that does not leaves what is there."""
    path, full = tmp_path / "a", OSError(errno.ENOSPC, "No space left on device")

    def broken(*args, **options):
        raise full

    def break_it():
        monkeypatch.setattr(torch if where == "save" else os, where, broken)
        if where == "link":  # where there are no links, the file is copied
            monkeypatch.setattr(checkpoints.shutil, "copyfile", broken)

    if where != "link":
        break_it()
        with pytest.raises(OSError, match="No space left") as caught:
            written(path, 1)
        assert "Model and guide keep the parameters of step 1" in caught.value.__notes__[0]
        assert os.listdir(tmp_path) == []
        monkeypatch.undo()
    files = written(path, 1, 2)
    break_it()
    with caplog.at_level(logging.WARNING, logger="pyro_vae"):
        files.write(content(3), 3)
    assert "a cannot be written after step 3 ([Errno 28] No space left on device)" in caplog.text
    assert "the checkpoint of step 2 stays, and training goes on" in caplog.text
    monkeypatch.undo()
    assert step_of(path) == 2
    if where != "replace":  # of which the first is of the file before the last
        assert step_of(tmp_path / "a.prev1") == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".x.tmp")]
    files.write(content(4), 4)
    assert step_of(path) == 4
    assert step_of(tmp_path / "a.prev1") == 2


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", broken)
    written(tmp_path / "a", 1, 2, 3)
    assert [step_of(tmp_path / name) for name in ("a", "a.prev1", "a.prev2")] == [3, 2, 1]


def test_a_pause_of_the_disk_does_not_stop_training(tmp_path, monkeypatch, caplog):
    """Each write but the first fails; parameters are those of a run without checkpoints."""
    path, kind, calls = tmp_path / "a", KINDS["plain"], []
    whole = trained(kind, epochs=3)
    real = os.replace

    def replace(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        found = trained(kind, epochs=3, checkpoint=path, checkpoint_keep=1)
    for name, value in whole[1].items():
        assert torch.equal(value, found[1][name])
    assert caplog.text.count("cannot be written") == 2
    assert step_of(path) == 3
    assert os.listdir(tmp_path) == ["a"]


# --- of another run ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 5}, "batch_size: 8 there, 5 here"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"drop_last": True}, "drop_last: False there, True here"),
        ({"loss": "iwae"}, "loss: ELBO.* there, IWAE.* here"),
        ({"optim": torch.optim.SGD}, "the optimizer Adam, not SGD"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, options, told):
    kind, path = KINDS["plain"], tmp_path / "a"
    trained(kind, epochs=1, checkpoint=path)
    if "loss" in options:
        options = {"loss": KINDS["iwae"].options["loss"]()}
    with pytest.raises(ValueError, match=rf"a: .*{told}.*pyro_vae.load them"):
        trained(kind, epochs=2, checkpoint=path, **options)


def test_another_number_of_data_is_refused(tmp_path):
    kind, path = KINDS["plain"], tmp_path / "a"
    trained(kind, epochs=1, checkpoint=path)
    other = type(kind)(data=lambda: X[:20])
    with pytest.raises(ValueError, match="data: 22 there, 20 here"):
        trained(other, epochs=2, checkpoint=path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("local", "not this pair's: .*saved"),
        ("discrete", "site 'k': none there, latent Categorical in data here"),
        ("store", "not this pair's"),
    ],
)
def test_another_model_is_refused(tmp_path, name, told):
    path = tmp_path / "a"
    trained(KINDS["plain"], epochs=1, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=told):
        trained(KINDS[name], epochs=2, checkpoint=path)
    assert path.read_bytes() == before


def test_another_dtype_is_refused_and_the_parameters_stay(tmp_path):
    kind, path = KINDS["plain"], tmp_path / "a"
    trained(kind, epochs=1, checkpoint=path)
    pairs = []

    def single():
        model, guide = kind.pair()
        pairs.append((model.float(), guide.float()))
        return pairs[0]

    with pytest.raises(ValueError, match=r"saved torch.float64, here torch.float32"):
        trained(type(kind)(single, lambda: X.float()), epochs=2, checkpoint=path)
    torch.manual_seed(5)
    for fresh, used in zip(kind.pair(), pairs[0], strict=True):
        for one, other in zip(fresh.parameters(), used.parameters(), strict=True):
            assert torch.equal(one.float(), other)


@pytest.mark.parametrize("drop", ["progress", "last", "best", "optimizer", "optimizer_type"])
def test_a_content_without_its_parts_is_refused(tmp_path, drop):
    """As no version has written: with a checksum that is right."""
    kind, path = KINDS["plain"], tmp_path / "a"
    trained(kind, epochs=1, checkpoint=path)
    found = checkpoints.load(path)
    for other in (None, 3, {"a": 1}, [torch.zeros(2)]):
        if other is None:
            broken = {name: value for name, value in found.items() if name != drop}
        else:
            broken = {**found, drop: other}
        checkpoints.save(broken, path)
        with pytest.raises(ValueError, match=r"a: it holds something else|written with"):
            trained(kind, epochs=2, checkpoint=path, checkpoint_keep=1)


def test_the_first_format_is_read(tmp_path):
    """Of version 1: no settings, no place in an epoch, no other random numbers, no checksum."""
    kind, path = KINDS["validation, warm-up"], tmp_path / "a"
    whole = trained(kind, epochs=3)
    trained(kind, epochs=2, checkpoint=path)
    found = checkpoints.load(path)
    kept = ("schedulers", "last", "best", "optimizer", "optimizer_type", "loss", "progress")
    first = {name: found[name] for name in kept}
    first |= {"pyro_vae_checkpoint": 1, "random_state": found["random"]["torch"]}
    torch.save(first, path)
    (tmp_path / "a.prev1").unlink()
    pair = kind.pair()
    pv.load(path, *pair)
    best = found["best"]["model"]
    assert all(torch.equal(v, best[name]) for name, v in pair[0].state_dict().items())
    result = trained(kind, epochs=3, checkpoint=path)
    equal_histories(result[0].history, whole[0].history)
    for name, value in whole[1].items():
        assert torch.equal(value, result[1][name])
