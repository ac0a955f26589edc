"""Runs of every kind that a checkpoint must bring back: pairs, data, losses and optimizers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.schedules import LinearWarmup
from tests.training.fits import Drawn, Fresh

X = torch.randn(22, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VALIDATION = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BATCH = 8  # of which an epoch has 3, the last one smaller


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 3).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


def encoder():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2)).double()


def amortized():
    model = Model()
    return model, pv.AmortizedGuide(model, encoder(), example=X)


def local():
    model = Model()
    return model, pv.LocalGuide(model, num_data=len(X), example=X)


def jointly():
    """One datum, by an autoguide-like table of one row."""
    model = Model()
    return model, pv.LocalGuide(model, num_data=1, example=X, data_plate=False)


def in_the_store():
    """Plain functions, whose parameters live in Pyro's store."""
    net = encoder()

    def model(x):
        scale = pyro.param("scale", torch.ones(3).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", net)
        loc = net(x)[:, :3]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    return model, guide


def discrete():
    """A mixture of two, summed out."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.means = nn.Parameter(torch.randn(2, 3).double())

        def forward(self, x):
            with pyro.plate("data", len(x)):
                probs = x.new_tensor([0.4, 0.6])
                k = pyro.sample("k", dist.Categorical(probs), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.means[k] + z, 0.5).to_event(1), obs=x)

    model = Mixture()
    return model, pv.AmortizedGuide(model, encoder(), example=X)


def with_global():
    """A latent that all data share."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(X), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mu + z, 0.5).to_event(1), obs=x)

    wide = pyro.infer.autoguide.AutoNormal(pyro.poutine.block(model, expose=["mu"]))
    wide(X)
    return model, pv.AmortizedGuide(model, encoder(), example=X, global_guide=wide)


class Noisy(Dataset):
    """Rows with noise of PyTorch's, NumPy's and Python's global generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        noise = torch.randn(()).item() + np.random.randn() + random.gauss(0, 1)  # noqa: NPY002
        return X[i] + 0.1 * noise


class Stream(IterableDataset):
    """Of no known length."""

    def __iter__(self):
        return iter(X)


def loader(**options):
    return DataLoader(TensorDataset(X), batch_size=BATCH, **options)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def one_cycle(model, guide):
    """A scheduler by step, of an optimizer of the user's."""
    optimizer = adam([*model.parameters(), *guide.parameters()])
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=40)
    return {"optim": optimizer, "callbacks": [pv.callbacks.EachStep(scheduler)]}


def plateau(model, guide):
    optimizer = torch.optim.SGD([*model.parameters(), *guide.parameters()], lr=1e-3, momentum=0.9)
    return {
        "optim": optimizer,
        "callbacks": [ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)],
    }


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        pair: makes model and guide.
        data: makes what fit is given.
        options: of fit.
        more: makes more of them, of the pair.
    """

    pair: Callable[[], Any] = amortized
    data: Callable[[], Any] = lambda: X
    options: dict[str, Any] = field(default_factory=dict)
    more: Callable[..., dict[str, Any]] = lambda model, guide: {}


KINDS = {
    "plain": Kind(),
    "validation, warm-up": Kind(
        options={"validation_data": VALIDATION, "schedule": LinearWarmup(7), "patience": 20}
    ),
    "iwae": Kind(options={"loss": lambda: pv.IWAE(3)}),
    "score gradients, baselines": Kind(options={"loss": lambda: pv.ELBO(2, estimator="score")}),
    "Trace_ELBO": Kind(options={"loss": lambda: Trace_ELBO(2)}),
    "TraceGraph_ELBO": Kind(options={"loss": lambda: TraceGraph_ELBO()}),
    "RenyiELBO": Kind(options={"loss": lambda: RenyiELBO(0.5, 3)}),
    "local": Kind(local, options={"drop_last": True}),
    "jointly": Kind(jointly, options={"data_plate": False}),
    "store": Kind(in_the_store, options={"loss": lambda: Trace_ELBO()}),
    "store, pyro.optim": Kind(
        in_the_store, options={"optim": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})}
    ),
    "discrete": Kind(discrete),
    "TraceEnum_ELBO": Kind(discrete, options={"loss": lambda: TraceEnum_ELBO(max_plate_nesting=1)}),
    "global": Kind(with_global),
    "rows": Kind(data=Noisy),
    "rows, no blocks": Kind(data=Noisy, options={"shuffle": "blocks"}),
    "loader": Kind(data=lambda: loader(shuffle=True)),
    "loader with a generator": Kind(
        data=lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    ),
    "stream": Kind(data=Stream),
    "drawn by epoch": Kind(data=lambda: Fresh(X)),
    "drawn by step": Kind(data=lambda: Drawn(X)),
    "one cycle": Kind(more=one_cycle),
    "plateau": Kind(more=plateau, options={"validation_data": VALIDATION}),
    "float32": Kind(data=lambda: X, options={"compile": "replay"}),
}


def trained(kind: Kind, **options: Any):
    """Return the result of a run of fit, and all that it leaves in model and guide."""
    pyro.clear_param_store()  # as in a process of its own
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    model, guide = kind.pair()
    given = {
        name: v() if callable(v) and name in {"loss", "optim"} else v
        for name, v in kind.options.items()
    }
    given = {"optim": adam, "batch_size": BATCH, **given, **kind.more(model, guide), **options}
    result = pv.fit(model, guide, kind.data(), **({"progress": False} | given))
    return result, everything(model, guide)


def everything(*programs: Any) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers: of modules, and of Pyro's store."""
    found = {}
    for number, program in enumerate(programs):
        if isinstance(program, nn.Module):
            found |= {f"{number} {n}": v.clone() for n, v in program.state_dict().items()}
    if not found:
        store = pyro.get_param_store()
        found |= {n: store._params[n].detach().clone() for n in store}
    return found
