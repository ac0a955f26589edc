"""What a guide must be for each datum to have a weight."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest

import pyro_vae as pv
from tests.models import factor_analysis


def test_guides_joint_over_the_data_are_refused():
    """AutoDiagonalNormal's one site is the whole batch's: no bound of a datum is in it."""
    model = factor_analysis()
    x = model.data(5)
    for auto in (
        pyro.infer.autoguide.AutoDiagonalNormal,
        pyro.infer.autoguide.AutoMultivariateNormal,
    ):
        with pytest.raises(
            ValueError, match=r"'_AutoD?i?a?.*_latent' has batch shape \[\].* 5 data"
        ):
            pv.log_weights(model, auto(model), x, num_particles=2)

    def no_plate(x):
        pyro.sample("z", dist.Normal(x.new_zeros(5, 3), 1.0).to_event(2))

    with pytest.raises(ValueError, match=r"'z' has batch shape \[\]"):
        pv.log_weights(model, no_plate, x, num_particles=2)
