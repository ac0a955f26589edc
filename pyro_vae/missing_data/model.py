"""Missing data: the observed part of any model, and an encoder that sees what is missing."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.missing_data.arguments import Arguments, Key
from pyro_vae.missing_data.check import Pattern, check_decisions, pattern_of
from pyro_vae.programs.batch import Batch, rows_text
from pyro_vae.programs.batch import arguments as as_called
from pyro_vae.programs.messages import text_of, trace_of
from pyro_vae.programs.nodes import left_out, plain_distribution
from pyro_vae.programs.pyro_internals import mask_inside
from pyro_vae.programs.state import evaluation, module_of, preserved_rng
from pyro_vae.programs.supports import value_of
from pyro_vae.programs.types import Node, Program, Trace, Values
from pyro_vae.recording import is_recording

__all__ = ["MissingData"]

_PATTERNS = 8  # of missing values that a model is looked at with, at most


class MissingData(nn.Module):
    r"""A model of the observed part of its data: NaN in an observed value is a missing value.

    .. math:: p(x_\mathrm{seen}, z) = p(z) \prod_{d\ \mathrm{seen}} p(x_d | z)

    The model stays as it is. What is missing is left out of the likelihood, number by number where
    the likelihood is a product over them (``Normal(...).to_event(1)``); of a joint one
    (MultivariateNormal, Multinomial, Dirichlet) only a whole event can be left out. So every
    loss and bound is that of the smaller model without these numbers, and needs the values to be
    missing at random: whether a value is missing may depend on what is seen, not on itself
    (Rubin 1976).

    Wherever else the model uses a missing value (as a covariate, or as the parent of another
    site) it is NaN, and that is an error.

    Args:
        model: a Pyro model: a function, an nn.Module, or a method of one.
        mask: the name of an argument that says what is seen: a boolean tensor of the data's
            shape. It is the argument of that keyword, or else the last positional one, and is
            not passed on. Where it is False the value counts as missing, whatever number is there;
            integer data, which have no NaN, become floating-point numbers. None where NaN says it.
        values: which argument ``mask`` speaks of, by position or keyword; needed where several
            have its shape.

    Raises:
        TypeError: for a mask that is not a boolean tensor.
        ValueError: for ``values`` without ``mask``; for a mask that has the shape of no
            argument, or of several; where a part of a joint event is missing; and where a
            missing value is more than the value of an observed site.

    References:
        Rubin (1976). Inference and missing data. Biometrika 63(3).
        Mattei & Frellsen (2019). MIWAE: deep generative modelling and imputation of incomplete
        data sets. ICML.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         likelihood = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0)
        ...         pyro.sample("x", likelihood.to_event(1), obs=x)
        >>> def posterior(x):
        ...     seen = (~x.isnan()).sum(-1)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x.nansum(-1) / (1 + seen), (1 + seen) ** -0.5))
        >>> x = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]])
        >>> pv.elbo(pv.MissingData(model), posterior, x, num_particles=5).value.round(decimals=4)
        tensor([-1.5155,  0.0000], dtype=torch.float64)
    """

    takes_missing = True

    def __init__(
        self, model: Program, *, mask: str | None = None, values: Key | None = None
    ) -> None:
        super().__init__()
        if mask is None and values is not None:
            raise ValueError(f"values={values!r} says what the mask is of: give mask= as well")
        self.model = model
        owner = module_of(model)  # of a method: its parameters are the model's
        self.owner = None if owner is model else owner
        self.mask = mask
        self.values = values
        self._patterns: set[Pattern] = set()  # of missing values, for which the model was looked at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the observed part of a batch."""
        arguments = Arguments(args, kwargs)
        if self.mask is not None:
            _, arguments = arguments.coded_by_nan(self.mask, self.values)
        try:
            with _LeaveMissingOut() as handler:
                result = self.model(*arguments.args, **arguments.kwargs)
            if not handler.wraps_another:
                self._check(arguments)
            return result
        except _RefusedError:
            raise
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            if not any(_has_nan(value) for _, value in arguments.items()):
                raise
            # Not a note: Pyro's trace makes an exception of its own, of this type and text.
            raise type(error)(
                f"{text_of(error)}\nThe batch has missing values (NaN), which may only be values "
                "of observed sites: as a covariate, or as what another site depends on, a value "
                "must be there. Impute it first, or give it a distribution as a latent site"
            ) from error

    def _check(self, arguments: Arguments) -> None:
        """Raise ValueError where the model decides by a missing value; looked at a few times.

        After a run, which has given parameters their first values, and unseen from outside.
        """
        if is_recording() or len(self._patterns) >= _PATTERNS:
            return
        pattern = pattern_of(arguments)
        if not pattern or pattern in self._patterns:
            return
        self._patterns.add(pattern)
        first: list[Any] = []  # traces, as Pyro makes them

        def run(arguments: Arguments, absent: Values | None) -> Trace:
            # Outside of it, the trace takes what stands in for a missing value.
            model: Program = _LeaveMissingOut(absent)(self.model)
            if first:
                model = poutine.replay(model, trace=first[0])
            trace: Trace = trace_of(model, as_called(arguments.args, arguments.kwargs))
            first.append(trace)
            return trace

        with (
            torch.no_grad(),
            preserved_rng(Batch(arguments.args, arguments.kwargs).device),
            evaluation(self, self.owner),
            pyro.validation_enabled(False),
            poutine.block(),
        ):
            try:
                check_decisions(run, arguments)
            except ValueError as error:
                raise _RefusedError(str(error)) from error


class _RefusedError(ValueError):
    """A missing value that cannot be left out, and why."""


class _LeaveMissingOut(Messenger):
    """Masks what is NaN in observed values, and puts a number of the support in its place.

    The model goes on with NaN, for what depends on the number that stands in would be wrong.

    Args:
        absent: which numbers of each site to leave out instead, for a look at a model that goes
            on with the values it has.
    """

    def __init__(self, absent: Values | None = None) -> None:
        super().__init__()
        self.absent = absent
        self.wraps_another = False  # which has left out what is missing

    def _pyro_sample(self, msg: Node) -> None:
        """Leave missing numbers of an observed value out of its density."""
        value = msg["value"]
        self.wraps_another |= "_missing" in msg["infer"]
        if (
            not msg["is_observed"]
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
            or msg["infer"].get("_deterministic")
            or "_missing" in msg["infer"]
            or isinstance(msg["fn"], Unit)
        ):
            return
        if self.absent is None:
            unknown = value.isnan()
        else:
            unknown = self.absent.get(msg["name"], value.isnan())
        # What the model masks is not there, and so not missing: padding, or a value for which
        # another site stands (obs_mask).
        missing = unknown & ~left_out(msg["fn"], msg["mask"], value.device)
        msg["fn"] = _masked(msg["fn"], ~unknown, msg["name"])
        msg["infer"] = {**msg["infer"], "_unknown": unknown, "_missing": missing, "_given": value}
        msg["value"] = torch.where(unknown, _stand_in(msg["fn"], msg["name"]).to(value), value)

    def _pyro_post_sample(self, msg: Node) -> None:
        """Put NaN back, for what the model makes of the value."""
        # Handlers outside of this one, the trace among them, have taken the value by now.
        if msg["is_observed"] and "_unknown" in msg["infer"]:
            given = msg["infer"].pop("_given", None)
            if self.absent is None:
                given = msg["value"].masked_fill(msg["infer"]["_unknown"], math.nan)
            if given is not None:
                msg["value"] = given


def _masked(fn: Any, seen: Tensor, name: str) -> Any:
    """Return a distribution whose log density is that of the seen numbers of an event.

    Args:
        fn: the distribution.
        seen: [*batch, *event], or what broadcasts with it.
        name: of the site.
    """
    if fn.event_dim == 0:
        return fn.mask(seen)
    if isinstance(fn, Independent):
        return _masked(fn.base_dist, seen, name).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return _masked(fn.base_dist, seen, name).mask(mask_inside(fn))
    if isinstance(fn, ExpandedDistribution):
        return _masked(fn.base_dist, seen, name).expand(fn.batch_shape)
    events = seen.flatten(-fn.event_dim)
    whole = events.all(-1)
    partly = events.any(-1) & ~whole
    if not is_recording() and bool(partly.any()):
        where = rows_text(partly.reshape(len(partly), -1).any(1)) if partly.ndim else "the event"
        raise _RefusedError(
            f"observed site {name!r}: a part of an event is missing in {where}, but the density of "
            f"a {type(fn).__name__} is not a product over its event, so no part can be left out. "
            "Mark the whole event as missing, or write the likelihood as a product "
            "(Normal(...).to_event(1))"
        )
    return fn.mask(whole)


def _stand_in(fn: Any, name: str) -> Tensor:
    """Return a value of the support that broadcasts with those of the distribution."""
    try:
        return value_of(fn)
    except NotImplementedError as error:
        raise _RefusedError(
            f"observed site {name!r}: no value is known inside the support of "
            f"{type(plain_distribution(fn)).__name__}, to stand in for a missing one; leave rows "
            "with missing values out"
        ) from error


def _has_nan(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
