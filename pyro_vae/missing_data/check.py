"""Whether a model decides by numbers that are missing: scored with others in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from pyro.distributions import Unit
from torch import Tensor

from pyro_vae.missing_data.arguments import Arguments, Key, floating
from pyro_vae.programs.nodes import left_out, sample_nodes
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.traces import site_log_prob
from pyro_vae.programs.types import Node, Trace, Values

# Fills between a column's least and largest number: with so few codes, each has its turn.
_STEPS = 8

# Returns the trace of the model's run on some arguments: what each observed site leaves out is
# passed after the first run, whose latents the others share.
Run: TypeAlias = Callable[[Arguments, Values | None], Trace]
# Which columns of which arguments have missing values.
Pattern: TypeAlias = tuple[tuple[Key | torch.Size | bytes, ...], ...]


def pattern_of(arguments: Arguments) -> Pattern:
    """Return which columns of which arguments have missing values; () for none."""
    found = []
    for name, each in arguments.items():
        if (value := floating(each)) is not None:
            columns = value.isnan().reshape(len(value), -1).any(0)
            if bool(columns.any()):
                found.append((name, value.shape[1:], columns.cpu().numpy().tobytes()))
    return tuple(found)


def check_decisions(run: Run, arguments: Arguments) -> None:
    """Raise ValueError where the density of what was seen varies with what was not.

    A comparison with NaN is False, and an index made of NaN is some number: a model that goes on
    with them scores a value that was never observed. With numbers in the missing places, small and
    large ones, what was seen must have the density that it has with NaN there.
    """
    coded = run(arguments, None)
    absent = {
        name: left_out(node["fn"], node["mask"], node["value"].device)
        for name, node in _scored(coded)
    }
    found: dict[str, list[Tensor]] = {}
    for others in _filled(arguments):
        try:
            terms = dict(_terms(run(others, absent), coded))
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue  # a number that the model cannot take says nothing
        for name, term in terms.items():
            found.setdefault(name, []).append(term)
    for name, wanted in _terms(coded, coded):
        node = coded.nodes[name]
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


def _scored(trace: Trace) -> Iterator[tuple[str, Node]]:
    for name, node in sample_nodes(trace):
        if not is_deterministic(node) and isinstance(node["value"], Tensor):
            yield name, node


def _terms(trace: Trace, coded: Trace) -> Iterator[tuple[str, Tensor]]:
    for name, node in _scored(trace):
        if name in coded.nodes:
            yield name, site_log_prob(name, node, scaled=False)


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
    inner = [(step / _STEPS, 0.0) for step in range(1, _STEPS)]
    for share, beyond in ((0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (1.0, 1.0), *inner):
        yield arguments.map(functools.partial(_fill, share=share, beyond=beyond))


def _fill(_: Key, value: Any, *, share: float, beyond: float) -> Any:
    """Return an argument with a number in place of NaN.

    The one that a share of the column's numbers lie below, or one beyond all of them.
    """
    x = floating(value)
    if x is None:
        return value
    whole = x[~x.isnan()]
    if whole.numel() == 0:
        return x.masked_fill(x.isnan(), share + beyond)
    column = _seen_value(x, share)
    extreme = whole.min() if share == 0 else whole.max()
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
    first = (ranks < wanted).sum(0, keepdim=True).clamp(max=len(value) - 1)
    return ordered.gather(0, first)[0]
