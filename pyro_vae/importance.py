"""Objectives of importance weights, one for each datum: IWAE and reweighted wake-sleep."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batches import as_batch
from pyro_vae.counts import as_count
from pyro_vae.estimators import iwae_bound
from pyro_vae.graphs import is_recording
from pyro_vae.guides import LocalGuide
from pyro_vae.handlers import same_scale, scale_parts
from pyro_vae.layouts import Layout, device_of
from pyro_vae.objectives import Objective, not_reparameterized, without_value
from pyro_vae.particles import per_datum
from pyro_vae.running import evaluation, preserved_rng, unwrapped
from pyro_vae.sites import latent_nodes
from pyro_vae.spine import Run
from pyro_vae.traces import dream, is_point, mask_proposals, site_log_prob, trace_given

__all__ = ["IWAE", "WakeSleep"]


class _Importance(Objective):
    """What the objectives of one importance weight per datum have in common."""

    _data = "needed"
    _enumeration = "no"

    def explain(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, str]:
        """Return, for each latent site, that its part of the weight is sampled."""
        with torch.no_grad(), preserved_rng(device_of(args, kwargs)), evaluation(model, guide):
            run = self._run(model, guide, args, kwargs)
        told = dict.fromkeys(
            run.layout.summed_out, "summed out: discrete, and not proposed by the guide"
        )
        for name, _ in run.guide_nodes():
            told[name] = "sampled: an importance weight has no analytic part"
        return told


class IWAE(_Importance):
    r"""The importance-weighted bound of each datum (Burda, Grosse & Salakhutdinov 2016).

    .. math:: \sum_n s_n \log \frac{1}{K} \sum_k w_{kn},
        \quad w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} | x_n)}

    The loss is its negative. The scale s of a datum (of a subsampled plate, or of
    pyro.poutine.scale) stands outside the logarithm: inside, the sum would not bound
    log p(x) any more. It is the model's; what the guide says of scales is not needed. A
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
    refuse what the two cannot do: a point made of other draws and of parameters
    (AutoStructured), and for "dreg" latents of different scales.

    Args:
        num_particles: K, at least 1.
        estimator: of the gradient by the guide's parameters: "pathwise", "stl" or "dreg".
        vectorize_particles: as in :class:`pyro_vae.ELBO`.
        data_plate: as in :func:`pyro_vae.log_weights`; False for one weight of all the data.

    Raises:
        DataPlateError: where the data plate cannot be told.
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
        estimator: str = "pathwise",
        *,
        vectorize_particles: bool = True,
        data_plate: str | bool | None = None,
    ) -> None:
        if estimator not in ("pathwise", "stl", "dreg"):
            raise ValueError(f"estimator={estimator!r}: 'pathwise', 'stl' or 'dreg' is needed")
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, data_plate=data_plate
        )
        self.estimator = estimator
        # The score of a draw that all particles share has another weight than theirs.
        self._share_globals = estimator == "pathwise"

    def __repr__(self) -> str:
        return f"IWAE(num_particles={self.num_particles}, estimator={self.estimator!r})"

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss, a scalar to differentiate: the negative bound in nats."""
        through_draws = self.estimator != "pathwise" and torch.is_grad_enabled()
        draws = "gated" if through_draws else "attached"
        run = self._run(model, guide, args, kwargs, draws=draws, one_minibatch=True)
        for name, nodes in run.guide_nodes():
            if not nodes[0]["fn"].has_rsample:
                raise not_reparameterized(name, nodes[0])
        scale, ratios, ratio = _scales(run)
        terms = (
            run.stopped_guide_terms(scaled=False, apart=ratio is None)
            if through_draws
            else run.guide_terms()
        )
        log_joint, log_guide = _weighted(run, terms, ratios, ratio)
        log_weights = log_joint - log_guide
        _check_edges(run, log_joint)
        bound = (scale * iwae_bound(log_weights)).sum()
        if run.layout.shares_globals:
            bound = bound - _kl_of_globals(run)
        if self.estimator == "dreg" and through_draws:
            shares = torch.softmax(log_weights.detach(), 0)
            if ratio is None:
                raise ValueError(
                    "estimator='dreg' needs one scale for all latent sites of a datum; use "
                    "'pathwise'"
                )
            # The score of log q^ratio, doubly reparameterized, takes ratio * share * (1 - share)
            # of a path from its share.
            run.scale_gradients(1 - ratio + ratio * shares)
            # A draw of no density has no share.
            weighed = torch.where(shares > 0, log_weights, 0.0)
            bound = bound.detach() + without_value((scale * shares * weighed).sum())
        return self._checked(run, -bound)


def _check_edges(run: Run, log_joint: Tensor) -> None:
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


class WakeSleep(_Importance):
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
        num_particles: K, at least 2, for a single weight is always 1.
        insomnia: the share of wake-phi; the rest is sleep-phi, which teaches an encoder
            and is refused for a LocalGuide, whose rows belong to the data.
        dream: where the batch is not just the observed values: from a mapping (observed
            site to dreamt value) to the batch that holds them. By default each observed
            value is found among the batch's tensors.
        vectorize_particles: as in :class:`pyro_vae.ELBO`.
        data_plate: as in :func:`pyro_vae.log_weights`; False for one weight of all the data.

    Raises:
        DataPlateError: where the data plate cannot be told.
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
        dream: Callable[[Mapping[str, Tensor]], Any] | None = None,
        vectorize_particles: bool = True,
        data_plate: str | bool | None = None,
    ) -> None:
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia={insomnia}: a share of wake-phi from 0 to 1 is needed")
        num_particles = as_count("num_particles", num_particles)
        if num_particles < 2 and insomnia > 0:
            raise ValueError(
                f"num_particles={num_particles}: wake-phi needs at least 2, for the normalized "
                "weight of a single draw is always 1"
            )
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, data_plate=data_plate
        )
        self.insomnia = insomnia
        self.dream = dream
        # Which argument an observed site is, as long as its layout is remembered.
        self._sources = weakref.WeakKeyDictionary[Layout, dict[str, int | str]]()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_sources"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _sources=weakref.WeakKeyDictionary())

    def __repr__(self) -> str:
        return f"WakeSleep(num_particles={self.num_particles}, insomnia={self.insomnia})"

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss, a scalar to differentiate: the negative bound in nats."""
        run = self._run(model, guide, args, kwargs, draws="detached", one_minibatch=True)
        scale, *ratios = _scales(run)
        log_joint, log_guide = _weighted(run, run.guide_terms(), *ratios)
        log_weights = log_joint - log_guide.detach()
        bound = (scale * iwae_bound(log_weights)).sum()
        self._checked(run, -bound)
        if not torch.is_grad_enabled():
            return -bound
        if self.insomnia > 0:
            shares = torch.softmax(log_weights.detach(), 0)
            wake = (scale * shares * log_guide).sum()
            bound = bound + self.insomnia * without_value(wake)
        if self.insomnia < 1:
            asleep = (scale * self._sleep(run, model, guide, args, kwargs)).sum()
            bound = bound + (1 - self.insomnia) * without_value(asleep)
        return -bound

    def _sleep(
        self, run: Run, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Tensor:
        """Return log q(z | x) of a dream for each datum, [N]."""
        layout = run.layout
        if isinstance(unwrapped(guide), LocalGuide):
            raise ValueError(
                "a sleep phase teaches an encoder what the model dreams; the rows of a LocalGuide "
                "belong to the data, and would learn the prior. Use insomnia=1"
            )
        if layout.draws_minibatch:
            raise ValueError(
                "a sleep phase needs the minibatch as the batch; the model draws its own "
                "(subsample_size=...). Pass pyro.plate(name, num_data, subsample=x), or insomnia=1"
            )
        with torch.no_grad():
            dreamt = dream(
                model, args, kwargs, summed_out=layout.summed_out, nesting=layout.nesting
            )
        values = {name: node["value"] for name, node in latent_nodes(dreamt)}
        observed = {name: values.pop(name) for name, _ in run.observed_nodes() if name in values}
        if self.dream is not None:
            batch = as_batch(self.dream(observed))
            args, kwargs = batch.args, batch.kwargs
        else:
            args, kwargs = self._with(run, observed, args, kwargs)
        guide_trace = trace_given(guide, values, args, kwargs)
        mask_proposals(dreamt, guide_trace)
        total: Tensor | float = 0.0
        for name, node in latent_nodes(guide_trace):
            _require_density(name, node)
            log_prob = site_log_prob(name, node, scaled=False)
            total = total + per_datum(log_prob, layout.nesting, layout.data_dim, leading=0)
        return torch.as_tensor(total)

    def _with(
        self, run: Run, observed: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with dreamt values in the place of the observed ones."""
        if run.layout not in self._sources:
            self._sources[run.layout] = _sources(run, observed)
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, key in self._sources[run.layout].items():
            holder: Any = new_args if isinstance(key, int) else new_kwargs
            holder[key] = observed[name].reshape(holder[key].shape).to(holder[key])
        return tuple(new_args), new_kwargs


def _sources(run: Run, observed: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Return which argument of the batch each observed site's value is."""
    found: dict[str, int | str] = {}
    arguments = {
        key: value
        for key, value in (*enumerate(run.args), *run.kwargs.items())
        if isinstance(value, Tensor)
    }
    for name, nodes in run.observed_nodes():
        if name not in observed:
            continue  # a factor: it is not drawn
        value = nodes[0]["value"]
        # The argument itself, or a view of it; else whatever is equal, if nothing else is.
        keys = [key for key, argument in arguments.items() if _is_view(value, argument)] or [
            key
            for key, argument in arguments.items()
            if argument.numel() == value.numel()
            and torch.equal(argument.reshape(value.shape).to(value), value)
        ]
        if len(keys) != 1 or keys[0] in found.values():
            raise ValueError(
                f"the sleep phase cannot tell which argument of the batch holds the values of the "
                f"observed site {name!r} (candidates: {keys}); give dream=, a function from "
                "{site: dreamt value} to a batch, or insomnia=1"
            )
        found[name] = keys[0]
    return found


def _is_view(value: Tensor, argument: Tensor) -> bool:
    return value is argument or (
        value.data_ptr() == argument.data_ptr() and value.numel() == argument.numel()
    )


def _require_density(name: str, node: Any) -> None:
    if node["infer"].get("is_auxiliary") or is_point(node["fn"]):
        raise ValueError(
            f"the sleep phase needs the guide's density of given latents, which its site {name!r} "
            "hides (an auxiliary site, or a Delta); use insomnia=1, or a guide of pyro_vae"
        )


# A scale in two parts: that of plates and poutine.scale, and the factor of a KL warm-up, a tensor
# whose number is not to be read.
_Parts = tuple[Any, Tensor | None]


def _scales(run: Run) -> tuple[Any, dict[str, _Parts], Any]:
    """Return the scale of each datum, the ratio to it of each site's, and the latents' ratio.

    The scale of a datum, [N] or a number, is that of its likelihood. The ratio of the latents is
    None where it is not one for all.
    """
    shared = _shared(run)
    parts = {
        name: _scale_parts(run, name, nodes[0])
        for name, nodes in run.model_nodes()
        if name not in shared
    }
    observed = [parts[name] for name, _ in run.observed_nodes()]
    # Observed sites of different scales are tempered: what is left is what a datum counts for.
    alike = bool(observed) and all(_same_parts(s, observed[0]) for s in observed)
    scale = observed[0][0] if alike else run.plate_scale
    ratios = {
        name: (1.0 if same_scale(s, scale) else s / scale, factor)
        for name, (s, factor) in parts.items()
    }
    latent = [ratios[name] for name, _ in run.latent_nodes() if name not in shared]
    alike = not latent or all(_same_parts(r, latent[0]) for r in latent)
    return scale, ratios, None if not alike else _product(latent[0]) if latent else 1.0


def _weighted(
    run: Run, guide_terms: Mapping[str, Tensor], ratios: Mapping[str, _Parts], common: Any
) -> tuple[Tensor, Tensor]:
    """Return log p(x, z) and log q(z | x) of each datum, [K, N].

    A site of another scale than the datum's enters with the ratio of the two.
    """
    shared = _shared(run)
    log_joint = _sum(
        _times(_product(ratios[name]), term)
        for name, term in run.model_terms(scaled=False, skip=shared)
    )

    def ratio(name: str) -> Any:
        if name in ratios:
            return _product(ratios[name])
        if common is None:
            raise ValueError(
                f"the guide's auxiliary site {name!r} stands for latent sites of different "
                "scales; give them one scale"
            )
        return common

    proposed = [
        _times(ratio(name), term) for name, term in guide_terms.items() if name not in shared
    ]
    # Nothing is proposed where every latent is summed out.
    return log_joint, _sum(proposed) if proposed else torch.zeros_like(log_joint)


def _shared(run: Run) -> set[str]:
    """Return the latent sites of which all particles see one draw."""
    return set(_globals(run)) if run.layout.shares_globals else set()


def _scale_parts(run: Run, name: str, node: Any) -> _Parts:
    scale, factor = scale_parts(node)
    return run.datum_scale(name, {**node, "scale": scale}), factor


def _same_parts(a: _Parts, b: _Parts) -> bool:
    return a[1] is b[1] and same_scale(a[0], b[0])


def _product(parts: _Parts) -> Any:
    scale, factor = parts
    return scale if factor is None else scale * factor


def _times(ratio: Any, term: Tensor) -> Tensor:
    return term if isinstance(ratio, float) and ratio == 1.0 else ratio * term


def _globals(run: Run) -> list[str]:
    """Return the latent sites of model and guide outside the data plate."""
    nodes = {name: found[0] for name, found in (*run.guide_nodes(), *run.latent_nodes())}
    return [name for name, node in nodes.items() if not run.is_local(name, node)]


def _kl_of_globals(run: Run) -> Tensor:
    """Return log q - log p of the one draw of the global latents, scaled."""
    latents = dict(run.latent_nodes())
    terms = [
        sign * run.log_prob(name, found[name], scaled=True)[0].sum()
        for sign, found in ((1.0, dict(run.guide_nodes())), (-1.0, latents))
        for name in _globals(run)
        if name in found
    ]
    return torch.stack(terms).sum()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)
