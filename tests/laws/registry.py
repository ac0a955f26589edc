"""Every reference model and family: how to make it, with a guide and a batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.zoo import likelihoods

N = 6


@dataclass(frozen=True)
class Entry:
    """How to make a reference model, and what is special about it.

    Attributes:
        make: the model.
        encoder: arguments of make_encoder; None where there is nothing to propose.
        simulate: options of simulate.
        guide: options of the guide.
        missing: whether values may be missing.
    """

    make: Callable[[], Any]
    encoder: tuple[Any, ...] | None = ([5],)
    simulate: dict[str, Any] = field(default_factory=dict)
    guide: Callable[[Any], dict[str, Any]] = lambda model: {}
    missing: bool = True


def vae(likelihood: Any) -> Callable[[], Any]:
    return lambda: pv.zoo.VAE(4, 2, hidden=[3], likelihood=copy.deepcopy(likelihood))


TABLE = torch.tensor([[4.0, 1.0, 2.0], [1.0, 3.0, 2.0]])


ENTRIES = {
    "Bernoulli VAE": Entry(vae(likelihoods.Bernoulli())),
    "Binomial VAE": Entry(vae(likelihoods.Binomial(5))),
    "Gaussian VAE, sigma learned": Entry(vae(likelihoods.Gaussian())),
    "Gaussian VAE, sigma fixed": Entry(vae(likelihoods.Gaussian(0.5))),
    "categorical VAE": Entry(vae(likelihoods.Categorical(3))),
    "convolutional VAE": Entry(
        lambda: pv.zoo.ConvVAE((1, 4, 4), 2, channels=[3, 2], batch_norm=True), (5,)
    ),
    "two layers": Entry(lambda: pv.zoo.TwoLayerVAE(4, (2, 2), hidden=[3])),
    "two layers, top-down": Entry(
        lambda: pv.zoo.TwoLayerVAE(4, (2, 2), hidden=[3]), guide=lambda model: {"top_down": True}
    ),
    "conditional VAE": Entry(lambda: pv.zoo.ConditionalVAE(4, 2, 3, hidden=[3])),
    "mixture VAE": Entry(lambda: pv.zoo.MixtureVAE(4, 2, 3, hidden=[3])),
    "probabilistic PCA": Entry(lambda: pv.zoo.ProbabilisticPCA(4, 2)),
    "factor analysis": Entry(lambda: pv.zoo.FactorAnalysis(4, 2)),
    "topic model": Entry(
        lambda: pv.zoo.TopicModel(6, 3), simulate={"document_length": 20}, missing=False
    ),
    "single cells, size given": Entry(
        lambda: pv.zoo.SingleCellCounts(5, 2, hidden=[3], size_prior=(4.0, 0.5)),
        simulate={"size": torch.linspace(20.0, 90.0, N)},
    ),
    "single cells, size latent": Entry(
        lambda: pv.zoo.SingleCellCounts(5, 2, hidden=[3], size_prior=(4.0, 0.5))
    ),
    "deep Markov model": Entry(
        lambda: pv.zoo.DeepMarkovModel(3, 2, hidden=[3]), (3,), simulate={"num_steps": 3}
    ),
    "item response": Entry(
        lambda: pv.zoo.ItemResponse(5),
        guide=lambda model: {"global_guide": model.make_global_guide()},
    ),
    "item response, top-down": Entry(
        lambda: pv.zoo.ItemResponse(5),
        guide=lambda model: {"global_guide": AutoMultivariateNormal(model.items), "top_down": True},
    ),
    "eye colour": Entry(lambda: pv.zoo.EyeColour(TABLE), None, missing=False),
}


FAMILIES = {
    "full rank": pv.families.FullRankNormal(),
    "low rank": pv.families.LowRankNormal(1),
    "flow": pv.families.Flow(bins=3, hidden=2),
    "annealed": pv.families.Annealed(pv.families.Normal(), 2),
    "point": pv.families.Delta(),
}


# Of each kind of structure one: one site, a hierarchy, constrained supports, masked latents,
# a discrete latent summed out, global latents.
KINDS = [
    "Bernoulli VAE",
    "two layers",
    "topic model",
    "single cells, size latent",
    "deep Markov model",
    "mixture VAE",
    "item response",
]


class Filling(nn.Module):
    """An encoder, missing values filled in with zero."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any, seen: Tensor | None = None, **kwargs: Any) -> Tensor:
        filled = {key: torch.nan_to_num(value) for key, value in kwargs.items()}
        return self.encoder(*(torch.nan_to_num(a) for a in args), **filled)


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def pair(
    name: str, family: Any = None, *, missing: bool = False, sees_mask: bool = False
) -> tuple[Any, Any, Batch]:
    """Return a model, a guide and a batch, in float64.

    With ``missing`` some values are, and the encoder fills them in, or ``sees_mask``.
    """
    entry = ENTRIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = entry.make().double()
        data = as_batch(model.simulate(N, seed=1, **entry.simulate))
        kwargs = {key: double(value) for key, value in data.kwargs.items()}
        batch = Batch(tuple(map(double, data.args)), kwargs)
        if entry.encoder is None:
            return model, pv.ExactGuide(model, example=batch), batch
        options = {"missing": True} if sees_mask else {}
        encoder = model.make_encoder(*entry.encoder, **options).double()
        options = {"family": family, **entry.guide(model)}
        if not missing:
            return model, pv.AmortizedGuide(model, encoder, example=batch, **options), batch
        x = batch.args[0] if batch.args else kwargs["x"]
        seen = torch.ones_like(x, dtype=torch.bool)
        seen.reshape(N, -1)[::2, 0] = False
        if x.is_floating_point():
            x.masked_fill_(~seen, math.nan)
            whole = pv.MissingData(model)
        else:
            batch = Batch(batch.args, {**kwargs, "seen": seen})
            whole = pv.MissingData(model, mask="seen")
        wrapped: nn.Module = Filling(encoder)
        if sees_mask:
            key = 0 if batch.args else "x"
            mask = "seen" if "seen" in batch.kwargs else None
            wrapped = pv.MissingEncoder(
                encoder, dim=1 if x.ndim == 4 else -1, mask=mask, values=key
            )
        guide = pv.AmortizedGuide(whole, wrapped, example=batch, **options)
        return whole, guide, batch


every_model = pytest.mark.parametrize("name", ENTRIES)


every_amortized = pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.encoder])


every_family = pytest.mark.parametrize(
    "family", [pytest.param(n, marks=pytest.mark.slow if n == "annealed" else ()) for n in FAMILIES]
)


every_kind = pytest.mark.parametrize("name", KINDS)
