"""What the programs of :mod:`fuzz_programs` come to, in plain torch.

Values are kept in one layout, [particle, datum, plate a, plate b, *event], parameters are read
from Pyro's store, and no function of Pyro or of the package takes part: log densities are formulas,
plates are sums over axes, masks are zeros, scales are factors, and discrete latents are summed out
by running through all joint assignments of a datum's entries.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tests.patterns.fuzz_programs import NUM_VALUES, SUPPORTS, Program, Site, build

__all__ = ["Answer", "Values", "evidence", "log_density"]

Values = Mapping[str, Tensor]
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


# --- densities


def _spread_out(eta: Tensor, size: int) -> Tensor:
    return torch.stack(
        [eta + (0.0 if size == 1 else 0.3 * (2 * i / (size - 1) - 1)) for i in range(size)], -1
    ) - (0.3 if size == 1 else 0.0)


def _tilted(eta: Tensor, size: int) -> Tensor:
    steps = [2 * i / (size - 1) - 1 for i in range(size)]
    return torch.stack([eta * step + 0.5 * step * step for step in steps], -1)


def _beta(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return constant + (a - 1) * v.log() + (b - 1) * torch.log1p(-v)


def _log_binomial(n: Tensor | float, k: Tensor) -> Tensor:
    n = torch.as_tensor(n, dtype=k.dtype)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _mvn(v: Tensor, loc: Tensor, s: float) -> Tensor:
    size = loc.shape[-1]
    factor = torch.eye(size, dtype=loc.dtype)
    for i, j in itertools.product(range(size), range(size)):
        if j < i:
            factor[i, j] = 0.4
    factor = s * factor
    precision = torch.linalg.inv(factor @ factor.T)
    x = v - loc
    squares = torch.einsum("...i,ij,...j->...", x, precision, x)
    return -0.5 * squares - size * _HALF_LOG_TWO_PI - factor.diagonal().log().sum()


def _within(v: Tensor, density: Tensor, low: float, high: float = math.inf) -> Tensor:
    """A density of zero outside the support."""
    inside = (v > low) & (v < high)
    return torch.where(inside, density, torch.full_like(density, -math.inf))


def log_density(site: Site, eta: Tensor, v: Tensor) -> Tensor:
    """Return the log density of a site at values, summed over the event."""
    family, s, size = site.family, site.spread, site.size
    v = v.to(eta.dtype)
    softplus = torch.nn.functional.softplus
    if family == "factor":
        return -0.5 * (eta - v) ** 2
    if family in ("categorical", "onehot", "multinomial", "dirichlet", "mvn"):
        logits = (
            _spread_out(eta, size) if family in ("dirichlet", "mvn") else _tilted(eta, size or 3)
        )
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        if family == "mvn":
            return _mvn(v, logits, s)
        if family == "dirichlet":
            a = 2 * logits.exp()
            constant = torch.lgamma(a.sum(-1)) - torch.lgamma(a).sum(-1)
            return constant + ((a - 1) * v.log()).sum(-1)
        if family == "categorical":
            log_p, index = torch.broadcast_tensors(log_p, v.long().unsqueeze(-1))
            return log_p.gather(-1, index[..., :1]).squeeze(-1)
        found = (v * log_p).sum(-1)
        if family == "multinomial":
            found = found + math.log(120) - torch.lgamma(v + 1).sum(-1)
        return found
    m = _spread_out(eta, size) if size else eta
    safe = v.clamp(min=1e-300 if v.dtype == torch.float64 else 1e-38)
    unit = v.clamp(min=1e-300 if v.dtype == torch.float64 else 1e-38, max=1.0)
    standard = (v - m) / s
    formulas: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: -0.5 * standard**2 - math.log(s) - _HALF_LOG_TWO_PI,
        "studentt": lambda: (
            math.lgamma(2.5)
            - math.lgamma(2.0)
            - 0.5 * math.log(4 * math.pi)
            - math.log(s)
            - 2.5 * torch.log1p(standard**2 / 4)
        ),
        "laplace": lambda: -standard.abs() - math.log(2 * s),
        "gamma": lambda: _within(
            v, 2 * s * m - math.lgamma(2 * s) + (2 * s - 1) * safe.log() - m.exp() * v, 0
        ),
        "lognormal": lambda: _within(
            v, -0.5 * ((safe.log() - m) / s) ** 2 - safe.log() - math.log(s) - _HALF_LOG_TWO_PI, 0
        ),
        "exponential": lambda: _within(v, m - m.exp() * v, 0),
        "halfnormal": lambda: _within(
            v, 0.5 * math.log(2 / math.pi) - m - 0.5 * (v / m.exp()) ** 2, 0
        ),
        "beta": lambda: _within(v, _beta(unit, 2 * (m / 2).exp(), torch.full_like(m, 2.0)), 0, 1),
        "uniform": lambda: _within(v, torch.zeros_like(v + m), 0, 1),
        "interval": lambda: _within(v, torch.zeros_like(v + m) - math.log(3), -1, 2),
        "bernoulli": lambda: v * m - softplus(m),
        "binomial": lambda: _log_binomial(2.0, v) + v * m - 2 * softplus(m),
        "poisson": lambda: v * m - m.exp() - torch.lgamma(v + 1),
        "negbinomial": lambda: (
            torch.lgamma(v + 3)
            - math.lgamma(3)
            - torch.lgamma(v + 1)
            + v * m
            - (v + 3) * softplus(m)
        ),
    }
    found = formulas[family]()
    return found.sum(-1) if size else found


# --- terms of a program


class Answer:
    """The terms of a program's sites at given values.

    Args:
        program: the program.
        parameters: by name, as Pyro's store holds them: [bias, slope].
        rows: of the batch; None for all.
    """

    def __init__(self, program: Program, parameters: Values, rows: Tensor | None = None) -> None:
        self.program = program
        self.parameters = parameters
        take = (lambda t: t) if rows is None else (lambda t: t[rows])
        self.data = {name: take(tensor) for name, tensor in program.batch.items()}
        self.h = self.data["h"].reshape(1, -1, 1, 1).to(torch.float64)
        self.num_data = self.h.shape[1]
        self.sizes = [size for _, size in program.inner.values()]
        self.summed_out: tuple[str, ...] = program.summed_out

    def log_density(self, site: Site, values: Values, *, role: str, detach: bool = False) -> Tensor:
        """Return the log density of a site, [K or 1, *shape of its plates], without its mask."""
        pair = self.parameters[f"{role}_{site.name}"]
        bias, slope = (pair.detach() if detach else pair).to(torch.float64)
        eta = bias.reshape(1, 1, 1, 1)
        if site.local:
            eta = eta + slope * self.h
        for axis, (name, (_, size)) in enumerate(self.program.inner.items()):
            if name in site.plates:
                entries = [
                    0.4 * (2 * i / (size - 1) - 1) if size > 1 else -0.4 for i in range(size)
                ]
                shape = [1, 1, 1, 1]
                shape[2 + axis] = size
                eta = eta + torch.tensor(entries, dtype=torch.float64).reshape(shape)
        for term in site.terms:
            eta = eta + term.weight * self._feature(site, term.parent, term.reduce, values)
        value = self._value(site, values)
        seen = ~value.isnan()
        if not bool(seen.all()):
            value = torch.where(seen, value, torch.ones_like(value))
            if site.size:  # a product over numbers: leave those out that are missing
                return self._of_parts(site, eta, value, seen)
            found = log_density(site, eta, value) * seen
        else:
            found = log_density(site, eta, value)
        return self._expand(site, found)

    def _of_parts(self, site: Site, eta: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        from dataclasses import replace

        one = replace(site, size=0)
        centres = _spread_out(eta, site.size)
        parts = [
            log_density(one, centres[..., i], value[..., i]) * seen[..., i]
            for i in range(site.size)
        ]
        return self._expand(site, functools.reduce(torch.add, parts))

    def _value(self, site: Site, values: Values) -> Tensor:
        if site.observed:
            return self.data[site.name].to(torch.float64).unsqueeze(0)
        return values[site.name].to(torch.float64)

    def _expand(self, site: Site, found: Tensor) -> Tensor:
        """Give a term an entry for each of its plates' entries."""
        shape = [found.shape[0], self.num_data if site.local else 1, 1, 1]
        for axis, (name, (_, size)) in enumerate(self.program.inner.items()):
            if name in site.plates:
                shape[2 + axis] = size
        return found.expand(shape)

    def _raw_feature(self, parent: Site, values: Values) -> Tensor:
        value = values[parent.name].to(torch.float64)
        if parent.family in ("dirichlet", "onehot"):
            steps = [-0.5 + 1.5 * i / (parent.size - 1) for i in range(parent.size)]
            return torch.stack([value[..., i] * step for i, step in enumerate(steps)]).sum(0)
        bounded = SUPPORTS[parent.family] in ("discrete", "unit", "interval")
        found = 0.7 * value if bounded else value.tanh()
        return found.sum(-1) / parent.size if parent.size else found

    def _feature(self, site: Site, name: str, reduce: bool, values: Values) -> Tensor:
        parent = self.program.site(name)
        found = self._raw_feature(parent, values)
        if parent.mask is not None and parent.mask.gated:
            found = found * self.mask(parent, values)
        for axis, plate in enumerate(self.program.inner):
            if plate in parent.plates and (plate not in site.plates or reduce):
                size = self.sizes[axis]
                shares = found.sum(2 + axis, keepdim=True)
                # A value that is not written out per entry is the same in each.
                found = shares / (size if found.shape[2 + axis] == size else 1)
        return found

    def mask(self, site: Site, values: Values) -> Tensor:
        """Return where a site counts, as zeros and ones."""
        mask = site.mask
        if mask is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.float64)
        if mask.kind == "latent":
            parent = self.program.site(mask.parent)
            return (self._raw_feature(parent, values) > 0).to(torch.float64)
        return self.data[f"mask_{site.name}"].to(torch.float64).unsqueeze(0)

    def counts(self, site: Site, values: Values, *, unmask: bool = False) -> Tensor:
        """Return what a latent's or observed site's term is multiplied by.

        A discrete latent that is summed out is not there, with its mask or without. Where a
        discrete latent that is summed out masks another latent, that one follows its prior.
        """
        mask = site.mask
        if mask is None or (not site.observed and (unmask or site.name in self.summed_out)):
            return torch.ones(1, 1, 1, 1, dtype=torch.float64)
        if not site.observed and mask.kind == "latent" and mask.parent in self.summed_out:
            return torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return self.mask(site, values)

    def model_term(self, site: Site, values: Values, *, unmask: bool = False) -> Tensor:
        """Return log p of a site, masked, per entry."""
        found = self.log_density(site, values, role="p")
        return _times(self.counts(site, values, unmask=unmask), found)

    def guide_term(self, site: Site, values: Values, *, detach: bool = False) -> Tensor:
        """Return log q of a site, masked as the model masks it, per entry."""
        found = self.log_density(site, values, role="q", detach=detach)
        return _times(self.counts(self.program.site(site.name), values), found)

    # --- sums over assignments

    def assignments(self, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
        """Yield all joint values of the entries of discrete sites."""
        choices = []
        for name in names:
            site = self.program.site(name)
            shape = [
                size if plate in site.plates else 1
                for plate, (_, size) in self.program.inner.items()
            ]
            shape = [1, 1, *shape, *[1] * (2 - len(shape))]
            many = math.prod(shape)
            tensors = []
            for entry in itertools.product(range(NUM_VALUES[site.family]), repeat=many):
                value = torch.tensor(entry, dtype=torch.float64).reshape(shape)
                if site.family == "onehot":
                    value = torch.nn.functional.one_hot(value.long(), site.size).to(torch.float64)
                tensors.append(value)
            choices.append(tensors)
        for chosen in itertools.product(*choices):
            yield dict(zip(names, chosen, strict=True))

    def joint(
        self, values: Values, sites: tuple[Site, ...], *, unmask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log of the sum over discrete latents of a product of terms.

        Of the sites of the data, [K, N], and of those that all data share, [K, 1].
        """
        shared: Tensor = torch.zeros(1, 1, dtype=torch.float64)
        for site in sites:
            if not site.local:
                shared = shared + _per_datum(self.model_term(site, values, unmask=unmask))
        found = []
        for assigned in self.assignments(self.summed_out):
            total: Tensor = torch.zeros(1, self.num_data, dtype=torch.float64)
            for site in sites:
                if site.local:
                    term = self.model_term(site, {**values, **assigned}, unmask=unmask)
                    total = total + _per_datum(term)
            found.append(total)
        widest = max(total.shape[0] for total in found)
        stacked = torch.stack([total.expand(widest, -1) for total in found])
        return stacked.logsumexp(0), shared

    def log_weights(self, values: Values) -> dict[str, Tensor]:
        """Return log_likelihood, log_prior, log_guide of the data, [K, N], and of all, [K, 1]."""
        prior, shared_prior = self.joint(values, self.program.latents)
        joint, shared = self.joint(values, self.program.model_sites)
        guide, shared_guide = _zero(self.num_data), _zero(1)
        for site in self.program.guide_sites:
            term = _per_datum(self.guide_term(site, values))
            if site.local:
                guide = guide + term
            else:
                shared_guide = shared_guide + term
        return {
            "log_likelihood": joint - prior,
            "log_prior": prior,
            "log_guide": guide,
            "shared_prior": shared_prior,
            "shared_guide": shared_guide,
            "total": joint - guide + (shared - shared_guide) * 0,
            "shared": shared - shared_guide,
        }

    # --- losses

    @property
    def plate_scale(self) -> float:
        style = self.program.plate_style
        if style == "drawn":
            return self.program.num_data / self.num_data
        return self.program.full_size / self.num_data if style == "subsample" else 1.0

    def scale(self, site: Site) -> Tensor:
        """Return the scale of a site in the model, [1, N or 1]."""
        found = torch.ones(1, 1, dtype=torch.float64)
        if self.program.common_scale is not None:
            found = found * self.program.common_scale
        if site.scale == "datum":
            found = found * self.data["weight"].to(torch.float64).reshape(1, -1)
        elif isinstance(site.scale, float):
            found = found * site.scale
        return found * self.plate_scale if site.local else found

    def guide_scale(self, site: Site) -> Tensor:
        """Return the scale of a site in the guide."""
        if self.program.guide_scales:
            return self.scale(site)
        one = torch.ones(1, 1, dtype=torch.float64)
        return one * self.plate_scale if site.local else one

    def parents(self, site: Site) -> set[str]:
        """Return the latents that a site's term depends on."""
        found = {term.parent for term in site.terms}
        through = [self.program.site(name) for name in found] + [site]
        return found | {s.mask.parent for s in through if s.mask and s.mask.kind == "latent"}

    def components(self) -> list[tuple[set[str], list[Site]]]:
        """Return groups of summed-out latents with the sites that they connect."""
        groups = [({name}, [self.program.site(name)]) for name in self.summed_out]
        for site in self.program.model_sites:
            needed = self.parents(site) & set(self.summed_out)
            needed |= {site.name} & set(self.summed_out)
            touched = [group for group in groups if group[0] & needed]
            if not touched:
                continue
            names = set().union(*(group[0] for group in touched))
            sites = [s for group in touched for s in group[1]]
            sites += [] if site in sites else [site]
            groups = [group for group in groups if not group[0] & needed] + [(names, sites)]
        return groups

    def elbo(
        self,
        values: Values,
        *,
        enumerated: tuple[str, ...] = (),
        analytic: tuple[str, ...] = (),
        detach: bool = False,
    ) -> Tensor | None:
        """Return the sum over particles and data of the ELBO's terms, scaled as in training.

        None where a scale would have to stand inside of a sum over a discrete latent.
        """
        groups = self.components()
        for _, sites in groups:
            scales = [self.scale(site) for site in sites]
            if any(bool((scale != scales[0]).any()) for scale in scales):
                return None
        grouped = {site.name for _, sites in groups for site in sites}
        particles = max([v.shape[0] for v in values.values()], default=1)
        total: Tensor = torch.zeros((), dtype=torch.float64)
        proposals = self.program.proposed
        for assigned in self.assignments(enumerated):
            given = {**values, **assigned}
            chance = torch.zeros(1, 1, dtype=torch.float64)
            for name in enumerated:
                term = self.log_density(proposals[name], given, role="q")
                chance = chance + _per_datum(term)
            part: Tensor = torch.zeros(1, 1, dtype=torch.float64)
            for site in self.program.model_sites:
                if site.name in grouped or site.name in analytic:
                    continue
                part = part + self.scale(site) * _per_datum(self.model_term(site, given)) / (
                    1 if site.local else self.num_data
                )
            for names, sites in groups:
                sums = []
                for summed in self.assignments(tuple(sorted(names))):
                    terms = [_per_datum(self.model_term(s, {**given, **summed})) for s in sites]
                    sums.append(functools.reduce(torch.add, terms))
                widest = max(t.shape[0] for t in sums)
                log_sum = torch.stack([t.expand(widest, -1) for t in sums]).logsumexp(0)
                part = part + self.scale(sites[0]) * log_sum
            for name, site in proposals.items():
                term = (
                    self.kl(site, given)
                    if name in analytic
                    else self.guide_term(site, given, detach=detach and name not in enumerated)
                )
                part = part - self.guide_scale(site) * _per_datum(term) / (
                    1 if site.local else self.num_data
                )
            whole = (chance.exp() * part).expand(particles, self.num_data)
            total = total + whole.sum() / particles
        return total

    def kl(self, site: Site, values: Values) -> Tensor:
        """Return KL(q, p) of a site, masked, per entry, of distributions in this layout."""
        prior = self.program.site(site.name)
        etas = self._eta(site, values, "q"), self._eta(prior, values, "p")
        mine, theirs = torch.broadcast_tensors(*etas)
        found = torch.distributions.kl_divergence(build(site, mine), build(prior, theirs))
        return _times(self.counts(prior, values), self._expand(site, found))

    def _eta(self, site: Site, values: Values, role: str) -> Tensor:
        bias, slope = self.parameters[f"{role}_{site.name}"].to(torch.float64)
        eta = bias.reshape(1, 1, 1, 1) + (slope * self.h if site.local else 0.0)
        for axis, (name, (_, size)) in enumerate(self.program.inner.items()):
            if name in site.plates:
                shape = [1, 1, 1, 1]
                shape[2 + axis] = size
                entries = [
                    0.4 * (2 * i / (size - 1) - 1) if size > 1 else -0.4 for i in range(size)
                ]
                eta = eta + torch.tensor(entries, dtype=torch.float64).reshape(shape)
        for term in site.terms:
            eta = eta + term.weight * self._feature(site, term.parent, term.reduce, values)
        return eta

    def importance(
        self, values: Values, *, detach: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return scale [1, N], log p [K, N] and log q [K, N] with ratios, and the shared term.

        The scale of a datum is that of its observed sites where they have one, else that of the
        plate; what the scale of another site differs by goes into the weight.
        """
        observed = [self.scale(site) for site in self.program.observed]
        alike = observed and all(bool((scale == observed[0]).all()) for scale in observed)
        outer = observed[0] if alike else torch.full((1, 1), self.plate_scale).to(torch.float64)
        groups = self.components()
        for _, sites in groups:
            scales = [self.scale(site) for site in sites]
            if any(bool((scale != scales[0]).any()) for scale in scales):
                return None
        grouped = {site.name for _, sites in groups for site in sites}
        joint = guide = torch.zeros(1, self.num_data, dtype=torch.float64)
        shared = torch.zeros((), dtype=torch.float64)
        for site in self.program.model_sites:
            if site.name in grouped:
                continue
            term = _per_datum(self.model_term(site, values))
            if site.local:
                joint = joint + self.scale(site) / outer * term
            else:
                shared = shared + (self.scale(site) * term)[0].sum()
        for names, sites in groups:
            sums = []
            for summed in self.assignments(tuple(sorted(names))):
                terms = [_per_datum(self.model_term(s, {**values, **summed})) for s in sites]
                sums.append(functools.reduce(torch.add, terms))
            widest = max(t.shape[0] for t in sums)
            log_sum = torch.stack([t.expand(widest, -1) for t in sums]).logsumexp(0)
            joint = joint + self.scale(sites[0]) / outer * log_sum
        for name, site in self.program.proposed.items():
            if name in self.summed_out:
                continue
            term = _per_datum(self.guide_term(site, values, detach=detach))
            scale = self.scale(self.program.site(name))
            if site.local:
                guide = guide + scale / outer * term
            else:
                shared = shared - (self.guide_scale(site) * term)[0].sum()
        particles = max([v.shape[0] for v in values.values()], default=1)
        joint, guide = (t.expand(particles, self.num_data) for t in (joint, guide))
        return outer, joint, guide, shared


def _zero(num_data: int) -> Tensor:
    return torch.zeros(1, num_data, dtype=torch.float64)


def _times(count: Tensor, term: Tensor) -> Tensor:
    """Leave out what does not count, be it infinite."""
    count, term = torch.broadcast_tensors(count, term)
    return torch.where(count > 0, term, torch.zeros_like(term))


def _per_datum(term: Tensor) -> Tensor:
    """Sum over the entries of inner plates: [K, N] of [K, N, A, B]."""
    return term.sum((2, 3))


# --- evidence


def evidence(program: Program, parameters: Values, points: int = 3001) -> Tensor | None:
    """Return log p(x), [N], by quadrature and enumeration; None where that is out of reach.

    That is: with more than two continuous numbers in a datum, with counts among the latents, or
    with latents that all data share.
    """
    if any(not site.local or site.family == "poisson" for site in program.latents):
        return None
    continuous = [site for site in program.latents if SUPPORTS[site.family] != "discrete"]
    entries: list[tuple[Site, tuple[int, ...], int]] = []
    for site in continuous:
        shape = tuple(program.inner[p][1] if p in site.plates else 1 for p in program.inner)
        shape = (*shape, *[1] * (2 - len(shape)))
        size = site.size or 1
        if site.family == "dirichlet":
            if site.size != 2:
                return None
            size = 1
        entries += [(site, shape, i) for i in range(math.prod(shape) * size)]
    if len(entries) > (2 if program.num_data <= 5 else 1) or any(
        site.mask and not site.mask.gated for site in program.latents
    ):
        return None
    for site in program.model_sites:
        if site.mask is not None and site.mask.kind == "latent":
            parent = program.site(site.mask.parent)
            # A step is no matter for a grid, and a masked value has no distribution.
            if SUPPORTS[parent.family] != "discrete" or parent.mask is not None:
                return None
    if any(len(site.plates) and SUPPORTS[site.family] == "discrete" for site in program.latents):
        return None
    answer = Answer(program, {n: p.detach() for n, p in parameters.items()})
    discrete = [site.name for site in program.latents if SUPPORTS[site.family] == "discrete"]
    answer.summed_out = tuple(discrete)
    if len(entries) == 2:
        points = 281
    grids = [_grid(site, points) for site, _, _ in entries]
    mesh = torch.meshgrid(*[u for u, _, _ in grids], indexing="ij") if grids else ()
    steps = sum((_log_step(u) for u, _, _ in grids), torch.zeros(()).to(torch.float64))
    log_volume: Tensor = torch.zeros(1, dtype=torch.float64)
    values: dict[str, list[Tensor]] = {}
    for u, (site, _, _) in zip(mesh, entries, strict=True):
        value, log_slope = _from_line(site, u.reshape(-1))
        log_volume = log_volume + log_slope
        values.setdefault(site.name, []).append(value)
    tensors = {}
    for site in continuous:
        shape = next(shape for other, shape, _ in entries if other.name == site.name)
        stacked = torch.stack(values[site.name], -1)
        if site.family == "dirichlet":
            stacked = torch.stack([stacked, 1 - stacked], -1).flatten(-2)
        tensors[site.name] = stacked.reshape(-1, 1, *shape, *([site.size] if site.size else []))
    joint, _ = answer.joint(tensors, program.model_sites, unmask=True)
    return (joint + log_volume.unsqueeze(-1)).logsumexp(0) + steps


def _grid(site: Site, points: int) -> tuple[Tensor, None, None]:
    low, high = {
        "real": (-8.0, 8.0),
        "positive": (-22.0, 8.0) if points > 1000 else (-14.0, 8.0),
        "unit": (-16.0, 16.0),
        "interval": (-22.0, 22.0),
        "simplex": (-16.0, 16.0),
    }[SUPPORTS[site.family]]
    return torch.linspace(low, high, points, dtype=torch.float64), None, None


def _log_step(u: Tensor) -> Tensor:
    return (u[1] - u[0]).log()


def _from_line(site: Site, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return a point of the support for one of the line, and the log of the slope."""
    kind = SUPPORTS[site.family]
    log_sigmoid = torch.nn.functional.logsigmoid
    if kind == "real":
        return u.sinh(), u.cosh().log()  # heavy tails too
    if kind == "positive":
        return u.exp(), u
    slope = log_sigmoid(u) + log_sigmoid(-u)
    if kind == "interval":
        return -1 + 3 * u.sigmoid(), slope + math.log(3)
    return u.sigmoid(), slope
