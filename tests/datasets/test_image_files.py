"""Files of images: every accepted one, and what is said of those that are not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae import datasets
from tests.datasets.files import grey, idx_bytes, write_images, write_labels, write_mnist


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_directory_of_idx_files(tmp_path: Path, suffix: str):
    train, test = write_mnist(tmp_path, suffix)
    data = datasets.load(tmp_path)
    assert np.array_equal(data.train.numpy(), train.reshape(7, 12))
    assert np.array_equal(data.test.numpy(), test.reshape(5, 12))
    assert data.train_labels.tolist() == list(range(7))
    assert data.test_labels.tolist() == list(range(5))
    assert data.name == tmp_path.name


@pytest.mark.parametrize("images_suffix", ["", ".gz"])
@pytest.mark.parametrize("labels_suffix", ["", ".gz"])
def test_idx_file_takes_the_labels_beside_it(
    tmp_path: Path, images_suffix: str, labels_suffix: str
):
    images = grey(6)
    path = write_images(tmp_path / f"train-images-idx3-ubyte{images_suffix}", images)
    write_labels(tmp_path / f"train-labels-idx1-ubyte{labels_suffix}", images[:, 1, 1])
    data = datasets.load(path)
    assert torch.equal(data.train_labels, data.train[:, 5].long())
    assert torch.equal(data.test_labels, data.test[:, 5].long())


def test_idx_file_without_labels(tmp_path: Path):
    data = datasets.load(write_images(tmp_path / "t10k-images.idx3-ubyte", grey(6)))
    assert (len(data.train), len(data.test), data.train_labels) == (5, 1, None)


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file or directory at .*nothing\.npz"):
        datasets.load(tmp_path / "nothing.npz")


def test_unknown_suffix(tmp_path: Path):
    (tmp_path / "a.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv by its name: expected \.npz, \.npy, or an idx"):
        datasets.load(tmp_path / "a.csv")


def test_directory_names_what_is_missing_and_found(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").rename(tmp_path / "other")
    with pytest.raises(
        FileNotFoundError, match=r"missing t10k-labels-idx1-ubyte; found other, t10k-images"
    ):
        datasets.load(tmp_path)


def test_empty_directory(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="found an empty directory"):
        datasets.load(tmp_path)


def test_idx_wrong_magic_number(tmp_path: Path):
    path = write_labels(tmp_path / "train-images-idx3-ubyte", np.arange(4))
    with pytest.raises(ValueError, match=r"of images.*magic number 0x00000803, found 0x00000801"):
        datasets.load(path)


@pytest.mark.parametrize(("size", "message"), [(0, "header of 16"), (10, "header of 16")])
def test_idx_cut_in_the_header(tmp_path: Path, size: int, message: str):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(grey(4), 0x803)[:size])
    with pytest.raises(ValueError, match=f"cut short, .*{message} bytes, found {size} bytes"):
        datasets.load(path)


@pytest.mark.parametrize(("change", "problem"), [(-1, "cut short"), (1, "too long")])
def test_idx_of_the_wrong_length(tmp_path: Path, change: int, problem: str):
    content = idx_bytes(grey(4), 0x803) + b"\0"
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content[: len(content) - 1 + change])
    with pytest.raises(
        ValueError,
        match=rf"{problem}, the header promises images of shape \[4, 3, 4\], 64 bytes in all, "
        rf"found {64 + change} bytes",
    ):
        datasets.load(path)


def test_idx_gz_cut_short(tmp_path: Path):
    path = write_images(tmp_path / "train-images-idx3-ubyte.gz", grey(4))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match="gzip data are damaged or cut short"):
        datasets.load(path)


def test_npz_without_a_known_key(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=grey(4), target=np.arange(4))
    with pytest.raises(ValueError, match=r"expected the keys .* found \['images', 'target'\]"):
        datasets.load(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_cut_short(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    if suffix == "npz":
        np.savez(path, x=grey(40))
    else:
        np.save(path, grey(40))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: expected an? \.{suffix} .*could not read"):
        datasets.load(path)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_pickled_objects_are_not_loaded(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    ragged = np.array([{"a": 1}, None], dtype=object)
    if suffix == "npz":
        np.savez(path, x=ragged)
    else:
        np.save(path, ragged, allow_pickle=True)
    with pytest.raises(ValueError, match=r"could not read it .*allow_pickle=False"):
        datasets.load(path)


def test_a_member_of_an_archive_that_is_no_array_is_refused(tmp_path: Path):
    """NumPy gives the bytes of those whose header it does not know."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no header of NumPy's")
    with pytest.raises(ValueError, match=r"a\.npz: x in it is no array, or its header is damaged"):
        datasets.load(path)


def test_content_of_the_other_numpy_format(tmp_path: Path):
    np.save(tmp_path / "a.npy", grey(4))
    (tmp_path / "a.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"b\.npz: expected an archive, found one array"):
        datasets.load(tmp_path / "b.npz")
    np.savez(tmp_path / "a.npz", x=grey(4))
    (tmp_path / "a.npz").rename(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"b\.npy: expected one array, found an archive"):
        datasets.load(tmp_path / "b.npy")
