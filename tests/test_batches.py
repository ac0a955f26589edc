"""What a batch may be, how it is cut, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from pyro_vae.batches import Batch, EpochData, StepData, as_batch, rows_text

X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("passed", "args", "kwargs"),
    [
        ((X,), (X,), {}),
        ((X, Y), (X, Y), {}),
        (((X, Y),), (X, Y), {}),
        (([X, Y],), (X, Y), {}),
        (({"x": X, "y": Y},), (), {"x": X, "y": Y}),
        ((Batch((X,), {"y": Y}),), (X,), {"y": Y}),
        ((X, 0.5), (X, 0.5), {}),
        ((), (), {}),
    ],
)
def test_forms(passed, args, kwargs):
    batch = as_batch(*passed)
    assert len(batch.args) == len(args)
    assert all(found is wanted for found, wanted in zip(batch.args, args, strict=True))
    assert {k: id(v) for k, v in batch.kwargs.items()} == {k: id(v) for k, v in kwargs.items()}
    assert batch.size == (3 if passed else None)


def test_cut_repeat_and_convert():
    """Tensors with rows are cut; a 0-dimensional tensor and others pass through untouched."""
    scalar, flag, name = torch.tensor(2.0), True, None
    batch = Batch((X, scalar), {"y": Y, "flag": flag, "name": name})
    index = torch.tensor([2, 0])
    cut = batch.rows(index)
    assert torch.equal(cut.args[0], X[index])
    assert torch.equal(cut.kwargs["y"], Y[index])
    assert cut.args[1] is scalar
    assert cut.kwargs["flag"] is flag
    assert cut.kwargs["name"] is None
    assert torch.equal(batch.rows(slice(1, 3)).args[0], X[1:])
    twice = batch.repeat(2)
    assert torch.equal(twice.args[0], torch.cat([X, X]))
    assert torch.equal(twice.kwargs["y"], torch.cat([Y, Y]))
    assert twice.args[1] is scalar
    moved = batch.to("meta")
    assert moved.device.type == "meta"
    assert moved.kwargs["y"].device.type == "meta"
    assert batch.device.type == "cpu"
    assert as_batch(0.5).device.type == "cpu"


def test_refusals():
    with pytest.raises(
        ValueError, match=r"same first dimension.*argument 0 has 3 rows, argument 'y' has 2 rows"
    ):
        Batch((X,), {"y": Y[:2]})
    with pytest.raises(ValueError, match="the batch is empty: argument 0 has 0 rows"):
        as_batch(X[:0])
    with pytest.raises(ValueError, match="the batch is empty"):
        as_batch(X).rows(slice(3, 6))
    with pytest.raises(TypeError, match=r"argument 'x' .* NumPy array; pass torch.as_tensor"):
        as_batch({"x": np.zeros((3, 2))})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_named(bad):
    x = torch.zeros(10, 2, 2)
    x[3, 1, 0] = x[7, 0, 1] = bad
    message = "argument 'x' of the batch holds NaN or infinite values in rows 3, 7 (2 of 10)"
    with pytest.raises(ValueError, match=re.escape(message)):
        as_batch({"y": Y.repeat(4)[:10], "x": x}).check_finite()


def test_finite_values_pass():
    """So do integers, and a tensor without features."""
    as_batch(X, Y, torch.zeros(3, 0), torch.tensor(math.nan)).check_finite()


def test_long_lists_of_rows_are_cut():
    assert rows_text(torch.ones(9, dtype=torch.bool)) == "rows 0, 1, 2, 3, 4, ... (9 of 9)"


def test_epoch_data_is_told_by_its_method():
    class Fresh:
        def epoch(self, generator):
            return X

    assert isinstance(Fresh(), EpochData)
    assert not isinstance(X, EpochData)


def test_step_data_are_told_by_source_and_method():
    class Drawn:
        source = X

        def draw(self, x):
            return x

    assert isinstance(Drawn(), StepData)
    assert not isinstance(X, StepData)


def test_a_tensor_dataset_is_a_tuple_of_its_tensors():
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    batch = as_batch(torch.utils.data.TensorDataset(x, y))
    assert batch.args[0] is x and batch.args[1] is y and batch.size == 3
