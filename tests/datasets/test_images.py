"""Datasets: the shipped digits, every accepted file, every refusal, and stochastic binarization."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae import datasets
from pyro_vae.datasets.images import StochasticBinarization
from tests.datasets.files import RNG_SEED, grey, rows, write_images, write_labels

# --- digits ----------------------------------------------------------------------------------


def test_digits_are_the_whole_data_set():
    data = datasets.digits()
    assert data.train.shape == (1437, 64)
    assert data.test.shape == (360, 64)
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert (data.shape, data.max_value, data.name) == ((8, 8), 16, "digits")
    both = torch.cat([data.train, data.test])
    assert (both.min(), both.max()) == (0, 16)
    # Facts of the published data set: how often each class occurs, and the sum of all pixels.
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(both.sum(dtype=torch.int64)) == 561718


def test_digits_split_never_changes():
    data = datasets.digits()
    assert data.train_labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert data.test_labels[:12].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]
    assert torch.equal(data.test, datasets.digits().test)


def test_digits_keep_image_and_label_together():
    # In the published order, image 0 is a 0 with this first row; it must carry its label still.
    first_row = [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]
    data = datasets.digits()
    both = torch.cat([data.train, data.test])
    labels = torch.cat([data.train_labels, data.test_labels])
    match = (both[:, :16] == torch.tensor(first_row)).all(1)
    assert labels[match].unique().tolist() == [0]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_digits_refuse_a_fraction_outside_0_1(fraction: float):
    with pytest.raises(ValueError, match="test_fraction must lie strictly between 0 and 1"):
        datasets.digits(test_fraction=fraction)


def test_repr_says_what_there_is():
    assert repr(datasets.digits(test_fraction=0.5)) == (
        "ImageData('digits': 898 train, 899 test, 8 x 8, 0 to 16, with labels)"
    )


# --- load: what is accepted ------------------------------------------------------------------


def test_npz_with_its_own_test_part(tmp_path: Path):
    train, test = grey(6), grey(2)
    np.savez(tmp_path / "a.npz", x_train=train, y_train=range(6), x_test=test, y_test=[7, 8])
    data = datasets.load(tmp_path / "a.npz")
    assert np.array_equal(data.train.numpy(), train.reshape(6, 12))
    assert np.array_equal(data.test.numpy(), test.reshape(2, 12))
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.test_labels.tolist() == [7, 8]
    assert (data.shape, data.max_value, data.name) == ((3, 4), 255, "a")


@pytest.mark.parametrize("keys", [("x", "y"), ("x_train", "y_train")])
def test_npz_without_a_test_part_holds_one_out(tmp_path: Path, keys: tuple[str, str]):
    images = grey(12)
    np.savez(tmp_path / "a.npz", **{keys[0]: images, keys[1]: images[:, 1, 1]})
    data = datasets.load(str(tmp_path / "a.npz"))
    assert (len(data.train), len(data.test)) == (10, 2)
    assert rows(torch.cat([data.train, data.test])) == rows(
        torch.from_numpy(images).reshape(12, 12)
    )
    # The label is a pixel of its image (row 1, column 1), so a lost pairing shows.
    assert torch.equal(data.train_labels, data.train[:, 5].long())
    assert torch.equal(data.test_labels, data.test[:, 5].long())
    again = datasets.load(tmp_path / "a.npz")
    assert torch.equal(again.test, data.test)


def test_npy_of_flat_square_images(tmp_path: Path):
    np.save(tmp_path / "a.npy", grey(8, 4, 4).reshape(8, 16))
    data = datasets.load(tmp_path / "a.npy", test_fraction=0.25)
    assert (data.train.shape, data.test.shape, data.shape) == ((6, 16), (2, 16), (4, 4))
    assert data.train_labels is None
    assert data.test_labels is None


@pytest.mark.parametrize(("largest", "expected"), [(1, 1), (2, 16), (16, 16), (17, 255)])
def test_max_value_is_the_smallest_common_encoding(tmp_path: Path, largest: int, expected: int):
    np.save(tmp_path / "a.npy", np.full((4, 2, 2), largest, dtype=np.int64))
    assert datasets.load(tmp_path / "a.npy").max_value == expected
    assert datasets.load(tmp_path / "a.npy", max_value=100).max_value == 100


@pytest.mark.parametrize("dtype", [bool, np.int16, np.float32, np.float64])
def test_whole_numbers_of_any_type(tmp_path: Path, dtype: type):
    images = grey(4) > 100
    np.save(tmp_path / "a.npy", images.astype(dtype))
    data = datasets.load(tmp_path / "a.npy")
    assert data.train.dtype == torch.uint8
    assert rows(torch.cat([data.train, data.test])) == rows(
        torch.from_numpy(images.reshape(4, 12).astype(np.uint8))
    )


# --- load: what is refused -------------------------------------------------------------------


def test_label_counts(tmp_path: Path):
    path = write_images(tmp_path / "train-images-idx3-ubyte", grey(4))
    write_labels(tmp_path / "train-labels-idx1-ubyte", np.arange(3))
    with pytest.raises(ValueError, match="4 images but 3 labels"):
        datasets.load(path)
    np.savez(tmp_path / "a.npz", x_train=grey(4), x_test=grey(2), y_train=[1], y_test=[1, 2])
    with pytest.raises(ValueError, match=r"a\.npz \(train\): 4 images but 1 labels"):
        datasets.load(tmp_path / "a.npz")


def test_labels_that_are_no_classes(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=grey(4), y=np.zeros((4, 10)))
    with pytest.raises(ValueError, match=r"labels of shape \[N\].* found shape \[4, 10\]"):
        datasets.load(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(), (12,), (4, 12), (4, 3, 4, 1), (4, 0, 4), (4, 0), (0, 3, 3)])
def test_wrong_dimensions(tmp_path: Path, shape: tuple[int, ...]):
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected images of shape \[N, height, width\]"):
        datasets.load(tmp_path / "a.npy")


def test_too_few_images_to_hold_one_out(tmp_path: Path):
    np.save(tmp_path / "a.npy", grey(1))
    with pytest.raises(ValueError, match=r"cannot hold out 0\.167 of 1 images"):
        datasets.load(tmp_path / "a.npy")


def test_parts_of_different_sizes(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x_train=grey(4), x_test=grey(2, 4, 3))
    with pytest.raises(ValueError, match="training images are 3 x 4, test images 4 x 3"):
        datasets.load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((6, 2, 2), "a"), "expected images of numbers, found dtype <U1"),
        (np.full((6, 2, 2), 1j), "found dtype complex128"),
        (np.full((6, 2, 2), 0.25), r"found fractions between 0\.25 and 0\.25; .*255 \* x"),
        (np.full((6, 2, 2), -1), "from 0 to 255, found values from -1 to -1"),
        (np.full((6, 2, 2), 256), "from 0 to 255, found values from 256 to 256"),
        (np.full((6, 2, 2), np.inf), "24 values are NaN or infinite, in 6 images"),
    ],
)
def test_wrong_values(tmp_path: Path, images: np.ndarray, message: str):
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(ValueError, match=message):
        datasets.load(tmp_path / "a.npy")


def test_nan_says_how_many_and_where(tmp_path: Path):
    images = np.zeros((4, 2, 2))
    images[2, 1] = np.nan
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(ValueError, match="2 values are NaN or infinite, in 1 images.* image 2"):
        datasets.load(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", x_train=np.zeros((4, 2, 2)), x_test=images)
    with pytest.raises(
        ValueError, match=r"\(test\): 2 values are NaN or infinite, in 1 images.*image 2"
    ):
        datasets.load(tmp_path / "a.npz")


def test_max_value_that_does_not_fit(tmp_path: Path):
    np.save(tmp_path / "a.npy", grey(6))
    with pytest.raises(ValueError, match="from 0 to 16, found one of 255"):
        datasets.load(tmp_path / "a.npy", max_value=16)
    with pytest.raises(ValueError, match="max_value must lie between 1 and 255, got 256"):
        datasets.load(tmp_path / "a.npy", max_value=256)


# --- stochastic binarization -----------------------------------------------------------------


def test_binarization_has_the_right_mean():
    # 20,000 draws of one pixel: 4 standard errors are 4 * sqrt(p (1 - p) / 20000) <= 0.0142.
    # The seed is fixed, so the test gives the same answer every time.
    grey_row = torch.tensor([0, 4, 8, 12, 16], dtype=torch.uint8)
    binarized = StochasticBinarization(grey_row.expand(20000, 5), max_value=16)
    draw = binarized.epoch(torch.Generator().manual_seed(RNG_SEED))
    assert draw.dtype == torch.float32
    assert set(draw.unique().tolist()) == {0.0, 1.0}
    p = grey_row / 16
    assert ((draw.mean(0) - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()


def test_rows_are_drawn_by_the_global_generator_and_bytes_stay_bytes():
    images = torch.tensor([0, 4, 8, 12, 16], dtype=torch.uint8).expand(20000, 5)
    binarized = StochasticBinarization(images, max_value=16)
    assert binarized.source is images
    binarized.images = images.clone()
    assert binarized.source is binarized.images
    torch.manual_seed(RNG_SEED)
    draw, other = binarized.draw(images), binarized.draw(images)
    torch.manual_seed(RNG_SEED)
    assert torch.equal(binarized.draw(images), draw)
    assert not torch.equal(draw, other)
    assert draw.dtype == torch.float32
    assert set(draw.unique().tolist()) == {0.0, 1.0}
    p = images[0] / 16
    assert ((draw.mean(0) - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()


def test_each_epoch_is_a_fresh_draw_and_a_seed_repeats_it():
    binarized = StochasticBinarization(datasets.digits().test, 16)
    generator = torch.Generator().manual_seed(1)
    first, second = binarized.epoch(generator), binarized.epoch(generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, binarized.epoch(torch.Generator().manual_seed(1)))
    assert torch.equal(first, binarized.fixed(seed=1))


def test_binarization_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    StochasticBinarization(datasets.digits().test, 16).fixed(seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_binarization_keeps_the_shape():
    binarized = StochasticBinarization(torch.full((3, 1, 2, 2), 255.0), max_value=255)
    assert torch.equal(binarized.fixed(0), torch.ones(3, 1, 2, 2))
    assert len(binarized) == 3
    assert repr(binarized) == "StochasticBinarization(images=[3, 1, 2, 2], max_value=255)"


@pytest.mark.parametrize(
    ("images", "max_value", "message"),
    [
        (torch.full((2, 4), 17.0), 16, r"max_value=16, found values from 17\.0 to 17\.0"),
        (torch.full((2, 4), -1.0), 16, "expected intensities from 0"),
        (torch.full((2, 4), math.nan), 16, "expected intensities from 0"),
        (torch.zeros(0, 4), 16, r"N at least 1, got \[0, 4\]"),
        (torch.zeros(4), 16, r"shape \[N, \.\.\.\] .* got \[4\]"),
        (torch.zeros(2, 4), 0, "max_value must be at least 1, got 0"),
    ],
)
def test_binarization_refuses(images: torch.Tensor, max_value: int, message: str):
    with pytest.raises(ValueError, match=message):
        StochasticBinarization(images, max_value)
