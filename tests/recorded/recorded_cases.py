"""Models, guides and data of record_numbers.py, small, by public names of pyro_vae alone."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vae as pv

N = 6


@dataclass(frozen=True)
class Case:
    """A model, a guide, and what both are called with.

    Attributes:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: a tuple of arguments, or a mapping of keyword arguments.
        data_plate: as all functions take it.
    """

    model: Any
    guide: Any
    batch: tuple[Any, ...] | dict[str, Any]
    data_plate: str | bool | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        return () if isinstance(self.batch, dict) else self.batch

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.batch if isinstance(self.batch, dict) else {}


Make = Callable[[], Case]


def in_double(make: Make) -> Make:
    """Return a maker after which the item goes on with float64 as the default."""

    def made() -> Case:
        torch.set_default_dtype(torch.float64)
        return make()

    return made


# --- a linear Gaussian model: every objective, with every kind of guide, in every setting -----

SETTINGS = (
    "plain",
    "subsampled",
    "masked",
    "missing",
    "scaled",
    "tempered",
    "float32",
    "repeat",
    "loop",
)
GUIDES = ("amortized", "local", "function", "module", "autonormal", "dependent", "score")
PROPOSAL = {
    "slope": [[0.3, 0.1], [-0.1, 0.2]],
    "intercept": [1.0, -0.8],
    "log_scale": [-0.4, 0.3],
    "coupling": 0.4,
}


class Linear(nn.Module):
    """a ~ N(0, 1), b ~ N(w a, 1), x ~ N((a, b) + mu, 0.7), in one of the settings."""

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting
        self.w = nn.Parameter(torch.tensor(0.8))
        self.mu = nn.Parameter(torch.tensor([0.4, -0.3]))

    def forward(self, x: Tensor, index: Tensor, seen: Tensor) -> None:
        pyro.module("linear", self)
        with contextlib.ExitStack() as stack:
            stack.enter_context(rows(self.setting, x, index))
            if self.setting == "scaled":
                stack.enter_context(poutine.scale(scale=3.0))
            if self.setting == "masked":
                stack.enter_context(poutine.mask(mask=seen))
            warm_up = 0.3 if self.setting == "tempered" else 1.0
            with poutine.scale(scale=warm_up):
                a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
                b = pyro.sample("b", dist.Normal(self.w * a, 1.0))
            if self.setting in ("repeat", "loop") and a.ndim > 1:
                raise ValueError("one dimension, please")
            if self.setting == "loop" and a.numel() > N:
                raise ValueError(f"{N} data, please")
            if self.setting == "missing":
                stack.enter_context(poutine.mask(mask=seen))
            location = torch.stack([a, b], -1) + self.mu
            pyro.sample("x", dist.Normal(location, 0.7).to_event(1), obs=x)


def rows(setting: str, x: Tensor, index: Tensor) -> Any:
    if setting == "subsampled":
        return pyro.plate("data", 2 * N, subsample=index)
    return pyro.plate("data", len(x))


class Drawn(dist.Normal):
    """A Normal whose draws carry no gradient."""

    has_rsample = False

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return super().rsample(torch.Size(sample_shape))


def propose(
    numbers: Any, setting: str, x: Tensor, index: Tensor, fn: Any = dist.Normal, coupling: Any = 0.0
) -> None:
    warm_up = 0.3 if setting == "tempered" else 1.0
    with rows(setting, x, index), poutine.scale(scale=warm_up):
        loc = x @ numbers["slope"].T + numbers["intercept"]
        scale = numbers["log_scale"].exp()
        a = pyro.sample("a", fn(loc[:, 0], scale[0]))
        pyro.sample("b", fn(loc[:, 1] + coupling * a, scale[1]))


class LinearGuide(nn.Module):
    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting
        self.numbers = nn.ParameterDict({n: torch.tensor(v) for n, v in PROPOSAL.items()})
        del self.numbers["coupling"]

    def forward(self, x: Tensor, index: Tensor, seen: Tensor) -> None:
        pyro.module("linear_guide", self)
        propose(self.numbers, self.setting, x, index)


class OfFirst(nn.Module):
    """A network of the first argument."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.net(x)


def linear_guide(kind: str, model: Linear, batch: tuple[Tensor, ...]) -> Any:
    setting = model.setting
    if kind == "amortized":
        return pv.AmortizedGuide(model, OfFirst(mlp(2, 3)), example=batch)
    if kind == "local":
        return pv.LocalGuide(model, num_data=N, example=batch)
    if kind == "module":
        return LinearGuide(setting)
    if kind == "autonormal":
        guide = AutoNormal(model, create_plates=lambda x, index, seen: rows(setting, x, index))
        guide(*batch)
        return guide

    def guide(x: Tensor, index: Tensor, seen: Tensor) -> None:
        numbers = {n: pyro.param(n, torch.tensor(v, dtype=x.dtype)) for n, v in PROPOSAL.items()}
        propose(
            numbers,
            setting,
            x,
            index,
            Drawn if kind == "score" else dist.Normal,
            numbers["coupling"] if kind == "dependent" else 0.0,
        )

    return guide


def linear(kind: str, setting: str) -> Case:
    dtype = torch.float32 if setting == "float32" else torch.float64
    torch.set_default_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64).to(dtype)
    seen = torch.ones(N, dtype=torch.bool)
    if setting in ("masked", "missing"):
        seen[2] = False
        x[2] = 0.0
    batch = (x, torch.arange(N), seen)
    model = Linear(setting)
    guide = linear_guide(kind, model, batch)
    return Case(model, poutine.scale(guide, scale=3.0) if setting == "scaled" else guide, batch)


def mlp(inputs: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh())


# --- the zoo, whole and with missing values ---------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """How to make a reference model, and what is special about it."""

    make: Callable[[], Any]
    encoder: tuple[Any, ...] | None = ([5],)
    simulate: dict[str, Any] = field(default_factory=dict)
    guide: Callable[[Any], dict[str, Any]] = lambda model: {}
    missing: bool = True


def vae(likelihood: Any) -> Callable[[], Any]:
    return lambda: pv.zoo.VAE(4, 2, hidden=[3], likelihood=likelihood)


def cells() -> Any:
    return pv.zoo.SingleCellCounts(5, 2, hidden=[3], size_prior=(4.0, 0.5))


TABLE = torch.tensor([[4.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
ZOO = {
    "Bernoulli VAE": Entry(vae(pv.zoo.likelihoods.Bernoulli())),
    "Binomial VAE": Entry(vae(pv.zoo.likelihoods.Binomial(5))),
    "Gaussian VAE": Entry(vae(pv.zoo.likelihoods.Gaussian())),
    "categorical VAE": Entry(vae(pv.zoo.likelihoods.Categorical(3))),
    "convolutional VAE": Entry(
        lambda: pv.zoo.ConvVAE((1, 4, 4), 2, channels=[3, 2], batch_norm=True), (5,)
    ),
    "convolutional VAE, repeat": Entry(
        lambda: pv.zoo.ConvVAE((1, 4, 4), 2, channels=[3, 2], batch_norm=False), (5,)
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
    "single cells, size given": Entry(cells, simulate={"size": torch.linspace(20.0, 90.0, N)}),
    "single cells, size latent": Entry(cells),
    "deep Markov model": Entry(
        lambda: pv.zoo.DeepMarkovModel(3, 2, hidden=[3]), (3,), simulate={"num_steps": 3}
    ),
    "item response": Entry(
        lambda: pv.zoo.ItemResponse(5),
        guide=lambda model: {"global_guide": model.make_global_guide()},
    ),
    "eye colour": Entry(lambda: pv.zoo.EyeColour(TABLE), None, missing=False),
}
FAMILIES = {
    "full rank": pv.families.FullRankNormal(),
    "low rank": pv.families.LowRankNormal(1),
    "flow": pv.families.Flow(bins=3, hidden=2),
    "point": pv.families.Delta(),
}
KINDS = (
    "Bernoulli VAE",
    "two layers",
    "topic model",
    "single cells, size latent",
    "deep Markov model",
    "mixture VAE",
    "item response",
)


class Filling(nn.Module):
    """An encoder, missing values filled in with zero."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any, seen: Tensor | None = None, **kwargs: Any) -> Tensor:
        filled = {key: torch.nan_to_num(value) for key, value in kwargs.items()}
        return self.encoder(*(torch.nan_to_num(a) for a in args), **filled)


class WithoutLast(nn.Module):
    """An encoder of all positional arguments but the last, the mask."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any) -> Tensor:
        return self.encoder(*args[:-1])


def zoo(
    name: str, family: Any = None, *, missing: bool = False, dtype: torch.dtype = torch.float64
) -> Case:
    entry = ZOO[name]
    model = entry.make().to(dtype)
    data = model.simulate(N, seed=1, **entry.simulate)
    batch: Any = data if isinstance(data, (tuple, Mapping)) else (data,)
    if isinstance(batch, Mapping):
        batch = {key: of_dtype(value, dtype) for key, value in batch.items()}
    else:
        batch = tuple(of_dtype(value, dtype) for value in batch)
    if entry.encoder is None:
        return Case(model, pv.ExactGuide(model, example=batch), batch)
    encoder = model.make_encoder(*entry.encoder).to(dtype)
    options = {"family": family, **entry.guide(model)}
    if not missing:
        return Case(model, pv.AmortizedGuide(model, encoder, example=batch, **options), batch)
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    seen = torch.ones_like(x, dtype=torch.bool)
    seen.reshape(N, -1)[::2, 0] = False
    if x.is_floating_point():
        x.masked_fill_(~seen, math.nan)
        whole, net = pv.MissingData(model), Filling(encoder)
    elif isinstance(batch, dict):
        batch = {**batch, "seen": seen}
        whole, net = pv.MissingData(model, mask="seen"), Filling(encoder)
    else:
        batch = (*batch, seen)
        whole, net = pv.MissingData(model, mask="seen"), WithoutLast(encoder)
    return Case(whole, pv.AmortizedGuide(whole, net, example=batch, **options), batch)


def of_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


# --- structures: plates, discrete sites, masks, supports, guides of all makes ------------------

STRUCTURES: dict[str, Make] = {}


def structure(make: Make) -> Make:
    STRUCTURES[make.__name__.replace("_", " ")] = in_double(make)
    return make


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def table(name: str, *shape: int, value: float = 0.1) -> Tensor:
    return pyro.param(name, lambda: value + 0.1 * torch.arange(math.prod(shape)).reshape(shape))


MEANS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@structure
def inner_plate_outside() -> Case:
    """The data at dim -1, an inner plate at dim -2, latents in both."""

    def plates(y: Tensor) -> Any:
        return pyro.plate("data", y.shape[0], dim=-1), pyro.plate("inner", y.shape[1], dim=-2)

    def model(y: Tensor) -> None:
        rows, inner = plates(y)
        with rows:
            z = pyro.sample("z", dist.Normal(table("m"), 1.0))
            with inner:
                u = pyro.sample("u", dist.Normal(z, 0.5))
                pyro.sample("y", dist.Normal(u, 0.7), obs=y.T)

    def guide(y: Tensor) -> None:
        rows, inner = plates(y)
        with rows:
            z = pyro.sample("z", dist.Normal(table("a") * y.mean(1), 0.6))
            with inner:
                pyro.sample("u", dist.Normal(0.5 * (y.T + z), table("s", value=0.5)))

    return Case(model, guide, (data(N, 3),), "data")


@structure
def inner_plate_inside() -> Case:
    """The data at dim -2, an inner plate at dim -1."""

    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("inner", y.shape[1], dim=-1):
                u = pyro.sample("u", dist.Gamma(torch.tensor(2.0), 1.0))
                pyro.sample("y", dist.Normal(z + u, scale), obs=y)

    y = data(N, 3)
    return Case(model, pv.AmortizedGuide(model, mlp(3), example=y, data_plate="data"), (y,), "data")


@structure
def mixture() -> Case:
    """A discrete site that the guide leaves out, above a continuous one."""

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", WEIGHTS.clone(), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(MEANS[c], 0.5))
            pyro.sample(
                "x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0).to_event(1), obs=x
            )

    x = data(N, 2)
    return Case(model, pv.AmortizedGuide(model, mlp(2), example=x), (x,))


@structure
def mixture_with_an_exact_guide() -> Case:
    def model(x: Tensor) -> None:
        means = pyro.param("means", MEANS.clone())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    x = data(N)
    return Case(model, pv.ExactGuide(model, example=x), (x,))


@structure
def discrete_in_an_inner_plate() -> Case:
    grid = torch.tensor([[0.1, -2.0], [1.3, 0.4], [-0.7, 2.2]])

    def model(y: Tensor) -> None:
        means = pyro.param("grid", grid.clone())
        with pyro.plate("data", len(y), dim=-1):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(MEANS[c], 0.5))
            with pyro.plate("inner", 4, dim=-2):
                d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.3) + 0.1 * (c > 0)))
                mean = means[c, d.long()] + z
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y.T)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("z", dist.Normal(table("a") * y.mean(1), 0.8))

    return Case(model, guide, (data(N, 4),), "data")


@structure
def hidden_markov_model() -> Case:
    """A chain of discrete sites in the data plate, all of them summed out."""

    def model(x: Tensor) -> None:
        move = pyro.param(
            "move", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex
        )
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            state: Any = torch.tensor(0)
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"c_{t}", dist.Categorical(move[state]))
                pyro.sample(f"x_{t}", dist.Normal(means[state], 1.0), obs=x[:, t])

    return Case(model, lambda x: None, (data(N, 4),))


@structure
def discrete_proposals() -> Case:
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", 0.4 * torch.ones(N), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(q))

    return Case(model, guide, (data(N),))


@structure
def enumerated_proposals() -> Case:
    def model(x: Tensor) -> None:
        means = pyro.param("means", MEANS.clone())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(means[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.ones(N, 3) / 3, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(q), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(table("m", 3)[c], 0.8))

    return Case(model, guide, (data(N),))


def hierarchy(x: Tensor, num_data: int | None = None) -> None:
    g = pyro.sample("g", dist.Normal(torch.zeros(()), 2.0))
    size = len(x) if num_data is None else num_data
    with pyro.plate("data", size, subsample=None if num_data is None else x):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("s", torch.tensor(0.8))), obs=x)


class OfNumbers(nn.Module):
    """A network of one number for each datum."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(-1))


@structure
def global_latents() -> Case:
    x = data(N)
    globals_ = AutoNormal(poutine.block(hierarchy, expose=["g"]))
    guide = pv.AmortizedGuide(hierarchy, OfNumbers(), example=x, global_guide=globals_)
    return Case(hierarchy, guide, (x,))


@structure
def global_latents_subsampled() -> Case:
    x = data(N)

    def model(x: Tensor) -> None:
        hierarchy(x, 20)

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(table("loc"), 0.3))
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("z", dist.Normal(table("a") * x + 0.2 * g, 0.7))

    return Case(model, guide, (x,))


@structure
def one_datum() -> Case:
    x = data(N)
    guide = AutoMultivariateNormal(hierarchy)
    guide(x)
    return Case(hierarchy, guide, (x,), False)


@structure
def one_datum_in_a_table() -> Case:
    x = data(N)
    guide = pv.LocalGuide(
        hierarchy, num_data=1, example=x, family=pv.families.FullRankNormal(), data_plate=False
    )
    return Case(hierarchy, guide, (x,), False)


@structure
def minibatch_drawn_by_the_model() -> Case:
    x = data(8)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(table("m"), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(table("q", 8)[i], 0.9))

    return Case(model, guide, (x,))


@structure
def auxiliary_site() -> Case:
    x = data(N)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(table("m"), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x)))
    guide(x)
    return Case(model, guide, (x,))


@structure
def weights_of_data() -> Case:
    """A scale for each datum, a tensor."""
    weights = torch.linspace(0.5, 2.0, N)

    def model(x: Tensor, w: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=w):
            z = pyro.sample("z", dist.Normal(table("m"), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, w: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=w):
            pyro.sample("z", dist.Normal(table("a") * x, 0.8))

    return Case(model, guide, (data(N), weights))


@structure
def spike_and_slab() -> Case:
    """A latent that another one masks."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.6)))
            with poutine.mask(mask=on.bool()):
                z = pyro.sample("z", dist.Normal(table("m"), 2.0))
            pyro.sample("x", dist.Normal(on * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(torch.sigmoid(x * table("a"))))
            with poutine.mask(mask=on.bool()):
                pyro.sample("z", dist.Normal(x, 0.8))

    return Case(model, guide, (data(N),))


@structure
def factors() -> Case:
    def model(x: Tensor) -> None:
        p = table("p")
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p, 1.0))
            pyro.factor("x", -((z - x) ** 2))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table("q", N), 1.0))

    return Case(model, guide, (data(N),))


@structure
def observed_in_part() -> Case:
    """Pyro's obs_mask."""
    seen = torch.tensor([True, False, True, True, False, True])

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(table("p"), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(table("q", N), 1.0))
            pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    return Case(model, guide, (data(N), seen))


@structure
def supports() -> Case:
    """Positive numbers, shares, intervals, angles and a vector."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), table("b", value=1.0)))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            part = pyro.sample("part", dist.Beta(torch.tensor(2.0), 3.0))
            turn = pyro.sample("turn", dist.Uniform(torch.tensor(-1.0), 2.0))
            shift = pyro.sample(
                "shift", dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.3)
            )
            pyro.deterministic("mean", rate * part)
            total = (rate * part + turn).unsqueeze(-1) * share + shift.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(total, 0.5).to_event(1), obs=x)

    x = data(N, 3)
    return Case(model, pv.AmortizedGuide(model, mlp(3), example=x), (x,))


@structure
def transformed_proposals() -> Case:
    """Proposals whose draws round to the ends of an interval."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(table("a", value=0.7), 0.8))
            pyro.sample("x", dist.Normal(p, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(table("q", N), 4.0)
            pyro.sample("p", dist.TransformedDistribution(base, dist.transforms.SigmoidTransform()))

    return Case(model, guide, (data(N),))


@structure
def nothing_latent() -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(table("m"), 1.0), obs=x)

    return Case(model, lambda x: None, (data(N),))


@structure
def keyword_arguments() -> Case:
    def model(*, x: Tensor, covariate: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(table("m") * covariate, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(*, x: Tensor, covariate: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table("a") * x + covariate, 0.8))

    return Case(model, guide, {"x": data(N), "covariate": torch.linspace(-1.0, 1.0, N)})


@structure
def points() -> Case:
    x = data(N)
    guide = AutoDelta(local_model, create_plates=lambda x: pyro.plate("data", len(x)))
    guide(x)
    return Case(local_model, guide, (x,))


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


@structure
def outside_the_support() -> Case:
    """A guide that proposes where the model's density is zero."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table("a") + x.abs(), 0.5))

    return Case(model, guide, (data(N),))


# --- small pairs for fit, refine and em ---------------------------------------------------------


class SmallVAE(nn.Module):
    """A VAE of twelve black and white pixels, that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 12))

    def forward(self, x: Tensor) -> None:
        RUNS["model"] += 1
        pyro.module("small_vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            particles = math.prod(z.shape[:-2])
            RUNS[f"model, {particles if particles < 3 else 'more'} at once"] += 1
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


RUNS = collections.Counter[str]()


def pixels(num_data: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(num_data, 1, generator=generator).expand(-1, 12)
    return torch.bernoulli(levels, generator=generator)


def small_pair() -> tuple[nn.Module, pv.AmortizedGuide, Tensor]:
    """Return a model that counts its runs, a guide and data."""
    model, x = SmallVAE(), pixels(20)
    return model, pv.AmortizedGuide(model, mlp(12, 6), example=x), x


def small_case() -> Case:
    model, guide, x = small_pair()
    return Case(model, guide, (x,))


def local_case() -> Case:
    model, x = SmallVAE(), pixels(20)
    return Case(model, pv.LocalGuide(model, num_data=20, example=x), (x,))


def by_hand_case() -> Case:
    model, encoder = SmallVAE(), nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))

    def guide(x: Tensor) -> None:
        RUNS["guide"] += 1
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Case(model, guide, (pixels(20),))


def by_row_case() -> Case:
    """A guide of Pyro's that has parameters for each row by its place."""
    model, x = SmallVAE(), pixels(20)
    guide = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x)))
    return Case(model, guide, (x,))


def items_case() -> Case:
    model = pv.zoo.ItemResponse(5)
    x = model.simulate(20, seed=1)
    encoder = model.make_encoder([5])
    guide = pv.AmortizedGuide(model, encoder, example=x, global_guide=model.make_global_guide())
    return Case(model, guide, (x,))


def hierarchy_case() -> Case:
    """The plate has the size of the minibatch, which fit has to scale."""
    x = 1.5 + torch.randn(20, generator=torch.Generator().manual_seed(0))

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(table("loc"), 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table("a") * x + 0.2 * g, 0.7))

    return Case(hierarchy, guide, (x,))


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_case() -> Case:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Case(schools, AutoNormal(schools), (y, sigma), False)


def digits_case() -> Case:
    images = pv.datasets.digits().train[:24]
    model = pv.zoo.VAE(64, 2, hidden=[8])
    guide = pv.AmortizedGuide(model, model.make_encoder([8]), example=(images[:4] > 8).float())
    return Case(model, guide, (images,))


def dropout_case() -> Case:
    """Noise in the networks, and batch statistics."""
    model, x = SmallVAE(), pixels(20)
    encoder = pv.nets.MLP([12, 6, 6], activate_last=True, batch_norm=True, dropout=0.3)
    return Case(model, pv.AmortizedGuide(model, encoder, example=x), (x,))


def local_model_case(guide: str = "amortized") -> Case:
    """z ~ N(m, 1) in two dimensions, x ~ N(W z, 0.5): posteriors are correlated."""
    loadings = torch.tensor([[1.0, 0.4], [0.2, -1.0], [0.9, 0.8]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.to(x).T, 0.5).to_event(1), obs=x)

    x = data(N, 3)
    if guide == "amortized":
        return Case(model, pv.AmortizedGuide(model, mlp(3), example=x), (x,))

    def by_hand(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = x[:, :2] * table("a", value=0.4)
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    return Case(model, by_hand, (x,))


def heavy_case() -> Case:
    """A posterior with a heavy tail."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(2.0, x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 2.0), obs=x)

    x = 3 * data(N)
    return Case(model, pv.LocalGuide(model, num_data=N, example=x), (x,))


def em_mixture() -> Case:
    x = torch.cat([data(15, 2) - 2, data(15, 2) + 2])

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        means = pyro.param("means", torch.tensor([[-1.0, 0.0], [1.0, 0.3]]))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[c], 1.0).to_event(1), obs=x)

    return Case(model, pv.ExactGuide(model, example=x), (x,))


def em_local(family: Any = None) -> Case:
    model = pv.zoo.FactorAnalysis(4, 2).double()
    x = model.simulate(12, seed=2)
    return Case(model, pv.LocalGuide(model, num_data=12, example=x, family=family), (x,))


def em_amortized() -> Case:
    model = pv.zoo.FactorAnalysis(4, 2).double()
    x = model.simulate(12, seed=2)
    encoder = model.make_encoder([5]).double()
    return Case(model, pv.AmortizedGuide(model, encoder, example=x), (x,))
