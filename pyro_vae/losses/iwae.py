"""The importance-weighted bound of each datum, with its gradient estimators."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pyro_vae.losses.base import not_reparameterized, without_value
from pyro_vae.losses.importance import ImportanceObjective, WeightedTerms, kl_of_globals
from pyro_vae.particles.estimators import iwae_bound
from pyro_vae.particles.stopped_gradients import StoppedGradients
from pyro_vae.particles.training_run import TrainingRun
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.traces import trace_guide
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.recording import is_recording

IWAEEstimator: TypeAlias = Literal["pathwise", "stl", "dreg"]


class IWAE(ImportanceObjective):
    r"""The importance-weighted bound of each datum (Burda, Grosse & Salakhutdinov 2016).

    .. math:: \sum_n s_n \log \frac{1}{K} \sum_k w_{kn},
        \quad w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} | x_n)}

    The loss is its negative. The scale s of a datum (of a subsampled plate, or of
    pyro.poutine.scale) stands outside the logarithm: inside, the sum would not bound
    log p(x) any more. It is the model's; the guide's scales are not needed. A
    latent site whose scale is not that of the likelihood (KL warm-up) has the ratio in the
    weight, in model and guide alike. Discrete latents that the guide does not propose are
    summed out. Global latents g are drawn once for all particles, and each datum's weights are
    given them: the loss is then that of :math:`\mathbb{E}_{q(g)}[\sum_n \log \frac1K \sum_k
    w_{kn}(g)] - \mathrm{KL}(q(g), p(g))`, pathwise.

    Its gradient by the model's parameters is the derivative of what was drawn; by the
    guide's parameters it is estimated

    - "pathwise": by that derivative too. Its signal falls below its noise as K grows
      (Rainforth et al. 2018);
    - "dreg": doubly reparameterized (Tucker et al. 2019): through the draws alone, each
      path weighted by the square of its normalized weight. The same expectation, without
      that fault, and no noise at all where the guide is the exact posterior;
    - "stl": through the draws alone, with the normalized weights (Roeder, Wu & Duvenaud
      2017). No noise at the exact posterior, but for K > 1 another expectation than the
      derivative of the bound (Tucker et al. 2019).

    "stl" and "dreg" run a guide twice if its proposals may depend on one another. They
    refuse a point made of other draws and of parameters
    (AutoStructured), and for "dreg" latents of different scales.

    Args:
        num_particles: K, at least 1.
        estimator: of the gradient by the guide's parameters: "pathwise", "stl" or "dreg".
        vectorize_particles: as in :class:`pyro_vae.ELBO`.
        data_plate: as in :func:`pyro_vae.log_weights`; False for one weight of all the data.

    Raises:
        DataPlateError: where the data plate cannot be found.
        ValueError: for an unknown option, global latents (but "pathwise"), a subsampled plate
            inside a datum, or a proposal that cannot be reparameterized.

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
        >>> loss = pv.IWAE(50, estimator="dreg")
        >>> isinstance(pyro.infer.SVI(model, guide, optim, loss=loss).step(x), float)
        True
    """

    _enumeration = "sum"

    def __init__(
        self,
        num_particles: int,
        estimator: IWAEEstimator = "pathwise",
        *,
        vectorize_particles: bool = True,
        data_plate: DataPlate = None,
    ) -> None:
        if estimator not in get_args(IWAEEstimator):
            raise ValueError(f"estimator={estimator!r}: 'pathwise', 'stl' or 'dreg' is needed")
        super().__init__(num_particles, vectorize_particles, data_plate)
        self.estimator = estimator
        # The score of a draw that all particles share has another weight than theirs.
        self._share_globals = estimator == "pathwise"

    def __repr__(self) -> str:
        return f"IWAE(num_particles={self.num_particles}, estimator={self.estimator!r})"

    def _loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return the negative bound."""
        through_draws = self.estimator != "pathwise" and torch.is_grad_enabled()
        stopped = StoppedGradients() if through_draws else None
        run = self._run(model, guide, batch, stopped.trace if stopped else trace_guide)
        for name, nodes in run.guide.latents():
            if not nodes[0]["fn"].has_rsample:
                raise not_reparameterized(name, nodes[0])
        weights = WeightedTerms(run)
        ratio = weights.latent_ratio
        terms = (
            stopped.guide_terms(run, scaled=False, apart=ratio is None)
            if stopped
            else run.guide_terms()
        )
        log_joint = weights.log_joint()
        log_weights = log_joint - weights.log_guide(terms)
        _check_edges(run, log_joint)
        bound = (weights.scale * iwae_bound(log_weights)).sum()
        if run.plan.shares_globals:
            bound = bound - kl_of_globals(run)
        if self.estimator == "dreg" and stopped:
            shares = torch.softmax(log_weights.detach(), 0)
            if ratio is None:
                raise ValueError(
                    "'dreg' needs one scale for all latent sites of a datum; use 'pathwise'"
                )
            # The score of log q^ratio, doubly reparameterized, takes ratio * share * (1 - share)
            # of a path from its share.
            stopped.scale_gradients(run, 1 - ratio + ratio * shares)
            # A draw of no density has no share.
            weighed = torch.where(shares > 0, log_weights, 0.0)
            bound = bound.detach() + without_value((weights.scale * shares * weighed).sum())
        return self._checked(run, -bound)


def _check_edges(run: TrainingRun, log_joint: Tensor) -> None:
    """Raise ValueError for gradients through draws that leave the support of a distribution.

    They miss what a parameter moves across the edge, and would train to something else.
    """
    if is_recording() or not log_joint.requires_grad:
        return
    if bool((log_joint == -math.inf).any()) and (sites := run.outside()):
        raise ValueError(
            f"the guide proposes values of {', '.join(sites)} where the model's density is zero: "
            "a gradient through the draws misses what crosses the edge of its support. Propose on "
            "the support alone, as the guides of pyro_vae do, or train with pv.WakeSleep; the "
            "value of the loss, and pv.iwae_bound, are right with such proposals"
        )
