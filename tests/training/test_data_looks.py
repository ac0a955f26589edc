"""What fit finds out of a pair before its first step."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.optim

import pyro_vae as pv
from tests.training.fits import make_data, make_guide, model, run


def test_a_model_that_closes_over_its_data():
    x = make_data()
    guide = pv.LocalGuide(lambda: model(x), num_data=40, example=())
    result = pv.fit(lambda: model(x), guide, (), max_steps=3, progress=False)
    assert result.steps == 3
    assert -4 < result.history["elbo"][-1] < -1  # per datum


def test_a_model_that_draws_its_own_minibatch():
    x = make_data()

    def draws(x):
        with pyro.plate("data", 40, subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index])

    result, _ = run(x, make_guide(x, fn=draws), fn=draws, epochs=None, max_steps=5)
    assert result.steps == 5
    assert all(-4 < elbo < -1 for elbo in result.history["elbo"])
