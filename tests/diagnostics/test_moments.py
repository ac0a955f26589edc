"""Means and widths beside those of chains: Gaussians whose ratios are known."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_vae.diagnostics.moments import Moments

D = 40


def rotated(seed: int = 0) -> np.ndarray:
    """An orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]


def chains(rng: np.random.Generator, root: np.ndarray) -> np.ndarray:
    return 3.0 + rng.normal(size=(4, 1000, len(root))) @ root.T


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_one_direction_among_many(factor):
    """A width that is wrong along one direction alone: no axis shows it, that direction does."""
    rng = np.random.default_rng(1)
    turn = rotated()
    wrong = np.ones(D)
    wrong[0] = factor
    draws = 3.0 + (rng.normal(size=(4000, D)) * wrong) @ turn.T
    found = Moments.of(draws, chains(rng, np.eye(D)))
    axes, directions = found.width[:D], found.width[D:]
    # The axes have the share of the direction that the turn gives them.
    of_axes = np.sqrt(1 + (factor**2 - 1) * turn[:, 0] ** 2)
    assert (np.abs(axes - of_axes) < 4.5 * found.width_se[:D]).all()
    narrowest, widest, _ = directions
    error = 4 * found.width_se[D : D + 2].max()
    # What is found is near the direction, not it: 0.06 of its share goes astray.
    assert narrowest == pytest.approx(min(factor, 1.0), abs=error + 0.06 * (factor < 1))
    assert widest == pytest.approx(max(factor, 1.0), abs=error + 0.12 * (factor > 1))


def test_a_mean_that_is_off():
    """By 0.5 along a direction, in posterior standard deviations of a correlated posterior."""
    rng = np.random.default_rng(2)
    root = np.linalg.cholesky(0.7 * np.ones((D, D)) + 0.3 * np.eye(D))
    shift = 0.5 * root @ (np.arange(D) == D - 1)  # the last axis of the white coordinates
    draws = 3.0 + rng.normal(size=(4000, D)) @ root.T + shift
    found = Moments.of(draws, chains(rng, root))
    wanted = shift / np.sqrt(np.diag(root @ root.T))
    assert (np.abs(found.shift[:D] - wanted) < 4.5 * found.shift_se[:D]).all()
    assert abs(found.shift[-1]) == pytest.approx(0.5, abs=4 * found.shift_se[-1] + 0.05)
    assert np.abs(wanted).max() < 0.3  # less along every axis


def test_errors_cover():
    """Differences from the truth in standard errors, over repetitions with dependent chains."""
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(60):
        noise = rng.normal(size=(4, 1200, 3))
        walk = np.empty_like(noise)
        walk[:, 0] = noise[:, 0]
        for step in range(1, 1200):
            walk[:, step] = 0.8 * walk[:, step - 1] + 0.6 * noise[:, step]
        found = Moments.of(rng.normal(size=(2000, 3)) * 0.7, walk[:, 200:])
        scores.append([found.shift / found.shift_se, (found.width - 0.7) / found.width_se])
    spread = np.square(np.array(scores)).mean((0, 2))
    assert ((spread > 0.8) & (spread < 1.35)).all()
