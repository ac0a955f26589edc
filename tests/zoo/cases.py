"""Reference models other than images, each with a batch and what describe says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.programs.nodes import latent_nodes, sample_nodes

NUM_DATA = 7


@dataclass(frozen=True)
class Case:
    """A model with its batch and its description."""

    model: nn.Module
    batch: Any
    encoder: nn.Module
    data_plate: str
    latents: list[str]
    observed: list[str]

    @property
    def guide(self) -> pv.AmortizedGuide:
        return pv.AmortizedGuide(self.model, self.encoder, example=self.batch)


def linear(kind: type) -> Case:
    model = kind(6, 2).double()
    with torch.no_grad():
        model.mean.normal_()
        model.log_noise.normal_(-0.5, 0.3)
    return Case(model, model.simulate(NUM_DATA), model.make_encoder([8]), "data", ["z"], ["x"])


def topics() -> Case:
    model = pv.zoo.TopicModel(20, 3, concentration=0.7).double()
    # Documents of different lengths.
    counts = torch.cat([model.simulate(3, document_length=30), model.simulate(NUM_DATA - 3)])
    return Case(model, counts, model.make_encoder([8]), "documents", ["topic_shares"], ["counts"])


def cells(*, size_given: bool) -> Case:
    model = pv.zoo.SingleCellCounts(12, 2, hidden=[8], size_prior=(4.0, 0.5)).double()
    size = torch.linspace(20, 200, NUM_DATA, dtype=torch.float64) if size_given else None
    batch = model.simulate(NUM_DATA, size=size)
    latents = ["z"] if size_given else ["z", "size"]
    return Case(model, batch, model.make_encoder([8]), "cells", latents, ["counts"])


def sequences() -> Case:
    model = pv.zoo.DeepMarkovModel(3, 2, hidden=[8]).double()
    batch = model.simulate(NUM_DATA, num_steps=4)
    steps = range(1, 5)
    return Case(
        model,
        batch,
        model.make_encoder(5),
        "sequences",
        [f"z_{t}" for t in steps],
        [f"x_{t}" for t in steps],
    )


CASES = {
    "factor analysis": lambda: linear(pv.zoo.FactorAnalysis),
    "probabilistic PCA": lambda: linear(pv.zoo.ProbabilisticPCA),
    "topics": topics,
    "cells": lambda: cells(size_given=False),
    "cells of given size": lambda: cells(size_given=True),
    "sequences": sequences,
}


def arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def latents(model: Callable[..., Any], *batch: Any) -> dict[str, Tensor]:
    """Draws from the prior."""
    trace = poutine.trace(model).get_trace(*batch)
    return {name: node["value"] for name, node in latent_nodes(trace)}


def log_joint(
    model: Callable[..., Any], plate: str, values: dict[str, Tensor], *batch: Any
) -> Tensor:
    """Sum of the log densities of the sites in the data plate, [..., N]."""
    conditioned = poutine.condition(model, data=values)
    trace = poutine.trace(conditioned).get_trace(*batch)
    return sum(
        node["fn"].log_prob(node["value"])
        for _, node in sample_nodes(trace)
        if plate in {frame.name for frame in node["cond_indep_stack"]}
    )


def assert_vectorized_is_looped(model: Callable[..., Any], plate: str, *batch: Any) -> None:
    with torch.no_grad():
        draws = [latents(model, *batch) for _ in range(4)]
        one_by_one = torch.stack([log_joint(model, plate, values, *batch) for values in draws])
        values = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        particles = pyro.plate("particles", 4, dim=-2)
        together = log_joint(particles(model), plate, values, *batch)
    assert together.shape == (4, NUM_DATA)
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
    assert one_by_one.std(0).min() > 0  # the draws differ, and with them the densities


def assert_simulates(model: Any) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (arguments(model.simulate(50, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    for tensor, same in zip(first, again, strict=True):
        assert len(tensor) == 50
        assert torch.equal(tensor, same)
    assert not torch.equal(first[0], other[0])
