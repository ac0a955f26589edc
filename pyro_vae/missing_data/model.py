"""Missing data: the observed part of any model, and an encoder that sees what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.missing_data.check import check_decisions, pattern_of
from pyro_vae.programs.batch import Batch, rows_text
from pyro_vae.programs.nodes import left_out, plain_distribution
from pyro_vae.programs.plain_errors import text_of, trace_of
from pyro_vae.programs.pyro_internals import mask_inside
from pyro_vae.programs.state import evaluation, module_of, preserved_rng
from pyro_vae.programs.supports import value_of
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
        self,
        model: Callable[..., Any],
        *,
        mask: str | None = None,
        values: int | str | None = None,
    ) -> None:
        super().__init__()
        if mask is None and values is not None:
            raise ValueError(f"values={values!r} says what the mask is of: give mask= as well")
        self.model = model
        owner = module_of(model)  # of a method: its parameters are the model's
        self.owner = None if owner is model else owner
        self.mask = mask
        self.values = values
        self._patterns: set[Any] = set()  # of missing values, for which the model was looked at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the observed part of a batch."""
        if self.mask is not None:
            args, kwargs = code_by_nan(args, kwargs, self.mask, self.values)
        try:
            with _LeaveMissingOut() as handler:
                result = self.model(*args, **kwargs)
            if not handler.wraps_another:
                self._check(args, kwargs)
            return result
        except _RefusedError:
            raise
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            if not any(_has_nan(value) for value in (*args, *kwargs.values())):
                raise
            # Not a note: Pyro's trace makes an exception of its own, of this type and text.
            raise type(error)(
                f"{text_of(error)}\nThe batch has missing values (NaN), which may only be values "
                "of observed sites: as a covariate, or as what another site depends on, a value "
                "must be there. Impute it first, or give it a distribution as a latent site"
            ) from error

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError where the model decides by a missing value; looked at a few times.

        After a run, which has given parameters their first values, and unseen from outside.
        """
        if is_recording() or len(self._patterns) >= _PATTERNS:
            return
        pattern = pattern_of(args, kwargs)
        if not pattern or pattern in self._patterns:
            return
        self._patterns.add(pattern)
        device = Batch(args, kwargs).device
        first: list[Any] = []

        def run(args: Any, kwargs: Any, absent: Mapping[str, Tensor] | None) -> Any:
            # Outside of it, the trace takes what stands in for a missing value.
            model: Any = _LeaveMissingOut(absent)(self.model)
            if first:
                model = poutine.replay(model, trace=first[0])
            first.append(trace_of(model, args, kwargs))
            return first[-1]

        with (
            torch.no_grad(),
            preserved_rng(device),
            evaluation(self, self.owner),
            pyro.validation_enabled(False),
            poutine.block(),
        ):
            try:
                check_decisions(run, args, kwargs)
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

    def __init__(self, absent: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.absent = absent
        self.wraps_another = False  # which has left out what is missing

    def _pyro_sample(self, msg: Any) -> None:
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

    def _pyro_post_sample(self, msg: Any) -> None:
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


def code_by_nan(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: str, values: int | str | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the mask out of a batch, and put NaN where it is False."""
    key = masked_argument(args, kwargs, mask, values)
    args, rest, seen = _without_mask(args, kwargs, mask)
    x = argument_of(args, rest, key)
    if not x.is_floating_point():
        exact = x
        x = x.to(torch.get_default_dtype())
        if not is_recording() and bool((x.to(exact.dtype) != exact).any()):
            raise ValueError(
                f"mask={mask!r}: the integers of argument {key!r} have no exact value in "
                f"{x.dtype}, in which missing ones are marked; give them as float64"
            )
    coded = x.masked_fill(~seen, math.nan)
    return with_argument(args, key, coded), with_keyword(rest, key, coded)


def masked_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: str, values: int | str | None
) -> int | str:
    """Return which argument a mask speaks of; raise ValueError where it is not plain."""
    args, kwargs, seen = _without_mask(args, kwargs, mask)
    if values is not None:
        shape = getattr(argument_of(args, kwargs, values), "shape", None)
        if shape != seen.shape:
            raise ValueError(
                f"mask={mask!r} has shape {list(seen.shape)}, but the argument {values!r} that it "
                f"speaks of has {'none' if shape is None else list(shape)}; give a mask of the "
                "data's own shape"
            )
        return values
    named = named_arguments(args, kwargs)
    alike = [
        key
        for key, value in named.items()
        if isinstance(value, Tensor) and value.shape == seen.shape
    ]
    if len(alike) != 1:
        raise ValueError(
            f"mask={mask!r} has shape {list(seen.shape)}, as have the arguments {alike} of "
            f"{list(named)}; say with values= which one it speaks of, and give it that shape"
        )
    return alike[0]


def _without_mask(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: str
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    rest = dict(kwargs)
    if mask in rest:
        seen, where = rest.pop(mask), "that keyword argument"
    elif args:
        *first, seen = args
        args, where = tuple(first), "the last positional argument"
    else:
        raise TypeError(f"mask={mask!r}: there is no such argument among {list(kwargs)}")
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        kind = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
        raise TypeError(f"mask={mask!r}: {where} is no boolean tensor but {kind}")
    return args, rest, seen


def named_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs.items())
    return named


def argument_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str) -> Any:
    named = named_arguments(args, kwargs)
    if key not in named:
        raise ValueError(f"values={key!r}: the batch has the arguments {list(named)}")
    return named[key]


def with_argument(args: tuple[Any, ...], key: int | str, value: Any) -> tuple[Any, ...]:
    return tuple(value if i == key else old for i, old in enumerate(args))


def with_keyword(kwargs: Mapping[str, Any], key: int | str, value: Any) -> dict[str, Any]:
    return {name: value if name == key else old for name, old in kwargs.items()}


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
