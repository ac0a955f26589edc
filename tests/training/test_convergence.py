"""When training has converged: averages, stages, and what is left to gain, on known optima."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.training.convergence import Blocks, Followed, Stages
from tests.training.fits import (
    equal_histories,
    exact_elbo,
    make_data,
    make_guide,
    model,
    parameters_of,
    same,
)
from tests.training.fits import run as fit


def test_blocks_are_means_of_equal_length():
    """Of 0, 1, 2, ...: the mean of a block is the middle of its numbers."""
    x, blocks, whole = torch.zeros((), dtype=torch.float64), Blocks(3), []
    for number in range(48):
        x.fill_(number)
        if blocks.add([x]):
            whole.append((blocks.length, len(blocks.means)))
    assert whole == [(3, n) for n in range(1, 9)] + [(6, n) for n in range(5, 9)]
    found = [float(block[0]) for block in blocks.means]
    assert found == pytest.approx([6 * n + 2.5 for n in range(8)])
    blocks.add([x])
    assert [float(block[0]) for block in blocks.means] == pytest.approx([5.5, 17.5, 29.5, 41.5])


def test_what_is_followed_is_bounded():
    """Every second step; rows are thinned by two, and stay as far apart as they say."""
    followed = Followed(2)
    for _ in range(3000):
        followed.add(lambda: torch.tensor([float(followed.steps)]))
    assert len(followed.rows) < 512 and followed.stride == 8
    assert [float(row) for row in followed.rows] == [8 * n for n in range(1, 376)]


def trace(curvature, rate, noise, start, steps, seed=0, **options):
    """Stochastic gradients on a quadratic, through the rule; where and at what excess it ended."""
    rng = np.random.default_rng(seed)
    h = torch.tensor(curvature, dtype=torch.float64)
    x = torch.full_like(h, start)

    def scores(settings, number):
        elbos = torch.stack([-(h * setting[0] ** 2).sum() / 2 for setting in settings])
        return elbos.unsqueeze(1) + torch.tensor(rng.standard_normal(8))

    slopes = noise * torch.tensor(rng.standard_normal((8, len(h))))

    def follow():
        return slopes @ x - (h * x**2).sum() / 2

    stages = Stages([x], scores, follow, **{"tolerance": 0.01} | options)
    for step in range(1, steps + 1):  # noqa: B007 - it is returned
        draw = torch.tensor(rng.standard_normal(len(h)))
        x -= rate * (h * x + noise * draw)
        verdict = stages.add()
        if verdict != "go on":
            x.copy_(stages.average[0])
            rate *= stages.factor
        if verdict == "converged":
            break
    return verdict, step, float((h * x**2).sum() / 2), stages


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_an_optimum_is_reached_and_said(noise):
    verdict, step, excess, stages = trace([1.0, 0.3, 0.1], 0.3, noise, 10.0, 20_000)
    assert verdict == "converged" and stages.stage >= 1
    assert excess < 0.01
    assert stages.left[0] < 0.01 and step < 10_000


def test_what_still_falls_has_not_converged():
    """Along a line, by 1e-4 a step."""
    x = torch.zeros((), dtype=torch.float64)

    def fail(settings, number):
        pytest.fail("nothing is stationary")

    stages = Stages([x], fail, lambda: x.clone().reshape(1), 0.01)
    for _ in range(3000):
        x += 1e-4
        assert stages.add() == "go on"


def test_noise_that_is_left_is_the_variance_of_the_average():
    """Independent iterates N(0, 1) of 20 numbers, and the loss |x|^2 / 2.

    The average of m of them is 20 / (2 m) below its expectation; the stage before was as good. By
    the mean of 60 runs, within 4 standard errors.
    """
    found = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(20, dtype=torch.float64)

        def scores(settings, number):
            elbos = torch.stack([-(setting[0] ** 2).sum() / 2 for setting in settings])
            elbos[1] = elbos[0]
            return elbos.unsqueeze(1).expand(-1, 8)

        still = x.new_zeros(1)
        stages = Stages([x], scores, lambda found=still: found, tolerance=1e-9, window=800)
        stages._before = [x.clone()]
        while math.isnan(stages.left[0]):
            x.copy_(torch.randn(20, generator=generator, dtype=torch.float64))
            stages.add()
        assert stages._steps == 800
        found.append(stages.left[0])
    values = np.asarray(found)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert values.mean() == pytest.approx(20 / (2 * 400), abs=4 * error)
    assert error < 0.002


class Rates(pv.callbacks.Callback):
    """The learning rate of each step."""

    def __init__(self, optimizer):
        self.optimizer, self.rates = optimizer, []

    def on_step(self, step):
        self.rates.append(self.optimizer.param_groups[0]["lr"])


def converging(x, guide=None, stop=None, **options):
    guide = make_guide(x) if guide is None else guide
    stop = pv.Converged(0.01, window=200) if stop is None else stop
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05, fused=True)
    rates = Rates(optimizer)
    options = {"epochs": None, "max_steps": 5000, "batch_size": 20} | options
    result, _ = fit(x, guide, optim=optimizer, callbacks=[rates], stop=stop, **options)
    return result, guide, stop, rates.rates


@pytest.mark.parametrize("compile", [pytest.param(False, marks=pytest.mark.slow), "replay"])
def test_fit_ends_at_the_optimum(compile, caplog):
    """Of the linear encoder, whose optimum is the exact posterior: log p(x), in closed form."""
    x = make_data()
    with caplog.at_level(logging.INFO, "pyro_vae"):
        result, guide, stop, rates = converging(x, compile=compile)
    assert result.stopped_by == "converged" and not result.unfinished
    evidence = torch.distributions.Normal(0.0, 2**0.5).log_prob(x).mean()
    assert 0 < evidence - exact_elbo(guide, x).mean() < 0.01
    assert result.promised == stop.left and 0 <= stop.left[0] < 0.01
    assert len(rates) == result.steps < 5000
    assert rates[0] == 0.05 and rates[-1] in {0.05 / 2**n for n in range(1, 8)}
    assert "the learning rate is lowered" in caplog.text and "converged" in caplog.text


def test_the_average_is_what_is_kept():
    x = make_data()
    _, guide, stop, _ = converging(x)
    count = len(parameters_of(guide))
    assert same(parameters_of(guide), stop._stages.average[:count])


@pytest.mark.slow
def test_a_resumed_run_converges_as_a_whole_one(tmp_path):
    x, path = make_data(), tmp_path / "run.pt"
    whole, guide, _, rates = converging(x)
    found, options = [], {"checkpoint": path, "checkpoint_every": 1000}
    for steps in (37, 101, 5000):
        resumed, again, _, part = converging(x, max_steps=steps, **options)
        found += part
    assert resumed.stopped_by == "converged" and resumed.steps == whole.steps
    assert found == rates
    equal_histories(whole.history, resumed.history)
    assert same(parameters_of(guide), parameters_of(again))
    # There is nothing left to do; with a smaller tolerance there is.
    once_more, third, _, rest = converging(x, **options)
    assert once_more.stopped_by == "converged" and not rest
    assert same(parameters_of(guide), parameters_of(third))
    finer = pv.Converged(1e-4, window=200)
    longer, *_ = converging(x, stop=finer, max_steps=whole.steps + 100, **options)
    assert longer.steps == whole.steps + 100


def test_a_run_on_a_loader_goes_on_with_the_minibatches_that_it_compared(tmp_path):
    def stages(steps, path=None):
        torch.manual_seed(5)
        x, stop = make_data(), pv.Converged(0.01, window=16)
        loader = DataLoader(TensorDataset(x), batch_size=10, shuffle=True)
        options = {"max_steps": steps, "epochs": None, "compile": False}
        fit(loader, make_guide(x), stop=stop, checkpoint=path, **options)
        return stop._stages

    whole = stages(70)
    for steps in (20, 50):
        stages(steps, tmp_path / "run.ckpt")
    resumed = stages(70, tmp_path / "run.ckpt")
    assert whole._steps == resumed._steps
    assert whole._followed.rows
    for one, other in zip(whole._followed.rows, resumed._followed.rows, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_warm_up_is_no_part_of_a_stage():
    x = make_data()
    schedule = pv.schedules.LinearWarmup(100)
    result, _, stop, _ = converging(x, schedule=schedule)
    assert result.stopped_by == "converged"
    assert stop._stages._steps <= result.steps - 100
    assert result.history["beta"][-1] == 1.0
    with pytest.raises(ValueError, match=r"stop: Cyclical\(.* has no end"):
        converging(x, schedule=pv.schedules.Cyclical(period=10))


def test_without_an_end_in_sight_the_limits_count():
    result, *_ = converging(make_data(), max_steps=60)
    assert result.stopped_by == "max_steps"
    assert math.isnan(result.promised[0])


@pytest.mark.parametrize(
    "options", [{"tolerance": 0.0}, {"level": 0.6}, {"factor": 1.0}, {"window": 3}]
)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: a number between"):
        pv.Converged(**options)


def test_a_tolerance_is_a_number():
    with pytest.raises(ValueError, match="tolerance='a': a number is needed"):
        pv.Converged(tolerance="a")


def test_what_does_not_go_together_is_refused():
    x, guide = make_data(), make_guide(make_data())
    optimizer = torch.optim.Adam(guide.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for callback in (scheduler, pv.callbacks.EachStep(scheduler)):
        with pytest.raises(ValueError, match="sets the learning rate, and so does a scheduler"):
            fit(x, guide, optim=optimizer, callbacks=[callback], stop=pv.Converged())
    rows = pv.LocalGuide(model, num_data=40, example=x)
    with pytest.raises(ValueError, match="rows move in minibatches; pyro_vae.refine"):
        fit(x, rows, batch_size=10, stop=pv.Converged())
    with pytest.raises(TypeError, match="stop=0.01: a pv.Converged"):
        fit(x, stop=0.01)
    with pytest.raises(ValueError, match="give it to fit as stop="):
        fit(x, callbacks=[pv.Converged()])
