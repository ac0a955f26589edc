"""The exact posterior of a model's discrete latents, as a guide."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.guides.base import hidden_plates
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.enumeration import Conditional, conditionals, enumerated, marginals
from pyro_vae.programs.handlers import Registered
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.nodes import plain_distribution, sample_nodes
from pyro_vae.programs.on_demand import example_of
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import evaluation
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.traces import site_log_prob
from pyro_vae.programs.types import DataPlate, Distribution, Program, Trace

_FAMILIES = (dist.Categorical, dist.Bernoulli, dist.OneHotCategorical)
_T = TypeVar("_T")


class ExactGuide(Registered):
    r"""A guide that proposes discrete latents from their exact posterior.

    .. math:: q(c_1, \dots, c_J | x) = \prod_j p_\theta(c_j | c_1, \dots, c_{j-1}, x)

    The E-step of expectation-maximization (Dempster, Laird & Rubin 1977). All values of
    the sites are summed over, under the model's parameters as they are at each call; so
    every log weight equals log p(x), and the ELBO too. It has no parameters, and no
    gradient passes through it: that of the ELBO by the model's is then log p(x)'s
    (Fisher's identity).

    Sites are proposed outer plates first, then in the model's order, marked for parallel
    enumeration (``infer={"enumerate": "parallel"}``): pyro.infer.TraceEnum_ELBO sums over
    them, elsewhere they are drawn. The model runs in eval mode, unseen by handlers around.

    Args:
        model: a Pyro model whose latents are Categorical, Bernoulli or OneHotCategorical.
        example: a batch (tensor, tuple or mapping) to read shapes from; a few rows do.
        data_plate: the name of the plate of the data, where it is not plain; False to
            treat the whole batch as one datum.

    Raises:
        DataPlateError: where no plate is plainly that of the data.
        ValueError: for latents that are not of these families, that lie outside the data
            plate, or whose posterior is not a product over plates.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> means = torch.tensor([-1.0, 1.0])
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         c = pyro.sample("c", dist.Categorical(torch.ones(2)))
        ...         pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)
        >>> x = torch.tensor([0.0, 3.0])
        >>> guide = pv.ExactGuide(model, example=x)
        >>> guide.posterior(x)["c"]
        tensor([[0.5000, 0.5000],
                [0.0025, 0.9975]])
    """

    def __init__(self, model: Program, *, example: Any, data_plate: DataPlate = None) -> None:
        super().__init__()
        # In a tuple: a module of its own would make the model's parameters the guide's.
        self._model = (model,)
        batch = example_of(example)
        structure = ModelLooks(model, batch).structure(data_plate, strict=True)
        _check(structure)
        self._nesting = structure.nesting
        latents = (*structure.local_latents, *structure.global_latents)
        self._names = tuple(site.name for site in latents)
        self._frozen: tuple[Batch, tuple[Conditional, ...]] | None = None
        self._enumerated(batch, conditionals)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample each latent site from its posterior; return values by name. The Pyro guide."""
        chain = self._current(Batch(args, kwargs))
        plates = hidden_plates(frame for conditional in chain for frame in conditional.frames)
        values: dict[str, Tensor] = {}
        indices: dict[str, Tensor] = {}
        for conditional in chain:
            proposal = _proposal(conditional, indices)
            with contextlib.ExitStack() as stack:
                for frame in conditional.frames:
                    stack.enter_context(plates[frame.name])
                stack.enter_context(poutine.scale(scale=conditional.node["scale"]))
                if (mask := conditional.node["mask"]) is not None:
                    stack.enter_context(poutine.mask(mask=mask))
                value = pyro.sample(conditional.name, proposal, infer={"enumerate": "parallel"})
            values[conditional.name] = value
            indices[conditional.name] = value.argmax(-1) if proposal.event_dim else value
        return values

    def posterior(self, *batch: Any) -> dict[str, Tensor]:
        """Return the posterior probability of every value of every site.

        Under the model's current parameters; the responsibilities of a mixture.

        Args:
            *batch: the model's arguments.

        Returns:
            Site name to probabilities, ``[*batch shape, values]``: each site's own marginals.
        """
        return self._enumerated(as_batch(*batch), marginals)

    @contextlib.contextmanager
    def frozen(self, *batch: Any, **keywords: Any) -> Iterator[None]:
        """Keep the posterior of a batch as it is now, while the model's parameters change.

        The E-step: inside the context, losses on this batch are the M-step's.

        Args:
            *batch: the model's arguments; inside the context the guide takes no others.
            **keywords: those by keyword.
        """
        before, arguments = self._frozen, as_batch(*batch) if batch else as_batch(keywords)
        self._frozen = arguments, self._enumerated(arguments, conditionals)
        try:
            yield
        finally:
            self._frozen = before

    def _current(self, batch: Batch) -> tuple[Conditional, ...]:
        if self._frozen is None:
            return self._enumerated(batch, conditionals)
        frozen, chain = self._frozen
        if not _same(frozen, batch):
            raise ValueError(
                f"the guide's posterior is frozen for {frozen}, and was called with other data "
                f"({batch}); leave guide.frozen(...), or freeze this batch"
            )
        return chain

    def _enumerated(
        self, batch: Batch, reduce: Callable[[Trace, dict[str, Tensor], int], _T]
    ) -> _T:
        """Return what is made of the model's trace, all values of its latents at once."""
        model = enumerated(self._model[0], self._names, -1 - self._nesting)
        with torch.no_grad(), evaluation(self._model[0]), poutine.block():
            trace = trace_of(model, batch)
            terms = {n: site_log_prob(n, node) for n, node in sample_nodes(trace)}
            return reduce(trace, terms, self._nesting)


def _check(structure: Structure) -> None:
    """Raise ValueError for latents that the guide cannot propose."""
    structure.require_no_globals()
    for site in (*structure.local_latents, *structure.global_latents):
        if not site.enumerable:
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}) has no finitely many values, as "
                f"sites of an ExactGuide have. Let a guide propose {site.name!r} alone "
                "(pyro_vae.AmortizedGuide, pyro_vae.LocalGuide): discrete sites are then summed out"
            )
        if not isinstance(plain_distribution(site.fn), _FAMILIES):
            raise ValueError(
                f"latent site {site.name!r} is {site.distribution}: an ExactGuide proposes "
                f"{', '.join(family.__name__ for family in _FAMILIES)} sites. Write it as a "
                "Categorical, or leave it out of a guide of your own: it is then summed out"
            )
        if drawn := [plate.name for plate in site.plates if plate.drawn]:
            raise ValueError(
                f"the model draws its own minibatch in plate {drawn[0]!r}, which the guide cannot "
                "know. Pass it as the batch, with pyro.plate(name, num_data, subsample=x)"
            )


def _proposal(conditional: Conditional, indices: dict[str, Tensor]) -> Distribution:
    logits = conditional.given(indices)
    family = plain_distribution(conditional.node["fn"])
    if isinstance(family, dist.Bernoulli):
        # Finite where one value is impossible: so is the density of the other then.
        return dist.Bernoulli(logits=torch.nan_to_num(logits[..., 1] - logits[..., 0]))
    one_hot = isinstance(family, dist.OneHotCategorical)
    return (dist.OneHotCategorical if one_hot else dist.Categorical)(logits=logits)


def _same(one: Batch, other: Batch) -> bool:
    first, second = ({**dict(enumerate(b.args)), **b.kwargs} for b in (one, other))
    return first.keys() == second.keys() and all(
        a is (b := second[key])
        or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
        for key, a in first.items()
    )
