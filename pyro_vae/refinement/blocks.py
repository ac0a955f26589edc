"""The data in blocks: the guide with a row per datum of each, its evaluator, and their graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pyro_vae.compiler.arguments import form_of, rebuilt
from pyro_vae.compiler.recorder import Recorder
from pyro_vae.families.base import Family
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.local import LocalGuide
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.moved import NOISE_SITE
from pyro_vae.programs.processes import processes
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Compile, DataPlate

_PIECES = 4  # of one step, recorded at most
_FLAT = 8.0  # log of how many times wider than the prior a flat density is

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ScoredGuide:
    """A guide with a row per datum of some data, and the evaluator of its draws.

    Attributes:
        evaluator: of n data.
        guide: a table of a family; tables are passed, its own is not looked at.
    """

    evaluator: Evaluator
    guide: LocalGuide

    def shifted(self, table: Tensor, shift: Tensor) -> Tensor:
        """Return rows [n, P] moved by a shift in the family's units, [n, P]."""
        return self.guide.family.shifted(table, self.guide.num_coordinates, shift)

    def log_weights(self, table: Tensor, noise: Tensor, power: Tensor | float = 1.0) -> Tensor:
        """Return log w, [K, n], of draws that rows [n, P] make of noise [K, num_noise].

        With p(x, z) to a power. The gradient sticks the landing (Roeder, Wu & Duvenaud 2017): the
        score of log q has expectation zero, so the density's own dependence on the parameters is
        left out, and only the path counts.
        """
        rows = slice(0, self.evaluator.num_data)
        if self.guide.annealing is not None:
            # Draws that were moved have no score of their own to leave out.
            given = self.guide.annealing.noise_value(noise, self.evaluator.num_data)
            with self.guide.using(table):
                values, log_guide = self.evaluator.draw_from(rows, {NOISE_SITE: given})
            return power * sum(self.evaluator.score_model(rows, values)) - log_guide
        values = self.evaluator.from_single(self.guide.from_noise(table, noise))
        log_likelihood, log_prior = self.evaluator.score_model(rows, values)
        if not self.guide.family.has_density:
            return log_likelihood + log_prior
        with self.guide.using(table.detach()):
            log_guide = self.evaluator.score_guide(rows, values)
        return power * (log_likelihood + log_prior) - log_guide

    def log_joint(self, z: Tensor, prior: Tensor | float = 1.0) -> Tensor:
        """Return ``log p(x | z) + w (log p(z) + log |det dz/du|)``, up to a constant, [K, n].

        Of unconstrained coordinates [K, n, D], with w the weight of the prior. By a nearly flat
        guide, whose log density is minus the log determinant of the map to the supports, with the
        model's masks on it.
        """
        rows = slice(0, self.evaluator.num_data)
        values = self.evaluator.from_single(self.guide.values_of(z))
        log_likelihood, log_prior = self.evaluator.score_model(rows, values)
        with self.guide.using(self.guide.table.detach()):
            return log_likelihood + prior * (log_prior - self.evaluator.score_guide(rows, values))


@dataclass(frozen=True)
class Block:
    """Some of the data, and what is made for them.

    Attributes:
        rows: which they are, by number, [n].
        scored: a guide of the family, scored on them.
        of: the blocks that it is one of.
    """

    rows: Tensor
    scored: ScoredGuide
    of: Blocks

    @property
    def evaluator(self) -> Evaluator:
        """Of these data."""
        return self.scored.evaluator

    @functools.cached_property
    def flat(self) -> ScoredGuide:
        """Independent Gaussians far wider than the prior: a nearly flat density."""
        flat = self.of.score(self.evaluator.pair.looks, len(self.rows), Normal())
        with torch.no_grad():
            flat.guide.table[..., 1] += _FLAT
        return flat

    @property
    def prior_scale(self) -> Tensor:
        """The prior's standard deviations, [D]."""
        return (self.flat.guide.table[0, :, 1].detach() - _FLAT).exp()

    def run(
        self,
        function: Callable[..., Sequence[Tensor]],
        scored: ScoredGuide,
        inputs: Sequence[Tensor],
        calls: int,
        *,
        check: bool,
    ) -> Sequence[Tensor]:
        """Return a function of a scored guide and tensors, by a graph that blocks of a size share.

        The last of the inputs is the one with particles; ``calls`` are to be expected for this
        block, of which ``check`` says the first.
        """
        evaluator = scored.evaluator
        given = (evaluator.given(), list(inputs))
        tensors: list[Tensor] = []
        form = form_of(given, tensors)

        def on_tensors(*tensors: Tensor) -> Sequence[Tensor]:
            block, inputs = rebuilt(given, iter(tensors))
            with evaluator.on(*block) as other:
                return function(replace(scored, evaluator=other), *inputs)

        # What is scored in many pieces would be a graph of as many times the operations.
        pieces = inputs[-1].shape[0] * evaluator.num_data / evaluator.chunk_pairs
        if form is None or (pieces > _PIECES and evaluator.splittable):
            return function(scored, *inputs)
        key = (function.__name__, form)
        return self.of.recorder(key, on_tensors, tensors, calls * len(self.of.current), check=check)


class Blocks:
    """Makes blocks of data, and keeps them: those of all data, and the last ones of fewer.

    Args:
        looks: what is known of the model on all data.
        whole: an evaluator of the model on all data, with any guide; its seed is that of the draws.
        guide: of the family that is refined; in dtype and on the device of its table.
        data_plate: as in :func:`pyro_vae.refine`.
        compile: as in :class:`pyro_vae.CompiledSVI`.

    Attributes:
        family: the variational family.
        size: D, unconstrained coordinates of a datum.
        num_noise: standard normal numbers that a draw of a datum is made of.
        seed: of the draws.
        like: a table; all are of its dtype and on its device.
        recorder: of the functions that are run on blocks.
        current: the blocks that were asked for last.
    """

    def __init__(
        self,
        looks: ModelLooks,
        whole: Evaluator,
        guide: LocalGuide,
        data_plate: DataPlate,
        compile: Compile,
    ) -> None:
        self.family, self.size = guide.family, guide.num_coordinates
        self.num_noise = self.family.num_noise(self.size)
        self.seed, self.like = whole.seed, guide.table
        self.recorder = Recorder("refining", compile)
        self.current: list[Block] = []
        self._looks, self._whole, self._data_plate = looks, whole, data_plate
        self._kept: dict[bool, list[Block]] = {}

    def at(self, rows: Tensor) -> list[Block]:
        """Return some of the data in blocks; all of them where the model does not take fewer."""
        whole = self._whole
        if not whole.splittable:
            rows = torch.arange(whole.num_data, device=rows.device)
        fewer = rows.numel() < whole.num_data
        kept = self._kept.get(fewer)
        if kept is None or not torch.equal(torch.cat([block.rows for block in kept]), rows):
            kept = self._kept[fewer] = []
            for mine in (rows[some] for some in whole.blocks_of(len(rows))):
                looks, size = self._looks, len(mine)
                looks = looks.on(whole.batch.rows(mine)) if size < whole.num_data else looks
                kept.append(Block(mine, self.score(looks, size, self.family), self))
        self.current = kept
        return kept

    def over(self, rows: Tensor, function: Callable[[Block], _T]) -> Iterator[tuple[Tensor, _T]]:
        """Yield what a function returns of each block of some data, and which these are.

        Processes under torchrun take the blocks by turns.
        """
        blocks = self.at(rows) if len(rows) else []
        found = processes().by_turns(function, blocks)
        yield from ((block.rows, result) for block, result in zip(blocks, found, strict=True))

    def score(self, looks: ModelLooks, num_data: int, family: Family) -> ScoredGuide:
        """Return a guide of a family with a row for each datum of a batch, and its evaluator."""
        model, plate = looks.model, self._data_plate
        made = LocalGuide(model, num_data=num_data, example=looks, family=family, data_plate=plate)
        guide = made.to(self.like)
        make = functools.partial(Evaluator, data_plate=plate, seed=self.seed, gradients=True)
        return ScoredGuide(make(model, guide, looks.batch, like=self._whole, looks=looks), guide)


def per_row(numbers: Tensor, table: Tensor) -> Tensor:
    """Return numbers of rows, [n], in a shape that goes with a table's."""
    return numbers.reshape(-1, *[1] * (table.ndim - 1))
