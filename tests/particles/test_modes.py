"""Modes of particles: values and terms go into a run's shape and come back."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.particles.modes import MODES, Loop, Plate, Repeat, per_datum
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.sites import SiteShape

K, N = 3, 4
every_mode = pytest.mark.parametrize("name", MODES)


def numbers(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@every_mode
def test_values_come_back(name):
    """Of a site in both plates with an event, [K, inner, data, event]."""
    mode, value = MODES[name](2, -1), numbers(K, 2, N, 5)
    runs = [mode.fold(value, SiteShape(2, 1), run) for run in range(mode.num_runs(K))]
    shapes = {"plate": (K, 2, N, 5), "repeat": (2, K * N, 5), "loop": (2, N, 5)}
    assert all(run.shape == shapes[name] for run in runs)
    assert torch.equal(mode.unfold(runs, 1, K), value)


@every_mode
def test_terms_are_summed_for_each_datum(name):
    """A term [K, inner, data] by each mode is its sum over the inner plate, [K, N]."""
    mode, term = MODES[name](2, -1), numbers(K, 2, N)
    runs = [mode.fold(term, SiteShape(2, 0), run) for run in range(mode.num_runs(K))]
    assert torch.equal(mode.by_particle(runs, K, -1), term.sum(1))


@every_mode
def test_numbers_are_spread_over_a_site(name):
    mode, by_datum = MODES[name](2, -1), numbers(K, N)
    runs = [mode.spread(by_datum, run, mode.plate_dims) for run in range(mode.num_runs(K))]
    back = mode.by_particle(runs, K, -1)
    assert torch.equal(back, by_datum)


def test_draws_of_each_mode_are_k_for_each_datum():
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-6))

    x = torch.arange(4.0)
    for name in MODES:
        mode = MODES[name](1, -1)
        (run,) = mode.programs(K, program)
        batch = mode.batch(as_batch(x), K)
        traces = [poutine.trace(run).get_trace(*batch.args) for _ in range(mode.num_runs(K))]
        values = mode.unfold([trace.nodes["z"]["value"] for trace in traces], 0, K)
        torch.testing.assert_close(values, x.expand(K, N), rtol=0, atol=1e-4)


def test_dimensions_of_plates():
    assert (Plate(2, -1).plate_dims, Plate(2, -1).first_enum_dim) == (3, -4)
    assert (Loop(2, -1).plate_dims, Loop(2, -1).first_enum_dim) == (2, -3)
    assert (Loop(2, -1).num_runs(K), Repeat(2, -1).repeats(K), Plate(2, -1).repeats(K)) == (K, K, 1)


def test_one_datum_has_nothing_to_repeat():
    with pytest.raises(ValueError, match="needs a data plate to repeat along"):
        Repeat(1, None)


def test_sums_over_all_but_the_data():
    term = numbers(K, 2, N)
    assert torch.equal(per_datum(term, 2, -1, leading=1), term.sum(1))
    assert torch.equal(per_datum(term, 2, None, leading=1), term.sum((1, 2)).unsqueeze(-1))
    assert torch.equal(per_datum(numbers(N), 2, -1, leading=0), numbers(N))
    assert per_datum(torch.tensor(2.0), 2, -1, leading=0).tolist() == [2.0]
