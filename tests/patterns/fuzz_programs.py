"""Random programs from a small grammar, and what each is as a Pyro model and a Pyro guide.

A program is data: sites with families, plates, parents, masks and scales. Here it is run by
Pyro; :mod:`fuzz_answers` evaluates the same data in plain torch. The meaning of a site:

    eta = bias + slope * h + offsets of its plates' entries + sum of weight * feature(parent)

and its family turns eta into a distribution. ``h`` is a covariate of the datum; the feature of a
parent is a bounded function of its value, averaged over its event and over plates that the child
is not in. Bias and slope are parameters, of the model and of the guide.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

__all__ = ["ENUMERABLE", "Mask", "Program", "Site", "Term", "generate"]

# Each family by the support of its values.
REAL = ("normal", "studentt", "laplace", "mvn")
POSITIVE = ("gamma", "lognormal", "exponential", "halfnormal")
UNIT = ("beta", "uniform")
INTERVAL = ("interval",)
SIMPLEX = ("dirichlet",)
ENUMERABLE = ("bernoulli", "categorical", "onehot", "binomial")
COUNTS = ("poisson",)
SUPPORTS = {
    family: name
    for name, families in {
        "real": REAL,
        "positive": POSITIVE,
        "unit": UNIT,
        "interval": INTERVAL,
        "simplex": SIMPLEX,
        "discrete": ENUMERABLE,
        "counts": COUNTS,
    }.items()
    for family in families
}
# Families that are one event of a vector.
VECTORS = ("mvn", "dirichlet", "onehot", "multinomial")
NUM_VALUES = {"bernoulli": 2, "categorical": 3, "onehot": 3, "binomial": 3}


@dataclass(frozen=True)
class Term:
    """A parent: its feature times a weight; averaged over the inner plates if ``reduce``."""

    parent: str
    weight: float
    reduce: bool = False


@dataclass(frozen=True)
class Mask:
    """Where a site counts: by "data" or "entry" arguments, or where a "latent" is positive.

    ``inside`` puts it in the distribution (fn.mask), else it is a poutine.mask around.
    ``gated`` children see the site only where it counts.
    """

    kind: str
    inside: bool
    gated: bool
    parent: str = ""


@dataclass(frozen=True)
class Site:
    """A sample statement of the model, or of the guide."""

    name: str
    family: str
    size: int  # of its event; 0 for a number
    plates: tuple[str, ...]  # inner plates
    terms: tuple[Term, ...]
    bias: float
    slope: float
    spread: float
    local: bool = True  # in the data plate
    observed: bool = False
    mask: Mask | None = None
    scale: float | str | None = None  # of poutine.scale; "datum" is a number for each datum
    enumerate: bool = False  # the guide asks for it


@dataclass
class Program:
    """A model and a guide of it, as data, with a batch to run them on."""

    seed: int
    dtype: torch.dtype
    num_data: int
    data_dim: int
    inner: dict[str, tuple[int, int]]  # plate to (dim, size)
    plate_style: str
    full_size: int
    model_sites: tuple[Site, ...]
    guide_sites: tuple[Site, ...]
    common_scale: float | None
    guide_scales: bool
    guide_masks: bool
    missing: bool
    drop_dims: bool  # means over the leftmost inner plate do not keep the dimension
    batch: dict[str, Tensor] = field(default_factory=dict)
    corners: tuple[str, ...] = ()
    runs: list[dict[str, Any]] = field(default_factory=list)  # what the guide drew

    # --- what is plain to see of it

    @property
    def latents(self) -> tuple[Site, ...]:
        return tuple(site for site in self.model_sites if not site.observed)

    @property
    def observed(self) -> tuple[Site, ...]:
        return tuple(site for site in self.model_sites if site.observed)

    @property
    def proposed(self) -> dict[str, Site]:
        return {site.name: site for site in self.guide_sites}

    @property
    def summed_out(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.latents if site.name not in self.proposed)

    def site(self, name: str) -> Site:
        return next(site for site in self.model_sites if site.name == name)

    @property
    def nesting(self) -> int:
        """Plate dimensions of the program."""
        used = {plate for site in self.model_sites for plate in site.plates}
        dims = [self.inner[plate][0] for plate in used]
        dims += [self.data_dim] if any(site.local for site in self.model_sites) else []
        return max((-dim for dim in dims), default=0)

    @property
    def positional(self) -> tuple[Tensor, ...]:
        return tuple(self.batch.values())

    def __str__(self) -> str:
        lines = [
            f"program {self.seed}: N={self.num_data} {self.dtype} data dim {self.data_dim}, inner "
            f"{self.inner}, plate {self.plate_style}/{self.full_size}, scale {self.common_scale}, "
            f"guide scales {self.guide_scales} masks {self.guide_masks}, missing {self.missing}, "
            f"drop_dims {self.drop_dims}, corners {self.corners}"
        ]
        lines += [f"  model {site}" for site in self.model_sites]
        lines += [f"  guide {site}" for site in self.guide_sites]
        return "\n".join(lines)

    # --- layout: canonical [N, A, B, *event] to and from Pyro's

    def _axes(self) -> dict[int, int]:
        """Canonical axis (0 data, 1 and 2 inner plates) by Pyro dimension."""
        axes = {self.data_dim: 0}
        axes.update({dim: 1 + k for k, (dim, _) in enumerate(self.inner.values())})
        return axes

    def to_batch(self, tensor: Tensor, depth: int) -> Tensor:
        """Bring [N, A, B, *event] to ``depth`` batch dimensions, aligned at the right."""
        axes = self._axes()
        order = [axes[dim] for dim in range(-3, 0) if dim in axes]
        rest = [axis for axis in range(3) if axis not in order]
        events = tensor.ndim - 3
        moved = tensor.permute(*rest, *order, *range(3, 3 + events))
        sizes = iter(moved.shape[len(rest) : 3])
        shape = [next(sizes) if dim in axes else 1 for dim in range(-3, 0)]
        return moved.reshape(*shape[3 - depth :], *moved.shape[3:])

    def from_batch(self, value: Tensor, event_ndim: int, nesting: int) -> Tensor:
        """Bring [*lead, *batch, *event] to [lead, N, A, B, *event]; lead is one number."""
        split = value.ndim - event_ndim
        batch, event = value.shape[:split], value.shape[split:]
        if len(batch) < nesting:
            batch = torch.Size([1] * (nesting - len(batch))) + batch
        plates = batch[len(batch) - nesting :]
        value = value.reshape(-1, *(1,) * (3 - nesting), *plates, *event)
        axes = self._axes()
        source = {axis: 4 + dim for dim, axis in axes.items()}  # dim -3..-1 is place 1..3
        unused = [place for place in (1, 2, 3) if place not in source.values()]
        order = [source[axis] if axis in source else unused.pop() for axis in range(3)]
        return value.permute(0, *order, *range(4, value.ndim))

    def depth(self, site: Site) -> int:
        """Batch dimensions of a site in Pyro."""
        dims = [self.inner[plate][0] for plate in site.plates]
        dims += [self.data_dim] if site.local else []
        return max((-dim for dim in dims), default=0)

    # --- run by Pyro

    def model(self, *batch: Tensor) -> None:
        """Run the model."""
        data, rows = self._begin(batch)
        values: dict[str, Tensor] = {}
        with self._common():
            for site in self.model_sites:
                values[site.name] = self._sample(site, "p", data, rows, values)

    def guide(self, *batch: Tensor) -> None:
        """Run the guide, and remember what it drew."""
        data, rows = self._begin(batch)
        values: dict[str, Tensor] = {}
        with self._common() if self.guide_scales else contextlib.nullcontext():
            for site in self.guide_sites:
                values[site.name] = self._sample(site, "q", data, rows, values)
        self.runs.append({"values": values, "rows": rows if self.plate_style == "drawn" else None})

    def _begin(self, batch: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], Any]:
        data = dict(zip(self.batch, batch, strict=True))
        size = len(data["h"])
        kwargs: dict[str, Any] = {}
        if self.plate_style == "subsample":
            size, kwargs = self.full_size, {"subsample": data["h"]}
        elif self.plate_style == "index":
            size = len(data["h"])
        elif self.plate_style == "drawn":
            kwargs = {"subsample_size": max(1, size // 2)}
        self._plate = pyro.plate("data", size, dim=self.data_dim, **kwargs)
        self._inner_plates = {
            name: pyro.plate(name, size, dim=dim) for name, (dim, size) in self.inner.items()
        }
        rows = None
        if self.plate_style in ("drawn", "index"):
            with self._plate as rows:
                pass
            data = {name: tensor[rows] for name, tensor in data.items()}
        return data, rows

    def _common(self) -> Any:
        if self.common_scale is None:
            return contextlib.nullcontext()
        return poutine.scale(scale=self.common_scale)

    def _sample(
        self, site: Site, role: str, data: dict[str, Tensor], rows: Any, values: dict[str, Tensor]
    ) -> Tensor:
        key = f"{role}_{site.name}"
        initial = torch.tensor([site.bias, site.slope], dtype=self.dtype)
        bias, slope = pyro.param(key, initial)
        eta = bias
        if site.local:
            h = data["h"]
            eta = eta + slope * h.reshape(len(h), *[1] * (-1 - self.data_dim))
        for plate in site.plates:
            dim, size = self.inner[plate]
            offsets = 0.4 * torch.linspace(-1, 1, size, dtype=self.dtype)
            eta = eta + offsets.reshape(size, *[1] * (-1 - dim))
        for term in site.terms:
            eta = eta + term.weight * self._feature(site, term, data, values)
        fn = build(site, eta)
        mask = None
        if site.mask is not None and (role == "p" or self.guide_masks):
            mask = self._mask(site, data, values)
        if mask is not None and site.mask is not None and site.mask.inside and fn is not None:
            fn, mask = fn.mask(mask), None
        with contextlib.ExitStack() as stack:
            if site.local:
                stack.enter_context(self._plate)
            for plate in site.plates:
                stack.enter_context(self._inner_plates[plate])
            if mask is not None:
                stack.enter_context(poutine.mask(mask=mask))
            if site.scale is not None and (role == "p" or self.guide_scales):
                scale: Any = site.scale
                if scale == "datum":
                    h = data["weight"]
                    scale = h.reshape(len(h), *[1] * (-1 - self.data_dim))
                stack.enter_context(poutine.scale(scale=scale))
            if site.observed:
                obs = self.to_batch(data[site.name], self.depth(site))
                if site.family == "factor":
                    pyro.factor(site.name, -0.5 * (eta - obs) ** 2)
                    return obs
                return pyro.sample(site.name, fn, obs=obs)
            infer = {"enumerate": "parallel"} if site.enumerate else {}
            return pyro.sample(site.name, fn, infer=infer)

    def _feature(
        self, site: Site, term: Term, data: dict[str, Tensor], values: dict[str, Tensor]
    ) -> Tensor:
        parent, value = self.site(term.parent), values[term.parent]
        found = feature(parent, value)
        if parent.mask is not None and parent.mask.gated:
            found = found * self._mask(parent, data, values).to(found)
        for plate in parent.plates:
            dim, _ = self.inner[plate]
            if (plate not in site.plates or term.reduce) and found.ndim >= -dim:
                keep = not (self.drop_dims and dim == -self.nesting and plate not in site.plates)
                found = found.mean(dim, keepdim=keep)
        return found

    def _mask(self, site: Site, data: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
        mask = site.mask
        assert mask is not None
        if mask.kind == "latent":
            return feature(self.site(mask.parent), values[mask.parent]) > 0
        return self.to_batch(data[f"mask_{site.name}"], self.depth(site))


def feature(site: Site, value: Tensor) -> Tensor:
    """Return a bounded function of a value, averaged over its event."""
    support = SUPPORTS[site.family]
    found = value.to(torch.get_default_dtype()) if not value.is_floating_point() else value
    if site.family in ("dirichlet", "onehot"):
        weights = torch.linspace(-0.5, 1.0, site.size, dtype=found.dtype)
        return (found * weights).sum(-1)
    found = found * 0.7 if support in ("discrete", "unit", "interval") else torch.tanh(found)
    return found.mean(-1) if site.size else found


def vector(eta: Tensor, size: int) -> Tensor:
    """Return [..., size] numbers about eta."""
    return eta.unsqueeze(-1) + 0.3 * torch.linspace(-1, 1, size, dtype=eta.dtype)


def choices(eta: Tensor, size: int) -> Tensor:
    """Return the logits of a choice among [..., size], which eta tilts."""
    steps = torch.linspace(-1, 1, size, dtype=eta.dtype)
    return eta.unsqueeze(-1) * steps + 0.5 * steps**2


def cholesky(size: int, spread: float, dtype: torch.dtype) -> Tensor:
    """Return the factor of a covariance matrix with correlations."""
    return spread * (torch.eye(size, dtype=dtype) + 0.4 * torch.ones(size, size).to(dtype).tril(-1))


def build(site: Site, eta: Tensor) -> Any:
    """Return the distribution of a site."""
    family, s, size = site.family, site.spread, site.size
    if family == "factor":
        return None
    if family in VECTORS:
        loc = vector(eta, size)
        logits = choices(eta, size)
        return {
            "mvn": lambda: dist.MultivariateNormal(loc, scale_tril=cholesky(size, s, eta.dtype)),
            "dirichlet": lambda: dist.Dirichlet(2 * loc.exp()),
            "onehot": lambda: dist.OneHotCategorical(logits=logits),
            "multinomial": lambda: dist.Multinomial(5, logits=logits),
        }[family]()
    if family == "categorical":
        return dist.Categorical(logits=choices(eta, 3))
    loc = vector(eta, size) if size else eta
    width = torch.full_like(loc, s)
    fn = {
        "normal": lambda: dist.Normal(loc, width),
        "studentt": lambda: dist.StudentT(torch.full_like(loc, 4.0), loc, width),
        "laplace": lambda: dist.Laplace(loc, width),
        "gamma": lambda: dist.Gamma(2 * width, loc.exp()),
        "lognormal": lambda: dist.LogNormal(loc, width),
        "exponential": lambda: dist.Exponential(loc.exp()),
        "halfnormal": lambda: dist.HalfNormal(loc.exp()),
        "beta": lambda: dist.Beta(2 * (loc / 2).exp(), torch.full_like(loc, 2.0)),
        "uniform": lambda: dist.Uniform(torch.zeros_like(loc), torch.ones_like(loc)),
        "interval": lambda: dist.Uniform(-torch.ones_like(loc), torch.full_like(loc, 2.0)),
        "bernoulli": lambda: dist.Bernoulli(logits=loc),
        "binomial": lambda: dist.Binomial(torch.full_like(loc, 2.0), logits=loc),
        "poisson": lambda: dist.Poisson(loc.exp()),
        "negbinomial": lambda: dist.NegativeBinomial(torch.full_like(loc, 3.0), logits=loc),
    }[family]()
    return fn.to_event(1) if size else fn


# --- the grammar


def generate(seed: int) -> Program:
    """Return the program of a seed."""
    rng = random.Random(seed)
    inner = _plates(rng)
    data_dim = inner.pop("data")[0]
    corners: list[str] = []
    # What is observed of one unit is not more than a few numbers: brute force has to end.
    latents = _latents(rng, inner, corners)
    observed = _observed(rng, inner, latents, corners)
    proposals, latents = _proposals(rng, latents, inner, corners)
    sites = (*latents, *observed)
    if rng.random() < 0.25 and latents:
        sites = _with_scales(rng, sites)
    style = _pick(rng, {"plain": 6, "subsample": 2, "index": 0.6, "drawn": 0.6})
    if style in ("index", "drawn"):
        corners.append(f"plate_{style}")
    num_data = _pick(rng, {1: 2, 2: 2, 3: 3, 5: 3, 257: 0.5})
    program = Program(
        seed=seed,
        dtype=torch.float64 if rng.random() < 0.8 else torch.float32,
        num_data=num_data,
        data_dim=data_dim,
        inner=inner,
        plate_style=style,
        full_size=num_data * rng.choice([1, 2, 10]),
        model_sites=sites,
        guide_sites=proposals,
        common_scale=rng.choice([0.5, 3.0]) if rng.random() < 0.12 else None,
        guide_scales=rng.random() < 0.7,
        guide_masks=rng.random() < 0.5,
        missing=rng.random() < 0.1,
        drop_dims=rng.random() < 0.1,
    )
    scales = {site.scale for site in sites}
    if len(scales) > 1:
        corners.append("scales")
    scales = {site.scale for site in program.latents}
    if program.summed_out and (len(scales) > 1 or len({site.scale for site in sites}) > 1):
        corners.append("scaled_sum")
    if program.drop_dims:
        corners.append("drop_dims")
    _add_data(program)
    program.corners = tuple(dict.fromkeys(corners))
    # The guide's sites have the masks and scales of the model's.
    mine = {site.name: site for site in program.model_sites}
    program.guide_sites = tuple(
        replace(site, mask=mine[site.name].mask, scale=mine[site.name].scale) for site in proposals
    )
    if any(site.mask and site.mask.kind == "latent" for site in program.guide_sites):
        # Not those that are enumerated: under a mask that differs by value, draws would too.
        names = {site.name for site in program.guide_sites if not site.enumerate}
        drawn = {
            site.mask.parent
            for site in program.guide_sites
            if site.mask and site.mask.kind == "latent"
        }
        if not drawn <= names:
            program.guide_masks = False
    return program


def _pick(rng: random.Random, weights: dict[Any, float]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _plates(rng: random.Random) -> dict[str, tuple[int, int]]:
    count = _pick(rng, {0: 5, 1: 4, 2: 1})
    if count == 0:
        return {"data": (_pick(rng, {-1: 8, -2: 2}), 0)}
    dims = rng.sample([-1, -2] if count == 1 else [-1, -2, -3], count + 1)
    sizes = [_pick(rng, {1: 1, 2: 5, 3: 2}) for _ in range(count)]
    inner = {name: (dim, size) for name, dim, size in zip("ab", dims[1:], sizes, strict=False)}
    return {"data": (dims[0], 0), **inner}


def _latents(
    rng: random.Random, inner: dict[str, tuple[int, int]], corners: list[str]
) -> list[Site]:
    sites: list[Site] = []
    count = _pick(rng, {0: 0.4, 1: 3, 2: 4, 3: 2})
    for number in range(count):
        discrete = rng.random() < 0.4
        if discrete:
            family = rng.choice(ENUMERABLE)
        else:
            kinds = [REAL, REAL, POSITIVE, UNIT, SIMPLEX, INTERVAL, COUNTS]
            family = rng.choice(rng.choice(kinds))
        local = not (number == 0 and rng.random() < 0.08 and count > 1)
        plates = tuple(p for p in inner if local and rng.random() < 0.5)
        size = 0
        if family in ("dirichlet", "mvn"):
            size = rng.choice([2, 3])
        elif family == "onehot":
            size = 3
        elif not discrete and family != "poisson" and rng.random() < 0.25:
            size = rng.choice([1, 2])
        terms = _terms(rng, sites, plates, local, 0.7, corners)
        site = Site(
            name=f"{'c' if discrete else 'z'}{number}",
            family=family,
            size=size,
            plates=plates,
            terms=terms,
            bias=round(rng.uniform(-0.5, 0.5), 2),
            slope=rng.choice([0.0, 0.5]) if local else 0.0,
            spread=rng.choice([0.7, 1.0, 1.5]),
            local=local,
        )
        if not local:
            corners.append("global")
        sites.append(_masked(rng, site, sites, inner, 0.3, corners))
    return sites


def _terms(
    rng: random.Random,
    earlier: list[Site],
    plates: tuple[str, ...],
    local: bool,
    probability: float,
    corners: list[str],
) -> tuple[Term, ...]:
    terms = []
    for parent in earlier[-2:]:
        if rng.random() > probability or (parent.local and not local):
            continue
        reduce = bool(set(parent.plates) & set(plates)) and rng.random() < 0.15
        if reduce or not set(parent.plates) <= set(plates):
            corners.append("mean")
        terms.append(Term(parent.name, round(rng.choice([-1, 1]) * rng.uniform(0.5, 2), 2), reduce))
    return tuple(terms)


def _masked(
    rng: random.Random,
    site: Site,
    earlier: list[Site],
    inner: dict[str, tuple[int, int]],
    probability: float,
    corners: list[str],
) -> Site:
    if rng.random() > probability or not site.local:
        return site
    parents = [
        p
        for p in earlier
        if set(p.plates) <= set(site.plates) and p.local and p.family not in UNIT + POSITIVE
    ]
    kinds = ["data"] + (["entry"] if site.plates else []) + (["latent"] * 2 if parents else [])
    kind = rng.choice(kinds)
    gated = rng.random() < 0.8
    mask = Mask(kind, rng.random() < 0.4, gated)
    if kind == "latent":
        mask = replace(mask, parent=rng.choice(parents).name, gated=True)
        corners.append("latent_mask")
    if not site.observed and kind != "latent" and not gated:
        corners.append("free_mask")
    return replace(site, mask=mask)


def _observed(
    rng: random.Random, inner: dict[str, tuple[int, int]], latents: list[Site], corners: list[str]
) -> list[Site]:
    sites = []
    families = {
        "normal": 5,
        "poisson": 2,
        "bernoulli": 2,
        "gamma": 1,
        "beta": 1,
        "categorical": 1,
        "studentt": 1,
        "mvn": 1,
        "multinomial": 1,
        "negbinomial": 1,
        "factor": 0.5,
    }
    for number in range(_pick(rng, {1: 7, 2: 3})):
        family = _pick(rng, families)
        plates = tuple(p for p in inner if rng.random() < 0.7)
        size = 0
        if family in ("mvn", "multinomial"):
            size = 3
        elif family in ("normal", "poisson", "bernoulli") and rng.random() < 0.3:
            size = 2
        terms = _terms(rng, latents, plates, True, 0.9, corners)
        site = Site(
            name=f"x{number}",
            family=family,
            size=size,
            plates=plates,
            terms=terms,
            bias=round(rng.uniform(-0.5, 0.5), 2),
            slope=0.0,
            spread=rng.choice([0.5, 1.0]),
            observed=True,
        )
        sites.append(_masked(rng, site, latents, inner, 0.2, corners))
    return sites


def _proposals(
    rng: random.Random, latents: list[Site], inner: dict[str, tuple[int, int]], corners: list[str]
) -> tuple[tuple[Site, ...], list[Site]]:
    """Return the guide's sites. Discrete latents may be left out, and are summed out."""
    sites: list[Site] = []
    how = _pick(rng, {"summed": 5, "proposed": 3, "enumerated": 2, "mixed": 0.7})
    combinations = 1
    # What the guide would have to know of a latent that it may not draw.
    hidden = {s.name for s in latents if s.mask is not None and s.mask.kind == "latent"}
    for latent in latents:
        family, asked = latent.family, False
        if family in ENUMERABLE:
            entries = 1
            for plate in latent.plates:
                entries *= inner[plate][1]
            choice = rng.choice(["summed", "proposed", "enumerated"]) if how == "mixed" else how
            combinations *= NUM_VALUES[family] ** entries
            if not latent.local:
                choice = "proposed"
            if choice == "summed" and combinations <= 90:
                corners.append("summed")
                continue
            asked = choice == "enumerated" and not any(site.enumerate for site in sites)
            corners.append("enumerated" if asked else "proposed")
        elif family in COUNTS:
            corners.append("proposed")
        support = SUPPORTS[family]
        options = {
            "real": ("normal", "normal", "studentt", "laplace") if family != "mvn" else ("mvn",),
            "positive": ("lognormal", "gamma"),
            "unit": ("beta",),
            "interval": ("interval",),
            "simplex": ("dirichlet",),
            "counts": ("poisson",),
            "discrete": (family,),
        }[support]
        family = rng.choice(options)
        if support in ("positive", "unit", "interval") and rng.random() < 0.12:
            family = "normal"
            corners.append("wider")
        # A guide whose proposals depend on one another, but not on what is enumerated or masked.
        terms = tuple(
            Term(p.name, round(rng.uniform(-1, 1), 2))
            for p in sites
            if set(p.plates) <= set(latent.plates)
            and (latent.local or not p.local)
            and not p.enumerate
            and p.name not in hidden
            and rng.random() < 0.35
        )
        sites.append(
            replace(
                latent,
                family=family,
                terms=terms,
                bias=round(rng.uniform(-0.5, 0.5), 2),
                slope=rng.choice([0.0, 0.6]) if latent.local else 0.0,
                spread=rng.choice([0.7, 1.0]),
                mask=None,
                enumerate=asked,
            )
        )
    return tuple(sites), latents


def _with_scales(rng: random.Random, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    which = rng.choice(["latents", "one", "observed", "all"])
    scale = rng.choice([0.3, 2.0, "datum"])
    one = rng.choice([site.name for site in sites])
    return tuple(
        replace(site, scale=scale if site.local or scale != "datum" else 0.7)
        if which == "all"
        or (which == "latents" and not site.observed)
        or (which == "observed" and site.observed)
        or (which == "one" and site.name == one)
        else site
        for site in sites
    )


def _add_data(program: Program) -> None:
    """Draw a batch, in canonical layout: a covariate, values of observed sites, masks."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(program.seed)
    try:
        shape = (program.num_data, 1, 1)
        batch = {"h": torch.randn(program.num_data, dtype=program.dtype)}
        batch["weight"] = torch.rand(program.num_data, dtype=program.dtype) + 0.5
        for site in program.model_sites:
            sizes = [program.inner[p][1] if p in site.plates else 1 for p in program.inner]
            full = (program.num_data, *sizes, *[1] * (2 - len(sizes)))
            if site.mask is not None and site.mask.kind != "latent":
                kept = torch.rand(full if site.mask.kind == "entry" else shape) > 0.4
                batch[f"mask_{site.name}"] = kept.expand(full).clone()
            if not site.observed:
                continue
            eta = 0.7 * torch.randn(full, dtype=program.dtype)
            if site.family == "factor":
                value = eta
            else:
                value = build(site, eta).sample()
            batch[site.name] = value.to(program.dtype) if site.family != "categorical" else value
        if program.missing:
            _remove_values(program, batch)
        program.batch = batch
    finally:
        torch.set_rng_state(generator_state)


def _remove_values(program: Program, batch: dict[str, Tensor]) -> None:
    program.missing = False
    for site in program.observed:
        if site.family in ("normal", "poisson", "bernoulli", "gamma", "studentt"):
            gone = torch.rand(batch[site.name].shape) < 0.3
            batch[site.name] = batch[site.name].masked_fill(gone, float("nan"))
            program.missing = True


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype, and go back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
