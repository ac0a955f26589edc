"""The evidence lower bound, with its gradient estimators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.losses.base import Objective, not_reparameterized, without_value
from pyro_vae.losses.kl import analytic_kl, kl_per_dimension
from pyro_vae.particles.stopped_gradients import StoppedGradients
from pyro_vae.particles.training_run import TrainingRun
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.traces import trace_guide
from pyro_vae.programs.types import DataPlate, Node, Program

ELBOEstimator: TypeAlias = Literal["pathwise", "stl", "score"]
KLKind: TypeAlias = Literal["analytic", "sample"]

# The terms of an ELBO, each [K, N] or [K, 1], by what they are and the site that they are of.
_Terms: TypeAlias = dict[tuple[Literal["model", "kl", "guide", "factor"], str], Tensor]

_BASELINE_DECAY = 0.9


class ELBO(Objective):
    r"""The evidence lower bound, with an analytic KL wherever there is one.

    .. math::
        \mathbb{E}_q[\log p(x | z)] - \mathrm{KL}(q(z | x), p(z))
        \quad\text{or}\quad \mathbb{E}_q[\log p(x, z) - \log q(z | x)]

    Site by site, a latent whose guide and model distributions have a closed-form KL
    gets it; the others are sampled (:func:`pyro_vae.explain` says which and why).
    The loss is the negative ELBO, summed over the data, with scales and masks applied,
    as Pyro's is: ``pyro.infer.SVI(model, guide, optim, loss=pv.ELBO())`` and
    ``pv.ELBO()(model, guide)(x).backward()`` both work.

    Its gradient by the guide's parameters is estimated

    - "pathwise": through the draws (Kingma & Welling 2014);
    - "stl": through the draws alone, without the score of log q, whose expectation is
      zero (sticking the landing, Roeder, Wu & Duvenaud 2017): no noise at all where the
      guide is the exact posterior. The KL is then sampled, which makes the noise cancel. A guide
      whose proposals may depend on one another runs twice;
    - "score": for latents that cannot be reparameterized, by the derivative of log q
      times the draw's gain (REINFORCE, Williams 1992; Ranganath, Gerrish & Blei
      2014), datum by datum, less a baseline: the mean of the other particles', or, of a
      single particle, a running mean. Latents that can be reparameterized stay pathwise.

    Args:
        num_particles: K, draws of the guide for an estimate.
        kl: "analytic", or "sample" for the same estimate as pyro.infer.Trace_ELBO;
            by default analytic, and sampled for "stl".
        estimator: of the gradient: "pathwise", "stl" or "score".
        free_bits: nats of KL per latent dimension, on average over the batch, below which
            a dimension is not pressed further (Kingma et al. 2016, eq. 15). Changes the
            gradient, never the value.
        vectorize_particles: whether several particles run at once, in a plate outside
            the model's own. The first call compares them with single particles and
            falls back, to the batch repeated or to a loop with a logged warning, if the
            networks cannot take the extra dimension.
        data_plate: as in :func:`pyro_vae.log_weights`.

    Raises:
        ValueError: for an unknown option, num_particles < 1, a guide that does not
            propose the model's latent sites, one whose draws cannot be reparameterized
            (unless estimator="score"), or free bits of a site whose KL has no closed form
            per dimension.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(5)
        >>> guide = pv.LocalGuide(model, num_data=5, example=x)
        >>> optim = pyro.optim.Adam({"lr": 0.01})
        >>> isinstance(pyro.infer.SVI(model, guide, optim, loss=pv.ELBO()).step(x), float)
        True
    """

    _enumeration = "expectation"

    def __init__(
        self,
        num_particles: int = 1,
        kl: KLKind | None = None,
        estimator: ELBOEstimator = "pathwise",
        *,
        free_bits: float = 0.0,
        vectorize_particles: bool = True,
        data_plate: DataPlate = None,
    ) -> None:
        if kl is not None and kl not in get_args(KLKind):
            raise ValueError(f"kl={kl!r}: 'analytic' or 'sample' is needed")
        if estimator not in get_args(ELBOEstimator):
            raise ValueError(f"estimator={estimator!r}: 'pathwise', 'stl' or 'score' is needed")
        if kl == "analytic" and estimator == "stl":
            raise ValueError(
                "estimator='stl' needs kl='sample': without the sampled log q there is no score "
                "to leave out, and the noise does not vanish at the exact posterior"
            )
        kl = ("sample" if estimator == "stl" else "analytic") if kl is None else kl
        if not 0 <= free_bits < float("inf"):
            raise ValueError(f"free_bits={free_bits}: a number of nats of at least 0 is needed")
        if free_bits and kl == "sample":
            raise ValueError("free_bits need kl='analytic': a KL of each latent dimension")
        super().__init__(num_particles, vectorize_particles, data_plate)
        self.kl = kl
        self.estimator = estimator
        self.free_bits = free_bits
        if estimator == "score" or free_bits:
            self._data = "wanted"

    @property
    def coupling(self) -> str:
        """As in :class:`Objective`."""
        what = f"free_bits={self.free_bits} hold on average over a minibatch"
        return what if self.free_bits else ""

    def __repr__(self) -> str:
        how = f"kl={self.kl!r}, estimator={self.estimator!r}"
        return f"ELBO(num_particles={self.num_particles}, {how})"

    def _loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return the negative ELBO."""
        sticks = self.estimator == "stl" and torch.is_grad_enabled()
        stopped = StoppedGradients() if sticks else None
        run = self._run(model, guide, batch, stopped.trace if stopped else trace_guide)
        kls = self._analytic(run)
        terms: _Terms = {("model", n): t for n, t in run.model_terms(skip=kls, scaled=True)}
        terms.update((("kl", name), -kl) for name, kl in kls.items())
        terms.update((("guide", name), -t) for name, t in self._guide_terms(run, kls, stopped))
        for name, nodes in run.guide_factors():  # as Trace_ELBO has them, but pathwise
            terms["factor", name] = -run.log_prob(name, nodes, scaled=True)
        if not terms:  # as where nothing of this batch is observed
            return torch.zeros(())
        elbo = torch.stack([term.sum() for term in terms.values()]).sum() / self.num_particles
        if torch.is_grad_enabled():
            if self.estimator == "score":
                elbo = elbo + without_value(self._score(run, terms))
            if self.free_bits:
                elbo = elbo + without_value(_kl_below_floor(run, self.free_bits))
        return self._checked(run, -elbo, kls)

    def _explained(self, run: TrainingRun) -> dict[str, str]:
        sampled = "stl leaves out its score" if self.estimator == "stl" else "kl='sample'"
        found = {}
        for name, nodes in run.proposals():
            model_node = nodes[0][1]
            if model_node is not None and self.kl == "sample":
                found[name] = f"sampled: {sampled}"
                continue
            # Of the nodes that the loss takes, with what is summed out side by side.
            kls, reason = _closed_forms(nodes)
            first = run.plan.mode.first_enum_dim
            if model_node is not None and len(model_node["fn"].batch_shape) >= -first:
                reason = f"its prior depends on discrete latents, {reason}"
            found[name] = f"{'sampled' if kls is None else 'analytic'}: {reason}"
        return found

    def _analytic(self, run: TrainingRun) -> dict[str, Tensor]:
        """Return the scaled KL, [K, N], of each latent site that has a closed form."""
        if self.kl == "sample":
            return {}
        found: dict[str, Tensor] = {}
        for name, nodes in run.proposals():
            kls, _ = _closed_forms(nodes)
            if kls is not None:
                pairs = zip(kls, nodes, strict=True)
                terms = [scale_and_mask(kl, run.scale(q), q["mask"]) for kl, (q, _) in pairs]
                found[name] = run.term(name, run.guide.nodes(name), terms, scaled=False)
        return found

    def _guide_terms(
        self, run: TrainingRun, kls: dict[str, Tensor], stopped: StoppedGradients | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield log q, scaled, [K, N], of the sites without an analytic KL."""
        of_draws = {} if stopped is None else stopped.guide_terms(run, scaled=True)
        for name, nodes in run.guide.latents():
            reparameterized = nodes[0]["fn"].has_rsample or name in run.plan.enumerated
            if not reparameterized and self.estimator != "score":
                raise not_reparameterized(name, nodes[0])
            if name in of_draws:
                yield name, of_draws[name]
            elif name not in kls:
                term = run.log_prob(name, nodes, scaled=True)
                # The derivative of log q at a fixed draw is zero on average: noise to leave out.
                yield name, term if reparameterized else term.detach()

    def _score(self, run: TrainingRun, terms: _Terms) -> Tensor:
        """Return a term whose derivative is that of the draws' probability, times their gain."""
        num_data = max(term.shape[1] for term in terms.values())
        total = torch.zeros((), dtype=next(iter(terms.values())).dtype)
        for name, nodes in run.guide.latents():
            if nodes[0]["fn"].has_rsample or name in run.plan.enumerated:
                continue
            log_guide = run.log_prob(name, nodes, scaled=False)
            # The gain of a datum's draw is that datum's terms, less the KL of its own site.
            earned = [t.detach() for key, t in terms.items() if key != ("kl", name)]
            local = sum((t for t in earned if t.shape[1] == num_data), torch.zeros_like(earned[0]))
            zero = torch.zeros_like(local[:, :1])
            common = sum((t for t in earned if t.shape[1] != num_data), zero)
            is_local = log_guide.shape[1] == num_data
            signal = (local if is_local else local.sum(1, keepdim=True)) + common
            total = total + ((signal - self._baseline(name, signal)) * log_guide).sum()
        return total / self.num_particles

    def _baseline(self, name: str, signal: Tensor) -> Tensor:
        """Return the expected gain of a draw, independent of that draw: [K, N]."""
        count = signal.shape[0]
        if count > 1:
            return (signal.sum(0, keepdim=True) - signal) / (count - 1)
        mean, baseline = signal.mean(), self._baselines.get(name)
        if baseline is None:
            self._baselines[name] = mean
            return torch.zeros_like(signal)
        before = baseline.to(signal).clone()
        # In place: a graph that was traced from a step reads and writes it where it is.
        baseline.copy_(_BASELINE_DECAY * before + (1 - _BASELINE_DECAY) * mean)
        return before.expand_as(signal)


def _closed_forms(nodes: list[tuple[Node, Node | None]]) -> tuple[list[Tensor] | None, str]:
    """Return the KL of a latent's (guide, model) nodes in each trace, or None; and why."""
    kls, reason = [], ""
    for pair in nodes:
        kl, reason = analytic_kl(*pair)
        if kl is None:
            return None, reason
        kls.append(kl)
    return kls, reason


# --- free bits: a floor under the KL of each latent dimension, on average over the batch


def _kl_below_floor(run: TrainingRun, free_bits: float) -> Tensor:
    r"""Return the KL of the dimensions below the floor, which are not pressed further: a scalar.

    .. math:: \sum_d \max(\lambda, \mathrm{KL}_d), \quad
              \mathrm{KL}_d = \sum_n \mathrm{KL}(q(z_{nd} | x_n), p(z_d))

    (Kingma et al. 2016, arXiv:1606.04934, eq. 15), with :math:`\lambda` nats for each datum.
    Raises ValueError for a site whose KL has no closed form per dimension.
    """
    if run.plan.enumerated:
        raise ValueError(
            f"free_bits: the guide enumerates {list(run.plan.enumerated)}, of which a "
            "dimension's KL is no plain mean over data. Leave them out of the guide, and they "
            "are summed out"
        )
    given = []
    for name, nodes in run.proposals():
        kls = []
        for guide_node, model_node in nodes:
            kl, reason = kl_per_dimension(guide_node, model_node)
            if kl is None:
                raise ValueError(
                    f"free_bits: latent site {name!r} has no KL of each dimension: {reason}"
                )
            kls.append((guide_node, kl))
        total = _over_data(run, name, kls)
        count = _over_data(run, name, [(node, torch.ones_like(kl)) for node, kl in kls])
        # A dimension under the floor gets its KL back: no pressure, no gradient.
        given.append(torch.where(total < free_bits * count, total, torch.zeros_like(total)).sum())
    return torch.stack(given).sum() if given else torch.zeros(())


def _over_data(run: TrainingRun, name: str, terms: list[tuple[Node, Tensor]]) -> Tensor:
    """Return a site's terms, scaled and masked, summed over the data: the mean of the particles.

    Of each trace, the site's node and a term of its batch and event shape.
    """
    mode, local = run.plan.mode, run.is_local(name, terms[0][0])
    summed = (mode.data_dim if local else None, -mode.plate_dims if mode.leading else None)
    total: list[Tensor] = []
    for node, term in terms:
        batch_ndim = term.ndim - node["fn"].event_dim
        events, first = tuple(range(batch_ndim, term.ndim)), tuple(range(term.ndim - batch_ndim))
        ahead = scale_and_mask(term.movedim(events, first), run.scale(node), node["mask"])
        axes = [batch_ndim + dim for dim in summed if dim is not None and batch_ndim + dim >= 0]
        weighted = ahead.movedim(first, events)
        total.append(weighted.sum(axes, keepdim=True) if axes else weighted)
    return torch.stack(total).sum(0) / run.num_particles
