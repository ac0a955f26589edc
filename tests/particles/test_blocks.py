"""Rows on demand are looked at block by block, in the order in which they are read."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch

import pyro_vae as pv
from pyro_vae.particles.blocks import worth_parts
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.particles.pair_runner import first_block
from pyro_vae.programs.on_demand import OnDemand, on_demand

COUNTS = torch.poisson(torch.full((600, 2), 3.0), generator=torch.Generator().manual_seed(0))
FIRST = first_block(len(COUNTS))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z.exp()).to_event(1), obs=x)


def sparse(x=COUNTS):
    return on_demand(scipy.sparse.csr_matrix(x.numpy()))


def guide_of(program):
    return pv.LocalGuide(program, num_data=len(COUNTS), example=COUNTS[:5])


def test_a_block_has_the_structure_and_values_of_its_rows():
    assert len(COUNTS) > 2 * FIRST
    evaluator = Evaluator(model, guide_of(model), sparse(), seed=0)
    assert evaluator.num_data == len(COUNTS)
    for rows in evaluator.data_blocks():
        structure = evaluator.structure_of(rows)
        assert torch.equal(structure.sites["x"].value, COUNTS[rows])


def test_a_model_with_other_sites_on_later_rows_is_refused():
    def changing(x):
        model(x)
        if bool((x > 50).any()):
            pyro.sample("more", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    data = COUNTS.clone()
    data[FIRST] = 60.0
    evaluator = Evaluator(changing, guide_of(model), sparse(data), seed=0)
    first, second = evaluator.data_blocks()[:2]
    evaluator.structure_of(first)
    with pytest.raises(ValueError, match="more"):
        evaluator.structure_of(second)


def test_what_fails_on_the_first_rows_says_that_these_alone_were_run():
    def for_all(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + torch.zeros(len(COUNTS)), 1.0), obs=x[:, 0])

    with pytest.raises((RuntimeError, ValueError)) as caught:
        Evaluator(for_all, guide_of(model), sparse(), seed=0)
    assert any("read in parts" in note for note in caught.value.__notes__)


def test_one_block_or_one_datum_is_read_whole():
    assert isinstance(worth_parts(sparse(), None), OnDemand)
    assert not isinstance(worth_parts(sparse(), False), OnDemand)
    few = worth_parts(sparse(COUNTS[:FIRST]), None)
    assert not isinstance(few, OnDemand) and torch.equal(few.args[0], COUNTS[:FIRST])
