"""L-BFGS by rows: each row reaches its own optimum, whatever its scale, never above its start."""

from __future__ import annotations

import torch

from pyro_vae.refinement.lbfgs import minimize_rows


def test_quadratics_of_scales_from_1e_minus_3_to_1e3():
    """Curvatures of 1e6, 1 and 1e-6 in one row: the optimum to 1e-6 of each scale."""
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    target = torch.randn(5, 3, dtype=torch.float64) * scales
    rows, _, _ = minimize_rows(
        lambda x: ((x - target) / scales).square().sum(1) / 2, torch.zeros_like(target), 500
    )
    assert ((rows - target) / scales).abs().max() < 1e-6


def test_the_rosenbrock_function_from_many_starts():
    torch.manual_seed(0)
    start = 2 * torch.randn(20, 2, dtype=torch.float64)
    rows, _, taken = minimize_rows(
        lambda x: (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2, start, 500
    )
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-6)
    assert taken < 200


def test_rows_do_not_mix():
    """A row alone and among others goes the same way."""
    target = torch.randn(4, 2, dtype=torch.float64)

    def objective(which):
        return lambda x: (x - target[which]).pow(4).sum(1) + x.square().sum(1)

    start = torch.zeros(4, 2, dtype=torch.float64)
    together, *_ = minimize_rows(objective(slice(None)), start, 7)
    alone, *_ = minimize_rows(objective(slice(2, 3)), start[2:3], 7)
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=0)


def test_a_step_out_of_the_domain_is_shortened():
    rows, _, _ = minimize_rows(
        lambda x: (x - x.log()).sum(1), torch.full((1, 1), 50.0, dtype=torch.float64), 100
    )
    assert abs(rows.item() - 1.0) < 1e-7


def test_an_optimum_stays():
    rows, _, taken = minimize_rows(lambda x: x.square().sum(1), torch.zeros(3, 2), 100)
    assert torch.equal(rows, torch.zeros(3, 2)) and taken == 1


def test_a_row_that_runs_away_promises_more():
    """-log x falls for ever: no optimum, and its last direction says so; a parabola's does not."""

    def objective(x):
        return torch.stack([x[0].square().sum(), x[1, 0]])

    _, promised, _ = minimize_rows(objective, torch.ones(2, 1, dtype=torch.float64), 100)
    assert promised[0] < 1e-12 and promised[1] > 0.5
