"""Laws of the reference models other than images."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_vae as pv
from pyro_vae.programs.nodes import sample_nodes
from tests.zoo.cases import (
    CASES,
    NUM_DATA,
    Case,
    arguments,
    assert_simulates,
    assert_vectorized_is_looped,
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_the_description(case: Case):
    told = pv.describe(case.model, case.batch)
    kinds = {row["site"]: row["kind"] for row in told.rows}
    assert told.data_plate == case.data_plate
    assert [name for name, kind in kinds.items() if kind == "local latent"] == case.latents
    assert [name for name, kind in kinds.items() if kind == "observed"] == case.observed
    assert len(kinds) == len(case.latents) + len(case.observed)


def test_particles_at_once_are_particles_one_by_one(case: Case):
    assert_vectorized_is_looped(case.model, case.data_plate, *arguments(case.batch))


@pytest.mark.parametrize("particles", ["plate", "repeat"])
def test_particles_run_together(case: Case, particles: str):
    """A way of running particles that disagrees with a loop is refused."""
    pv.log_weights(case.model, case.guide, case.batch, num_particles=2, particles=particles, seed=0)


def test_chunks_change_nothing(case: Case):
    guide = case.guide

    def weights(chunk_size: int | None) -> Tensor:
        found = pv.log_weights(
            case.model, guide, case.batch, num_particles=6, seed=0, chunk_size=chunk_size
        )
        return found.total

    for chunk_size in (1, 11):
        torch.testing.assert_close(weights(chunk_size), weights(None), rtol=1e-12, atol=1e-12)


def test_float64_throughout(case: Case):
    batch = arguments(case.batch)
    for fn in (case.guide, case.model):
        for name, node in sample_nodes(poutine.trace(fn).get_trace(*batch)):
            assert node["value"].dtype == torch.float64, name
    assert pv.log_weights(case.model, case.guide, case.batch, num_particles=2).total.dtype == (
        torch.float64
    )


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(5)], ids=["ELBO", "IWAE"])
def test_a_gradient_reaches_every_parameter(case: Case, loss: pyro.infer.ELBO):
    guide = case.guide
    loss(case.model, guide)(*arguments(case.batch)).backward()
    for owner in (case.model, guide):
        for name, parameter in owner.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(5)], ids=["ELBO", "IWAE"])
def test_a_few_steps_lower_the_loss(case: Case, loss: pyro.infer.ELBO):
    guide, batch = case.guide, arguments(case.batch)
    pair = loss(case.model, guide)

    def mean_loss() -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            return torch.stack([pair(*batch) for _ in range(10)]).mean()

    before = mean_loss()
    parameters = {*case.model.parameters(), *guide.parameters()}
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        pair(*batch).backward()
        optimizer.step()
    assert mean_loss() < before - 0.1 * NUM_DATA


def test_simulations_have_a_seed_of_their_own(case: Case):
    assert_simulates(case.model)
