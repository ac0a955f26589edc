"""Reweighted wake-sleep, with one weight per particle and datum."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.losses.base import without_value
from pyro_vae.losses.importance import ImportanceObjective, WeightedTerms
from pyro_vae.particles.estimators import iwae_bound
from pyro_vae.particles.modes import per_datum
from pyro_vae.particles.plan import Plan
from pyro_vae.particles.training_run import TrainingRun, trace_detached
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.dreams import check_held, sources_of, with_dreamt
from pyro_vae.programs.guide_kinds import row_guide
from pyro_vae.programs.masks import mask_proposals
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.moved import refuse_moved
from pyro_vae.programs.nodes import is_point, latent_nodes
from pyro_vae.programs.traces import dream, site_log_prob, trace_given
from pyro_vae.programs.types import DataPlate, Program, Values

# Which argument an observed site is, as long as its plan is remembered.
_sources = weakref.WeakKeyDictionary[Plan, dict[str, int | str]]()


class WakeSleep(ImportanceObjective):
    r"""Reweighted wake-sleep, with weights of each datum (Bornschein & Bengio 2015).

    With normalized weights :math:`\bar w_{kn}` of K draws of the guide, a step goes along

    - wake-theta: the derivative of the importance-weighted bound by the model's
      parameters;
    - wake-phi: that of :math:`\sum_k \bar w_{kn} \log q(z_{kn} | x_n)` by the guide's, the
      forward KL from the posterior, up to the error of the weights;
    - sleep-phi: that of :math:`\log q(z | x)` at (z, x) dreamt by the model, the forward
      KL for the model's own data.

    The draws carry no gradient, so discrete proposals are as good as any, and neither
    needs the other's: one loss serves both sets of parameters. Its value is the negative
    importance-weighted bound; scales are treated as in :class:`pyro_vae.IWAE`.

    Args:
        num_particles: K, at least 2, because a single normalized weight is always 1.
        insomnia: the share of wake-phi; the rest is sleep-phi, which teaches an encoder
            and is refused for a LocalGuide, whose rows belong to the data.
        dream: where the batch is not just the observed values: from a mapping (observed
            site to dreamt value) to the batch that holds them. By default each observed
            value is found among the batch's tensors.
        vectorize_particles: as in :class:`pyro_vae.ELBO`.
        data_plate: as in :func:`pyro_vae.log_weights`; False for one weight of all the data.

    Raises:
        DataPlateError: where the data plate cannot be found.
        ValueError: for unknown options, what :class:`pyro_vae.IWAE` refuses (but for
            proposals that cannot be reparameterized), or a sleep phase that cannot be had.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(5)
        >>> encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 4))
        >>> guide = pv.AmortizedGuide(model, encoder, example=x)
        >>> optim = pyro.optim.Adam({"lr": 0.01})
        >>> loss = pv.WakeSleep(10, insomnia=0.8)
        >>> isinstance(pyro.infer.SVI(model, guide, optim, loss=loss).step(x), float)
        True
    """

    def __init__(
        self,
        num_particles: int = 10,
        insomnia: float = 1.0,
        *,
        dream: Callable[[Values], Any] | None = None,
        vectorize_particles: bool = True,
        data_plate: DataPlate = None,
    ) -> None:
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia={insomnia}: a share of wake-phi from 0 to 1 is needed")
        num_particles = as_count("num_particles", num_particles)
        if num_particles < 2 and insomnia > 0:
            raise ValueError(
                f"num_particles={num_particles}: wake-phi needs at least 2; of one, the weight is 1"
            )
        super().__init__(num_particles, vectorize_particles, data_plate)
        self.insomnia = insomnia
        self.dream = dream

    def __repr__(self) -> str:
        return f"WakeSleep(num_particles={self.num_particles}, insomnia={self.insomnia})"

    def _loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return the negative bound, with the gradients of each phase."""
        run = self._run(model, guide, batch, trace_detached)
        sites = [name for name, _ in run.guide.latents()]
        refuse_moved(sites, "wake-sleep needs it, pv.ELBO and pv.IWAE do not")
        weights = WeightedTerms(run)
        scale, log_guide = weights.scale, weights.log_guide(run.guide_terms())
        log_weights = weights.log_joint() - log_guide.detach()
        bound = (scale * iwae_bound(log_weights)).sum()
        self._checked(run, -bound)
        if not torch.is_grad_enabled():
            return -bound
        if self.insomnia > 0:
            shares = torch.softmax(log_weights.detach(), 0)
            wake = (scale * shares * log_guide).sum()
            bound = bound + self.insomnia * without_value(wake)
        if self.insomnia < 1:
            asleep = (scale * self._sleep(run, model, guide, batch)).sum()
            bound = bound + (1 - self.insomnia) * without_value(asleep)
        return -bound

    def _sleep(self, run: TrainingRun, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return log q(z | x) of a dream for each datum, [N]."""
        plan = run.plan
        if row_guide(guide) is not None:
            raise ValueError(
                "a sleep phase teaches an encoder what the model dreams; the rows of a LocalGuide "
                "belong to the data, and would learn the prior. Use insomnia=1"
            )
        if plan.draws_minibatch:
            raise ValueError(
                "a sleep phase needs the minibatch as the batch; the model draws its own "
                "(subsample_size=...). Pass pyro.plate(name, num_data, subsample=x), or insomnia=1"
            )
        with torch.no_grad():
            dreamt = dream(model, batch, summed_out=plan.summed_out, nesting=plan.mode.nesting)
        values = {name: node["value"] for name, node in latent_nodes(dreamt)}
        observed = {name: values.pop(name) for name, _ in run.observed() if name in values}
        if self.dream is None:
            batch = _dreamt_batch(run, observed, batch)
        else:
            batch = as_batch(self.dream(observed))
        guide_trace = trace_given(guide, values, batch)
        mask_proposals(dreamt, guide_trace)
        total: Tensor | float = 0.0
        for name, node in latent_nodes(guide_trace):
            if node["infer"].get("is_auxiliary") or is_point(node["fn"]):
                raise ValueError(
                    "the sleep phase needs the guide's density of given latents, which its site "
                    f"{name!r} hides (an auxiliary site, or a Delta); use insomnia=1, or a guide "
                    "of pyro_vae"
                )
            log_prob = site_log_prob(name, node)
            total = total + per_datum(log_prob, plan.mode.nesting, plan.mode.data_dim, leading=0)
        return torch.as_tensor(total)


def _dreamt_batch(run: TrainingRun, observed: Values, batch: Batch) -> Batch:
    """Return the arguments with dreamt values in the place of the observed ones."""
    if run.plan not in _sources:
        # A factor is not drawn.
        held = {name: nodes[0]["value"] for name, nodes in run.observed() if name in observed}
        found = sources_of(held, run.batch, who="the sleep phase", remedy=", or insomnia=1")
        check_held(found, batch, observed)
        _sources[run.plan] = found
    return with_dreamt(batch, _sources[run.plan], observed)
