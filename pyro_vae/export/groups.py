"""The groups of ArviZ's container, as arrays, from draws of a block of data."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arviz_versions import DATA_GROUPS
from pyro_vae.export.deterministic import DeterministicSite, DeterministicValues
from pyro_vae.export.draws import Groups, Piece
from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.on_demand import OnDemand
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.sites import Structure, absent, inner_dims, observed_values
from pyro_vae.programs.types import Values

_DRAWN = ("posterior", "posterior_predictive", "prior", "prior_predictive")


class GroupMaker:
    """Makes the groups of blocks of data: what the model says of draws of its latents.

    Args:
        evaluator: of the pair.
        predictive: whether to draw observed sites.

    Attributes:
        deterministic: the model's pyro.deterministic sites, once a block was made.
        coordinates: of continuous latents on a constrained support.
        observed: what is observed; of data that are read on demand, of the last block alone.
    """

    def __init__(self, evaluator: Evaluator, *, predictive: bool) -> None:
        self._evaluator, self._predictive = evaluator, predictive
        self._deterministic: DeterministicValues | None = None
        self.deterministic: list[DeterministicSite] = []
        self.coordinates = list(_constrained(evaluator.structure))
        self._in_parts = isinstance(evaluator.batch, OnDemand)
        self._look_at(evaluator.structure)

    def _look_at(self, structure: Structure) -> None:
        """Note what is observed, and what masks leave out: of all data, or of a block of them."""
        # One dtype for all blocks: NaN, in one of them, is no integer.
        sites, of_part = structure.sites.items(), self._in_parts
        self._absent = {name: absent(site, structure, of_part=of_part) for name, site in sites}
        self.observed = {s.name: observed_values(s, structure) for s in structure.observed}
        _hide(self.observed, self._absent, slice(None), keep_float=False)

    @property
    def shared(self) -> list[str]:
        """The deterministic sites without a value for each datum, though there are several."""
        return [site.name for site in self.deterministic if site.data_axis is None]

    @property
    def names(self) -> list[str]:
        """All sites, deterministic ones too once a block was made."""
        return [*self._evaluator.structure.sites, *(site.name for site in self.deterministic)]

    def __call__(self, pieces: Iterable[Piece]) -> tuple[slice, Groups]:
        """Return the data of a block, and their groups: arrays [S, N, ...].

        Without N where the batch is one datum, or a deterministic site has no value for each.
        """
        rows, found = slice(0, 0), []
        for piece in pieces:
            rows = piece.rows
            if self._deterministic is None:
                self._deterministic = DeterministicValues(self._evaluator, rows, piece.values)
                self.deterministic = list(self._deterministic.sites.values())
            found.append(self._of_piece(piece, self._deterministic))
        if self._in_parts:
            self._look_at(self._evaluator.structure_of(rows))
        return rows, {
            group: {name: torch.cat([each[group][name] for each in found]).numpy() for name in some}
            for group, some in found[0].items()
        }

    def _of_piece(
        self, piece: Piece, deterministic: DeterministicValues
    ) -> dict[str, dict[str, Tensor]]:
        evaluator, rows, values = self._evaluator, piece.rows, piece.values
        sites, seen = evaluator.structure.sites, {s.name for s in evaluator.structure.observed}
        num_draws, key = next(iter(values.values())).shape[0], (rows.start, piece.start)
        latents = evaluator.by_datum({n: v for n, v in values.items() if n in sites})
        terms = evaluator.site_log_prob(rows, values)
        prior = evaluator.predict(
            rows, num_draws, None, (Purpose.EXPORTED_PRIOR, *key), observed=self._predictive
        )
        stats = piece.stats
        if evaluator.structure.data_plate is None:
            stats = {
                name: value[:, 0] if value.ndim > 1 else value for name, value in stats.items()
            }
        groups = {
            "posterior": {**latents, **deterministic(rows, values)},
            "unconstrained_posterior": self._unconstrained(values),
            "log_likelihood": {n: term for n, term in terms.items() if n in seen},
            "log_prior": {n: term for n, term in terms.items() if n not in seen},
            "sample_stats": stats,
            "prior": {n: value for n, value in prior.items() if n not in seen},
        }
        if self._predictive:
            drawn = evaluator.predict(rows, num_draws, values, (Purpose.EXPORTED_PREDICTIVE, *key))
            groups["posterior_predictive"] = {n: v for n, v in drawn.items() if n in seen}
            groups["prior_predictive"] = {n: v for n, v in prior.items() if n in seen}
        return {
            group: {name: value.detach().cpu() for name, value in variables.items()}
            for group, variables in groups.items()
            if variables
        }

    def _unconstrained(self, values: Values) -> dict[str, Tensor]:
        """Return the unconstrained coordinates of latents on a constrained support."""
        single, dim = self._evaluator.single_values(values), self._evaluator.structure.data_dim
        found = {}
        for mine in self.coordinates:
            value = mine.unconstrained(single)
            axis = None if dim is None else value.ndim - len(mine.event) + dim
            found[mine.name] = value if axis is None else value.movedim(axis, 1)
        return found

    def hide_absent(self, rows: slice, groups: Groups) -> None:
        """Write NaN, in place, where masks say that a site has no value: padding, for example."""
        all_here = self._evaluator.structure.data_plate is None or self._in_parts
        here = slice(None) if all_here else rows
        for group in _DRAWN:
            _hide(groups.get(group, {}), self._absent, here)
        of_events = {}
        for mine in self.coordinates:  # of which a simplex has one less than values
            if (where := self._absent[mine.name]) is not None:
                batch = where.ndim - len(self._evaluator.structure.sites[mine.name].event_shape)
                gone = where.any(tuple(range(batch, where.ndim)))
                of_events[mine.name] = gone.reshape(*gone.shape, *[1] * len(mine.event))
        _hide(groups.get("unconstrained_posterior", {}), of_events, here)

    def dims(self, lead: Sequence[str], given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the names of each site's dimensions after chain and draw.

        Those of another shape in the group unconstrained_posterior go by
        ``unconstrained_posterior/<site>``.

        Args:
            lead: that of the datum, or none.
            given: by site, names for those after it.

        Raises:
            ValueError: for given names of no site, or too many or too few of them.
        """
        structure, deterministic = self._evaluator.structure, self.deterministic
        leads = {name: list(lead) for name in structure.sites}
        leads |= {s.name: [] if s.data_axis is None else list(lead) for s in deterministic}
        tails = {name: inner_dims(site, structure) for name, site in structure.sites.items()}
        tails |= {site.name: list(site.dims) for site in deterministic}
        if unknown := set(given) - set(tails):
            raise ValueError(
                f"dims names {sorted(unknown)}, which are not sites of the model: {sorted(tails)}"
            )
        for name, names in given.items():
            if len(names) != len(tails[name]):
                raise ValueError(
                    f"dims[{name!r}]={list(names)}: {len(tails[name])} names are needed, for the "
                    f"dimensions after {', '.join(['chain', 'draw', *leads[name]])}"
                )
            tails[name] = list(names)
        named = {name: leads[name] + tail for name, tail in tails.items()}
        for mine in self.coordinates:
            events = structure.sites[mine.name].event_shape
            if mine.event != tuple(events):
                batch = named[mine.name][: len(named[mine.name]) - len(events)]
                own = [f"{mine.name}_coordinate_{i}" for i in range(len(mine.event))]
                named[f"unconstrained_posterior/{mine.name}"] = batch + own
        return named


def _constrained(structure: Structure) -> Iterator[Coordinates]:
    """Yield the coordinates of continuous latents on a constrained support.

    A site that no one bijection maps from the reals for all data has none.
    """
    plate = structure.data_plate
    for site in structure.global_latents if plate is None else structure.local_latents:
        if not site.enumerable:
            with contextlib.suppress(ValueError):
                mine = Coordinates.of(site, plate, 0)
                if not mine.is_identity:
                    yield mine


def _hide(
    variables: dict[str, np.ndarray],
    nowhere: Mapping[str, np.ndarray | None],
    rows: slice,
    *,
    keep_float: bool = True,
) -> None:
    for name, value in variables.items():
        if (where := nowhere.get(name)) is not None:
            hidden = np.where(where[rows], np.nan, value)
            dtype = np.result_type(value.dtype, np.float32) if keep_float else hidden.dtype
            variables[name] = hidden.astype(dtype)


def joined(blocks: Sequence[Groups], shared: Collection[str]) -> Groups:
    """Join groups of blocks of data, arrays [C, S, N, ...] but for shared ones, which have no N.

    Arrays of groups without draws are [N, ...].
    """

    def of(group: str, name: str) -> np.ndarray:
        parts = [block[group][name] for block in blocks]
        alike = len(parts) == 1 or (group == "posterior" and name in shared)
        return parts[0] if alike else np.concatenate(parts, 0 if group in DATA_GROUPS else 2)

    return {group: {name: of(group, name) for name in some} for group, some in blocks[0].items()}
