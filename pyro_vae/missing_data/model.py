"""MissingData: the observed part of any model, which must not decide by what is missing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.missing_data.encoder import (
    Arguments,
    Key,
    arguments_of,
    as_called,
    coded_by_nan,
    floating,
)
from pyro_vae.programs.batch import Batch, rows_text
from pyro_vae.programs.batch import arguments as as_batch_of
from pyro_vae.programs.messages import text_of, trace_of
from pyro_vae.programs.nodes import left_out, plain_distribution, sample_nodes
from pyro_vae.programs.pyro_internals import is_deterministic, mask_inside
from pyro_vae.programs.state import evaluation, module_of, preserved_rng
from pyro_vae.programs.supports import value_of
from pyro_vae.programs.traces import site_log_prob
from pyro_vae.programs.types import Node, Program, Trace, Values
from pyro_vae.recording import is_recording

_PATTERNS = 8  # of missing values that a model is looked at with, at most
# Fills between a column's least and largest number: with so few codes, each has its turn.
_STEPS = 8


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
        self.mask, self.values = mask, values
        self._patterns = set[Hashable]()  # of missing values, for which the model was looked at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the observed part of a batch."""
        arguments = arguments_of(args, kwargs)
        if self.mask is not None:
            _, arguments = coded_by_nan(arguments, self.mask, self.values)
            args, kwargs = as_called(arguments)
        try:
            with _LeaveMissingOut() as handler:
                result = self.model(*args, **kwargs)
            if not handler.wraps_another:
                self._check(arguments)
            return result
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            if isinstance(error, _RefusedError) or not any(map(_has_nan, arguments.values())):
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
        if not (pattern := _pattern_of(arguments)) or pattern in self._patterns:
            return
        self._patterns.add(pattern)
        device = Batch(*as_called(arguments)).device
        with torch.no_grad(), preserved_rng(device), evaluation(self, self.owner):
            try:
                with pyro.validation_enabled(False), poutine.block():
                    _check_decisions(self.model, arguments)
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
        value, infer = msg["value"], msg["infer"]
        self.wraps_another |= "_missing" in infer
        if not msg["is_observed"] or not isinstance(value, Tensor) or isinstance(msg["fn"], Unit):
            return
        if not value.is_floating_point() or infer.get("_deterministic") or "_missing" in infer:
            return
        unknown = (self.absent or {}).get(msg["name"], value.isnan())
        # What the model masks is not there, and so not missing: padding, or a value for which
        # another site stands (obs_mask).
        missing = unknown & ~left_out(msg["fn"], msg["mask"], value.device)
        msg["fn"] = _masked(msg["fn"], ~unknown, msg["name"])
        msg["infer"] = {**infer, "_unknown": unknown, "_missing": missing, "_given": value}
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

    They are ``[*batch, *event]``, or what broadcasts with it.
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
            f"a {type(fn).__name__} is not a product over its event: no part can be left out. Mark "
            "the event as missing, or write the likelihood as a product (Normal(...).to_event(1))"
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


def _pattern_of(arguments: Arguments) -> tuple[Hashable, ...]:
    """Return which columns of which arguments have missing values; () for none."""
    found = []
    for name, each in arguments.items():
        if (value := floating(each)) is not None:
            columns = value.isnan().reshape(len(value), -1).any(0)
            if bool(columns.any()):
                found.append((name, value.shape[1:], columns.cpu().numpy().tobytes()))
    return tuple(found)


def _check_decisions(model: Program, arguments: Arguments) -> None:
    """Raise ValueError where the density of what was seen varies with what was not.

    A comparison with NaN is False, and an index made of NaN is some number: a model that goes on
    with them scores a value that was never observed. With numbers in the missing places, small and
    large ones, what was seen must have the density that it has with NaN there.
    """
    # Outside of the handler, a trace takes what stands in for a missing value.
    coded = trace_of(_LeaveMissingOut()(model), as_batch_of(*as_called(arguments)))
    nodes = _scored(coded)
    absent = {n: left_out(v["fn"], v["mask"], v["value"].device) for n, v in nodes.items()}
    replayed = poutine.replay(_LeaveMissingOut(absent)(model), trace=coded)
    found: dict[str, list[Tensor]] = {}
    for filled in _filled(arguments):
        try:
            others = _scored(trace_of(replayed, as_batch_of(*as_called(filled))))
            terms = _terms({name: node for name, node in others.items() if name in coded.nodes})
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue  # a number that the model cannot take says nothing
        for name, term in terms.items():
            found.setdefault(name, []).append(term)
    for name, wanted in _terms(nodes).items():
        node = nodes[name]
        seen = _seen(absent[name], node["fn"].event_dim)
        gaps = [_gap(term, wanted, seen) for term in found.get(name, [wanted])]
        if isinstance(node["fn"], Unit) and min(gaps) > 0:
            continue  # a factor of a model's own for NaN, like no number's
        if max(gaps) > 0:
            kind = "observed" if node["is_observed"] else "latent"
            raise ValueError(
                f"{kind} site {name!r}: its log density of what was seen changes by "
                f"{max(gaps):.3g} nats with the numbers that stand where values are missing: the "
                "model decides by a missing value (NaN > 0 is False), or fills it in. Let what is "
                "made of it be missing too, torch.where(x.isnan(), x, (x > 0).to(x)) for one; mask "
                "the site there (poutine.mask); or give the value a distribution as a latent site"
            )


def _scored(trace: Trace) -> dict[str, Node]:
    tensors = ((n, node) for n, node in sample_nodes(trace) if isinstance(node["value"], Tensor))
    return {name: node for name, node in tensors if not is_deterministic(node)}


def _terms(nodes: dict[str, Node]) -> dict[str, Tensor]:
    return {name: site_log_prob(name, node) for name, node in nodes.items()}


def _seen(absent: Tensor, events: int) -> Tensor:
    """Return which entries of a batch have a number that was seen."""
    if events and absent.flatten(-events).shape[-1] == 0:  # a factor has no value
        return absent.new_ones(absent.shape[:-events])
    return ~(absent.flatten(-events).all(-1) if events else absent)


def _gap(term: Tensor, wanted: Tensor, seen: Tensor) -> float:
    """Return by how much a log density differs beyond rounding; 0 where it does not."""
    term, wanted, seen = torch.broadcast_tensors(term, wanted, seen)
    tolerance = 1e-9 if wanted.dtype == torch.float64 else 1e-5
    close = torch.isclose(term, wanted, rtol=tolerance, atol=tolerance)
    wrong = seen & ~(close | term.isnan() | wanted.isnan())  # NaN is another error's
    return float((term - wanted)[wrong].abs().max()) if bool(wrong.any()) else 0.0


def _filled(arguments: Arguments) -> Iterator[Arguments]:
    """Yield arguments with numbers where one is NaN: those of the data, and beyond.

    Numbers between the extremes too: a model may ask for an interval, or for one code of several.
    """
    inner = ((step / _STEPS, 0.0) for step in range(1, _STEPS))
    for share, beyond in ((0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (1.0, 1.0), *inner):
        yield {key: _fill(value, share, beyond) for key, value in arguments.items()}


def _fill(value: Any, share: float, beyond: float) -> Any:
    """Return an argument with a number in place of NaN.

    The one that a share of the column's numbers lie below, or one beyond all of them.
    """
    x = floating(value)
    if x is None:
        return value
    whole = x[~x.isnan()]
    if whole.numel() == 0:
        return x.masked_fill(x.isnan(), share + beyond)
    column, extreme = _seen_value(x, share), whole.min() if share == 0 else whole.max()
    column = torch.where(column.isnan(), extreme, column)
    return torch.where(x.isnan(), column + beyond * (1 + whole.max() - whole.min()), x)


def _seen_value(value: Tensor, share: float) -> Tensor:
    """Return a number of each column, with this share of the column's others below; NaN for none.

    The share of different numbers: each of a few codes has its turn, however rare.
    """
    ordered = value.sort(0).values  # NaN come last
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    ranks = (starts & ~ordered.isnan()).cumsum(0)
    wanted = 1 + (share * (ranks[-1:] - 1)).round()
    return ordered.gather(0, (ranks < wanted).sum(0, keepdim=True).clamp(max=len(value) - 1))[0]
