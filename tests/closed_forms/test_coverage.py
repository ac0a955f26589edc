"""Intervals of stated standard errors cover the exact values as often as they should.

A smaller version of benchmarks/coverage.py, whose problems have answers by quadrature.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "coverage.py"
REPETITIONS, PARTICLES = 30, 2000


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_quadrature_is_exact_where_there_is_a_formula(coverage):
    """z ~ N(0, 1), two features N(z, 1): evidence, posterior and best Normal are known."""
    x = torch.tensor([[0.3, -1.0], [2.0, 1.0]], dtype=torch.float64)
    normal = torch.distributions.Normal
    problem = coverage.Problem(lambda z: normal(z, 1.0), x, 0.0, 1.0)
    joint = torch.distributions.MultivariateNormal(x.new_zeros(2), torch.eye(2).double() + 1)
    evidence, mean = problem.exact()
    torch.testing.assert_close(evidence, joint.log_prob(x))
    torch.testing.assert_close(mean, x.sum(-1) / 3)
    loc, scale = problem.best_normal()
    torch.testing.assert_close(loc, x.sum(-1) / 3, rtol=0, atol=1e-6)
    torch.testing.assert_close(scale, torch.full_like(loc, 3**-0.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(problem.elbo(loc, scale), evidence)


@pytest.mark.slow
def test_intervals_cover(coverage):
    """Coverage between 91% and 98%, give or take what so few repetitions can tell.

    Draws of different data are independent. The limits are those of as many intervals that cover
    with probability 0.91 or 0.98, passed by chance once in 10,000.
    """
    everything: dict[str, list[bool]] = {}
    for name, problem in coverage.problems().items():
        tallies = coverage.coverage(problem, REPETITIONS, PARTICLES)
        for quantity, tally in tallies.items():
            count = len(tally.per_datum)
            assert sum(tally.per_datum) >= binom.ppf(1e-4, count, 0.91), (name, quantity)
            everything.setdefault(quantity, []).extend(tally.per_datum)
    assert set(everything) == set(coverage.QUANTITIES)
    for quantity, inside in everything.items():
        assert len(inside) >= 400, quantity
        assert sum(inside) <= binom.ppf(1 - 1e-4, len(inside), 0.98) < len(inside), quantity
