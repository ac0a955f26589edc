"""The argument that holds observed values: found by identity, by equality, or refused."""

from __future__ import annotations

import pytest
import torch

from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.dreams import check_held, sources_of, with_dreamt

X, Y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])


def sources(observed, batch):
    return sources_of(observed, batch, who="a test", remedy=", or not")


def test_an_argument_is_found_by_identity_as_a_view_and_by_equality():
    batch = Batch((X, Y), {"w": X.clone()})
    assert sources({"x": X}, batch) == {"x": 0}  # not the equal one, "w"
    assert sources({"x": X.reshape(2, 1)}, batch) == {"x": 0}
    assert sources({"y": Y.double()}, batch) == {"y": 1}
    assert sources({"x": X, "y": Y.clone()}, batch) == {"x": 0, "y": 1}


def test_what_cannot_be_told_is_refused():
    told = r"a test cannot tell .* site 'x' \(candidates: \[\]\); give dream=.*, or not"
    with pytest.raises(ValueError, match=told):
        sources({"x": X + 1}, as_batch(X, Y))
    with pytest.raises(ValueError, match=r"candidates: \[0, 'w'\]"):
        sources({"x": X.clone()}, Batch((X,), {"w": X.clone()}))
    with pytest.raises(ValueError, match="site 'z'"):  # two sites of one argument
        sources({"x": X, "z": X}, as_batch(X, Y))


def test_values_take_the_place_shape_and_dtype_of_what_was_observed():
    batch = Batch((X, 3), {"y": torch.tensor([[1], [2]])})
    drawn = {"a": torch.tensor([[5.0], [6.0]]).double(), "b": torch.tensor([7.0, 8.0])}
    found = with_dreamt(batch, {"a": 0, "b": "y"}, drawn)
    assert found.args[1] == 3 and set(found.kwargs) == {"y"}
    assert torch.equal(found.args[0], torch.tensor([5.0, 6.0]))
    assert torch.equal(found.kwargs["y"], torch.tensor([[7], [8]]))
    assert torch.equal(batch.args[0], X)


@pytest.mark.parametrize("numbers", [torch.arange(6.0), torch.zeros(6)])
def test_a_transposed_argument_is_not_taken_for_the_argument(numbers):
    table = numbers.reshape(2, 3)
    with pytest.raises(ValueError, match=r"candidates: \[\]"):
        sources({"x": table.T}, as_batch(table))
    assert sources({"x": table.T}, as_batch(table.T)) == {"x": 0}  # itself, whatever its strides
    assert sources({"x": table.reshape(3, 2)}, as_batch(table)) == {"x": 0}


def test_draws_that_a_dtype_does_not_hold_are_refused():
    batch, whole = as_batch(torch.tensor([1, 2])), torch.tensor([3.0, 300.0])
    check_held({"x": 0}, batch, {"x": whole})
    check_held({"x": 0}, as_batch(X), {"x": whole + 0.1})
    with pytest.raises(ValueError, match=r"'x' that torch.int64, .* x.float\(\)"):
        check_held({"x": 0}, batch, {"x": whole + 0.1})
    with pytest.raises(ValueError, match="'x' that torch.uint8"):
        check_held({"x": 0}, as_batch(torch.tensor([1, 2]).byte()), {"x": whole})
