"""Minibatches: what a step sees, which rows are left out, and what losses of them add up to."""

from __future__ import annotations

import math
from itertools import chain, count

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.training.minibatches import MinibatchELBO, TrainingData, mean_elbo
from tests.training.fits import (
    HISTORY,
    Drawn,
    Fresh,
    exact_elbo,
    make_data,
    make_guide,
    model,
    parameters_of,
    run,
    same,
)


def subsampled(x):
    with pyro.plate("data", 40, subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_a_subsampled_plate_gives_elbos_per_datum():
    """The same guide, plate scaled or not: the same history, with a remainder of 8 too."""
    x, validation = make_data(), make_data(21, seed=3)
    frozen = {"epochs": 2, "batch_size": 16, "validation_data": validation}
    frozen["optim"] = lambda ps: torch.optim.SGD(ps, lr=0.0)
    plain, _ = run(x, **frozen)
    scaled, guide = run(x, fn=subsampled, **frozen)
    for name in HISTORY:
        assert plain.history[name] == pytest.approx(scaled.history[name], rel=1e-12), name
    # And both are right: 5 standard errors, by the exact ELBO.
    error = plain.history["elbo_std_error"][0]
    assert plain.history["elbo"][0] == pytest.approx(
        exact_elbo(guide, x).mean().item(), abs=5 * error + 0.05
    )


def test_each_epoch_is_shuffled_anew():
    x, batches = make_data(), []

    class Recording(Trace_ELBO):
        def loss_and_grads(self, model, guide, x):
            batches.append(x.flatten().tolist())
            return super().loss_and_grads(model, guide, x)

    run(x, loss=Recording())
    assert [len(batch) for batch in batches] == [16, 16, 8] * 2
    first, second = (list(chain(*part)) for part in (batches[:3], batches[3:]))
    assert first != second
    assert first != x.flatten().tolist()
    assert sorted(first) == sorted(second) == sorted(x.flatten().tolist())


def test_fresh_data_at_each_epoch():
    x = make_data()
    first, second = Fresh(x), Fresh(x)
    run(first, make_guide(x), epochs=3)
    run(second, make_guide(x), epochs=3)
    assert len(first.given) == 4  # one to look at
    assert same(first.given, second.given)
    assert len({float(given[0]) for given in first.given}) == 4
    other = Fresh(x)
    run(other, make_guide(x), epochs=3, seed=1)
    assert not torch.equal(first.given[1], other.given[1])


def test_fresh_data_at_each_step():
    x = make_data()
    first, second = Drawn(x), Drawn(x)
    one, _ = run(first, make_guide(x), batch_size=len(x), epochs=3, compile=False)
    run(second, make_guide(x), batch_size=len(x), epochs=3, compile=False)
    looks = len(first.given) - 3
    assert looks > 0  # at the data, before training
    assert same(first.given, second.given)
    means = {float(given.mean()) for given in first.given[looks:]}
    assert len(means) == 3
    assert one.steps == 3


class Counted:
    """Data drawn like those; a list that the code of draw names would be watched."""

    def __init__(self, x):
        self.source, self.calls = (x,), count()

    def draw(self, x):
        next(self.calls)
        return (x + 0.1 * torch.randn_like(x),)


def test_data_drawn_inside_a_recorded_step_are_those_of_an_eager_one():
    x = make_data()
    histories, parameters = [], []
    for compile in (False, "replay"):
        data = Counted(x)
        result, guide = run(data, make_guide(x), epochs=8, compile=compile)
        histories.append(result.history)
        parameters.append(parameters_of(guide))
        if compile:  # three steps an epoch, of two sizes: most of them never came to Python
            assert next(data.calls) < 24
    assert histories[1]["elbo"] == pytest.approx(histories[0]["elbo"], rel=1e-9)
    for a, b in zip(*parameters, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


class Draws:
    """A source and a function."""

    def __init__(self, source, draw):
        self.source, self.draw = source, draw


def wrote_to(x):
    x[x > 0.5] = 0.0
    return x


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda x: x[:-1], "Draws.draw was given 40 data and returned 39"),
        (lambda x: torch.cat([x, x]), "Draws.draw was given 40 data and returned 80"),
        (wrote_to, "Draws.draw writes to the minibatch that it is given"),
    ],
)
def test_draws_that_are_refused(draw, told):
    x = make_data()
    before = x.clone()
    with pytest.raises(ValueError, match=told):
        run(Draws(x, draw), make_guide(x))
    assert torch.equal(x, before)


def test_attributes_of_what_draws_are_seen_by_recorded_steps():
    class Scaled:
        def __init__(self, source):
            self.source, self.scale = source, 0.0

        def draw(self, x):
            return x + self.scale

    histories = []
    for compile in (False, "replay"):
        data = Scaled(make_data())

        def callback(epoch, data=data):
            data.scale = 10.0 * epoch.epoch

        result, _ = run(
            data, make_guide(data.source), epochs=7, callbacks=[callback], compile=compile
        )
        histories.append(result.history["elbo"])
    assert histories[1] == pytest.approx(histories[0], rel=1e-9)


def test_binarized_bytes_are_drawn_in_the_step():
    images = torch.arange(40, dtype=torch.uint8).reshape(20, 2)
    data = pv.datasets.StochasticBinarization(images, max_value=39)

    def pixels(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z.expand(-1, 2)).to_event(1), obs=x)

    guide = pv.AmortizedGuide(pixels, nn.Linear(2, 3), example=data.fixed(seed=0))
    result, _ = run(data, guide, fn=pixels, epochs=3, validation_data=data.fixed(seed=1))
    assert result.steps == 6
    assert torch.equal(images, torch.arange(40, dtype=torch.uint8).reshape(20, 2))


def test_the_mean_over_minibatches_by_hand():
    """Sizes weigh: 30 data at 1 nat and 10 at 5 have the mean 2."""
    assert mean_elbo([MinibatchELBO(1.0, 10), MinibatchELBO(3.0, 10)]) == pytest.approx((2.0, 1.0))
    # sqrt(((1 - 2) * 30)^2 + ((5 - 2) * 10)^2) * sqrt(2 / 1) / 40
    assert mean_elbo([MinibatchELBO(1.0, 30), MinibatchELBO(5.0, 10)]) == pytest.approx((2.0, 1.5))


def test_a_single_step_has_no_standard_error():
    result, _ = run(make_data(), batch_size=1000)
    assert result.steps == 2
    assert all(math.isnan(error) for error in result.history["elbo_std_error"])


def normalized(x, **options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    guide = pv.AmortizedGuide(model, encoder, example=x[:5])
    return run(x, guide, **{"epochs": 2, "batch_size": 20, **options})


def test_a_last_minibatch_of_one_datum_under_batch_norm():
    x = make_data(41)
    told = r"last minibatch of an epoch has 1 datum \(41 data, batch_size=20\), which BatchNorm1d"
    with pytest.raises(ValueError, match=told + r".*drop_last=True, or another batch_size"):
        normalized(x)
    result, _ = normalized(x, drop_last=True)
    assert result.steps == 4
    assert normalized(x, batch_size=21)[0].steps == 4
    with pytest.raises(ValueError, match=r"batch_size=1\), .*pass another batch_size"):
        normalized(x, batch_size=1)


def test_a_loader_s_minibatch_of_one_datum_under_batch_norm():
    x = make_data(41)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=20)
    guide = pv.AmortizedGuide(
        model, nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)).double(), example=x[:5]
    )
    with pytest.raises(ValueError, match=r"step 3 has a minibatch of 1 datum, which BatchNorm"):
        run(loader, guide, epochs=1)


def test_without_the_last_minibatch_each_epoch_leaves_out_others():
    x = make_data(41)
    data = TrainingData(model, make_guide(x), x, 20, None, None, drop_last=True)
    epochs = [torch.cat([index for index, _ in data.epoch()]) for _ in range(2)]
    assert all(len(rows.unique()) == 40 for rows in epochs)
    assert data.steps_per_epoch == 2


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


def test_the_error_of_huge_elbos_is_infinite_and_no_error():
    elbos = [MinibatchELBO(-1e200, 8), MinibatchELBO(-3e200, 8)]
    mean, error = mean_elbo(elbos)
    assert mean == pytest.approx(-2e200)
    assert error == math.inf
