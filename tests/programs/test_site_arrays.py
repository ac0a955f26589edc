"""Values of sites as arrays: the datum in front, missing and absent ones told apart."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch

from pyro_vae.programs.site_arrays import absent, array_of, inner_dims, observed_values
from pyro_vae.programs.sites import Plate, Site, Structure

DATA, ROWS = Plate("data", -1, 4, 4), Plate("rows", -2, 3, 3)


def site(plates=(DATA, ROWS), mask=None, missing=None):
    """A site of events of two, in rows inside of data: [3, 4, 2]."""
    fn = dist.Normal(torch.zeros(3, 4, 2), 1.0).to_event(1)
    value = torch.arange(24.0).reshape(3, 4, 2)
    return Site(
        "x", "observed", fn, torch.Size([3, 4]), torch.Size([2]), plates, value, mask, missing
    )


def of(one, plate=DATA):
    return Structure({"x": one}, plate, 2, 4)


def test_the_datum_comes_first():
    one = site()
    assert np.array_equal(observed_values(one, of(one)), one.value.movedim(1, 0).numpy())
    assert np.array_equal(observed_values(one, of(one, None)), one.value.numpy())
    assert array_of(torch.zeros(1, 4, 1), one, of(one)).shape == (4, 3, 2)


def test_names_of_the_other_dimensions():
    one = site()
    assert inner_dims(one, of(one)) == ["rows", "x_dim_1"]
    assert inner_dims(one, of(one, None)) == ["rows", "data", "x_dim_2"]
    bare = site(plates=(DATA,))
    assert inner_dims(bare, of(bare)) == ["x_dim_0", "x_dim_1"]


def test_a_missing_value_is_there_and_not_seen():
    missing = torch.zeros(3, 4, 2, dtype=torch.bool)
    missing[1, 2, 0] = True
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = False
    one = site(mask=mask, missing=missing)
    found = observed_values(one, of(one))
    assert np.argwhere(np.isnan(found)).tolist() == [[2, 1, 0]]
    assert np.argwhere(absent(one, of(one))).tolist() == [[3, 0, 0], [3, 0, 1]]
    whole = site()
    assert absent(whole, of(whole)) is None
